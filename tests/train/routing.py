"""How near a run's routing comes to a tie: of nearly equal logits rounding chooses one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from archscale.model import moe


@contextmanager
def smallest_gaps() -> Iterator[list[float]]:
    """Yields a list of one number: the smallest gap so far between a token's last chosen and
    first rejected logit. The caller may reset it.
    """
    original, smallest = moe.choose, [math.inf]

    def spying(logits: Tensor, count: int) -> Tensor:
        if count < logits.shape[-1] and len(logits):
            ordered = logits.sort(dim=-1, descending=True).values
            smallest[0] = min(smallest[0], (ordered[:, count - 1] - ordered[:, count]).min().item())
        return original(logits, count)

    moe.choose = spying
    try:
        yield smallest
    finally:
        moe.choose = original
