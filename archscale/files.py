"""Files that others may read while they are written: whole or not at all, whenever a machine stops.

Also the names of what lies in a run directory.
"""

import contextlib
import errno
import os
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, TypeVar

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
