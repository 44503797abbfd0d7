"""The newest checkpoint that loads: one rank chooses, all of them load, and where it is damaged an
older one is tried."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from archscale.checkpoint.directory import newest_valid, passed_over
from archscale.checkpoint.history import Start, find_start, warn
from archscale.checkpoint.place import Place
from archscale.distributed import on_rank_zero, rank
from archscale.errors import DamagedCheckpoint

Loaded = TypeVar("Loaded")


def start_from_newest(
    run_dir: Path, checkpoints: Place, resume: str, load: Callable[[Start], Loaded]
) -> Loaded:
    """What `load` returns of the start that `find_start` chooses, on all ranks together. Damaged
    checkpoints are passed over with a warning that names the file.

    Raises:
        CheckpointError: as `find_start` and `load`.
        DamagedCheckpoint: the very checkpoint that `resume` names is.
    """
    damaged: dict[Place, str] = {}
    while True:
        start = on_rank_zero(lambda: find_start(run_dir, checkpoints, resume, damaged))
        try:
            return load(start)
        except DamagedCheckpoint as error:
            if start.checkpoint is None or start.rewinds:
                raise
            _pass_over(start.checkpoint, error, damaged, warn)


def load_newest(
    directory: Place, before: int, warn: Callable[[str], None], load: Callable[[Place], Loaded]
) -> Loaded | None:
    """What `load` returns of the newest checkpoint of a step below `before` that is not damaged, on
    all ranks together; None where there is none. On rank 0 `warn` hears of the damaged ones."""
    damaged: dict[Place, str] = {}
    while True:
        path = on_rank_zero(lambda: newest_valid(directory, warn, before, damaged=damaged))
        if path is None:
            return None
        try:
            return load(path)
        except DamagedCheckpoint as error:
            _pass_over(path, error, damaged, warn)


def _pass_over(
    path: Place,
    error: DamagedCheckpoint,
    damaged: dict[Place, str],
    warn: Callable[[str], None],
) -> None:
    damaged[path] = error.problem
    if rank() == 0:
        warn(passed_over(path, error.problem))
