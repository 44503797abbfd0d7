"""How often a run passes over its training data, source by source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from archscale.config import Config
from archscale.data.training_data import TrainingData
from archscale.errors import ConfigError

# Over a source; up to there repeated text is about as good as new text (arXiv 2305.16264).
MANY_PASSES = 4


class SourceTokens(NamedTuple):
    """A source of the training data.

    Attributes:
        name: in the mixture; empty for `data.train`.
        share: of the run's samples.
        tokens: of its training split; None where it is not known, as before it is prepared.
    """

    name: str
    share: Fraction
    tokens: int | None


def source_tokens(data: TrainingData) -> list[SourceTokens]:
    """Of data that are there."""
    return [
        SourceTokens(source.name, data.shares[source.name], split.num_tokens)
        for source, split in zip(data.sources, data.splits)
    ]


def data_figures(sources: Sequence[SourceTokens], trained: int) -> dict[str, Any]:
    """Tokens and passes in all and of every source.

    Args:
        trained: tokens of the run.
    """
    sizes = [source.tokens for source in sources]
    total = None if not sizes or None in sizes else sum(size or 0 for size in sizes)
    return {
        "tokens": total,
        "passes": trained / total if total else None,
        "sources": [
            {
                "name": source.name or None,
                "share": float(source.share),
                "tokens": source.tokens,
                "drawn": round(source.share * trained),
                "passes": source.tokens and float(source.share * trained / source.tokens),
            }
            for source in sources
        ],
    }


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
    fewest = min(MANY_PASSES * row["tokens"] / row["share"] for row in repeated)
    fewer = int(fewest) // batch * batch
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
        f"the run passes {over}: repeated text teaches less than new text, and the validation loss"
        " may rise",
        "data.mixture" if mixed else "training.tokens",
        ("lower the weight, prepare more text" if mixed else "prepare more text") + less,
    )
