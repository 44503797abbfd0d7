"""Deleting a run's older checkpoints on demand, by the rules of `checkpoint.keep`, while nobody
trains there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from archscale.checkpoint.directory import discard, kept_steps, read_state
from archscale.checkpoint.integrity import problems_of
from archscale.checkpoint.listing import disk_size, folder_of
from archscale.checkpoint.place import Place, StorePath
from archscale.errors import (
    ArchscaleError,
    CheckpointError,
    ConfigError,
    TrainingError,
    explain_os_error,
)
from archscale.files import step_directory
from archscale.train.ownership import sole_owner


@dataclass(frozen=True)
class Pruning:
    """What goes, and why the others stay.

    Attributes:
        kept: by step the reason.
        deleted: by step its size on disk in bytes.
    """

    folder: Place
    kept: dict[int, str]
    deleted: dict[int, int]

    @property
    def freed(self) -> int:
        """Bytes on disk."""
        return sum(self.deleted.values())

    def render(self, dry_run: bool) -> str:
        """What stays and goes, for people; the last line is the sum."""
        stays = [f"step {step} stays: {reason}" for step, reason in self.kept.items()]
        goes = [f"step {step} goes: {size / 1e6:,.1f} MB" for step, size in self.deleted.items()]
        count = f"{len(self.deleted)} checkpoint{'' if len(self.deleted) == 1 else 's'}"
        done = "would be deleted" if dry_run else "deleted"
        total = f"{count} {done}, {self.freed / 1e6:,.1f} MB, in {self.folder}"
        return "\n".join([*stays, *(goes if dry_run else []), total])


def prune_checkpoints(
    directory: Place,
    keep: int,
    keep_every: int | None,
    dry_run: bool,
    progress: Callable[[str], None],
) -> Pruning:
    """Delete what the rules do not keep, from the run directory or folder `directory`.

    Args:
        keep: newest checkpoints that stay.
        keep_every: checkpoints whose step it divides stay as well.
        dry_run: delete nothing, and take no ownership.
        progress: hears of each deletion before it begins.

    Raises:
        CheckpointError: nothing to prune there, another process trains there, or a checkpoint
            cannot be deleted.
    """
    folder = folder_of(directory)
    if dry_run:
        return _plan(folder.path, keep, keep_every)
    try:
        with sole_owner(*dict.fromkeys((folder.run_dir, folder.path))):
            planned = _plan(folder.path, keep, keep_every)
            for step, size in planned.deleted.items():
                path = step_directory(folder.path, step)
                progress(f"deleting {path}: {size / 1e6:,.1f} MB")
                _delete(path)
    except CheckpointError:
        raise
    except (TrainingError, ConfigError) as error:
        raise _refused(error) from error
    return planned


def _refused(error: ArchscaleError) -> CheckpointError:
    """The owner's refusal, which speaks of training, in words that help here."""
    if isinstance(error, TrainingError):
        remedy = "wait for it to end, or end it; while it trains, its checkpoint.keep prunes"
    else:
        remedy = "get permission to write there, or see what would go with --dry-run"
    return CheckpointError(error.what, error.where, remedy)


def _delete(path: Place) -> None:
    try:
        discard(path)
    except OSError as error:
        cause, remedy = explain_os_error(error, "delete it yourself")
        raise CheckpointError(f"cannot prune: {cause}", str(path), remedy) from error
    if path.exists() or (
        not isinstance(path, StorePath) and path.with_name(f".{path.name}.deleted").exists()
    ):
        raise CheckpointError(
            "a checkpoint could not be deleted to its end", str(path), "delete the rest yourself"
        )


def _plan(folder: Place, keep: int, keep_every: int | None) -> Pruning:
    steps = [int(path.name[5:]) for path in folder_of(folder).checkpoints()]
    kept = kept_steps(steps, keep, keep_every, _not_finite_since(folder, steps))
    if not any(_is_whole(folder, step) for step in sorted(kept, reverse=True)):
        others = (step for step in reversed(steps) if step not in kept)
        if (whole := next((step for step in others if _is_whole(folder, step)), None)) is not None:
            kept[whole] = "the newest that is whole"
    deleted = {step: disk_size(step_directory(folder, step)) for step in steps if step not in kept}
    return Pruning(folder, dict(sorted(kept.items())), deleted)


def _not_finite_since(folder: Place, steps: Sequence[int]) -> int | None:
    """What the newest checkpoint that can be read says of it."""
    for step in reversed(steps):
        with contextlib.suppress(CheckpointError, AttributeError):
            since = read_state(step_directory(folder, step)).get("not_finite_since")
            return None if since is None else int(since)
    return None


def _is_whole(folder: Place, step: int) -> bool:
    return not problems_of(step_directory(folder, step))[0]
