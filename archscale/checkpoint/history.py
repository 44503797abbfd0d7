"""Which checkpoint a run continues from, by which keys it would be of another trajectory, and what
the run's own checkpoints say of those before them."""

from __future__ import annotations

import json
import os
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from archscale.checkpoint.changes import (
    DATA,
    OPTIMIZER,
    SCHEDULE,
    Change,
    Origin,
    Origins,
    recorded,
    to_state,
)
from archscale.checkpoint.directory import checkpoint_id, newest_valid, read_state
from archscale.checkpoint.place import Place, StorePath, checkpoints_of, place_of
from archscale.config import Config
from archscale.config.layers import Layer, flatten
from archscale.data.mixture import quotas
from archscale.data.split import TokenSplit
from archscale.data.training_data import TrainingData
from archscale.errors import CheckpointError, ConfigError
from archscale.files import METRICS, checkpoint_steps, step_directory

MIXTURE = "data.mixture"
BALANCE_SCOPE, MICRO_BATCH = "model.moe.balance_scope", "training.micro_batch"
# May differ between a checkpoint and the run that resumes it: they do not change the trajectory.
FREE_KEYS = (
    "name",
    "parallel",
    "telemetry",
    "eval",
    "checkpoint",
    MICRO_BATCH,
    "training.compile",
    "training.activation_checkpoint",
    "training.init_from",
    "training.ema",
    "data.train",
    "data.val",
    "data.tokenizer",
)


