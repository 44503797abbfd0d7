"""What `training.precision: auto` means for a run: what it was begun with, wherever it goes on."""

from __future__ import annotations

from pathlib import Path

from archscale.checkpoint.directory import read_state
from archscale.checkpoint.history import saved_config
from archscale.checkpoint.place import place_of
from archscale.config import Config, load_config
from archscale.distributed import gather_objects, same_everywhere
from archscale.errors import CheckpointError, ConfigError
from archscale.files import CONFIG


def with_kept_precision(config: Config, run_dir: Path, resume: str) -> Config:
    """`config` with the precision that the run to be continued was begun with; `auto` stays where
    none is continued.

    Args:
        resume: `auto`, `never` or the path of a checkpoint, also one that a decay continues.
    """
    if config.training.precision != "auto":
        return config
    if resume not in ("auto", "never"):
        source = place_of(resume)
        try:
            return _as_in(config, saved_config(source, read_state(source)))
        except CheckpointError:  # gone or damaged: the run directory may have continued it
            pass
    if (run_dir / CONFIG).is_file():
        return _as_in(config, load_config(run_dir / CONFIG))
    return config


def _as_in(config: Config, before: Config) -> Config:
    kept = before.training.precision
    return config if kept == "auto" else config.with_precision(kept)


def refuse_other_precision(precision: str) -> None:
    """Refuses ranks whose devices have chosen otherwise than rank 0's.

    Raises:
        ConfigError: on every rank, with the first that differs.
    """
    first, *others = gather_objects(precision)
    for rank, other in enumerate(others, 1):
        if other != first:
            raise same_everywhere(
                ConfigError(
                    f"auto is {first} on the device of rank 0 and {other} on that of rank {rank}",
                    "training.precision",
                    "set it to fp32 or bf16",
                )
            )
