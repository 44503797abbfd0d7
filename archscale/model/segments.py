"""Attention without a mask: documents as segments of one long sequence, for the kernel of
variable-length attention that a GPU has (`torch.nn.attention.varlen`).

All positions of a micro-batch lie in one row of N = B T tokens, cut where a sequence or a document
begins. The kernel does the work of the segments only, gives the log-sum-exp of the logits with the
same call, and never sees T × T numbers. `takes_segments` says which devices run it; elsewhere
attention gets a mask (`layers.attention_mask`), which is the definition that segments are tested
against. The kernel itself has not run on a GPU yet: `archscale bench gpu attention` compares it.

Shapes: B batch, T time, N = B T, S segments, H query heads, G key-value heads, C channels of a
head.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

FIRST_TORCH = (2, 11)  # whose kernel has a window, a scale and the log-sum-exp
GROUPED_TORCH = (2, 12)  # whose signature takes fewer key-value heads than query heads
FIRST_CAPABILITY = (8, 0)  # of the flash attention that the kernel calls
MOST_CHANNELS = 256
TORCH = int(torch.__version__.split(".")[0]), int(torch.__version__.split(".")[1])


class Segments(NamedTuple):
    """Where positions may look: back to the start of their segment, or to the window's."""

    bounds: Tensor
    """(S + 1,) int32 on the device: where segments begin in the row of N tokens, then N; the last
    ones are empty."""
    longest: int
    """No segment is longer, in tokens."""
    window: int | None
    """Tokens that a position sees, itself included; None: all of its segment before it."""


def takes_segments(
    device: str,
    capability: tuple[int, int] | None,
    dtype: torch.dtype,
    head_dim: int,
    torch_version: tuple[int, int],
) -> bool:
    """Whether attention with documents or a window runs on segments.

    Args:
        device: type of the device. capability: of a CUDA device.
        torch_version: major and minor.
    """
    return (
        device == "cuda"
        and capability is not None
        and capability >= FIRST_CAPABILITY
        and dtype in (torch.bfloat16, torch.float16)
        and head_dim <= MOST_CHANNELS
        and head_dim % 8 == 0
        and torch_version >= FIRST_TORCH
    )


def expands_groups(device: str, dtype: torch.dtype, masked: bool) -> bool:
    """Whether `scaled_dot_product_attention` is to be given keys and values as often as there are
    query heads: on CUDA no kernel takes groups in float32, and with a mask not every device's
    does. PyTorch would take its math backend, with logits of T × T in every head."""
    return device == "cuda" and (masked or dtype not in (torch.bfloat16, torch.float16))


def device_takes_segments(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """`takes_segments` of a device of this machine."""
    cuda = device.type == "cuda" and torch.version.hip is None
    capability = torch.cuda.get_device_capability(device) if cuda else None
    return takes_segments(device.type, capability, dtype, head_dim, TORCH)


def segment_bounds(tokens: Tensor, eos_id: int | None, documents: Tensor | None) -> Tensor:
    """Bounds as of `Segments`, (S + 1,) int32, of a batch on the host: arguments as of
    `layers.attention_mask`; positions of one document stand together.

    Segments of no token fill them up to a power of two, so that batches of about as many documents
    have bounds of the same shape.
    """
    starts = torch.zeros(tokens.shape, dtype=torch.bool)
    starts[:, 0] = True
    if documents is not None:
        starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    elif eos_id is not None:
        starts[:, 1:] = tokens[:, :-1] == eos_id
    begins = starts.flatten().nonzero().flatten()
    size = 1 << (len(begins) - 1).bit_length()
    bounds = torch.full((size + 1,), tokens.numel(), dtype=torch.int32)
    bounds[: len(begins)] = begins
    return bounds


def sequence_bounds(batch: int, context: int, device: torch.device) -> Tensor:
    """Bounds, (B + 1,) int32, where sequences are the segments."""
    return torch.arange(batch + 1, device=device, dtype=torch.int32) * context


def segment_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float
) -> tuple[Tensor, Tensor]:
    """softmax(scale · q kᵀ) v within segments, (B, T, H, C), and the log-sum-exp of each position's
    logits, (H, N) float32 without gradient; q (B, T, H, C), k and v (B, T, G, C)."""
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    grouped = q.shape[2] != k.shape[2]
    options: dict[str, Any] = {}
    if grouped and TORCH >= GROUPED_TORCH:
        options["enable_gqa"] = True
    elif grouped:
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    bounds, longest = segments.bounds, segments.longest
    left = -1 if segments.window is None else segments.window - 1
    out, lse = varlen_attn(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        bounds,
        bounds,
        longest,
        longest,
        return_aux=AuxRequest(lse=True),
        scale=scale,
        window_size=(left, 0),
        **options,
    )
    return out.unflatten(0, q.shape[:2]), lse.detach()
