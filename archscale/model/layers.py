"""The parts of the transformer: projection, norm, embedding, feed-forward, attention.

Each module says in `parameter_roles` what its own parameters are: parameter key → a plain dict with
`role` (matrix, embedding, head, vector), `view` (of more than two dimensions), `blocks` (the
matrices of a fused projection) and `init`, a pair (distribution, scale). The optimizer
(`optim.roles`) and `initialization` read it, so neither guesses from names or shapes.

Parameters are stored in float32 and cast to the activations' dtype where they are used.

Shapes: B batch, T time, D width, V vocabulary, F hidden features of a feed-forward, H query heads,
G key-value heads, C channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archscale.model.segments import Segments, expands_groups, segment_attention


class Projection(nn.Module):
    """y = x Wᵀ, x (…, fan_in) → y (…, fan_out), no bias; W (fan_out, fan_in) starts uniform on
    (−1/√fan_in, 1/√fan_in), as in HyperP (arXiv 2603.28743).

    Args:
        blocks: (name, rows) of the matrices that W holds one below the other. One product computes
            them all; the optimizer treats each as a matrix of its own. None: W is one matrix.
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
    """x / √(mean(x²) + ε) ⊙ g over the last axis (arXiv 1910.07467, eq. 4): normalized in x's
    dtype, returned in `dtype`."""

    def __init__(self, width: int, dtype: torch.dtype, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.dtype, self.eps = dtype, eps
        self.parameter_roles = {"weight": {"role": "vector", "init": ("constant", 1.0)}}

    def forward(self, x: Tensor) -> Tensor:
        # Rounded before it is multiplied by g: the backward pass then keeps the bf16 activation,
        # not a float32 one.
        return F.rms_norm(x, x.shape[-1:], eps=self.eps).to(self.dtype) * self.weight.to(self.dtype)


class Embedding(nn.Module):
    """Token ids (B, T) int64 → (B, T, D) float32, the start of the residual stream.

    Args:
        std: standard deviation at the start.
        dtype: the rows are rounded to it first.
    """

    def __init__(self, vocab_size: int, width: int, std: float, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.weight = nn.Parameter(torch.empty(vocab_size, width))
        self.parameter_roles = {"weight": {"role": "embedding", "init": ("normal", std)}}

    def forward(self, tokens: Tensor) -> Tensor:
        # FSDP2 gathers the table in `dtype`. The other layouts round as well, or their residual
        # streams would start from other numbers.
        return F.embedding(tokens, self.weight).to(self.dtype).float()


class FeedForward(nn.Module):
    """(B, T, D) → (B, T, D) through F hidden features.

    `swiglu`: (silu(x W_gateᵀ) ⊙ x W_upᵀ) W_downᵀ (arXiv 2002.05202, eq. 6);
    `relu2`: relu(x W_upᵀ)² W_downᵀ (arXiv 2109.08668).
    """

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


# --- attention


class Probe(Protocol):
    """Looks into a forward pass (`telemetry.stability.Probe`), without gradient.

    The blocks hand it what they compute anyway and return what it gives back beside their outputs:
    nothing is stored on a module, so recomputation counts nothing twice.
    """

    def attention(self, q: Tensor, k: Tensor, scale: float, mask: Tensor | None) -> Tensor:
        """Scalar summary of the attention logits scale · q kᵀ + mask; rotated queries (B, H, T, C),
        keys (B, G, T, C), mask as of `attention_mask`."""

    def log_sum_exp(self, lse: Tensor) -> Tensor:
        """The same summary, where the kernel has given the logits' log-sum-exp, (…)."""

    def router(self, logits: Tensor) -> Tensor:
        """Scalar summary of the router logits (N, E)."""

    def block(
        self,
        attention: Tensor,
        router: Tensor | None,
        attention_output: Tensor,
        mlp_output: Tensor,
        multiplier: float,
    ) -> Any:
        """The record of one block.

        Args:
            attention, router: what the two methods above returned; no router: None.
            attention_output, mlp_output: of the two branches, (B, T, D), before the multiplier with
                which both enter the residual stream.
        """


class BlockCache(Protocol):
    """What one block's attention has made of earlier tokens."""

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the keys and values (B, G, T, C) of new tokens; returns those of all tokens so far,
        (B, G, S, C) each."""


class Cache(Protocol):
    """Keys and values of the tokens that a model has read before
    (`inference.cache.KeyValueCache`)."""

    def start(self, tokens: Tensor) -> Tensor:
        """Take in new tokens (B, T), each row's after its own earlier ones; returns their
        positions, (B, T)."""

    def mask(self, window: int | None, eos_id: int | None, dtype: torch.dtype) -> Tensor | None:
        """What is added to the attention logits of the new tokens, (B or 1, 1, T, S), as of
        `attention_mask`."""

    def block(self, number: int) -> BlockCache:
        """The part of one block."""


class AttentionOutput(NamedTuple):
    """What `Attention` returns."""

    hidden: Tensor
    """(B, T, D)."""
    probed: Tensor | None
    """What the probe made of the logits; None without a probe."""


class Attention(nn.Module):
    """Causal attention with grouped queries (arXiv 2305.13245), normalized queries and keys
    (arXiv 2302.05442), rotary positions (arXiv 2104.09864) and a gate per head (arXiv 2505.06708).

    Each head's softmax(scale · q kᵀ + mask) v, times the sigmoid of the head's gate, then
    projected back to D.

    Args:
        heads, kv_heads, head_dim: H, G and C.
        norm: makes the norm of queries and of keys from C; None: they are not normalized.
        gated: whether heads are.
        scale: of the attention logits. 1/√C is usual; but q and k align as training goes on, and
            then q · k grows with C rather than with √C: √128/C (arXiv 2203.03466, definition 4.1).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        norm: Callable[[int], RMSNorm] | None,
        gated: bool,
        scale: float,
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
        self.q_norm = nn.Identity() if norm is None else norm(head_dim)
        self.k_norm = nn.Identity() if norm is None else norm(head_dim)
        self.scale = scale

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | Segments | None,
        probe: Probe | None = None,
        cache: BlockCache | None = None,
    ) -> AttentionOutput:
        """Attend within a micro-batch, and to what the cache holds.

        Args:
            x: (B, T, D). rope: cos and sin as of `rope_table`.
            mask: as of `attention_mask`; None: plain causal, and with earlier tokens everything.
                Segments stand for a mask where the device's kernel takes them.
        """
        B, T, _ = x.shape
        q, k, v, *gate = self.qkv(x).split(self.sizes, dim=-1)
        q = rotate(self.q_norm(q.view(B, T, self.heads, self.head_dim)), rope)
        k = rotate(self.k_norm(k.view(B, T, self.kv_heads, self.head_dim)), rope)
        v = v.view(B, T, self.kv_heads, self.head_dim)
        probed = None
        if isinstance(mask, Segments):
            o, lse = segment_attention(q, k, v, mask, self.scale)
            if probe is not None:
                probed = probe.log_sum_exp(lse)
        else:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H or G, T, C)
            if cache is not None:
                k, v = cache.extend(k, v)
            o = masked_attention(q, k, v, mask, self.scale).transpose(1, 2)  # (B, T, H, C)
            if probe is not None:
                probed = probe.attention(q, k, self.scale, mask)
        if gate:
            # Softmax has to attend to something; the gate lets a head say nothing.
            o = o * torch.sigmoid(gate[0]).unsqueeze(-1)
        return AttentionOutput(self.out(o.reshape(B, T, -1)), probed)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale · q kᵀ + mask) v, (B, H, T, C), for q (B, H, T, C), k and v (B, G, S, C), mask
    as of `attention_mask`; without one causal, or of all keys where there are more than queries."""
    grouped = q.shape[1] != k.shape[1]
    if grouped and expands_groups(q.device.type, q.dtype, mask is not None):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        grouped = False
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=mask is None and k.shape[2] == q.shape[2],
        scale=scale,
        enable_gqa=grouped,
    )


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """x (B, T, H, C) with the pairs of channels (i, i + C/2) turned by the angles of `rope_table`
    (arXiv 2104.09864, eq. 34, which pairs neighbours instead: the same up to the order of
    channels)."""
    cos, sin = (table.unsqueeze(-2).to(x.dtype) for table in rope)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def rope_table(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of position · θ^(−2i/C), each (…, C/2) float32, for positions (…), which are (T,)
    or each row's own, (B, T) (arXiv 2104.09864, eq. 15)."""
    # Not in bf16, whose 8 bits do not tell position 256 from 257.
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    frequency = theta ** (-exponent / head_dim)
    angle = positions.float().unsqueeze(-1) * frequency
    return angle.cos(), angle.sin()


