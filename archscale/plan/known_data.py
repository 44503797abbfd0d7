"""What a plan knows of the data: read from manifests and beginnings of files, as far as they are
there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction

from archscale.config import Config
from archscale.data.packed import check_packing, open_packing
from archscale.data.packing_index import PackedSize, total_size
from archscale.data.stored import (
    DataFacts,
    check_document_mask,
    describe,
    is_there,
    open_stored,
    real_name,
    refuse_training_files,
)
from archscale.data.training_data import (
    Source,
    Vocabulary,
    shared_vocabulary,
    training_sources,
)
from archscale.errors import ArchscaleError, ConfigError, DataError
from archscale.plan.passes import SourceTokens


@dataclass
class KnownData:
    """What is known of the data of a config.

    Attributes:
        sources: of the training data.
        vocabularies: of the sources that are there.
        missing: what training needs, and a plan does not.
        problems: what training refuses.
    """

    sources: list[SourceTokens] = field(default_factory=list)
    vocabularies: list[Vocabulary] = field(default_factory=list)
    missing: list[ConfigError] = field(default_factory=list)
    problems: list[ConfigError] = field(default_factory=list)

    @property
    def vocab_size(self) -> int | None:
        return next((known.size for known in self.vocabularies if known.size), None)

    def add_error(self, error: ArchscaleError, path: str) -> None:
        """An error in reading the data at a path."""
        errors = self.problems if is_there(path) else self.missing
        problem = ConfigError(error.what, error.where, error.remedy)
        if str(problem) not in map(str, errors):  # of a path that several sources read
            errors.append(problem)


def read_known_data(config: Config) -> KnownData:
    """Nothing where the mixture itself is wrong, which is a problem that the plan lists."""
    known = KnownData()
    try:
        chosen = training_sources(config.data)
    except ConfigError:
        return known
    period = sum(source.part for source in chosen)
    described: list[tuple[Source, DataFacts]] = []
    for source in chosen:
        tokens = packed = None
        try:
            facts = describe(source.path, config.data.tokenizer, config.model.vocab_size)
            described.append((source, facts))
            tokens = facts.tokens.get("train")
            if config.data.packing == "best_fit" and tokens and facts.eos_id is not None:
                packed = _packed(config, source.path)
        except DataError as error:
            known.add_error(error, source.path)
        share = Fraction(source.part, period)
        known.sources.append(
            SourceTokens(source.name, share, tokens, packed, real_name(source.path))
        )
    known.vocabularies = [
        Vocabulary.of(source.owner, source.path, facts, config.model.vocab_size)
        for source, facts in described
    ]
    known.problems += _disagreements(config, known, [facts for _, facts in described])
    known.problems += _held_out_twice(config, described)
    _read_validation(config, known, [facts for _, facts in described])
    return known


def _packed(config: Config, path: str) -> PackedSize | None:
    """How full the windows of a data set are; None where training has not packed it yet, or its
    shards are elsewhere."""
    try:
        index = open_packing(config.data, path, config.model.context, config.model.vocab_size)
        sizes = index.sizes()
    except DataError:
        return None
    return None if sizes is None else total_size(sizes)


def _disagreements(
    config: Config, known: KnownData, described: list[DataFacts]
) -> Iterator[ConfigError]:
    try:
        if known.vocabularies:
            shared_vocabulary(known.vocabularies)
        for facts in described:
            check_document_mask(config.data, facts.eos_id)
            check_packing(config.data, facts.eos_id)
    except ConfigError as problem:
        yield problem


def _trained(described: list[DataFacts]) -> list[str]:
    return [file for facts in described for file in facts.files.get("train", ())]


def _held_out_twice(
    config: Config, described: list[tuple[Source, DataFacts]]
) -> Iterator[ConfigError]:
    """Sources of a mixture that would be evaluated on what is trained on."""
    trained = _trained([facts for _, facts in described])
    for source, facts in described:
        held_out = facts.files.get("validation", [])
        evaluated = facts.tokens.get("validation", 0) > config.model.context
        try:
            if source.name and evaluated:
                refuse_training_files(source.owner, held_out, trained, source.path)
        except ConfigError as problem:
            yield problem


def _read_validation(config: Config, known: KnownData, described: list[DataFacts]) -> None:
    path = config.data.val
    if path is None:
        return
    size = known.vocab_size or config.model.vocab_size
    try:
        split = open_stored(path, "validation", config.data.tokenizer, size)
        if known.vocabularies:
            vocabulary = Vocabulary.of("data.val", path, split, size)
            vocabulary.check_same(shared_vocabulary(known.vocabularies))
        refuse_training_files("data.val", split.files, _trained(described), path)
    except ConfigError as problem:
        if str(problem) not in map(str, known.problems):  # of the training data alone
            known.problems.append(problem)
    except DataError as error:
        if len(described) == len(known.sources):
            # Where training data are, those of validation have to be, too.
            known.problems.append(ConfigError(error.what, error.where, error.remedy))
        else:
            known.add_error(error, path)
