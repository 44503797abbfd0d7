"""From the path that a user names, of a run or of a checkpoint in one, to what lies there."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archscale.checkpoint.directory import newest_valid, read_state, recorded_files, wrong_files
from archscale.checkpoint.history import saved_config
from archscale.checkpoint.place import STATE, Place, checkpoints_of
from archscale.config import Config, load_config
from archscale.data.stored import trained_tokenizer
from archscale.data.tokenizer import Tokenizer
from archscale.errors import CheckpointError
from archscale.files import ABANDONED, CHECKPOINTS, CONFIG, checkpoint_steps


@dataclass(frozen=True)
class Target:
    """A checkpoint with all that it takes to use its model.

    Attributes:
        config: that the checkpoint was written with.
    """

    run_dir: Path
    checkpoint: Place
    step: int
    config: Config
    tokenizer: Tokenizer

    @property
    def abandoned(self) -> bool:
        """Whether the run has gone back to before this checkpoint, so it is of another history."""
        place = self.checkpoint
        paths = (place.absolute(), place.resolve()) if isinstance(place, Path) else (place,)
        return any(path.parent.parent.name == ABANDONED for path in paths)


def find_target(target: Path) -> Target:
    """The checkpoint that a path names, with its config and its run's tokenizer.

    Raises:
        CheckpointError: there is none, it is damaged, or its run had diverged.
        DataError: the run's tokenizer is gone, damaged or another one.
    """
    named = (target / "state.json").is_file()
    run_dir = _run_of(target) if named else target
    checkpoint: Place | None = target if named else None
    if not named:
        checkpoint = newest_valid(checkpoints_of(run_dir), _warn)
    if checkpoint is None or not (run_dir / CONFIG).is_file():
        raise CheckpointError(
            "no run with a whole checkpoint",
            str(target),
            "name a run directory that train has filled, such as runs/<name>, or a checkpoint in"
            f" it, such as runs/<name>/{CHECKPOINTS}/step_00001000",
        )
    return target_of(run_dir, checkpoint)


def target_of(run_dir: Path, checkpoint: Place) -> Target:
    """A checkpoint of a run, wherever the run has it, with its config and its run's tokenizer.

    Raises:
        CheckpointError: it is damaged, or its run had diverged.
        DataError: the run's tokenizer is gone, damaged or another one.
    """
    state = _verified_state(checkpoint)
    refuse_diverged(state, checkpoint)
    # What the weights belong to is what the checkpoint says: the run directory's config may have
    # been edited since. Where the data lie now is what the run directory says.
    config = saved_config(checkpoint, state)
    places = load_config(run_dir / CONFIG).data
    tokenizer = trained_tokenizer(run_dir, places, state["data"])
    return Target(run_dir, checkpoint, state["step"], config, tokenizer)


def _verified_state(checkpoint: Place) -> dict[str, Any]:
    """What a checkpoint says of itself, after every byte of it has been compared with its checksum
    (where it was written with them); CheckpointError where one differs."""
    state = read_state(checkpoint)
    missing = [
        f"{STATE} has no {key}"
        for key, kind in (("step", int), ("config", dict), ("data", dict))
        if not isinstance(state.get(key), kind)
    ]
    if problems := missing or wrong_files(checkpoint, recorded_files(state)):
        raise CheckpointError(
            f"the checkpoint is damaged: {problems[0]}", str(checkpoint), "name another one"
        )
    return state


def _run_of(checkpoint: Path) -> Path:
    """The run directory that a checkpoint lies in, or has been moved aside in: by its name or, if
    that has none, by where links lead. The folder of checkpoints may be a link, and so may one
    checkpoint."""
    for path in (checkpoint.absolute(), checkpoint.resolve()):
        run_dir = path.parent.parent
        if run_dir.name == ABANDONED:
            run_dir = run_dir.parent
        if (run_dir / CONFIG).is_file():
            break
    return run_dir


def _warn(text: str) -> None:
    print(f"archscale: warning: {text}", file=sys.stderr)


def refuse_diverged(state: dict[str, Any], checkpoint: Place) -> None:
    """CheckpointError where the loss of the checkpoint's run was no longer finite."""
    since = state.get("not_finite_since")
    if since is None:
        return
    # The loss of a step is that of the weights of the step before.
    before = [step for step in checkpoint_steps(checkpoint.parent) if step < since - 1]
    remedy = f"name the checkpoint of step {before[-1]}" if before else "name a run that has not"
    raise CheckpointError(
        f"the run had diverged: its loss was not finite since step {since}",
        str(checkpoint),
        remedy,
    )
