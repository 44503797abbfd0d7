"""Where a data set goes: seen to before the first document is read, so that no work is lost to it.

A new directory is made beside its final place and renamed. An empty directory that is there already
may be a link, a mount or have rights of its own: it stays, and is filled from a work directory
inside of it, `dataset.json` last. What else has come into it meanwhile is never overwritten.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from archscale.data.preparing.work import PUBLISHING, WORK_MARK
from archscale.data.shards import MANIFEST
from archscale.errors import DataError
from archscale.files import sync

ELSEWHERE = "prepare into another directory with --set output=DIR"
_INNER_WORK = ".work"
_NOBODYS = {_INNER_WORK, "lost+found"}  # the latter is on every new ext4 disk


@dataclass(frozen=True)
class Destination:
    """The final place of a data set.

    Attributes:
        output: as the recipe names it.
        directory: where that leads, links resolved.
        work: the work directory that belongs to it.
        in_place: the directory is there, and is filled instead of renamed.
    """

    output: Path
    directory: Path
    work: Path
    in_place: bool

    @property
    def finished(self) -> bool:
        return (self.directory / MANIFEST).is_file()

    def publish(self, whole: Path) -> None:
        """Moves a complete dataset directory, on the same file system, to its place.

        Raises:
            DataError: the place is no longer free.
        """
        if not self.in_place:
            os.rename(whole, self.directory)
            sync(self.directory.parent)
            return
        _refuse_strangers(self.output, self.directory)
        (self.work / PUBLISHING).touch()
        sync(self.work)
        entries = sorted(whole.iterdir(), key=lambda entry: entry.name == MANIFEST)
        for entry in entries:
            if entry.name == MANIFEST:
                sync(self.directory)
            target = self.directory / entry.name
            if target.is_dir():  # the tokenizer, moved by a process that was killed thereafter
                for file in entry.iterdir():
                    os.replace(file, target / file.name)
            else:
                os.replace(entry, target)
        sync(self.directory)


def choose_destination(name: str) -> Destination:
    """The place of a data set, from the recipe's `output`; `~` is the home directory.

    Raises:
        DataError: something else stands there.
    """
    output = Path(os.path.expanduser(name))
    directory = Path(os.path.realpath(output))
    if directory == directory.parent:
        raise DataError("output is the root of the file system", str(output), ELSEWHERE)
    beside = directory.with_name(f".{directory.name}.work")
    if not os.path.lexists(directory):
        return Destination(output, directory, beside, in_place=False)
    if not directory.is_dir():
        raise DataError("output exists and is not a directory", str(output), ELSEWHERE)
    inner = directory / _INNER_WORK
    ours = (inner / WORK_MARK).is_file()
    if (directory / MANIFEST).is_file():
        return Destination(output, directory, inner if ours else beside, in_place=ours)
    _refuse_strangers(output, directory)
    return Destination(output, directory, inner, in_place=True)


def _refuse_strangers(output: Path, directory: Path) -> None:
    """DataError if there is anything in the directory that is not of an unfinished preparation."""
    inner = directory / _INNER_WORK
    if (inner / PUBLISHING).is_file():
        return
    names = {path.name for path in directory.iterdir()}
    ours = _NOBODYS if (inner / WORK_MARK).is_file() else _NOBODYS - {_INNER_WORK}
    if strangers := sorted(names - ours):
        problem = f"output has {strangers[0]} and is not a prepared data set: it has no {MANIFEST}"
        raise DataError(problem, str(output), ELSEWHERE)
