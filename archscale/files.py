"""Files that others may read while they are written: whole or not at all, whenever a machine stops.

Also the names of what lies in a run directory.
"""

import os
from pathlib import Path

# In a run directory:
CONFIG = "config.yaml"  # resolved
PLAN = "plan.json"
METRICS = "metrics.jsonl"  # a JSON object for each step
ENVIRONMENT = "environment.json"  # versions, git revision, host
MANIFEST = "manifest.json"  # parameter → role → rule
CHECKPOINTS = "checkpoints"
REPORT = "report.html"


def write_atomically(path: Path, content: bytes | str) -> None:
    """The file holds either what it held before or all of `content` (text as UTF-8), and whoever
    has the old one open never sees half of the new.

    Raises:
        OSError: it cannot be written; nothing is left beside it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Force a file, or the names in a directory, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checkpoint_steps(directory: Path) -> list[int]:
    """Steps of the complete checkpoints under `directory`, ascending by step, never by clock."""
    directories = directory.glob("step_*") if directory.is_dir() else ()
    return sorted(
        int(d.name[5:])
        for d in directories
        if d.name[5:].isdigit() and (d / "state.json").is_file()
    )


def step_directory(directory: Path, step: int) -> Path:
    return directory / f"step_{step:08d}"


def newest_step(run_dir: Path) -> int:
    """Step of a run's newest complete checkpoint; 0 without one."""
    return max(checkpoint_steps(run_dir / CHECKPOINTS), default=0)
