"""Learning-rate schedules: pure functions of tokens seen, so that they do not depend on how tokens
became steps."""

from __future__ import annotations

import math


def lr_multiplier(
    kind: str,
    tokens: float,
    total: float,
    *,
    warmup: float = 0.0,
    final_ratio: float = 0.1,
    decay_ratio: float = 2 / 7,
) -> float:
    """η(tokens) / η_peak.

    Args:
        kind: `linear`, `cosine`, `wsd` (constant, then linear decay over the last `decay_ratio` of
            the tokens) or `constant`.
        tokens: tokens consumed before the step, 0 ≤ tokens < total.
        total: tokens of the whole run.
        warmup: tokens of the linear warm-up from 0, counted inside `total`.
        final_ratio: value at `total` (constant ignores it).

    Raises:
        ValueError: unknown kind.
    """
    ramp = min(1.0, tokens / warmup) if warmup > 0 else 1.0
    progress = min(1.0, max(0.0, (tokens - warmup) / max(total - warmup, 1e-9)))
    if kind == "linear":
        decay = 1 - (1 - final_ratio) * progress
    elif kind == "cosine":
        decay = final_ratio + (1 - final_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
    elif kind == "wsd":
        into = (
            max(0.0, (tokens / total - (1 - decay_ratio)) / decay_ratio) if decay_ratio > 0 else 0.0
        )
        decay = 1 - (1 - final_ratio) * min(1.0, into)
    elif kind == "constant":
        decay = 1.0
    else:
        raise ValueError(f"unknown schedule {kind!r}; one of linear, cosine, wsd, constant")
    return ramp * decay
