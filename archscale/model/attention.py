"""Causal grouped-query attention with RoPE, QK-norm and a per-head output gate.

Shapes: B batch, T time, D width, H query heads, G key-value heads, K head size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archscale.model.layers import Probe, Projection, RMSNorm

BASE_HEAD_DIM = 128  # d_head0 of the attention scale √d_head0 / d_head (HyperP)


class Attention(nn.Module):
    """softmax(q kᵀ √128 / K) v per head, times sigmoid of the head's gate, projected back to D."""

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        qk_norm: bool,
        gated: bool,
        dtype: torch.dtype,
    ):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim] + (
            [heads] if gated else []
        )
        self.qkv = Projection(
            width, sum(self.sizes), list(zip(("q", "k", "v", "gate"), self.sizes))
        )
        self.out = Projection(heads * head_dim, width)
        self.q_norm = RMSNorm(head_dim, dtype) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(head_dim, dtype) if qk_norm else nn.Identity()
        self.scale = math.sqrt(BASE_HEAD_DIM) / head_dim

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        probe: Probe | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """x (B, T, D), rope (T, K/2) twice, mask broadcastable to (B, H, T, T), added to the
        logits, or None for plain causal → (B, T, D), and what a probe sees in the logits."""
        B, T, _ = x.shape
        q, k, v, *gate = self.qkv(x).split(self.sizes, dim=-1)
        q = rotate(self.q_norm(q.view(B, T, self.heads, self.head_dim)), rope)
        k = rotate(self.k_norm(k.view(B, T, self.kv_heads, self.head_dim)), rope)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v.view(B, T, self.kv_heads, self.head_dim)))
        o = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scale,
            enable_gqa=self.heads != self.kv_heads,
        ).transpose(1, 2)
        if gate:
            o = o * torch.sigmoid(gate[0]).unsqueeze(-1)
        seen = None if probe is None else probe.attention(q, k, self.scale, mask)
        return self.out(o.reshape(B, T, -1)), seen


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of x (B, T, H, K): pairs (i, i + K/2) turned by the angles of
    `rope_table`."""
    cos, sin = (table[None, :, None, :].to(x.dtype) for table in rope)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def rope_table(
    time: int, head_dim: int, theta: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin of position · θ^(−2i/K), each (T, K/2), float32 (Su et al. 2021)."""
    frequency = theta ** (
        -torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    )
    angle = torch.outer(torch.arange(time, device=device, dtype=torch.float32), frequency)
    return angle.cos(), angle.sin()


def attention_mask(
    tokens: Tensor, window: int | None, eos_id: int | None, dtype: torch.dtype
) -> Tensor | None:
    """What is added to attention's logits, (B or 1, 1, T, T) in `dtype`: 0 where a position may
    see, −∞ elsewhere; or None when it sees simply everything before it.

    Not bool: attention would make this of it in every block, and every block would save its own for
    the backward pass.

    Args:
        tokens: (B, T).
        window: tokens that a position sees, itself included; None: all.
        eos_id: token that ends a document (it belongs to the document it ends); None: documents are
            not separated.
    """
    if window is None and eos_id is None:
        return None
    T = tokens.shape[1]
    position = torch.arange(T, device=tokens.device)
    distance = position[:, None] - position[None, :]
    mask = (distance >= 0)[None]
    if window is not None:
        mask = mask & (distance < window)[None]
    if eos_id is not None:
        ended = (tokens == eos_id).cumsum(1)
        document = ended - (tokens == eos_id).to(ended.dtype)
        mask = mask & (document[:, :, None] == document[:, None, :])
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -math.inf)[
        :, None
    ]
