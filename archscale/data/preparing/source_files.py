"""The local files that a data set was made from: size, time and sha256 of each, by which a second
`prepare` sees whether any of them changed."""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from archscale.data.preparing.jobs import Report
from archscale.data.preparing.recipe import Recipe
from archscale.data.preparing.sources import hash_file
from archscale.data.preparing.work import WorkDirectory, key
from archscale.errors import DataError
from archscale.files import write_atomically

_TOGETHER = 256  # small files that one job hashes
_TOGETHER_BYTES = 64_000_000


class Stamp(NamedTuple):
    """Size in bytes and time of the last change of a file."""

    size: int
    mtime_ns: int


def stamp(path: str | Path) -> Stamp | None:
    """Of a local file; None where there is none, as for a URL."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return Stamp(status.st_size, status.st_mtime_ns)


@dataclass(frozen=True)
class SourceFile:
    """A file as it was read; `name` does not depend on the machine."""

    name: str
    size: int
    mtime_ns: int
    sha256: str


@dataclass(frozen=True)
class HashFiles:
    """A job: records of some files, as a list in JSON."""

    names: tuple[str, ...]
    paths: tuple[Path, ...]
    stamps: tuple[Stamp, ...]
    result: Path

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def size(self) -> int:
        return sum(each.size for each in self.stamps)

    def run(self, report: Report) -> None:
        records = []
        for name, path, expected in zip(self.names, self.paths, self.stamps):
            sha256 = hash_file(path)
            report(expected.size)
            if stamp(path) != expected:
                remedy = "give the same command again when nothing writes to it"
                raise DataError("the file changed while it was read", str(path), remedy)
            records.append(asdict(SourceFile(name, *expected, sha256)))
        write_atomically(self.result, json.dumps(records))


def local_files(recipe: Recipe) -> list[tuple[str, Path]]:
    """(name, path) of every file that the recipe's sources read, each once."""
    files = (file for source in recipe.all_sources() for file in source.files())
    return list(dict.fromkeys(files))


def hash_jobs(recipe: Recipe, work: WorkDirectory) -> list[HashFiles]:
    """Jobs that make the records of all local files, in order."""
    folder = work.folder("files")
    jobs = []
    for group in _groups(local_files(recipe)):
        names, paths = zip(*group)
        stamps = tuple(stamp(path) or Stamp(0, 0) for path in paths)
        result = folder / f"{key(names, [str(path) for path in paths], stamps)}.json"
        jobs.append(HashFiles(names, paths, stamps, result))
    return jobs


def _groups(files: Iterable[tuple[str, Path]]) -> Iterator[list[tuple[str, Path]]]:
    group: list[tuple[str, Path]] = []
    size = 0
    for name, path in files:
        group.append((name, path))
        size += (stamp(path) or Stamp(0, 0)).size
        if len(group) == _TOGETHER or size >= _TOGETHER_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def write_records(jobs: Iterable[HashFiles], path: Path) -> str:
    """Writes what the jobs found into one file; the sha256 of all names and hashes."""
    records = [record for job in jobs for record in json.loads(job.result.read_bytes())]
    write_atomically(path, json.dumps(records, indent=1))
    return key([(record["name"], record["sha256"]) for record in records])


def first_change(path: Path, recipe: Recipe) -> str | None:
    """What is different from the records of an earlier `prepare`, in words; None if nothing is.

    A file whose size and time are those of its record is taken to be the same; of any other, the
    whole content is compared.
    """
    try:
        records = [SourceFile(**record) for record in json.loads(path.read_bytes())]
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"cannot read the record of source files: {error}",
            str(path),
            "copy the file again from where it is whole",
        ) from error
    files = local_files(recipe)
    names, recorded = [name for name, _ in files], [record.name for record in records]
    if names != recorded:
        differing = sorted({*names} ^ {*recorded})
        if not differing:
            return "the order of the files"
        return f"{differing[0]} is {'new' if differing[0] in names else 'gone'}"
    for (name, path), record in zip(files, records):
        now = stamp(path)
        if now == (record.size, record.mtime_ns):
            continue
        if now is None or now.size != record.size or hash_file(path) != record.sha256:
            return f"{name} changed"
    return None
