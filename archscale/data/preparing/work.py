"""The work directory: what is done so far, under names that say what it was made from.

    archscale-work          the lock; a directory without it is not ours
    part-2-of-5             the lock of a part
    samples/KEY.json        text of one unit for training a tokenizer
    trained-KEY/            a trained tokenizer
    given-KEY/              a given one
    units/KEY.json …        an encoded unit (see encode.py)
    files/KEY.json          sizes, times and hashes of source files
    duplicates/             of the present run
    whole-KEY/              the dataset directory, until it is published
    publishing              it is being moved into a directory that was there

Every file appears in one rename, so that a process can be killed at any moment, and several can
share the directory. What another recipe, source file or tokenizer made has another key, and is
never taken for this one's.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archscale.data.preparing.progress import Say
from archscale.errors import DataError

WORK_MARK = "archscale-work"
PUBLISHING = "publishing"
_FORMAT = 1  # of the files in the directory: another one makes other keys
_FOLDERS = ("samples", "trained-", "given-", "units", "files", "duplicates", "whole-")
_OURS = (*_FOLDERS, "part-", PUBLISHING)


@dataclass(frozen=True)
class PartNumber:
    """`--part number/count`: the machine's share of the work; `number` counts from 1."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "PartNumber":
        """From "2/5"; DataError for anything else."""
        number, slash, count = text.partition("/")
        digits = number.isdecimal() and count.isdecimal() and len(number + count) < 12
        if not (slash and digits and 1 <= int(number) <= int(count)):
            raise DataError("no such part", f"--part {text}", "write it as 2/5: the second of five")
        return cls(int(number), int(count))

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @property
    def file(self) -> str:
        return f"part-{self.number}-of-{self.count}"


class WorkDirectory:
    """Paths in a work directory."""

    def __init__(self, path: Path):
        self.path = path

    def folder(self, name: str) -> Path:
        folder = self.path / name
        folder.mkdir(exist_ok=True)
        return folder

    def parts(self) -> set[PartNumber]:
        """The parts that were ever begun."""
        names = [path.name.split("-") for path in self.path.glob("part-*-of-*")]
        return {PartNumber(int(number), int(count)) for _, number, _, count in names}

    def has_results(self) -> bool:
        """Whether there is anything to go on with."""
        results = ("units/*.json", "samples/*.json", "files/*.json", "trained-*")
        return any(any(self.path.glob(pattern)) for pattern in results)

    def remove(self) -> None:
        """Removes what is ours in it, and the directory if nothing else is in it."""
        for entry in self.path.iterdir():
            if entry.name.startswith(_OURS):
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry, ignore_errors=True)
                else:
                    entry.unlink(missing_ok=True)
        # The mark goes last: a directory without it would be taken for a user's.
        (self.path / WORK_MARK).unlink(missing_ok=True)
        with suppress(OSError):
            self.path.rmdir()


def key(*decides: Any) -> str:
    """A name for a result, from all that decides it."""
    content = json.dumps([_FORMAT, *decides], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


@contextmanager
def open_work(path: Path, part: PartNumber | None, say: Say) -> Iterator[WorkDirectory]:
    """The work directory, made if need be, with its parents, and locked: parts share it, all else
    has it alone.

    Raises:
        DataError: another process works there, or it is not ours.
    """
    path.mkdir(parents=True, exist_ok=True)
    mark = path / WORK_MARK
    if not mark.exists() and any(path.iterdir()):
        remedy = "prepare into another directory with --set output=DIR, or rename this one"
        raise DataError("the work directory of this output is not archscale's", str(path), remedy)
    with _locked(mark, part is not None, say):
        if part is None:
            yield WorkDirectory(path)
            return
        with _locked(path / part.file, False, say):
            yield WorkDirectory(path)


@contextmanager
def _locked(path: Path, shared: bool, say: Say) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            problem = "another process is preparing this dataset"
            raise DataError(problem, str(path.parent), "wait for it to end") from error
        say(f"{path.parent}: this file system has no locks; start no second process there")
        yield
        return
    try:
        if not _same_file(descriptor, path):
            problem = "another process has just prepared this dataset"
            raise DataError(problem, str(path.parent), "give the same command again")
        yield
    finally:
        os.close(descriptor)


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False
