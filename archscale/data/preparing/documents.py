"""The documents of a recipe: read unit by unit, repaired, hashed; empty and unweighted ones left
out."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from archscale.data.preparing.recipe import Recipe
from archscale.data.preparing.sources import Source
from archscale.data.preparing.sources.fingerprints import LocalFile, stamp
from archscale.data.preparing.sources.units import UNIT_BYTES, Unit
from archscale.data.preparing.trouble import Trouble
from archscale.data.preparing.work import key

# Enough units that many processes end at about the same time, where the corpus is small.
_UNITS = 64
_LEAST_UNIT_BYTES = 1_000_000


class Document(NamedTuple):
    """Text, its UTF-8 length in bytes, and the sha256 of that UTF-8."""

    text: str
    size: int
    digest: bytes

    @property
    def identity(self) -> bytes:
        """16 bytes that two documents share only if they are equal."""
        return self.digest[16:]

    @property
    def share(self) -> float:
        """In [0, 1): decides the split."""
        return _share(self.digest, 0)


def _share(digest: bytes, part: int) -> float:
    """A number in [0, 1) from 53 bits of a content hash: as many as a float holds, or the highest
    would round to 1."""
    return (int.from_bytes(digest[8 * part : 8 * part + 8]) >> 11) / 2**53


@dataclass(frozen=True)
class RecipeUnit:
    """A unit, and all that decides which documents come of it.

    Attributes:
        held_out: it belongs to the recipe's own validation sources.
        files: the local files that it reads, as they were when it was listed.
    """

    source: Source
    unit: Unit
    held_out: bool
    on_error: Literal["stop", "skip"]
    files: tuple[LocalFile, ...]

    @property
    def name(self) -> str:
        return self.unit.name

    @property
    def size(self) -> int | None:
        return self.unit.size

    def key(self, *decides: Any) -> str:
        """The name of what is made from this unit, where `decides` has the rest that decides it."""
        parts = [asdict(part) for part in self.unit.parts]
        source = self.source.model_dump(mode="json")
        files = [(file.name, file.stamp) for file in self.files]
        return key(source, parts, files, self.held_out, self.on_error, *decides)

    def documents(self, trouble: Trouble, dropped: Counter) -> Iterator[Document]:
        """Those that are taken, which depends on the content of each alone.

        `dropped` counts: empty, unweighted (left out by the source's weight); and, though these
        are kept, repaired (half of a surrogate pair, which UTF-8 cannot hold, became U+FFFD).

        Raises:
            DataError: a document cannot be read, or the file changes while it is read.
        """
        for text in self.source.read(self.unit, trouble):
            try:
                encoded = text.encode()
            except UnicodeEncodeError:
                text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
                encoded = text.encode()
                dropped["repaired"] += 1
            digest, size = hashlib.sha256(encoded).digest(), len(encoded)
            # Of a document that fills the memory there is one copy less while it is encoded.
            del encoded
            if not size:
                dropped["empty"] += 1
            elif _share(digest, 1) >= self.source.weight:
                dropped["unweighted"] += 1
            else:
                yield Document(text, size, digest)
            del text  # before the next one is read
        for file in self.files:
            file.refuse_change()


@dataclass(frozen=True)
class UnitJob:
    """What a job on one unit is called, and its size; see `jobs.Job`."""

    unit: RecipeUnit

    @property
    def name(self) -> str:
        return self.unit.name

    @property
    def size(self) -> int | None:
        return self.unit.size


def list_units(recipe: Recipe) -> list[RecipeUnit]:
    """All units, in the order of the sources; those of validation sources first.

    Raises:
        DataError: a pattern that no file matches, or a package that is missing.
    """
    held_out = recipe.validation if isinstance(recipe.validation, list) else []
    sources = [(source, True) for source in held_out]
    sources += [(source, False) for source in recipe.sources]
    units = [(source, unit, held) for source, held in sources for unit in source.units()]
    total = sum(UNIT_BYTES if unit.size is None else unit.size for _, unit, _ in units)
    if total < _UNITS * UNIT_BYTES:
        limit = max(total // _UNITS, _LEAST_UNIT_BYTES)
        units = [(source, unit, held) for source, held in sources for unit in source.units(limit)]
    # Looked at once: what is read, and later recorded, has to be what is named here.
    files = {id(source): _local_files(source) for source, _ in sources}
    return [
        RecipeUnit(source, unit, held, recipe.on_error, _files(unit, files[id(source)]))
        for source, unit, held in units
    ]


def _local_files(source: Source) -> dict[str, LocalFile]:
    """By path."""
    return {str(path): LocalFile(name, str(path), stamp(path)) for name, path in source.files()}


def _files(unit: Unit, files: dict[str, LocalFile]) -> tuple[LocalFile, ...]:
    # A shard of a hub data set can be of any of its files.
    if unit.parts[0].shards is not None:
        return tuple(files.values())
    return tuple(files[part.path] for part in unit.parts if part.path in files)
