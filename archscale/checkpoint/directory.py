"""The folder of a run's checkpoints: which there are, whether they are whole, and what they say.

A checkpoint is the directory `step_00001000`: it is written under a temporary name and renamed once
every rank has finished, so a directory with that name is whole. `state.json` in it has the step,
the config and data that it belongs to, its own identity and that of the checkpoint before it, and
the size of every file.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from archscale.errors import CheckpointError, explain_os_error
from archscale.files import checkpoint_steps, step_directory

FORMAT = 2


def newest_valid(
    directory: Path,
    warn: Callable[[str], None],
    before: int | None = None,
    counts: Callable[[Path], bool] = lambda path: True,
) -> Path | None:
    """The newest checkpoint (of a step below `before`, and that `counts`) whose files are all there
    in their full size; `warn` hears of the ones passed over."""
    for step in reversed(checkpoint_steps(directory)):
        path = step_directory(directory, step)
        if (before is not None and step >= before) or not counts(path):
            continue
        problem = damage(path)
        if problem is None:
            return path
        warn(f"checkpoint {path} is damaged ({problem}): trying an older one")
    return None


def discard_after(directory: Path, step: int) -> None:
    """Delete the checkpoints of later steps."""
    for later in checkpoint_steps(directory):
        if later > step:
            discard(step_directory(directory, later))


def prune(directory: Path, keep: int, not_finite_since: int | None) -> None:
    """Delete all but the newest `keep` checkpoints and, once the loss is not finite, the newest one
    from before that.

    Args:
        not_finite_since: first step of the losses that are not finite up to now, if any. That loss
            is the work of the weights of the step before: where there is a checkpoint of these, the
            one before it stays too.
    """
    steps = checkpoint_steps(directory)
    kept = steps[-keep:]
    if not_finite_since is not None:
        for end in (not_finite_since, not_finite_since - 1):
            kept += [step for step in steps if step < end][-1:]
    for step in steps:
        if step not in kept:
            discard(step_directory(directory, step))


def damage(path: Path) -> str | None:
    """What is missing from or cut short in a checkpoint; None when it is whole."""
    try:
        files = read_state(path)["files"]
    except (CheckpointError, KeyError) as error:
        return str(error)
    for name, size in files.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            return (
                f"{name} is {file.stat().st_size if file.is_file() else 0} bytes long instead of"
                f" {size}"
            )
    return None


def read_state(path: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint."""
    try:
        state = json.loads((path / "state.json").read_text())
    except PermissionError as error:
        cause, remedy = explain_os_error(error, "name another checkpoint")
        raise CheckpointError(f"cannot read state.json: {cause}", str(path), remedy) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(
            "not a complete checkpoint", str(path), "name a directory step_… that holds state.json"
        ) from error
    if state.get("format") != FORMAT:
        raise CheckpointError(
            f"format {state.get('format')}, not {FORMAT}",
            str(path),
            "load it with the version that wrote it",
        )
    return state


def checkpoint_id(state: dict[str, Any]) -> str:
    """What tells a checkpoint from all others, wherever it lies; one that was written before
    checkpoints had an `id` has the digest of its state."""
    digest = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
    return str(state.get("id") or digest[:16])


def discard(path: Path) -> None:
    """Delete a checkpoint; a crash half-way leaves a hidden directory, never half a checkpoint."""
    if path.exists():
        hidden = path.with_name(f".{path.name}.deleted")
        shutil.rmtree(hidden, ignore_errors=True)
        os.replace(path, hidden)
        shutil.rmtree(hidden, ignore_errors=True)
