"""Files that others may read while they are written: whole or not at all, whenever a machine stops.

Also the names of what lies in a run directory.
"""

import contextlib
import errno
import os
import shutil
import signal
import threading
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

from archscale.errors import ConfigError, explain_os_error

# In a run directory:
CONFIG = "config.yaml"  # resolved
PLAN = "plan.json"
METRICS = "metrics.jsonl"  # a JSON object for each step
EVALUATIONS = "evaluations.jsonl"  # a JSON object for each result of `archscale eval`
SAMPLES = "samples.jsonl"  # a JSON object for each text that training has generated
ENVIRONMENT = "environment.json"  # versions, git revision, host
MANIFEST = "manifest.json"  # parameter → role → rule
CHECKPOINTS = "checkpoints"
ABANDONED = "abandoned"  # what lay after a checkpoint to which the run has gone back
TOKENIZER = "tokenizer"  # the run's own, whatever becomes of the data directory
REPORT = "report.html"
OWNER = "owner.json"  # the process that trains there, while it lives


class Directory(Protocol):
    """A local path, or another that has as much of `pathlib.Path`."""

    def is_dir(self) -> bool: ...

    def glob(self, pattern: str) -> Iterable[Any]: ...

    def __truediv__(self, name: str) -> Any: ...


AnyPath = TypeVar("AnyPath", bound=Directory)


def write_atomically(path: Path, content: bytes | str) -> None:
    """The file holds either what it held before or all of `content` (text as UTF-8), and whoever
    has the old one open never sees half of the new. A link is replaced, not followed.

    Raises:
        OSError: it cannot be written, by the name of `path`; nothing stays that can be deleted.
    """
    # Other processes, on other machines too, may write the same file.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # a broken disk, or one that is read-only now
            temporary.unlink(missing_ok=True)
        # A write that fails names no file.
        named = isinstance(error, OSError) and error.filename not in (None, str(temporary))
        if isinstance(error, OSError) and error.errno is not None and not named:
            error.filename, error.filename2 = str(path), None
        raise
    with contextlib.suppress(OSError):  # the file is there; some file systems sync no directory
        sync(path.parent)


def free_directory(out: Path, what: str) -> Path:
    """Where links lead from `out`, absolute.

    Args:
        what: is to be written there, such as "export".

    Raises:
        ConfigError: something stands there already.
    """
    try:
        real = Path(os.path.realpath(out))
        in_use = out.exists() and (not out.is_dir() or any(out.iterdir()))
    except OSError as error:
        raise _unwritable(error, out, what) from error
    if in_use:
        raise ConfigError(
            "something stands there already", str(out), "give --out a new or an empty directory"
        )
    return real


@contextlib.contextmanager
def new_directory(out: Path, what: str, last: str) -> Iterator[Path]:
    """A directory to fill, whose content is that of `out` at the end; after an error, and after
    SIGTERM, it is gone with the folders that were made on the way to it.

    A directory that is there stays the same one: it may be a mount point, the directory that the
    user's shell is in, or one in a place where nothing can be renamed.

    Args:
        out: from `free_directory`.
        what: is written there, such as "export".
        last: name of the file without which the directory counts for nothing.

    Raises:
        ConfigError: it cannot be written.
    """
    there = out.is_dir()
    folders = [folder for folder in out.parents if not folder.exists()]  # innermost first
    partial = (out if there else out.parent) / f".{out.name}.{uuid.uuid4().hex[:12]}.partial"
    moved: list[Path] = []
    try:
        with _sigterm_unwinds():
            partial.mkdir(parents=True)
            yield partial
            for path in partial.rglob("*"):
                sync(path)
            sync_names(partial)
            if there:
                for path in sorted(partial.iterdir(), key=lambda path: path.name == last):
                    moved.append(out / path.name)
                    os.replace(path, out / path.name)
                sync_names(out)
            else:
                os.replace(partial, out)
    except BaseException as error:
        for path in moved:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _unwritable(error, out, what) from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):  # the first that is not empty
            for folder in folders:
                folder.rmdir()


@contextlib.contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """SIGTERM ends the block as an exception does, and then the process with the status that shells
    give it; where somebody else handles it, or outside of the main thread, nothing changes."""
    handled = signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    if handled or threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _unwritable(error: OSError, out: Path, what: str) -> ConfigError:
    cause, remedy = explain_os_error(error, "give --out another directory")
    return ConfigError(f"cannot write the {what}: {cause}", str(out), remedy)


def sync_names(directory: Path) -> None:
    """Force the names in a directory onto the disk, where its file system can do that."""
    try:
        sync(directory)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def sync(path: Path) -> None:
    """Force a file, or the names in a directory, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checkpoint_steps(directory: Directory) -> list[int]:
    """Steps of the complete checkpoints under `directory`, ascending by step, never by clock."""
    directories = directory.glob("step_*") if directory.is_dir() else ()
    return sorted(
        int(d.name[5:])
        for d in directories
        if d.name[5:].isdigit() and (d / "state.json").is_file()
    )


def step_directory(directory: AnyPath, step: int) -> AnyPath:
    path: AnyPath = directory / f"step_{step:08d}"
    return path
