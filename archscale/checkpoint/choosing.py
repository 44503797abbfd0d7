"""The newest checkpoint that verifies: one rank chooses, and all of them read what it chose."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from archscale.checkpoint.directory import newest_valid, passed_over
from archscale.checkpoint.history import Start, find_start, warn
from archscale.checkpoint.place import Place
from archscale.checkpoint.saving import verify_together
from archscale.distributed import on_rank_zero, rank, same_everywhere
from archscale.errors import CheckpointError


def verified_start(run_dir: Path, checkpoints: Place, resume: str) -> Start:
    """As `find_start`, on all ranks together: the checkpoint is as it was written. Damaged ones are
    passed over with a warning that names the file.

    Raises:
        CheckpointError: as `find_start`; or the very checkpoint that `resume` names is damaged.
    """
    damaged: dict[Place, str] = {}
    while True:
        start = on_rank_zero(lambda: find_start(run_dir, checkpoints, resume, damaged))
        problem = start.checkpoint and verify_together(start.checkpoint)
        if not problem:
            return start
        if start.rewinds:
            remedy = "name an older checkpoint"
            raise same_everywhere(
                CheckpointError(f"it is damaged: {problem}", str(start.checkpoint), remedy)
            )
        _pass_over(start.checkpoint, problem, damaged, warn)


def newest_verified(directory: Place, warn: Callable[[str], None], before: int) -> Place | None:
    """The newest checkpoint of a step below `before` that is as it was written, on all ranks
    together; `warn` hears of the ones passed over, on rank 0."""
    damaged: dict[Place, str] = {}
    while True:
        path = on_rank_zero(lambda: newest_valid(directory, warn, before, damaged=damaged))
        problem = path and verify_together(path)
        if not problem:
            return path
        _pass_over(path, problem, damaged, warn)


def _pass_over(
    path: Place, problem: str, damaged: dict[Place, str], warn: Callable[[str], None]
) -> None:
    damaged[path] = problem
    if rank() == 0:
        warn(passed_over(path, problem))
