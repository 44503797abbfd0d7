"""Where a run's checkpoints lie: in its run directory, in another directory, or in an object store.

A store has no directories and renames nothing: names that begin alike are a directory, and the
objects of a checkpoint go under their final names, `state.json` last. It marks the checkpoint as
complete; without it a directory `step_…` there is one that was not finished.
"""

from __future__ import annotations

import contextlib
import datetime
import fnmatch
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

from archscale.config import CheckpointConfig
from archscale.data.remote import RemotePath, is_remote, lasts
from archscale.errors import ArchscaleError, ConfigError
from archscale.files import CHECKPOINTS, CONFIG, checkpoint_steps
from archscale.yaml_reader import parse_yaml

STATE = "state.json"  # the last file of a checkpoint to be written
PART = 64 << 20  # bytes that one request carries; stores take up to 10,000 of them for an object
_TIMES = ("LastModified", "mtime", "updated", "created")  # what stores call the time of a write


class StoreError(ArchscaleError):
    """A store of checkpoints cannot be reached, refuses, or has failed.

    No `CheckpointError`: nothing is known of the checkpoint, which must not be taken for damaged.
    """


class BrokenUpload(StoreError):
    """An object has not been written to its end, for a reason that may pass."""


class Stat(NamedTuple):
    """What `Path.stat` would tell of an object: bytes, and Unix seconds by the store's clock."""

    st_size: int
    st_mtime: float


