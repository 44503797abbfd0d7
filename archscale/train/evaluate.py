"""Validation loss: mean nats per token over the first windows of the validation split, the same on
any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from archscale.distributed import all_reduce
from archscale.model.loss import IGNORE
from archscale.parallel.engine import Engine


@torch.no_grad()
def evaluate(
    engine: Engine,
    batches: Iterable[tuple[Tensor, Tensor]],
    token_bytes: Tensor,
    device: torch.device,
) -> dict[str, float]:
    """`val_loss` (nats per token) and `val_bits_per_byte` over this rank's `batches`, reduced over
    all ranks; without the latter where the tokens stand for no text.

    Args:
        batches: (inputs, targets), the same number of batches on every rank.
        token_bytes: UTF-8 bytes that each token stands for, (V,).
    """
    sums = torch.zeros(3, device=device, dtype=torch.float64)  # nats, tokens, bytes
    for inputs, targets in batches:
        counted = targets != IGNORE
        length = token_bytes[torch.where(counted, targets, 0)] * counted
        sums[0] += engine.forward(inputs.to(device), targets.to(device)).loss.double()
        sums[1] += counted.sum().to(device)
        sums[2] += length.sum().to(device)
    nats, tokens, size = all_reduce(sums).tolist()
    losses = {"val_loss": nats / tokens}
    if size:
        losses["val_bits_per_byte"] = nats / size / math.log(2)
    return losses