def attention_mask(
    tokens: Tensor,
    window: int | None,
    eos_id: int | None,
    dtype: torch.dtype,
    documents: Tensor | None = None,
    queries: Tensor | None = None,
) -> Tensor | None:
    """What is added to the attention logits, (B or 1, 1, T, T) in `dtype`: 0 where a position may
    look, −∞ elsewhere. None where every position may look at everything before it.

    Args:
        tokens: (B, T).
        window: tokens that a position sees, itself included; None: all.
        eos_id: token that ends a document, and belongs to it: positions see their own document
            only. None: documents are not separated, unless they are given.
        documents: number of each position's document, (B, T), where the tokens do not say it.
        queries: the positions that look, (B, Q); the mask is (B, 1, Q, T) then. None: all.
    """
    if documents is None and eos_id is not None:
        ended = (tokens == eos_id).cumsum(1)
        documents = ended - (tokens == eos_id).to(ended.dtype)
    if window is None and documents is None and queries is None:
        return None
    position = torch.arange(tokens.shape[1], device=tokens.device)
    looking = position[None] if queries is None else queries
    distance = looking[:, :, None] - position
    allowed = distance >= 0
    if window is not None:
        allowed = allowed & (distance < window)
    if documents is not None:
        # Nothing else tells documents apart: rotary positions count by their differences alone.
        own = documents if queries is None else documents.gather(1, queries)
        allowed = allowed & (own[:, :, None] == documents[:, None, :])
    # Not bool: attention would convert it in every block, and every block would save its own copy
    # for the backward pass.
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, -math.inf)[:, None]