class StorePath(RemotePath):
    """As much of `pathlib.Path` as checkpoints need, of an object or a directory behind a URL.

    Raises:
        StoreError: from every request, also where a missing package or wrong credentials forbid it.
        FileNotFoundError: from reading what is not there.
    """

    error = StoreError
    failed = "the store of checkpoints failed"

    def __init__(self, url: str, info: dict[str, Any] | None = None):
        super().__init__(url)
        self._info = info  # what a listing has just said of it

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return type(self), (self.url,)  # paths travel between ranks

    def __lt__(self, other: StorePath) -> bool:
        return self.url < other.url

    def __truediv__(self, name: str) -> StorePath:
        return StorePath(f"{self.url}/{name}")

    def with_name(self, name: str) -> StorePath:
        return self.parent / name

    @property
    def parent(self) -> StorePath:
        return StorePath(self.url.rpartition("/")[0])

    @property
    def parents(self) -> tuple[StorePath, ...]:
        """None: a store makes what lies above an object."""
        return ()

    def resolve(self) -> StorePath:
        return self

    # --- what is there

    def iterdir(self) -> Iterator[StorePath]:
        """What lies in the directory; nothing where there is none."""
        try:
            entries = self._request("ls", detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return
        for entry in entries:
            if (child := self / entry["name"].rstrip("/").rpartition("/")[2]) and not (
                entry["type"] == "file" and entry["name"].rstrip("/") == self._opened[1]
            ):
                yield StorePath(child.url, entry)

    def glob(self, pattern: str) -> Iterator[StorePath]:
        return (path for path in self.iterdir() if fnmatch.fnmatch(path.name, pattern))

    def rglob(self, pattern: str) -> Iterator[StorePath]:
        for path in self.iterdir():
            if path.is_dir():
                yield from path.rglob(pattern)
            elif fnmatch.fnmatch(path.name, pattern):
                yield path

    def is_dir(self) -> bool:
        if self._info is not None:
            return bool(self._info["type"] == "directory")
        return next(self.iterdir(), None) is not None

    def is_file(self) -> bool:
        return not self.is_dir() if self._info is not None else super().is_file()

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def stat(self) -> Stat:
        info = self._info or self._request("info")
        time = next((info[key] for key in _TIMES if info.get(key)), 0.0)
        if isinstance(time, str):
            time = datetime.datetime.fromisoformat(time)
        if isinstance(time, datetime.datetime):
            time = time.timestamp()
        return Stat(int(info.get("size") or 0), float(time))

    def lstat(self) -> Stat:
        return self.stat()

    def read_text(self) -> str:
        return self.read_bytes().decode()

    def open(self) -> io.BufferedReader:
        """For reading, in ranges that are asked for again where a request fails."""
        return io.BufferedReader(_Ranges(self), 1 << 20)

    # --- changes

    def mkdir(self, parents: bool = True, exist_ok: bool = True) -> None:
        """Nothing in an object store."""
        if self._has_directories:
            self._request("makedirs", exist_ok=True)

    @property
    def _has_directories(self) -> bool:
        return self.url.startswith("file://")

    def write_bytes(self, content: bytes) -> None:
        self._change("pipe_file", content)  # stores name the argument differently

    def upload(self) -> Any:
        """A stream into the object, which is there once `close` has returned."""
        return self._change("open", mode="wb", block_size=PART)

    def copy_to(self, target: StorePath) -> None:
        """An object, within the store."""
        self._change("cp_file", target._opened[1])

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            self._request("rm_file")
        except FileNotFoundError:
            if not missing_ok:
                raise

    def remove_checkpoint(self) -> None:
        """Its mark first: killed half-way this leaves an unfinished one."""
        (self / STATE).unlink(missing_ok=True)
        for path in list(self.rglob("*")):
            path.unlink(missing_ok=True)
        if self._has_directories:
            with contextlib.suppress(FileNotFoundError):
                self._request("rm", recursive=True)

    def move_checkpoint(self, target: StorePath) -> None:
        """Copied to its end, the mark last, before anything is deleted."""
        target.mkdir()
        names = sorted((path.name for path in self.rglob("*")), key=lambda name: name == STATE)
        for name in names:
            (self / name).copy_to(target / name)
        self.remove_checkpoint()

    def _change(self, method: str, *more: Any, **arguments: Any) -> Any:
        try:
            return self._request(method, *more, **arguments)
        except FileNotFoundError as error:
            reason = error.__cause__ or error
            raise StoreError(
                f"nothing can be written there: {' '.join(str(reason).split())}",
                self.url,
                "make the bucket or container, or name another checkpoint.directory",
            ) from error

    def broken(self, error: Exception) -> StoreError:
        """What an `error` of a stream of `upload` is."""
        problem = self._problem(error, 0)
        kind = StoreError if lasts(error) else BrokenUpload
        return kind(problem.what, problem.where, problem.remedy)


class _Ranges(io.RawIOBase):
    """An object as a stream."""

    def __init__(self, path: StorePath):
        self._path, self._position, self._size = path, 0, path.version().size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        stop = min(self._position + min(len(view), PART), self._size)
        content = self._path.read_bytes(self._position, stop)
        view[: len(content)] = content
        self._position += len(content)
        return len(content)


Place: TypeAlias = Path | StorePath
AnyPlace = TypeVar("AnyPlace", Path, StorePath)


def place_of(text: str | os.PathLike[str] | StorePath) -> Place:
    """A path of this machine, or what is behind a URL."""
    if isinstance(text, StorePath):
        return text
    return StorePath(str(text)) if is_remote(text) else Path(text)


def checkpoints_of(run_dir: Path, settings: CheckpointConfig | None = None) -> Place:
    """Where the checkpoints of a run lie.

    Args:
        settings: of a run that is about to train; None: as the config in the run directory says.
    """
    directory = _directory_in(run_dir / CONFIG) if settings is None else settings.directory
    return run_dir / CHECKPOINTS if directory is None else place_of(directory)


def _directory_in(config: Path) -> str | None:
    """`checkpoint.directory` of a run; None where there is no config that says so."""
    try:
        directory = parse_yaml(config.read_text(), str(config))["checkpoint"]["directory"]
    except (OSError, ValueError, LookupError, TypeError, ConfigError):
        return None
    return directory if isinstance(directory, str) else None


def unfinished_in(folder: StorePath) -> list[StorePath]:
    """Directories that a process did not finish writing or deleting, or is writing."""
    return sorted(path for path in folder.glob("step_*") if not (path / STATE).is_file())


def newest_step(run_dir: Path) -> int:
    """Step of a run's newest complete checkpoint; 0 without one."""
    return max(checkpoint_steps(checkpoints_of(run_dir)), default=0)
