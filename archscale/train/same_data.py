"""Whether all ranks read the same data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from archscale.checkpoint.history import identity_of
from archscale.data.training_data import TrainingData
from archscale.data.validation import ValidationSet
from archscale.distributed import gather_objects, same_everywhere
from archscale.errors import ConfigError


def refuse_other_data(data: TrainingData, validation: Sequence[ValidationSet]) -> None:
    """Compares what each rank has opened with what rank 0 has: machines with disks of their own may
    have different data at the same path.

    Raises:
        ConfigError: on every rank, with the first data set that differs.
    """
    opened = {
        source.owner: (str(split.path), identity_of(split))
        for source, split in zip(data.sources, data.splits)
    }
    for held in validation:
        owner = f"the validation split of source {held.name}" if held.name else "data.val"
        opened[owner] = str(held.split.path), identity_of(held.split)
    first, *others = gather_objects(opened)
    for rank, other in enumerate(others, 1):
        for owner, (path, _) in {**first, **other}.items():
            ours, theirs = (of_rank.get(owner, (path, None))[1] for of_rank in (first, other))
            if ours != theirs:
                raise same_everywhere(_difference(owner, path, rank, ours, theirs))


def _difference(
    owner: str,
    path: str,
    rank: int,
    ours: dict[str, Any] | None,
    theirs: dict[str, Any] | None,
) -> ConfigError:
    if ours is None or theirs is None:
        lacking, having = (rank, 0) if theirs is None else (0, rank)
        problem = f"{owner} is missing on rank {lacking}, and there on rank {having}"
    elif ours["tokens"] != theirs["tokens"]:
        problem = (
            f"{owner} has {theirs['tokens']:,} tokens on rank {rank}, {ours['tokens']:,} on rank 0"
        )
    else:
        problem = f"{owner} on rank {rank} is not what it is on rank 0"
    return ConfigError(problem, path, "give every machine a copy of the same data set")
