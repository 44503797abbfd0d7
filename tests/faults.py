"""A file system that fails: every change under a directory is counted, and any of them can fail,
take its time, or be the last thing that its process does.

    with Storage(folder) as counted:                 # how many changes does a save make?
        save()
    with Storage(folder, full(after=5000)):          # no space after 5,000 bytes
        save()
    with Storage(folder, kill(at=17)):               # SIGKILL in place of the 17th
        save()

It stands between Python and the operating system: `open`, `os` and `pathlib` of this process and
of those forked from it while it is in place. What a C library writes by itself goes unseen.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

# errno of storage → what it means.
FAILURES = {
    "ENOSPC": errno.ENOSPC,  # the disk is full
    "EDQUOT": errno.EDQUOT,  # the user's share of it is
    "EROFS": errno.EROFS,  # it was mounted anew, read-only
    "EIO": errno.EIO,  # the device is broken
    "ESTALE": errno.ESTALE,  # the server has forgotten the file
}

FILES = (stat.S_IFREG, stat.S_IFDIR)  # what storage holds


@dataclass(frozen=True)
class Change:
    """A change that is about to be made.

    Attributes:
        number: 1-based, in the order in which the process makes them.
        kind: open (for writing), write, sync, rename, link, mkdir, rmdir, unlink or truncate.
        path: absolute; of what is renamed, where it goes to.
        size: bytes of a write.
    """

    number: int
    kind: str
    path: Path
    size: int = 0


# Called before a change; it may raise, wait, or end the process. What it returns, where that is not
# None, is how many bytes of a write are taken, as a system call may take fewer than it is given.
Act = Callable[[Change], "int | None"]


def failure(number: int, change: Change) -> OSError:
    """The error as the system raises it: what is done to an open file names none."""
    if change.kind in ("write", "sync", "truncate"):
        return OSError(number, os.strerror(number))
    return OSError(number, os.strerror(number), str(change.path))


def fail(number: int, at: int = 1, name: str = "") -> Act:
    """Every change from the `at`-th on whose path has `name` in it fails with the errno `number`,
    but for those that only remove: a full disk can be emptied, a read-only one cannot."""
    seen = 0

    def act(change: Change) -> None:
        nonlocal seen
        if name not in str(change.path):
            return
        if number in (errno.ENOSPC, errno.EDQUOT) and change.kind in ("unlink", "rmdir", "sync"):
            return
        seen += 1
        if seen >= at:
            raise failure(number, change)

    return act


def full(after: int, number: int = errno.ENOSPC) -> Act:
    """`after` more bytes can be written, the last of them by a write that is cut short."""
    left = after

    def act(change: Change) -> int | None:
        nonlocal left
        if change.kind != "write":
            return None
        if left == 0:
            raise failure(number, change)
        taken = min(left, change.size)
        left -= taken
        return taken

    return act


def slow(seconds: float) -> Act:
    """Every write and sync takes that long."""

    def act(change: Change) -> None:
        if change.kind in ("write", "sync"):
            time.sleep(seconds)

    return act


def hang(name: str) -> Act:
    """The first write to a path with `name` in it never returns."""

    def act(change: Change) -> None:
        if change.kind == "write" and name in str(change.path):
            time.sleep(3600)

    return act


def kill(at: int, torn: bool = False, after: str = "") -> Act:
    """SIGKILL in place of the `at`-th change.

    Args:
        torn: half of it is made, where it is a write.
        after: count from the change that gives something this name.
    """
    begun, seen = not after, 0

    def act(change: Change) -> int | None:
        nonlocal begun, seen
        seen += begun
        begun |= change.kind == "rename" and change.path.name == after
        if seen == at and torn and change.kind == "write" and change.size > 1:
            return change.size // 2
        if seen >= at:
            os.kill(os.getpid(), signal.SIGKILL)
        return None

    return act


class _File(io.FileIO):
    """A file whose writes are announced."""

    storage: Storage

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        taken = self.storage.announce("write", self.name, len(view))
        return super().write(view if taken is None else view[:taken])

    def truncate(self, size: int | None = None) -> int:
        self.storage.announce("truncate", self.name)
        return super().truncate(size)


class Storage:
    """The file system under `folder` while this context lasts.

    Attributes:
        changes: those made or tried so far.
    """

    def __init__(self, folder: Path | str, act: Act | None = None):
        self.folder = Path(os.path.realpath(folder))
        self.changes: list[Change] = []
        self._act = act
        self._before: list[tuple[Any, str, Any]] = []

    def announce(self, kind: str, path: Any, size: int = 0, base: int | None = None) -> int | None:
        """A change of `path` (of the open directory `base`, where there is one) follows."""
        where = self._covered(path, base)
        if where is None:
            return None
        change = Change(len(self.changes) + 1, kind, where, size)
        self.changes.append(change)
        return self._act(change) if self._act else None

    def _covered(self, path: Any, base: int | None = None) -> Path | None:
        """The path, absolute, where it lies under the folder; of an open file, by its
        descriptor."""
        if isinstance(path, int) and stat.S_IFMT(os.fstat(path).st_mode) not in FILES:
            return None  # a pipe or a terminal
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        text = os.fsdecode(path)
        if base is not None and not os.path.isabs(text):
            text = os.path.join(os.readlink(f"/proc/self/fd/{base}"), text)
        folder, name = os.path.split(os.path.abspath(text))
        where = Path(os.path.realpath(folder), name)
        return where if where.is_relative_to(self.folder) else None

    def __enter__(self) -> Storage:
        for owner, name, stand_in in self._stand_ins():
            self._before.append((owner, name, getattr(owner, name)))
            setattr(owner, name, stand_in)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for owner, name, before in reversed(self._before):
            setattr(owner, name, before)
        self._before.clear()

    def _stand_ins(self) -> Iterator[tuple[Any, str, Any]]:
        opened = self._opened(io.open)
        yield builtins, "open", opened
        yield io, "open", opened
        for name, kind in (("mkdir", "mkdir"), ("rmdir", "rmdir"), ("fsync", "sync")):
            yield os, name, self._announcing(getattr(os, name), kind)
        for name, kind in (("unlink", "unlink"), ("remove", "unlink"), ("truncate", "truncate")):
            yield os, name, self._announcing(getattr(os, name), kind)
        for name, kind in (("rename", "rename"), ("replace", "rename"), ("link", "link")):
            yield os, name, self._announcing(getattr(os, name), kind, target=1)
        yield os, "ftruncate", self._announcing(os.ftruncate, "truncate")
        yield os, "fdatasync", self._announcing(os.fdatasync, "sync")
        yield os, "open", self._os_open(os.open)
        yield os, "write", self._os_write(os.write)

    def _announcing(self, call: Callable, kind: str, target: int = 0) -> Callable:
        def announced(*args: Any, **kwargs: Any) -> Any:
            base = kwargs.get("dst_dir_fd" if target else "dir_fd")
            self.announce(kind, args[target], base=base)
            return call(*args, **kwargs)

        return announced

    def _os_open(self, call: Callable) -> Callable:
        def announced(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self.announce("open", path, base=kwargs.get("dir_fd"))
            return call(path, flags, *args, **kwargs)

        return announced

    def _os_write(self, call: Callable) -> Callable:
        def announced(descriptor: int, data: Any) -> int:
            view = memoryview(data).cast("B")
            taken = self.announce("write", descriptor, len(view))
            return call(descriptor, view if taken is None else view[:taken])

        return announced

    def _opened(self, call: Callable) -> Callable:
        """`open`, with a `_File` at the bottom of what writes under the folder."""

        def announced(
            file: Any,
            mode: str = "r",
            buffering: int = -1,
            encoding: str | None = None,
            errors: str | None = None,
            newline: str | None = None,
            closefd: bool = True,
            opener: Any = None,
        ) -> Any:
            if not set(mode) & set("wax+") or self._covered(file) is None:
                return call(file, mode, buffering, encoding, errors, newline, closefd, opener)
            self.announce("open", file)
            raw = _File(file, mode.replace("b", "").replace("t", ""), closefd, opener)
            raw.storage = self
            if buffering == 0:
                return raw
            size = buffering if buffering > 1 else io.DEFAULT_BUFFER_SIZE
            stream = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw, size)
            if "b" in mode:
                return stream
            text = io.TextIOWrapper(stream, encoding, errors, newline, buffering == 1)
            text.mode = mode  # type: ignore[misc]
            return text

        return announced
