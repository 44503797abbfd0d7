"""The units in which sources are read: what one process reads from beginning to end."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

# Enough that starting a unit costs nothing beside reading it; little enough to be read again when
# the process is killed in between.
UNIT_BYTES = 64_000_000


def shown(path: str) -> str:
    """A path as it can be printed on one line: line breaks and bytes that are not UTF-8 escaped."""
    text = path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@dataclass(frozen=True)
class Part:
    """A part of a file or data set, read from beginning to end.

    Attributes:
        path: local path, URL, or name of a hub data set.
        start: first byte, row group or shard.
        stop: the one after the last; None: to the end.
        size: bytes on disk, for progress and estimates; None where unknown.
        measure: what `start` and `stop` count. Parts by bytes begin and end inside of lines: each
            reads the documents that begin in it.
        cut: the file is cut at line ends into several documents.
        mark: the version of what is remote, as its store names it; "" if it does not.
        shards: how many the data set has, of which `start` and `stop` are some.
    """

    path: str
    start: int = 0
    stop: int | None = None
    size: int | None = None
    measure: Literal["bytes", "row groups", "shards"] = "bytes"
    cut: bool = False
    mark: str | None = None
    shards: int | None = None

    @property
    def name(self) -> str:
        if self.start == 0 and self.stop is None:
            return shown(self.path)
        end = "the end" if self.stop is None else f"{self.stop:,}"
        return f"{shown(self.path)} {self.measure} {self.start:,} to {end}"


@dataclass(frozen=True)
class Unit:
    """What one process reads from beginning to end."""

    parts: tuple[Part, ...]

    @property
    def name(self) -> str:
        others = len(self.parts) - 1
        tail = f" and {others} {'file' if others == 1 else 'files'} after it" if others else ""
        return self.parts[0].name + tail

    @property
    def size(self) -> int | None:
        """Bytes on disk; None where that of a part is unknown."""
        sizes = [part.size for part in self.parts if part.size is not None]
        return sum(sizes) if len(sizes) == len(self.parts) else None


def group(parts: Iterable[Part], limit: int) -> list[Unit]:
    """Consecutive parts together while they have at most `limit` bytes; of unknown size, alone."""
    units: list[Unit] = []
    together: list[Part] = []
    size = 0
    for part in parts:
        part_size = limit if part.size is None else part.size
        if together and size + part_size > limit:
            units.append(Unit(tuple(together)))
            together, size = [], 0
        together.append(part)
        size += part_size
    return [*units, Unit(tuple(together))] if together else units


def byte_ranges(path: str, size: int, limit: int, cut: bool = False) -> list[Part]:
    """A file of `size` bytes in parts of `limit` bytes."""
    starts = range(0, size, limit)
    return [
        Part(
            path,
            start,
            None if start == starts[-1] else start + limit,
            min(limit, size - start),
            cut=cut,
        )
        for start in starts
    ] or [Part(path, size=0, cut=cut)]
