"""Whole copies of remote files on this machine's disk, within a bound, shared by all its processes.

`ARCHSCALE_CACHE` names the directory (default `~/.cache/archscale`) and `ARCHSCALE_CACHE_GB` the
bound in gigabytes (default 50; 0: no cache). A copy is there whole or not at all: it is written
under another name, at its full size from the start so that the bound counts it, and renamed. Copies
come and go under one lock of the directory. What is not yet one is locked by the process that
writes it, which deletes it if that fails; a process that dies leaves at most a file that nobody has
locked, which the next one to need room deletes.
"""

import contextlib
import fcntl
import functools
import os
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from archscale.errors import DataError, explain_os_error

DIRECTORY, GIGABYTES = "ARCHSCALE_CACHE", "ARCHSCALE_CACHE_GB"
# Copies read during this time stay: where the bound is below what runs read, one copy after another
# would be fetched only to be deleted before it is read again.
RECENT = 600.0  # seconds
_TOUCH = 60.0  # seconds between notes that a copy is in use, when it is mapped anew
# A mapped file holds a descriptor: stay below the usual limit of 1,024 for a process.
_MAPPED = 200
_LOCK, _PART = ".lock", ".part"


class Cache:
    """Copies of files in one directory.

    Args:
        directory: made when first written to.
        limit: bytes of all files in it.

    Attributes:
        writable: False from the first failure on, of which a line on stderr tells: what is there is
            read, and no more is copied.
    """

    def __init__(self, directory: Path, limit: int):
        self.directory, self.limit = directory, limit
        self._maps: OrderedDict[str, tuple[np.ndarray, float]] = OrderedDict()
        self._guard = threading.Lock()
        self.writable = True

    def read(self, name: str, size: int) -> np.ndarray | None:
        """A copy, memory-mapped: uint8 [size]; None where there is none. One of another size is
        damaged, and deleted."""
        now = time.monotonic()
        with self._guard:
            mapped, since = self._maps.get(name, (None, now))
            if mapped is not None and now - since < _TOUCH:
                self._maps.move_to_end(name)
                return mapped
            # A deleted file stays on the disk as long as it is mapped: no map becomes old.
            for old in [key for key, (_, since) in self._maps.items() if now - since >= _TOUCH]:
                del self._maps[old]
            path = self.directory / name
            try:
                if path.stat().st_size != size:
                    self._delete_damaged(path, size)
                    return None
                mapped = np.memmap(path, np.uint8, "r", 0, (size,)).view(np.ndarray)
            except FileNotFoundError:
                return None
            except OSError as error:
                self._give_up(error)
                return None
            with contextlib.suppress(OSError):  # of another user, or read-only
                os.utime(path)
            self._maps[name] = mapped, now
            if len(self._maps) > _MAPPED:
                self._maps.popitem(last=False)
            return mapped

    def _delete_damaged(self, path: Path, size: int) -> None:
        with self._locked():
            if path.stat().st_size != size:  # not yet made anew by another process
                path.unlink()

    def add(self, name: str, size: int, write: Callable[[BinaryIO], None]) -> bool:
        """Makes a copy unless it is there; whether it is there now.

        Not where another process is making it, recently used copies leave no room, or the directory
        cannot be written.

        Args:
            name: of the copy.
            size: in bytes.
            write: writes the content to a file that stands at its beginning; what it raises leaves
                no copy.
        """
        try:
            with self._locked():
                path = self.directory / name
                if path.exists() and path.stat().st_size == size:
                    return True
                part = self._reserve(name, size)
        except OSError as error:
            self._give_up(error)
            return False
        if part is None:
            return False
        path = Path(part.name)
        with part:
            try:
                write(part)
                part.flush()
                os.fsync(part.fileno())
                with self._locked():
                    os.replace(path, self.directory / name)
            except OSError as error:
                path.unlink(missing_ok=True)
                self._give_up(error)
                return False
            except BaseException:
                path.unlink(missing_ok=True)
                raise
        return True

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self.directory.mkdir(parents=True, exist_ok=True)
        with open(self.directory / _LOCK, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _reserve(self, name: str, size: int) -> BinaryIO | None:
        """The file to write a copy into, locked and at its full size; None where there is no room
        or another process has it."""
        path = self.directory / (name + _PART)
        if path.exists() and not _free(path):
            return None
        path.unlink(missing_ok=True)
        if not self._make_room(size, RECENT):
            return None
        file = open(path, "w+b")  # noqa: SIM115 (lives as long as the copying)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.truncate(size)
        return file

    def trim(self) -> None:
        """Deletes what is above the bound, as where it was larger before."""
        try:
            if self.directory.is_dir():
                with self._locked():
                    self._make_room(0, 0.0)
        except OSError as error:
            self._give_up(error)

    def _make_room(self, size: int, unused: float) -> bool:
        """Deletes what dead processes left, and then, as far as needed, copies that were not used
        for so many seconds, the oldest first; whether there is room for `size` bytes now."""
        files = [entry for entry in os.scandir(self.directory) if entry.is_file()]
        states = {Path(entry.path): entry.stat() for entry in files if entry.name != _LOCK}
        used = sum(state.st_size for state in states.values())
        latest = time.time() - unused
        parts = [path for path in states if path.suffix == _PART and _free(path)]
        whole = [path for path in states if path.suffix != _PART and states[path].st_mtime < latest]
        for path in [*parts, *sorted(whole, key=lambda path: states[path].st_mtime)]:
            if path in parts or used + size > self.limit:
                path.unlink()
                used -= states[path].st_size
        return used + size <= self.limit

    def _give_up(self, error: OSError) -> None:
        if not self.writable:
            return
        self.writable = False
        cause, remedy = explain_os_error(
            error, f"name another directory in {DIRECTORY}, or set {GIGABYTES}=0 to do without"
        )
        print(
            f"archscale: warning: no more copies of remote files, they are read by ranges: {cause}"
            f" ({self.directory}): {remedy}",
            file=sys.stderr,
            flush=True,
        )


def _free(path: Path) -> bool:
    """Whether no process holds the lock of this file."""
    with open(path, "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def the_cache() -> Cache | None:
    """The cache that the environment names; None where its bound is 0."""
    text = os.environ.get(GIGABYTES, "50")
    try:
        limit = int(float(text) * 1e9)
    except (ValueError, OverflowError):
        limit = -1
    if limit < 0:
        raise DataError(
            f"{text!r} is no number of gigabytes", GIGABYTES, "set it to a number such as 50, or 0"
        )
    directory = os.environ.get(DIRECTORY) or "~/.cache/archscale"
    return _cache(Path(directory).expanduser(), limit) if limit else None


@functools.cache
def _cache(directory: Path, limit: int) -> Cache:
    cache = Cache(directory, limit)
    cache.trim()
    return cache
