"""The plan of a config on this machine or another: what `archscale plan` prints and `archscale
train` checks first."""

from __future__ import annotations

from archscale.config import Config
from archscale.errors import ConfigError
from archscale.plan.devices import DEVICES, Device
from archscale.plan.known_data import read_known_data
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
    known = read_known_data(config)
    if known.vocab_size:
        config = config.with_vocab(known.vocab_size)
    plan = make_plan(
        config,
        world_size=world_size,
        device=device,
        mfu=mfu,
        compare=() if device else tuple(DEVICES.values()),
        sources=known.sources,
    )
    plan.problems += known.problems
    missing = known.missing
    if config.model.vocab_size:
        plan.advice[:0] = missing  # a plan needs no data, training will
        return plan
    if missing and "model.vocab_size" not in missing[0].remedy:
        first = missing[0]
        remedy = f"{first.remedy}, or give model.vocab_size"
        missing[0] = ConfigError(first.what, first.where, remedy)
    # The vocabulary is not known because of these.
    others = [problem for problem in plan.problems if problem.where != "model.vocab_size"]
    plan.problems = [*missing, *others]
    return plan


def refuse(plan: Plan) -> None:
    """Raise what stands against running a plan: its first problem, and how many more there are."""
    if plan.problems:
        raise ConfigError.several(plan.problems, ": `archscale plan` lists them")