def other_trajectory(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Dotted keys of two resolved configs that differ and make them runs of different trajectories,
    in order."""
    mode = "telemetry.guard.mode"
    acts = "act" in (before.get(mode), now.get(mode))  # then the guard decides over updates
    # Then the balance loss is of each micro-batch.
    micro = "micro" in (before.get(BALANCE_SCOPE), now.get(BALANCE_SCOPE))
    for key in sorted(before.keys() | now.keys()):
        free = any(key == free or key.startswith(free + ".") for free in FREE_KEYS)
        same = before.get(key) == now.get(key) or (
            key == MIXTURE and _proportions(before.get(key)) == _proportions(now.get(key))
        )
        if key.startswith("data_set.") and key.endswith(".tokenizer"):
            same |= not (before.get(key) and now.get(key))  # one that is unknown may be any
        counts = (acts and key.startswith("telemetry.guard.")) or (micro and key == MICRO_BATCH)
        if not same and (not free or counts):
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
        changes: what is not as it was before the checkpoint, and is not recorded yet.
    """

    checkpoint: Place | None
    rewinds: bool = False
    own: bool = True
    changes: tuple[Change, ...] = ()


class Lineage:
    """What a run's next checkpoint continues: its parent, and before it the checkpoints that
    `--resume` has named, each as `{"step": …, "id": …}`, with `run` and `checkpoint` (a path) where
    it is another run directory's. And what has been changed on purpose on the way.

    Attributes:
        origins: where the data order and the schedule begin.
    """

    def __init__(self, start: Start | None = None) -> None:
        self._start = start or Start(None)
        self._parent: dict[str, Any] | None = None
        self._resumed: list[dict[str, Any]] = []
        self._changes: list[Change] | None = None  # None: no checkpoint has been restored yet
        self.origins = Origins()

    def restore(self, state: dict[str, Any], rewinds: bool) -> None:
        """The run goes on from the checkpoint of this `state`, to which `--resume` goes back."""
        self._parent = {"step": state["step"], "id": checkpoint_id(state)}
        if rewinds and not self._start.own:
            assert self._start.checkpoint is not None
            path = absolute(self._start.checkpoint)
            self._parent |= {"run": state["config"]["name"], "checkpoint": path}
        # A fall-back may go behind the checkpoint that was named: the command has had its way all
        # the same, and is not to have it again.
        named = [*self._resumed, self._parent] if rewinds else self._resumed
        before = state.get("resumed", [])
        self._resumed = before + [entry for entry in named if entry not in before]
        self._restore_changes(state)

    def _restore_changes(self, state: dict[str, Any]) -> None:
        """What has been changed since an older checkpoint holds from there on after a fall-back."""
        step, new = state["step"], self._unrecorded(state)
        self._changes = recorded(state) + [replace(change, step=step) for change in new]
        self.origins = Origins.of_state(state)
        parts = {part for change in new for part in change.parts} & {DATA, SCHEDULE}
        if parts:
            here = Origin(step, trained_samples(state))
            self.origins = replace(self.origins, **dict.fromkeys(parts, here))

    def _unrecorded(self, state: dict[str, Any]) -> list[Change]:
        before = recorded(state)
        if self._changes is None:
            return list(self._start.changes)
        return self._changes[len(before) :]

    def resets_optimizer(self, state: dict[str, Any]) -> bool:
        """Whether the optimizer starts anew at the checkpoint of this state, which is about to be
        restored."""
        return any(OPTIMIZER in change.parts for change in self._unrecorded(state))

    def next(self, step: int) -> dict[str, Any]:
        """For the state of the checkpoint of `step`, which is the parent from then on. Each rank
        makes an `id` of its own: that of rank 0 is written."""
        entries = {"id": uuid.uuid4().hex[:16], "parent": self._parent, "resumed": self._resumed}
        self._parent = {"step": step, "id": entries["id"]}
        return entries | to_state(self.origins, self._changes or [])


def trained_samples(state: Mapping[str, Any]) -> int:
    """Sequences of the run up to a checkpoint."""
    batches = Config.from_dict(state["config"]).batches
    return Origins.of_state(state).batches(batches).at(state["step"])[0]


def absolute(path: Place) -> str:
    """What names a checkpoint from any working directory."""
    return str(path) if isinstance(path, StorePath) else os.path.abspath(path)


def find_start(
    run_dir: Path, checkpoints: Place, resume: str, damaged: dict[Place, str] | None = None
) -> Start:
    """The checkpoint to continue from, if any: the newest one; with a path as `resume` the newest
    one that continues that path's, or else that itself. Whether it belongs to the run's trajectory
    is for the caller to check.

    Args:
        checkpoints: where the run's lie.
        damaged: as in `newest_valid`.

    Raises:
        CheckpointError: `resume` names no checkpoint, or is `never` where there is a run; or the
            run has left its checkpoints elsewhere.
    """
    if resume == "never" and (checkpoint_steps(checkpoints) or (run_dir / METRICS).exists()):
        remedy = "give another --run-dir, or drop --resume never"
        raise CheckpointError("the run directory holds a run", str(run_dir), remedy)
    if resume in ("auto", "never"):
        before = checkpoints_of(run_dir)
        if before != checkpoints and not checkpoint_steps(checkpoints) and checkpoint_steps(before):
            raise CheckpointError(
                f"the run's checkpoints lie in {before}, and none in checkpoint.directory",
                str(checkpoints),
                "copy them there, leave checkpoint.directory as it was, or name one with --resume",
            )
        return Start(newest_valid(checkpoints, warn, damaged=damaged))
    path = place_of(resume)
    newest = newest_continuing(checkpoints, path, damaged)
    if newest is not None:
        print(f"goes on from {newest}, which continues {path}", flush=True)
        return Start(newest)
    state = read_state(path)
    copy = step_directory(checkpoints, state["step"])
    return Start(path, rewinds=True, own=_has_id(copy, checkpoint_id(state)))


def newest_continuing(
    checkpoints: Place, path: Place, damaged: dict[Place, str] | None = None
) -> Place | None:
    """The newest checkpoint there that continues `path`, to which a run has gone back: a job that
    is started again with it goes on from where it is, also when `path` has been pruned since.

    Args:
        damaged: as in `newest_valid`.
    """
    if not checkpoint_steps(checkpoints):
        return None
    names = entry_of(checkpoints, path)

    def continues(candidate: Place) -> bool:
        try:
            return any(map(names, read_state(candidate).get("resumed", [])))
        except CheckpointError:
            return False

    return newest_valid(checkpoints, warn, counts=continues, damaged=damaged)


def entry_of(checkpoints: Place, path: Place) -> Callable[[Mapping[str, Any]], bool]:
    """Whether a `{"step": …, "id": …}` of a checkpoint of the folder `checkpoints` means `path`,
    which may have been pruned or moved away since.

    Raises:
        CheckpointError: `path` is a checkpoint that cannot be read.
    """
    if (path / "state.json").exists():
        named = checkpoint_id(read_state(path))
        return lambda entry: entry["id"] == named
    named_path, own = absolute(path), path.resolve().parent == checkpoints.resolve()
    return lambda entry: (
        entry["checkpoint"] == named_path
        if "checkpoint" in entry
        else own and step_directory(checkpoints, entry["step"]).name == path.name
    )


def _has_id(path: Place, named: str) -> bool:
    try:
        return checkpoint_id(read_state(path)) == named
    except CheckpointError:
        return False


def warn(text: str) -> None:
    """To the terminal."""
    print(f"archscale: warning: {text}", file=sys.stderr)


def saved_config(source: Place, saved: Mapping[str, Any]) -> Config:
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


def differing_keys(
    source: Place, saved: Mapping[str, Any], config: Config, data: TrainingData
) -> dict[str, tuple[Any, Any]]:
    """Dotted keys (of the data set as `data_set.…`) by which a run of `config` would be another
    trajectory than the one that saved the checkpoint `source`, with their values before and now.

    Raises:
        CheckpointError: as `saved_config`.
    """
    before, now = (
        flatten({**saved_config(source, saved).resolved(), "data_set": saved["data"]}),
        flatten({**config.resolved(), "data_set": identity(data)}),
    )
    return {key: (before.get(key), now.get(key)) for key in other_trajectory(before, now)}


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
