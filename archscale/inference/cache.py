"""Keys and values of what a model has read, so that the next token costs one position.

Shapes: B rows, T new tokens of each, S slots in use, G key-value heads, C channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from archscale.model.layers import attention_mask


class KeyValueCache:
    """`model.layers.Cache` for rows of different lengths: slot s of a row holds its token number s,
    so every row has the positions that it would have alone.

    A forward pass `model(tokens, cache=cache)` puts T tokens behind each row's own; `advance` then
    says how many of them count. The rest, which pads shorter rows on the right, is overwritten by
    the next pass, and seen by nothing before that.

    Args:
        capacity: tokens that a row can hold.

    Attributes:
        lengths: tokens of each row that count.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.lengths: list[int] = []
        self._tokens: Tensor | None = None  # (B, capacity)
        self._positions: Tensor | None = None  # (B, T), of the pass under way
        self._blocks: list[_Block] = []

    def start(self, tokens: Tensor) -> Tensor:
        B, T = tokens.shape
        if self._tokens is None:
            self.lengths = [0] * B
            self._tokens = tokens.new_zeros(B, self.capacity)
        if len(self.lengths) != B:
            raise ValueError(f"{B} rows for a cache of {len(self.lengths)}")
        if max(self.lengths) + T > self.capacity:
            raise ValueError(
                f"{T} tokens after {max(self.lengths)} are more than the cache's {self.capacity}"
            )
        starts = torch.tensor(self.lengths, device=tokens.device)
        self._positions = starts[:, None] + torch.arange(T, device=tokens.device)
        self._tokens.scatter_(1, self._positions, tokens)
        return self._positions

    def mask(self, window: int | None, eos_id: int | None, dtype: torch.dtype) -> Tensor | None:
        assert self._tokens is not None
        assert self._positions is not None
        T, used = self._positions.shape[1], self.used
        together = min(self.lengths) == max(self.lengths)
        # As without a cache at the start; later, a single new token sees all that is there.
        plain = eos_id is None and (window is None or used <= window) and together and T == 1
        if plain:
            return None
        queries = self._positions if max(self.lengths) else None
        return attention_mask(self._tokens[:, :used], window, eos_id, dtype, queries=queries)

    def block(self, number: int) -> _Block:
        while number >= len(self._blocks):
            self._blocks.append(_Block(self))
        return self._blocks[number]

    @property
    def used(self) -> int:
        """Slots that the pass under way reads: S."""
        assert self._positions is not None
        return max(self.lengths) + self._positions.shape[1]

    def advance(self, counts: Sequence[int]) -> None:
        """After a pass: how many of each row's T tokens count."""
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these, and put them in this order."""
        assert self._tokens is not None
        index = torch.tensor(rows, device=self._tokens.device)
        self.lengths = [self.lengths[row] for row in rows]
        self._tokens = self._tokens[index]
        for block in self._blocks:
            block.keys, block.values = block.keys[index], block.values[index]

    def join(self, other: KeyValueCache) -> None:
        """Append the rows of another cache of the same capacity."""
        assert self._tokens is not None
        assert other._tokens is not None
        self.lengths = [*self.lengths, *other.lengths]
        self._tokens = torch.cat([self._tokens, other._tokens])
        for block, more in zip(self._blocks, other._blocks, strict=True):
            block.keys = torch.cat([block.keys, more.keys])
            block.values = torch.cat([block.values, more.values])


class _Block:
    """The part of one block; keys and values are (B, G, capacity, C)."""

    keys: Tensor
    values: Tensor

    def __init__(self, cache: KeyValueCache):
        self._cache = cache
        self._empty = True

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self._empty:
            B, G, _, C = k.shape
            # Zeros: what is masked still enters the product with a weight of zero, and memory as
            # it comes may hold a NaN.
            self.keys = k.new_zeros(B, G, self._cache.capacity, C)
            self.values = v.new_zeros(B, G, self._cache.capacity, C)
            self._empty = False
        lengths, used = self._cache.lengths, self._cache.used
        for stored, new in ((self.keys, k), (self.values, v)):
            if min(lengths) == max(lengths):
                stored[:, :, lengths[0] : used] = new
            else:
                slots = self._cache._positions[:, None, :, None]  # type: ignore[index]
                stored.scatter_(2, slots.expand_as(new), new)
        return self.keys[:, :, :used], self.values[:, :, :used]
