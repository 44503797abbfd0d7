"""Which token comes next.

Shapes: B rows, V vocabulary, K tokens that are candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NOT_FINITE = -1  # in place of a token, where the logits are not finite


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: tokens that are candidates, the likeliest ones; None: all.
        top_p: of these the likeliest ones, up to the first with which their probabilities add up to
            this share, in (0, 1] (arXiv 1904.09751).
    """

    temperature: float = 0.8
    top_k: int | None = 50
    top_p: float = 1.0


def choose_tokens(logits: Tensor, sampling: Sampling, draws: Sequence[float]) -> Tensor:
    """One token of each row, (B,) int64; `NOT_FINITE` where a logit is not finite.

    Args:
        logits: (B, V) float32.
        draws: a number in [0, 1) for each row. Nothing else decides about a row, whatever rows are
            beside it.
    """
    finite = logits.isfinite().all(1)
    if sampling.temperature == 0:
        tokens = logits.argmax(1)
    else:
        tokens = _draw(logits.where(finite[:, None], 0.0), sampling, draws)
    return tokens.where(finite, NOT_FINITE)


def _draw(logits: Tensor, sampling: Sampling, draws: Sequence[float]) -> Tensor:
    vocabulary = logits.shape[1]
    count = vocabulary if sampling.top_k is None else min(sampling.top_k, vocabulary)
    ids = None
    if count < vocabulary:
        logits, ids = logits.topk(count)
    elif sampling.top_p < 1:
        logits, ids = logits.sort(descending=True)
    # In float64, and less the largest: else a small temperature makes infinities.
    logits = logits.double() - logits.amax(1, keepdim=True)
    up_to = (logits / sampling.temperature).softmax(1).cumsum(1)  # (B, K)
    if sampling.top_p < 1:
        # A candidate stays if those before it do not reach the share yet.
        kept = 1 + (up_to[:, :-1] < sampling.top_p).sum(1)
    else:
        kept = torch.full((len(logits),), count, device=logits.device)
    total = up_to.gather(1, kept[:, None] - 1)
    drawn = torch.tensor(draws, device=logits.device, dtype=torch.float64)[:, None] * total
    place = (up_to <= drawn).sum(1).minimum(kept - 1)
    return place if ids is None else ids.gather(1, place[:, None])[:, 0]
