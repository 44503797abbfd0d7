"""Stability indicators, layer by layer (REFERENCE 5; HyperP): Z-values, output RMS, activation
outliers.

On the steps that are read, the trainer hands a `Probe` to the forward pass. The blocks give it what
they have anyway and return its sums beside their outputs, without gradient: recomputation then
counts nothing twice, a step that is not read does nothing at all, and the trajectory is the same
with and without. Sums of all micro-batches and ranks are added once a reading.

Shapes: B batch, T time, D width, H query heads, G key-value heads, K head size, E routed experts, L
layers, N tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

INDICATORS = (
    "attention_z",
    "router_z",
    "attention_output_rms",
    "mlp_output_rms",
    "attention_outlier_pct",
    "mlp_outlier_pct",
)
OUTLIER = 5.0  # standard deviations
CHUNK_ELEMENTS = 1 << 24  # attention logits at a time


class Probe:
    """Sums over one micro-batch, float32 scalars on the device. Stateless, so a compiler may trace
    through it."""

    @torch.no_grad()
    def attention(self, q: Tensor, k: Tensor, scale: float, mask: Tensor | None) -> Tensor:
        """Σ LSE² over batch, heads and positions; arguments as of `log_sum_exp`."""
        return log_sum_exp(q.detach(), k.detach(), scale, mask).square().sum()

    @torch.no_grad()
    def router(self, logits: Tensor) -> Tensor:
        """Σ LSE² over tokens of logits (N, E)."""
        return logits.detach().float().logsumexp(-1).square().sum()

    @torch.no_grad()
    def branch(self, h: Tensor, multiplier: float) -> Tensor:
        """Of a branch's output h (B, T, D) before its multiplier: Σ (multiplier · h)², and how many
        entries lie further than 5 standard deviations (population) from their token's mean;
        (2,)."""
        h = h.detach().float()
        deviation = h - h.mean(-1, keepdim=True)
        limit = OUTLIER * deviation.square().mean(-1, keepdim=True).sqrt()
        return torch.stack(
            [h.square().sum() * multiplier**2, (deviation.abs() > limit).sum().float()]
        )


@torch.compiler.disable  # a loop as long as the context would be unrolled
def log_sum_exp(q: Tensor, k: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """Log-sum-exp of the attention logits scale · q kᵀ + mask that each position sees, (B, H, T)
    float32.

    The attention kernel's own where it gives one (CPU; CUDA in half precision without a mask),
    otherwise computed by chunks of positions.

    Args:
        q, k: (B, H, T, K) and (B, G, T, K), as attention takes them. mask: as of `attention_mask`;
            None: causal.
    """
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    aten = torch.ops.aten
    if q.device.type == "cpu" and q.dtype in (torch.float32, torch.bfloat16):
        added = None if mask is None else mask.to(q.dtype)
        return aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, k, 0.0, mask is None, attn_mask=added, scale=scale
        )[1]
    if (
        q.device.type == "cuda"
        and q.dtype in (torch.bfloat16, torch.float16)
        and mask is None
        and q.shape[-1] <= 256
    ):
        return aten._scaled_dot_product_flash_attention(q, k, k, 0.0, True, scale=scale)[1]
    return chunked_log_sum_exp(q, k, scale, mask)


def chunked_log_sum_exp(q: Tensor, k: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """As `log_sum_exp`, for as many heads of k as of q."""
    B, H, T, _ = q.shape
    position = torch.arange(T, device=q.device)
    size = max(1, CHUNK_ELEMENTS // (B * H * T))
    parts = []
    for start in range(0, T, size):
        rows = slice(start, min(start + size, T))
        seen = T if mask is not None else rows.stop
        logits = q[:, :, rows].float() @ k[:, :, :seen].float().mT * scale
        if mask is not None:
            logits = logits + mask[:, :, rows]
        else:
            logits = logits.masked_fill(position[:seen] > position[rows, None], -math.inf)
        parts.append(logits.logsumexp(-1))
    return torch.cat(parts, -1)


def stability_metrics(
    sums: Tensor, tokens: int, heads: int, width: int, per_layer: bool
) -> dict[str, Tensor]:
    """`stability/*` metrics, scalars on the device.

    Args:
        sums: (L, 6), in the order of `INDICATORS`, of all micro-batches and ranks; NaN in the
            column of what a model has not.
        tokens: of the whole step. per_layer: also one of each layer, counted from 0.
    """
    counts = sums.new_tensor(
        [tokens * heads, tokens, *[tokens * width] * 2, *[tokens * width / 100] * 2]
    )
    layers = sums / counts
    layers = torch.cat([layers[:, :2], layers[:, 2:4].sqrt(), layers[:, 4:]], 1)
    found = dict(zip((f"stability/{name}" for name in INDICATORS), layers.mean(0).unbind()))
    if per_layer:
        for number, row in enumerate(layers.unbind()):
            found |= zip(
                (f"stability/layer_{number:02d}/{name}" for name in INDICATORS), row.unbind()
            )
    return found
