"""Which checkpoint a run continues from, whether it belongs to this run's trajectory, and what the
run's own checkpoints say of those before them."""

from __future__ import annotations

import json
import sys
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archscale.checkpoint.directory import checkpoint_id, newest_valid, read_state
from archscale.config import Config
from archscale.config.layers import Layer, flatten
from archscale.data.mixture import quotas
from archscale.data.split import TokenSplit
from archscale.data.training_data import TrainingData
from archscale.errors import CheckpointError, ConfigError
from archscale.files import CHECKPOINTS, METRICS, checkpoint_steps, step_directory

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


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Attributes:
        checkpoint: that it continues from; None: from the beginning.
        rewinds: `--resume` names the checkpoint, and nothing in the run directory continues it yet.
        own: the run directory's history leads to it; otherwise nothing there does.
    """

    checkpoint: Path | None
    rewinds: bool = False
    own: bool = True


class Lineage:
    """What a run's next checkpoint continues: its parent, and before it the checkpoints that
    `--resume` has named, each as `{"step": …, "id": …}`."""

    def __init__(self) -> None:
        self._parent: dict[str, Any] | None = None
        self._resumed: list[dict[str, Any]] = []

    def restore(self, state: dict[str, Any], rewinds: bool) -> None:
        """The run goes on from the checkpoint of this `state`, to which `--resume` goes back."""
        self._parent = {"step": state["step"], "id": checkpoint_id(state)}
        # After a fall-back the state may be of the very checkpoint that was named.
        named = [*self._resumed, self._parent] if rewinds else self._resumed
        named = [entry for entry in named if entry["step"] <= state["step"]]
        before = state.get("resumed", [])
        self._resumed = before + [entry for entry in named if entry not in before]

    def next(self, step: int) -> dict[str, Any]:
        """For the state of the checkpoint of `step`, which is the parent from then on. Each rank
        makes an `id` of its own: that of rank 0 is written."""
        entries = {"id": uuid.uuid4().hex[:16], "parent": self._parent, "resumed": self._resumed}
        self._parent = {"step": step, "id": entries["id"]}
        return entries


def choose_checkpoint(
    config: Config,
    data: TrainingData,
    run_dir: Path,
    resume: str,
    damaged: dict[Path, str] | None = None,
) -> Start:
    """The checkpoint to continue from, if any, after checking that it belongs to this trajectory:
    the newest one; with a path as `resume` the newest one that continues that path's, or else that
    itself.

    Args:
        damaged: as in `newest_valid`.

    Raises:
        ConfigError: a key that would change the trajectory.
        CheckpointError: `resume` names no checkpoint, or is `never` where there is a run; or
            another version wrote the checkpoint.
    """
    checkpoints = run_dir / CHECKPOINTS
    if resume == "never" and (checkpoint_steps(checkpoints) or (run_dir / METRICS).exists()):
        remedy = "give another --run-dir, or drop --resume never"
        raise CheckpointError("the run directory holds a run", str(run_dir), remedy)
    if resume in ("auto", "never"):
        start = Start(newest_valid(checkpoints, warn, damaged=damaged))
    else:
        start = _named(checkpoints, Path(resume), damaged)
    source = start.checkpoint
    if source is not None:
        saved = read_state(source)
        before, now = (
            flatten({**_saved_config(source, saved).resolved(), "data_set": saved["data"]}),
            flatten({**config.resolved(), "data_set": identity(data)}),
        )
        for key in other_trajectory(before, now):
            raise ConfigError(
                f"{key} is {now.get(key)}, the checkpoint's run has {before.get(key)}",
                str(source),
                "restore the value, or start another run with --run-dir",
            )
    return start


def _named(checkpoints: Path, path: Path, damaged: dict[Path, str] | None) -> Start:
    """The start that `--resume path` means: a job that is started again with it goes on from where
    it is, also when `path` has been pruned since."""
    own = path.resolve().parent == checkpoints.resolve()
    pruned = own and not (path / "state.json").exists()
    named = "" if pruned else checkpoint_id(read_state(path))

    def continues(candidate: Path) -> bool:
        try:
            resumed = read_state(candidate).get("resumed", [])
        except CheckpointError:
            return False
        return any(
            step_directory(checkpoints, entry["step"]).name == path.name
            if pruned
            else entry["id"] == named
            for entry in resumed
        )

    newest = newest_valid(checkpoints, warn, counts=continues, damaged=damaged)
    if newest is not None:
        print(f"goes on from {newest}, which continues {path}", flush=True)
        return Start(newest)
    copy = step_directory(checkpoints, read_state(path)["step"])
    return Start(path, rewinds=True, own=_has_id(copy, named))


def _has_id(path: Path, named: str) -> bool:
    try:
        return checkpoint_id(read_state(path)) == named
    except CheckpointError:
        return False


def warn(text: str) -> None:
    """To the terminal."""
    print(f"archscale: warning: {text}", file=sys.stderr)


def _saved_config(source: Path, saved: Mapping[str, Any]) -> Config:
    """The config of a checkpoint through the present schema: keys that are newer than it have their
    defaults.

    Raises:
        CheckpointError: it has a key or a value that this version does not know.
    """
    try:
        return Config.from_layers([Layer(str(source / "state.json"), saved["config"])])
    except ConfigError as error:
        raise CheckpointError(
            f"another version of archscale wrote this checkpoint: {error.what}",
            error.where,
            "resume it with that version, or start another run with --run-dir",
        ) from None


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
