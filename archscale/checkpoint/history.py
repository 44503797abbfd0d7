"""Which checkpoint a run continues from, and whether it belongs to this run's trajectory."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from archscale.checkpoint.directory import newest_valid, read_state
from archscale.config import Config
from archscale.config.layers import flatten
from archscale.data.mixture import quotas
from archscale.data.split import TokenSplit
from archscale.data.training_data import TrainingData
from archscale.errors import CheckpointError, ConfigError, explain_os_error
from archscale.files import CHECKPOINTS, METRICS, checkpoint_steps

MIXTURE = "data.mixture"
# May differ between a checkpoint and the run that resumes it: they do not change the trajectory.
FREE_KEYS = (
    "name",
    "parallel",
    "telemetry",
    "eval",
    "checkpoint",
    "training.micro_batch",
    "training.compile",
    "training.activation_checkpoint",
    "data.train",
    "data.val",
    "data.tokenizer",
)


def other_trajectory(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Dotted keys of two resolved configs that differ and make them runs of different trajectories,
    in order."""
    mode = "telemetry.guard.mode"
    acts = "act" in (before.get(mode), now.get(mode))  # then the guard decides over updates
    for key in sorted(before.keys() | now.keys()):
        free = any(key == free or key.startswith(free + ".") for free in FREE_KEYS)
        same = before.get(key) == now.get(key) or (
            key == MIXTURE and _proportions(before.get(key)) == _proportions(now.get(key))
        )
        if key.startswith("data_set.") and key.endswith(".tokenizer"):
            same |= not (before.get(key) and now.get(key))  # one that is unknown may be any
        if not same and (not free or (acts and key.startswith("telemetry.guard."))):
            yield key


def _proportions(mixture: Any) -> dict[str, int]:
    """What the order of a `data.mixture` follows from: not where its data lie. It is a list, its
    JSON in a table, or null."""
    entries = json.loads(mixture) if isinstance(mixture, str) else mixture
    return quotas({entry["name"]: entry["weight"] for entry in entries}) if entries else {}


def choose_checkpoint(
    config: Config, data: TrainingData, run_dir: Path, resume: str
) -> Path | None:
    """The checkpoint to continue from, if any, after checking that it belongs to this trajectory
    and that the run directory can be written.

    Raises:
        ConfigError: a key that would change the trajectory, or a run directory that cannot be
            written.
        CheckpointError: `resume` names no checkpoint, or is `never` where there is a run.
    """
    checkpoints = run_dir / CHECKPOINTS
    if resume == "never" and (checkpoint_steps(checkpoints) or (run_dir / METRICS).exists()):
        remedy = "give another --run-dir, or drop --resume never"
        raise CheckpointError("the run directory holds a run", str(run_dir), remedy)
    if resume in ("auto", "never"):
        source = newest_valid(
            checkpoints, lambda text: print(f"archscale: warning: {text}", file=sys.stderr)
        )
    else:
        source = Path(resume)
    if source is not None:
        saved = read_state(source)
        before, now = (
            # Through the present schema: keys that are newer than the checkpoint have their
            # defaults.
            flatten({**Config.from_dict(saved["config"]).resolved(), "data_set": saved["data"]}),
            flatten({**config.resolved(), "data_set": identity(data)}),
        )
        for key in other_trajectory(before, now):
            raise ConfigError(
                f"{key} is {now.get(key)}, the checkpoint's run has {before.get(key)}",
                str(source),
                "restore the value, or start another run with --run-dir",
            )
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run_dir):
            pass
    except OSError as error:
        cause, remedy = explain_os_error(error, "give another with --run-dir")
        raise ConfigError(
            f"cannot write the run directory: {cause}", str(run_dir), remedy
        ) from error
    return source


def identity(data: TrainingData) -> dict[str, Any]:
    """What makes the training data the same, wherever they lie; of a mixture by source."""
    sources = {source.name: identity_of(split) for source, split in zip(data.sources, data.splits)}
    return {"sources": sources} if data.mixed else sources[""]


def identity_of(split: TokenSplit) -> dict[str, Any]:
    """What tells a split from others, wherever it lies."""
    return {
        "tokenizer": split.fingerprint,
        "tokens": split.num_tokens,
        "origin": split.origin,
    }
