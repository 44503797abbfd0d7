"""Windows as training reads them, and those of a split that is cut as it stands."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np

from archscale.data.split import TokenSplit
from archscale.errors import DataError

# The target that `cross_entropy` ignores by default; also in model/loss.py, since neither room
# imports the other.
IGNORE = -100


class Windows(NamedTuple):
    """What a model reads, and the token that follows each.

    Attributes:
        inputs, targets: int64 [n, context]; the target of padding is `IGNORE`.
        documents: int32 [n, context]: number of the document that each position belongs to, in its
            window, ascending; padding is a document, too. None where ends of documents alone
            separate them, or nothing does.
    """

    inputs: np.ndarray
    targets: np.ndarray
    documents: np.ndarray | None = None


class WindowReader(Protocol):
    """A split, cut into windows.

    Attributes:
        num_samples: how many there are.
    """

    num_samples: int

    def windows(self, indices: np.ndarray) -> Windows:
        """These windows [n]; DataError where a shard cannot be read, or has an id outside the
        vocabulary."""


class Concatenated:
    """Windows of `context` tokens one after another, wherever documents end; a `WindowReader`."""

    def __init__(self, split: TokenSplit):
        self._split, self.num_samples = split, split.num_samples

    def windows(self, indices: np.ndarray) -> Windows:
        return read_windows(self._split, indices)


def read_windows(split: TokenSplit, indices: np.ndarray) -> Windows:
    """These windows [n] of a split; errors as of a `WindowReader`."""
    block = split.samples(indices.tolist())
    refuse_unknown_ids(split, block)
    return Windows(block[:, :-1], block[:, 1:])


def refuse_unknown_ids(split: TokenSplit, ids: np.ndarray) -> None:
    """DataError for an id outside the vocabulary: it would index past the embedding."""
    # As unsigned numbers, so that a negative id is one that is too high.
    highest = ids.view(np.uint64).max()
    if highest >= split.vocab_size:
        wrong = highest.astype(np.int64)
        raise DataError(
            f"token id {wrong} in split {split.split!r} is outside the vocabulary of"
            f" {split.vocab_size}",
            str(split.path),
            "run `archscale data verify` on it; the dataset changed or is damaged",
        )
