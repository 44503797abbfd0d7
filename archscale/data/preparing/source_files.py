"""The files that a data set was made from, by which a second `prepare` sees whether any of them
changed: size, time and sha256 of each local one; of a remote one the mark that its store gives."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from archscale.data.preparing.documents import RecipeUnit
from archscale.data.preparing.jobs import Report
from archscale.data.preparing.preparation import Preparation
from archscale.data.preparing.progress import Say
from archscale.data.preparing.recipe import Recipe
from archscale.data.preparing.sources.fingerprints import LocalFile, hash_file, stamp
from archscale.data.preparing.sources.units import Part
from archscale.data.preparing.trouble import UnreadableFile
from archscale.data.preparing.work import key
from archscale.errors import DataError
from archscale.files import write_atomically

_TOGETHER = 256  # small files that one job hashes
_TOGETHER_BYTES = 64_000_000


@dataclass(frozen=True)
class SourceFile:
    """A file as it was read; `name` does not depend on the machine. `sha256` is None if it could
    not be read, and was left out."""

    name: str
    size: int
    mtime_ns: int
    sha256: str | None


@dataclass(frozen=True)
class RemoteFile:
    """A URL or hub data set, and its version as its store names it."""

    name: str
    mark: str


@dataclass(frozen=True)
class HashFiles:
    """A job: records of some files, as a list in JSON."""

    files: tuple[LocalFile, ...]
    on_error: Literal["stop", "skip"]
    result: Path

    @property
    def name(self) -> str:
        return self.files[0].name

    @property
    def size(self) -> int:
        return sum(file.stamp.size for file in self.files)

    def run(self, report: Report) -> None:
        records = []
        for file in self.files:
            skipping = self.on_error == "skip"
            sha256 = _hash_if_readable(file.path) if skipping else hash_file(file.path)
            report(file.stamp.size)
            file.refuse_change()
            records.append(asdict(SourceFile(file.name, *file.stamp, sha256)))
        write_atomically(self.result, json.dumps(records))


def _hash_if_readable(path: str | Path) -> str | None:
    try:
        return hash_file(path)
    except UnreadableFile:
        return None


def hash_jobs(preparation: Preparation) -> list[HashFiles]:
    """Jobs that make the records of all local files that its units read, each once, in order."""
    folder = preparation.work.folder("files")
    files = dict.fromkeys(file for unit in preparation.units for file in unit.files)
    on_error = preparation.recipe.on_error
    return [
        HashFiles(group, on_error, folder / f"{key(on_error, group)}.json")
        for group in _groups(files)
    ]


def _groups(files: Iterable[LocalFile]) -> Iterator[tuple[LocalFile, ...]]:
    group: list[LocalFile] = []
    size = 0
    for file in files:
        group.append(file)
        size += file.stamp.size
        if len(group) == _TOGETHER or size >= _TOGETHER_BYTES:
            yield tuple(group)
            group, size = [], 0
    if group:
        yield tuple(group)


def write_records(jobs: Iterable[HashFiles], units: Iterable[RecipeUnit], path: Path) -> str:
    """Writes what the jobs found, and the marks of what is remote in the units, into one file; the
    sha256 of all names and hashes."""
    records = [record for job in jobs for record in json.loads(job.result.read_bytes())]
    records += map(asdict, _remote(part for unit in units for part in unit.unit.parts))
    write_atomically(path, json.dumps(records, indent=1))
    return key([(record["name"], record.get("sha256", record.get("mark"))) for record in records])


def _remote(parts: Iterable[Part]) -> dict[RemoteFile, None]:
    """Each once, in order."""
    files = (RemoteFile(part.path, part.mark) for part in parts if part.mark is not None)
    return dict.fromkeys(files)


def first_change(path: Path, recipe: Recipe, say: Say) -> str | None:
    """What is different from the records of an earlier `prepare`, in words; None if nothing is.

    A local file whose size and time are those of its record is taken to be the same; of any other,
    the whole content is compared. One that could not be read has changed when it can be. Where what
    is remote cannot be reached, `say` receives that.
    """
    try:
        records = json.loads(path.read_bytes())
        remote = [RemoteFile(**record) for record in records if "mark" in record]
        local = [SourceFile(**record) for record in records if "mark" not in record]
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"cannot read the record of source files: {error}",
            str(path),
            "copy the file again from where it is whole",
        ) from error
    return _first_local_change(local, recipe) or _first_remote_change(remote, recipe, say)


def _first_local_change(records: list[SourceFile], recipe: Recipe) -> str | None:
    listed = (file for source in recipe.all_sources() for file in source.files())
    files = list(dict.fromkeys(listed))
    recorded = [record.name for record in records]
    if difference := _difference([name for name, _ in files], recorded):
        return difference
    for (name, path), record in zip(files, records):
        now = stamp(path)
        if now == (record.size, record.mtime_ns) and record.sha256 is not None:
            continue
        if now.size != record.size or _hash_if_readable(path) != record.sha256:
            return f"{name} changed"
    return None


def _first_remote_change(records: list[RemoteFile], recipe: Recipe, say: Say) -> str | None:
    try:
        files = list(
            _remote(part for source in recipe.all_sources() for part in source.remote_files())
        )
    except DataError as error:
        say(f"whether {error.where} changed is not known: {error.what}")
        return None
    if difference := _difference([file.name for file in files], [file.name for file in records]):
        return difference
    changed = [file.name for file, record in zip(files, records) if file != record]
    return f"{changed[0]} changed" if changed else None


def _difference(names: list[str], recorded: list[str]) -> str | None:
    if names == recorded:
        return None
    differing = sorted({*names} ^ {*recorded})
    if not differing:
        return "the order of the files"
    return f"{differing[0]} is {'new' if differing[0] in names else 'gone'}"
