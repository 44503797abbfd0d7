"""The plan of a config on this machine or another: what `archscale plan` prints and `archscale
train` checks first."""

from __future__ import annotations

from fractions import Fraction

from archscale.config import Config
from archscale.data.packed import check_packing, open_packing
from archscale.data.packing_index import PackedSize, total_size
from archscale.data.stored import check_document_mask, describe, real_name
from archscale.data.training_data import Vocabulary, shared_vocabulary, training_sources
from archscale.errors import ConfigError, DataError
from archscale.plan.devices import DEVICES, Device
from archscale.plan.passes import SourceTokens
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
    sources, vocabularies, missing = _read_manifests(config)
    if vocabularies:
        config = config.with_vocab(vocabularies[0].size)
    plan = make_plan(
        config,
        world_size=world_size,
        device=device,
        mfu=mfu,
        compare=() if device else tuple(DEVICES.values()),
        sources=sources,
    )
    if vocabularies:
        try:
            shared_vocabulary(vocabularies)
            for vocabulary in vocabularies:
                check_document_mask(config.data, vocabulary.eos_id)
                check_packing(config.data, vocabulary.eos_id)
        except ConfigError as problem:
            plan.problems.append(problem)
    if missing and config.model.vocab_size:
        plan.advice[:0] = missing  # a plan needs no data, training will
    elif missing:
        first = missing[0]
        if "model.vocab_size" not in first.remedy:
            remedy = f"{first.remedy}, or give model.vocab_size"
            missing[0] = ConfigError(first.what, first.where, remedy)
        others = [problem for problem in plan.problems if problem.where != "model.vocab_size"]
        plan.problems = [*missing, *others]
    return plan


def _read_manifests(
    config: Config,
) -> tuple[list[SourceTokens], list[Vocabulary], list[ConfigError]]:
    """What is known of the training data: its sources, their vocabularies, and what is missing."""
    sources: list[SourceTokens] = []
    vocabularies: list[Vocabulary] = []
    missing: dict[str, ConfigError] = {}
    try:
        chosen = training_sources(config.data)
    except ConfigError:
        return [], [], []  # a problem that the plan lists
    period = sum(source.part for source in chosen)
    for source in chosen:
        tokens = packed = None
        try:
            facts = describe(source.path, config.data.tokenizer, config.model.vocab_size)
            vocabularies.append(Vocabulary.of_facts(source, facts))
            tokens = facts.tokens.get("train")
            if config.data.packing == "best_fit" and tokens and facts.eos_id is not None:
                packed = _packed(config, source.path)
        except DataError as error:
            missing[source.path] = ConfigError(error.what, error.where, error.remedy)
        share = Fraction(source.part, period)
        sources.append(SourceTokens(source.name, share, tokens, packed, real_name(source.path)))
    return sources, vocabularies, list(missing.values())


def _packed(config: Config, path: str) -> PackedSize | None:
    """How full the windows of a data set are; None where training has not packed it yet, or its
    shards are elsewhere."""
    try:
        index = open_packing(config.data, path, config.model.context, config.model.vocab_size)
        sizes = index.sizes()
    except DataError:
        return None
    return None if sizes is None else total_size(sizes)


def refuse(plan: Plan) -> None:
    """Raise what stands against running a plan: its first problem, and how many more there are."""
    if plan.problems:
        raise ConfigError.several(plan.problems, ": `archscale plan` lists them")
