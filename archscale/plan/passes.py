"""How often a run passes over its training data, source by source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from archscale.config import Config
from archscale.data.packing_index import PackedSize
from archscale.data.stored import real_name
from archscale.data.training_data import TrainingData
from archscale.errors import ConfigError

# Over a source; up to there repeated text is about as good as new text (arXiv 2305.16264).
MANY_PASSES = 4
MUCH_PADDING = 0.2  # of a source's positions


class SourceTokens(NamedTuple):
    """A source of the training data.

    Attributes:
        name: in the mixture; empty for `data.train`.
        share: of the run's samples.
        tokens: of its training split; None where it is not known, as before it is prepared.
        packed: how full its windows are; None where documents are not packed, or not yet.
        path: real one of its data set, which may be another source's, too.
    """

    name: str
    share: Fraction
    tokens: int | None
    packed: PackedSize | None = None
    path: str = ""

    @property
    def padding(self) -> float:
        """Share of its positions that is known to have no target."""
        return 0.0 if self.packed is None else self.packed.padding

    def positions(self, context: int) -> int | None:
        """Those that a pass trains on, of all its windows; None where that is not known."""
        if self.packed is not None:
            return self.packed.windows * self.packed.context
        return self.tokens and (self.tokens - 1) // context * context


def source_tokens(data: TrainingData) -> list[SourceTokens]:
    """The tokens of each source, where the data are there."""
    packed: Sequence[PackedSize | None] = data.packed or [None] * len(data.sources)
    return [
        SourceTokens(
            source.name,
            data.shares[source.name],
            split.num_tokens,
            size,
            real_name(source.path),
        )
        for source, split, size in zip(data.sources, data.splits, packed)
    ]


def data_figures(sources: Sequence[SourceTokens], trained: int, context: int) -> dict[str, Any]:
    """Tokens and passes in all and of every source, and the real tokens that are trained on,
    without padding. A data set that several sources read counts once, and its passes are those of
    all of them.

    Args:
        trained: tokens of the run, padding among them.
        context: tokens of a window.
    """
    sets = {source.path: source for source in sources}
    shares = {
        path: sum((each.share for each in sources if each.path == path), Fraction())
        for path in sets
    }
    tokens = [source.tokens for source in sets.values()]
    positions = [source.positions(context) for source in sets.values()]
    total = None if None in positions else sum(count or 0 for count in positions)

    def passes(source: SourceTokens) -> float | None:
        of_a_pass = source.positions(context)
        return float(shares[source.path] * trained / of_a_pass) if of_a_pass else None

    return {
        "tokens": None if not tokens or None in tokens else sum(count or 0 for count in tokens),
        "real_tokens": round(trained * (1 - sum(each.share * each.padding for each in sources))),
        "passes": trained / total if total else None,
        "sources": [
            {
                "name": source.name or None,
                "share": float(source.share),
                "tokens": source.tokens,
                "drawn": round(source.share * trained),
                "passes": passes(source),
                "packed": source.packed and {**source.packed._asdict(), "padding": source.padding},
            }
            for source in sources
        ],
    }


def _padding(row: Mapping[str, Any]) -> float:
    """The share of padding in a source's row of the figures."""
    return row["packed"]["padding"] if row["packed"] else 0.0


def much_padding(figures: Mapping[str, Any]) -> ConfigError | None:
    """Advice where windows are packed and far from full, as when they are longer than shards."""
    padded = [row for row in figures["sources"] if _padding(row) > MUCH_PADDING]
    if not padded:
        return None
    shares = " and ".join(
        f"{_padding(row):.0%} of the positions"
        + (f" of source {row['name']}" if row["name"] else "")
        for row in padded
    )
    return ConfigError(
        f"documents are packed shard by shard, and {shares} are padding",
        "data.packing",
        "prepare larger shards, shorten model.context, or set it to concatenate",
    )


def many_passes(config: Config, figures: Mapping[str, Any]) -> ConfigError | None:
    """Advice where the run repeats a source more than a few times.

    Args:
        config: with numbers of tokens.
        figures: of `data_figures`.
    """
    repeated = [row for row in figures["sources"] if (row["passes"] or 0) > MANY_PASSES]
    if not repeated:
        return None
    batch = config.batch_tokens
    trained = config.batches.at(config.steps)[0] * config.model.context
    fewest = trained * MANY_PASSES / max(row["passes"] for row in repeated)
    fewer = int(fewest * (1 + 1e-12)) // batch * batch  # a whole number may be rounded down
    less = f", or set training.tokens to at most {fewer}" if fewer else ""
    over = " and ".join(
        f"{row['passes']:,.3g} times over"
        + (f" source {row['name']} of" if row["name"] else " its")
        + f" {row['tokens']:,} tokens"
        + ("" if row["name"] else " of data")
        for row in repeated
    )
    mixed = figures["sources"][0]["name"] is not None
    return ConfigError(
        f"the run passes {over}: repeated text teaches less than new text from the fifth pass on"
        " (arXiv 2305.16264), and the validation loss may rise",
        "data.mixture" if mixed else "training.tokens",
        ("lower the weight, prepare more text" if mixed else "prepare more text") + less,
    )
