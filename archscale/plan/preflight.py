"""The plan of a config on this machine or another: what `archscale plan` prints and `archscale
train` checks first."""

from __future__ import annotations

from pathlib import Path

from archscale.config import Config
from archscale.data.shards import read_manifest
from archscale.errors import ConfigError, DataError
from archscale.plan.devices import DEVICES, Device
from archscale.plan.plan import Plan, make_plan


def plan_config(
    config: Config, *, world_size: int | None = None, device: Device | None = None, mfu: float = 0.4
) -> Plan:
    """The plan of a config that may never run here. A vocabulary that the config leaves to the data
    is taken from there.

    Args:
        world_size: devices; None: parallel.replicate × parallel.shard, `auto` counting as one.
        device: to plan for; None: compare all that are known.
    """
    if world_size is None:
        shard = config.parallel.shard
        world_size = config.parallel.replicate * (1 if shard == "auto" else shard)
    missing: ConfigError | None = None
    data_tokens: int | None = None
    try:
        manifest = read_manifest(Path(config.data.train))
        config = config.with_vocab(manifest.tokenizer.vocab_size)
        if "train" in manifest.splits:
            data_tokens = manifest.splits["train"].tokens
    except DataError as error:
        remedy = (
            error.remedy if config.model.vocab_size else f"{error.remedy}, or give model.vocab_size"
        )
        missing = ConfigError(error.what, error.where, remedy)
    plan = make_plan(
        config,
        world_size=world_size,
        device=device,
        mfu=mfu,
        compare=() if device else tuple(DEVICES.values()),
        data_tokens=data_tokens,
    )
    if missing and config.model.vocab_size:
        plan.advice.insert(0, missing)  # a plan needs no data, training will
    elif missing:
        plan.problems = [missing, *(p for p in plan.problems if p.where != "model.vocab_size")]
    return plan


def refuse(plan: Plan) -> None:
    """Raise what stands against running a plan: its first problem, and how many more there are."""
    if plan.problems:
        raise ConfigError.several(plan.problems, ": `archscale plan` lists them")
