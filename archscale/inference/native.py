"""A `Transformer`, or what an engine calls in its place, as `generate` uses it.

Shapes: B rows, T tokens of each, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from archscale.inference.cache import KeyValueCache
from archscale.model.transformer import ModelOutput


class NativeModel:
    """`inference.generate.LanguageModel` of a forward function.

    Args:
        forward: called as `Transformer` is: the model itself, or an engine's `forward`. Where that
            is sharded, all ranks take part in every pass, so all of them generate the same.
        context: tokens that the model reads at most.
        device: of the model.
    """

    def __init__(self, forward: Callable[..., ModelOutput], context: int, device: torch.device):
        self.context = context
        self._forward, self._device = forward, device

    def read(self, rows: Sequence[Sequence[int]], capacity: int) -> tuple[Tensor, KeyValueCache]:
        """Read each row from its start; returns the logits of what follows, (B, V), and the cache.

        Args:
            rows: of at least one token and at most `capacity` each.
            capacity: of the cache.
        """
        counts = [len(row) for row in rows]
        longest = max(counts)
        padded = [[*row, *[0] * (longest - len(row))] for row in rows]
        cache = KeyValueCache(capacity)
        return self._pass(padded, counts, cache), cache

    def step(self, tokens: Sequence[int], cache: KeyValueCache) -> Tensor:
        """Read one more token of each row; returns the logits of what follows, (B, V)."""
        return self._pass([[token] for token in tokens], [1] * len(tokens), cache)

    @torch.no_grad()
    def _pass(
        self, tokens: Sequence[Sequence[int]], counts: list[int], cache: KeyValueCache
    ) -> Tensor:
        last = torch.tensor([count - 1 for count in counts], device=self._device)
        # Compiled blocks would be compiled anew for every length of the cache.
        with torch.compiler.set_stance("force_eager"):
            output = self._forward(torch.tensor(tokens, device=self._device), cache=cache, at=last)
        cache.advance(counts)
        assert output.logits is not None
        return output.logits[:, 0]
