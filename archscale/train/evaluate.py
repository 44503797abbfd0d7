"""Validation loss: mean nats per token over the first windows of each validation split, the same on
any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from archscale.data.validation import ValidationSet
from archscale.distributed import all_reduce
from archscale.model.loss import IGNORE
from archscale.parallel.engine import Engine


class HeldOut(NamedTuple):
    """What a model makes of one validation split.

    Attributes:
        loss: nats per token.
        bytes_per_token: UTF-8 bytes of the text; None where it is not known what text the tokens
            stand for.
    """

    loss: float
    bytes_per_token: float | None

    @property
    def bits_per_byte(self) -> float | None:
        return self.bytes_per_token and self.loss / self.bytes_per_token / math.log(2)


@torch.no_grad()
def evaluate(
    engine: Engine,
    batches: Iterable[tuple[Tensor, Tensor]],
    token_bytes: Tensor | None,
    device: torch.device,
) -> HeldOut:
    """Means over this rank's `batches`, reduced over all ranks.

    Args:
        batches: (inputs, targets), the same number of batches on every rank.
        token_bytes: UTF-8 bytes that each token stands for, (V,); None where they are not known.
    """
    sums = torch.zeros(3, device=device, dtype=torch.float64)  # nats, tokens, bytes
    for inputs, targets in batches:
        counted = targets != IGNORE
        sums[0] += engine.forward(inputs.to(device), targets.to(device)).loss.double()
        sums[1] += counted.sum().to(device)
        if token_bytes is not None:
            length = token_bytes[torch.where(counted, targets, 0)] * counted
            sums[2] += length.sum().to(device)
    nats, tokens, size = all_reduce(sums).tolist()
    return HeldOut(nats / tokens, None if token_bytes is None else size / tokens)


def validation_metrics(
    sets: Sequence[ValidationSet], results: Sequence[HeldOut]
) -> dict[str, float]:
    """`val_loss` and `val_bits_per_byte` of the run, and with `/<name>` of a mixture's sources.

    The run's loss is the mean of those of its sets by their weights, as of a text that has these
    shares of tokens; its bits per byte are that mean over the same text's bytes per token. What has
    tokens of unknown text has no bits per byte.
    """
    weighted = [(held.weight, result) for held, result in zip(sets, results) if held.weight]
    lengths = [(weight, result.bytes_per_token) for weight, result in weighted]
    whole = HeldOut(
        sum(weight * result.loss for weight, result in weighted),
        None
        if any(length is None for _, length in lengths)
        else sum(weight * (length or 0.0) for weight, length in lengths),
    )
    named = {f"/{held.name}": result for held, result in zip(sets, results) if held.name}
    metrics = {}
    for suffix, result in {"": whole, **named}.items():
        metrics[f"val_loss{suffix}"] = result.loss
        if result.bits_per_byte is not None:
            metrics[f"val_bits_per_byte{suffix}"] = result.bits_per_byte
    return metrics
