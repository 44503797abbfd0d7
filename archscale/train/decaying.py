"""`--decay-from`: the config of a run that decays from a checkpoint of a wsd or constant run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from archscale.checkpoint.changes import Origins, recorded
from archscale.checkpoint.directory import read_state
from archscale.checkpoint.history import entry_of, newest_continuing, saved_config
from archscale.checkpoint.place import Place, checkpoints_of
from archscale.config import Config
from archscale.config.layers import Layer
from archscale.errors import ConfigError
from archscale.train.continuing import TOKENS, Wishes, schedule_tokens
from archscale.train.rates import Rates

FLAT = ("wsd", "constant")


def decaying(config: Config, run_dir: Path, wishes: Wishes) -> Config:
    """`config` as a run whose wsd decay begins exactly with the checkpoint `wishes.decay_from`, at
    t tokens, and whose rates are planned for what the checkpoint's run was.

    It ends after t / (1 − `schedule.decay_ratio`) tokens in whole steps (t, and so the end, counted
    from where `schedule.decay_share_of` counts), or with `training.tokens` where the command gives
    them; `schedule.decay_ratio` becomes the decay's share of the whole.

    Raises:
        ConfigError: a checkpoint inside a warm-up, a decay or under another schedule; or an end
            that is not after it.
        CheckpointError: it is no checkpoint, nor one that this run has continued.
    """
    path = wishes.decay_from
    assert path is not None
    if config.schedule.kind not in FLAT:
        raise _other_kind("the config", config.schedule.kind, "schedule.kind")
    begun = _recorded_start(checkpoints_of(run_dir, config.checkpoint), path) or _start(path)
    tokens, context = begun["tokens"], config.model.context
    if tokens <= config.schedule.warmup_tokens:
        raise ConfigError(
            f"the learning rate warms up until {config.schedule.warmup_tokens} tokens, and the"
            f" checkpoint is of {tokens}",
            str(path),
            "name a later one",
        )
    if wishes.tokens_given and config.training.tokens != "auto":
        end = config.training.tokens
        steps = config.steps
    else:
        before = config.schedule.tokens_before_share
        wanted = before + (tokens - before) / (1 - config.schedule.decay_ratio)
        steps = config.batches.steps(wanted / context)
        end = config.batches.at(steps)[0] * context
    total = config.batches.at(steps)[0] * context
    if total <= tokens:
        raise ConfigError(
            f"a run of {total} tokens has no step left to decay after the {tokens} of {path}",
            TOKENS,
            "give more, or leave it to schedule.decay_ratio",
        )
    parameterization = {}
    if config.parameterization.applied_token_exponent:
        parameterization = {"planned_tokens": begun["planned_tokens"]}
    change = {
        "schedule": {"kind": "wsd", "decay_ratio": 1 - tokens / total, "decay_share_of": "run"},
        "training": {"tokens": end},
        "parameterization": parameterization,
    }
    return Config.from_layers(
        [Layer("the config", config.resolved()), Layer(f"--decay-from {path}", change)]
    )


def _recorded_start(checkpoints: Place, path: Place) -> Mapping[str, Any] | None:
    """Where the decay from `path` began, as a later checkpoint of it says: `path` itself may be
    gone."""
    newest = newest_continuing(checkpoints, path)
    if newest is None:
        return None
    state, names = read_state(newest), entry_of(checkpoints, path)
    ids = {entry["id"] for entry in state.get("resumed", []) if names(entry)}
    decays = [c for c in recorded(state) if c.kind == "decay" and c.id in ids]
    return decays[-1].details if decays else None


def _start(path: Place) -> Mapping[str, Any]:
    state = read_state(path)
    before = saved_config(path, state)
    schedule = before.schedule
    if schedule.kind not in FLAT:
        raise _other_kind("its run", schedule.kind, str(path))
    flat = before.model_copy(update={"schedule": schedule.model_copy(update={"kind": "constant"})})
    last, origins = state["step"] - 1, Origins.of_state(state)
    if last >= origins.schedule.step and (
        Rates(before, origins).multiplier(last) != Rates(flat, origins).multiplier(last)
    ):
        raise ConfigError(
            f"the learning rate of step {state['step']} decays already",
            str(path),
            "name a checkpoint from before the decay of its run",
        )
    planned = before.parameterization.planned_tokens or before.tokens
    return {"tokens": schedule_tokens(state), "planned_tokens": planned}


def _other_kind(whose: str, kind: str, where: str) -> ConfigError:
    return ConfigError(
        f"{whose} has schedule.kind {kind}, which has no constant part to decay from",
        where,
        "name a checkpoint of a wsd or constant run, and give its config",
    )
