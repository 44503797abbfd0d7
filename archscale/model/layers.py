"""Building blocks that declare the role and the initialization of their own parameters.

`parameter_roles` maps a parameter's key to a plain dict: `role` (matrix, embedding, head, vector),
`view` of more than two dimensions, `blocks` of a fused
projection, and `init`, a pair (distribution, scale). The optimizer and the initializer read it; see
`optim.roles`.

Weights are stored in float32 and cast to the activations' dtype where they are used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-5


class Probe(Protocol):
    """What looks into a forward pass (`telemetry.stability`): each method sums something over a
    micro-batch."""

    def attention(self, q: Tensor, k: Tensor, scale: float, mask: Tensor | None) -> Tensor:
        """Of rotated queries (B, H, T, K) and keys (B, G, T, K); scalar."""

    def router(self, logits: Tensor) -> Tensor:
        """Of (N, E); scalar."""

    def branch(self, h: Tensor, multiplier: float) -> Tensor:
        """Of a branch's output (B, T, D) before its multiplier; (2,)."""


class Projection(nn.Module):
    """x (…, fan_in) → (…, fan_out), no bias; U(−1/√fan_in, 1/√fan_in) at initialization.

    Args:
        blocks: (name, rows) of the logical matrices stored one below the other; None: a single
            matrix.
    """

    def __init__(self, fan_in: int, fan_out: int, blocks: Sequence[tuple[str, int]] | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(fan_out, fan_in))
        init = ("uniform", 1 / math.sqrt(fan_in))
        self.parameter_roles = {
            "weight": {"role": "matrix", "blocks": tuple(blocks or ()), "init": init}
        }

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
    """x / √(mean(x²) + ε) · g over the last axis, computed in x's dtype, returned in `dtype`."""

    def __init__(self, width: int, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.dtype = dtype
        self.parameter_roles = {"weight": {"role": "vector", "init": ("constant", 1.0)}}

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=NORM_EPS).to(self.dtype) * self.weight.to(self.dtype)


class Embedding(nn.Module):
    """Token ids (B, T) → float32 (B, T, D), rounded to `dtype`: the start of the float32 residual
    stream."""

    def __init__(self, vocab_size: int, width: int, std: float, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype  # FSDP2 gathers the table in it; the others must round alike
        self.weight = nn.Parameter(torch.empty(vocab_size, width))
        self.parameter_roles = {"weight": {"role": "embedding", "init": ("normal", std)}}

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight).to(self.dtype).float()


class FeedForward(nn.Module):
    """SwiGLU, silu(x W_gᵀ) ⊙ (x W_uᵀ), or relu(x W_uᵀ)², then W_d; hidden size F."""

    def __init__(self, width: int, hidden: int, kind: str):
        super().__init__()
        self.kind = kind
        if kind == "swiglu":
            self.up = Projection(width, 2 * hidden, [("gate", hidden), ("up", hidden)])
        else:
            self.up = Projection(width, hidden)
        self.down = Projection(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        if self.kind == "swiglu":
            gate, up = h.chunk(2, dim=-1)
            return self.down(F.silu(gate) * up)
        return self.down(F.relu(h).square())
