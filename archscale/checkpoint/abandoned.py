"""What a run leaves behind when it goes back to an older checkpoint, and what a killed one did not
finish.

A run directory has one history: what does not belong to it is moved into `abandoned/`.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from archscale.checkpoint.history import Start
from archscale.checkpoint.place import AnyPlace, Place, StorePath, unfinished_in
from archscale.errors import CheckpointError, explain_os_error
from archscale.files import (
    ABANDONED,
    EVALUATIONS,
    METRICS,
    SAMPLES,
    checkpoint_steps,
    step_directory,
    write_atomically,
)
from archscale.telemetry.sinks import lines_until

RECORDS = (METRICS, EVALUATIONS, SAMPLES)  # lines that each belong to a step

# What saving and discarding checkpoints, a watchdog without anything to write, and
# `write_atomically` leave behind when they are killed.
UNFINISHED_CHECKPOINT = re.compile(r"\.step_\d+\.(partial|deleted)")
EMPTY_FILE = re.compile(r"stacks_rank_\d+\.txt")
UNFINISHED_FILE = re.compile(r"\.(?!report).+\.[0-9a-f]{12}\.tmp")


def leave_one_history(run_dir: Path, checkpoints: Place, start: Start, step: int) -> None:
    """Move what does not precede `start` from the run directory into `abandoned/`, and say so;
    nothing is deleted. What killed processes did not finish writing or deleting is.

    Args:
        checkpoints: where the run's lie; in a store they are moved within it.
        step: of `start`.

    Raises:
        CheckpointError: something cannot be moved.
    """
    try:
        _delete_unfinished(run_dir, checkpoints)
        _move_abandoned(run_dir, checkpoints, start, step if start.own else 0)
    except OSError as error:
        cause, remedy = explain_os_error(error, "train in another directory with --run-dir")
        raise CheckpointError(
            f"cannot move what the run leaves behind: {cause}",
            error.filename or str(run_dir),
            remedy,
        ) from error


def _delete_unfinished(run_dir: Path, checkpoints: Place) -> None:
    if isinstance(checkpoints, StorePath):
        for unfinished in unfinished_in(checkpoints):
            unfinished.remove_checkpoint()
    else:
        for path in checkpoints.iterdir() if checkpoints.is_dir() else ():
            if UNFINISHED_CHECKPOINT.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)
    for path in run_dir.iterdir():
        empty = EMPTY_FILE.fullmatch(path.name) and path.stat().st_size == 0
        if empty or UNFINISHED_FILE.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _move_abandoned(run_dir: Path, checkpoints: Place, start: Start, step: int) -> None:
    """Move the checkpoints and, unless a crash lost their checkpoint, the metrics and whatever else
    has lines of later steps than `step`."""
    later = [number for number in checkpoint_steps(checkpoints) if number > step]
    records = {name: lines_until(run_dir / name, step) for name in RECORDS if start.rewinds}
    records = {name: parts for name, parts in records.items() if parts[1]}
    if not later and not records:
        return
    targets: list[Place] = []
    if records or not isinstance(checkpoints, StorePath):
        target = _new_directory(run_dir / ABANDONED, step)
        targets.append(target)
    if later and isinstance(checkpoints, StorePath):
        targets.append(aside := _new_directory(checkpoints / ABANDONED, step))
    # Killed between any two of these, the run goes on from where it is then, or does them again.
    for name, (_, lines) in records.items():
        write_atomically(target / name, "".join(lines))
    for number in reversed(later):
        source = step_directory(checkpoints, number)
        if isinstance(source, StorePath):
            source.move_checkpoint(aside / source.name)
        else:
            shutil.move(source, target / source.name)  # it may lie on another disk
    for name, (kept, _) in records.items():
        write_atomically(run_dir / name, "".join(kept))
    count = len(records[METRICS][1]) if METRICS in records else 0
    steps = f"checkpoints of steps {', '.join(map(str, later))}" if later else "no checkpoint"
    print(
        f"moved what came after step {step} into {' and '.join(map(str, targets))}: {steps},"
        f" {count} lines of metrics",
        flush=True,
    )


def _new_directory(abandoned: AnyPlace, step: int) -> AnyPlace:
    """`after_step_00000004`, or with a number behind it from the second one on."""
    number, target = 1, abandoned / f"after_step_{step:08d}"
    while target.exists():
        number += 1
        target = abandoned / f"after_step_{step:08d}_{number}"
    target.mkdir(parents=True)
    return target
