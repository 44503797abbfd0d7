"""What the cache must be equal to: every token reads the whole text anew."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from archscale.model.transformer import ModelOutput


class TextRows:
    """The tokens of several texts."""

    def __init__(self, rows: Sequence[Sequence[int]]):
        self.rows = [list(row) for row in rows]

    def keep(self, rows: Sequence[int]) -> None:
        self.rows = [self.rows[row] for row in rows]

    def join(self, other: TextRows) -> None:
        self.rows += other.rows


class RereadingModel:
    """`inference.generate.LanguageModel` without a cache, one row after another.

    Args:
        forward: as `Transformer` is called.
    """

    def __init__(self, forward: Callable[..., ModelOutput], context: int, device: torch.device):
        self.context = context
        self._forward, self._device = forward, device

    def read(self, rows: Sequence[Sequence[int]], capacity: int) -> tuple[Tensor, TextRows]:
        text = TextRows(rows)
        return self._logits(text), text

    def step(self, tokens: Sequence[int], rows: TextRows) -> Tensor:
        for row, token in zip(rows.rows, tokens, strict=True):
            row.append(token)
        return self._logits(rows)

    @torch.no_grad()
    def _logits(self, text: TextRows) -> Tensor:
        logits = []
        for row in text.rows:
            output = self._forward(torch.tensor([row], device=self._device))
            assert output.logits is not None
            logits.append(output.logits[:, -1])
        return torch.cat(logits)
