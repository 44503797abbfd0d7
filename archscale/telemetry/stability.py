"""Stability indicators, layer by layer (HyperP, arXiv 2603.28743): Z-values, output RMS, activation
outliers.

On the steps that are read, the trainer hands a `Probe` to the forward pass. The blocks give it what
they have anyway and return its sums beside their outputs, without gradient: recomputation then
counts nothing twice, a step that is not read does nothing at all, and the trajectory is the same
with and without. Sums of all micro-batches and ranks are added once a reading.

Shapes: B batch, T time, D width, H query heads, G key-value heads, C channels of a head, E routed
experts, L layers, N tokens.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

OUTLIER = 5.0  # standard deviations
CHUNK_ELEMENTS = 1 << 24  # attention logits at a time


class LayerSums(NamedTuple):
    """What the indicators are made of: float32 scalars of one block and micro-batch, or (L,) of all
    blocks and a whole step.

    LSE is the log-sum-exp of a softmax's logits, h a branch's output after its multiplier.
    """

    attention_lse: Tensor
    """Σ LSE² of the attention logits over batch, heads and positions."""
    attention_square: Tensor
    """Σ h² of the attention branch."""
    attention_outliers: Tensor
    """Entries of the attention branch's output that lie more than 5 standard deviations
    (population, over the features of their token) from their token's mean."""
    mlp_square: Tensor
    """Σ h² of the MLP or expert branch."""
    mlp_outliers: Tensor
    """As `attention_outliers`, of the MLP or expert branch."""
    router_lse: Tensor | None = None
    """Σ LSE² of the router logits over tokens; None in a model without experts."""


class Probe:
    """Takes the sums of one micro-batch, on the device. Stateless, so a compiler may trace through
    it."""

    @torch.no_grad()
    def attention(self, q: Tensor, k: Tensor, scale: float, mask: Tensor | None) -> Tensor:
        """Σ LSE² over batch, heads and positions; arguments as of `log_sum_exp`."""
        return log_sum_exp(q.detach(), k.detach(), scale, mask).square().sum()

    @torch.no_grad()
    def log_sum_exp(self, lse: Tensor) -> Tensor:
        """Σ LSE² where the attention kernel has given LSE, of any shape."""
        return lse.detach().float().square().sum()

    @torch.no_grad()
    def router(self, logits: Tensor) -> Tensor:
        """Σ LSE² over tokens of logits (N, E) (the router's z-loss, arXiv 2202.08906, eq. 5, before
        the mean)."""
        return logits.detach().float().logsumexp(-1).square().sum()

    @torch.no_grad()
    def block(
        self,
        attention: Tensor,
        router: Tensor | None,
        attention_output: Tensor,
        mlp_output: Tensor,
        multiplier: float,
    ) -> LayerSums:
        """The sums of one block.

        Args:
            attention, router: what the methods above returned.
            attention_output, mlp_output: (B, T, D), before they are multiplied by `multiplier`.
        """
        attention_output, mlp_output = (h.detach().float() for h in (attention_output, mlp_output))
        return LayerSums(
            attention_lse=attention.float(),
            attention_square=attention_output.square().sum() * multiplier**2,
            attention_outliers=outliers(attention_output),
            mlp_square=mlp_output.square().sum() * multiplier**2,
            mlp_outliers=outliers(mlp_output),
            router_lse=router,
        )


def outliers(h: Tensor) -> Tensor:
    """How many entries of h (B, T, D) are outliers, as `LayerSums.attention_outliers` says; float32
    scalar."""
    deviation = h - h.mean(-1, keepdim=True)
    limit = OUTLIER * deviation.square().mean(-1, keepdim=True).sqrt()
    return (deviation.abs() > limit).sum().float()


def log_sum_exp(q: Tensor, k: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """Log-sum-exp of the attention logits scale · q kᵀ + mask that each position sees, (B, H, T)
    float32.

    The attention kernel's own where it gives one (CPU; CUDA in half precision without a mask),
    otherwise computed by chunks of positions.

    Args:
        q, k: (B, H, T, C) and (B, G, T, C), as attention takes them.
        mask: as of `model.layers.attention_mask`; None: causal.
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


# An operator of its own: a compiler would unroll a loop as long as the context.
@torch.library.custom_op("archscale::chunked_log_sum_exp", mutates_args=())
def chunked_log_sum_exp(q: Tensor, k: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """`log_sum_exp` in plain PyTorch, a few positions at a time; k has as many heads as q."""
    B, H, T, _ = q.shape
    position = torch.arange(T, device=q.device)
    size = max(1, CHUNK_ELEMENTS // (B * H * T))
    parts = []
    for start in range(0, T, size):
        rows = slice(start, min(start + size, T))
        # Causal without a mask: no key after the chunk's last position can be seen.
        keys = T if mask is not None else rows.stop
        logits = q[:, :, rows].float() @ k[:, :, :keys].float().mT * scale
        if mask is not None:
            logits = logits + mask[:, :, rows]
        else:
            logits = logits.masked_fill(position[:keys] > position[rows, None], -math.inf)
        parts.append(logits.logsumexp(-1))
    return torch.cat(parts, -1).float()


@chunked_log_sum_exp.register_fake
def _(q: Tensor, k: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    return q.new_empty(q.shape[:-1], dtype=torch.float32)


def stability_metrics(
    sums: LayerSums, tokens: int, heads: int, width: int, per_layer: bool
) -> dict[str, Tensor]:
    """`stability/*` metrics, scalars on the device: means over layers, then, with `per_layer`,
    those of each layer, counted from 0.

    Args:
        sums: (L,) each, of all micro-batches and ranks.
        tokens: of the whole step. heads: H. width: D.
    """
    entries = tokens * width
    layers = {"attention_z": sums.attention_lse / (tokens * heads)}
    if sums.router_lse is not None:
        layers["router_z"] = sums.router_lse / tokens
    layers |= {
        "attention_output_rms": (sums.attention_square / entries).sqrt(),
        "mlp_output_rms": (sums.mlp_square / entries).sqrt(),
        "attention_outlier_pct": 100 * sums.attention_outliers / entries,
        "mlp_outlier_pct": 100 * sums.mlp_outliers / entries,
    }
    metrics = {f"stability/{name}": values.mean() for name, values in layers.items()}
    if per_layer:
        for number in range(len(sums.attention_lse)):
            for name, values in layers.items():
                metrics[f"stability/layer_{number:02d}/{name}"] = values[number]
    return metrics
