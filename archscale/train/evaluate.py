"""Validation loss: mean nats per token over the first windows of each validation split, the same on
any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from archscale.config import Config
from archscale.data.loader import Batch
from archscale.data.validation import ValidationSet, validation_batches
from archscale.distributed import all_reduce, rank, world_size
from archscale.model.loss import IGNORE
from archscale.train.placing import place


class Forwards(Protocol):
    """An engine, or what has as much of one.

    Attributes:
        forward: gives what the model does, from inputs and targets.
    """

    forward: Callable[..., Any]


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


class Evaluation:
    """The validation of a run, on this rank.

    Args:
        sets: what is evaluated.
        batches, batch_size: how many batches of each, from its start, and the windows of a batch.
    """

    def __init__(
        self, sets: Sequence[ValidationSet], batches: int, batch_size: int, device: torch.device
    ):
        self.sets, self.device = list(sets), device
        self._batches, self._batch_size = batches, batch_size
        tables = [held.split.token_bytes for held in sets]
        self._token_bytes = [
            None if table is None else torch.from_numpy(table.astype("int64")) for table in tables
        ]

    @classmethod
    def of_run(
        cls,
        config: Config,
        sets: Sequence[ValidationSet],
        device: torch.device,
        batch_size: int | None = None,
    ) -> Self:
        """As a run of this resolved config is validated: on `eval.batches` batches of the training
        size, which are the same windows on any number of ranks and at any micro-batch.

        Args:
            batch_size: windows of one forward pass, a divisor of all; None: as in training.
        """
        size = batch_size or config.training.micro_batch
        return cls(sets, config.eval.batches * config.batch_size // size, size, device)

    def metrics(
        self, engine: Forwards, leave: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        """`val_loss` and `val_bits_per_byte` of the run, and with `/<name>` of a mixture's sources.

        The run's loss is the mean of its sets' by their weights, as of a text that has these shares
        of tokens; its bits per byte are that mean over the same text's bytes per token. Where it is
        not known what text the tokens stand for there are no bits per byte.

        Args:
            leave: asked before every batch, with the same answer on all ranks; then there is no
                result.
        """
        if not self.sets:
            return {}
        count, size = self._batches, self._batch_size
        results = []
        for held, token_bytes in zip(self.sets, self._token_bytes):
            batches = validation_batches(held.split, count, size, rank(), world_size())
            result = evaluate(engine, batches, token_bytes, self.device, leave)
            if result is None:
                return None
            results.append(result)
        weighted = [(held.weight, each) for held, each in zip(self.sets, results) if held.weight]
        lengths = [
            weight * each.bytes_per_token
            for weight, each in weighted
            if each.bytes_per_token is not None
        ]
        whole = HeldOut(
            sum(weight * each.loss for weight, each in weighted),
            sum(lengths) if len(lengths) == len(weighted) else None,
        )
        named = {f"/{held.name}": each for held, each in zip(self.sets, results) if held.name}
        metrics = {}
        for suffix, each in {"": whole, **named}.items():
            metrics[f"val_loss{suffix}"] = each.loss
            if each.bits_per_byte is not None:
                metrics[f"val_bits_per_byte{suffix}"] = each.bits_per_byte
        return metrics


def of_average(metrics: Mapping[str, float]) -> dict[str, float]:
    """The losses among an evaluation's metrics, by the names that those of the running average of
    the weights have: `val_loss_ema`, `val_loss_ema/web`."""
    losses = {key: value for key, value in metrics.items() if key.startswith("val_loss")}
    return {key.replace("val_loss", "val_loss_ema", 1): value for key, value in losses.items()}


@torch.no_grad()
def evaluate(
    engine: Forwards,
    batches: Iterable[Batch],
    token_bytes: Tensor | None,
    device: torch.device,
    leave: Callable[[], bool] = lambda: False,
) -> HeldOut | None:
    """Means over this rank's `batches`, reduced over all ranks; None where `leave` said so before
    one of them.

    Args:
        batches: the same number on every rank.
        token_bytes: UTF-8 bytes that each token stands for, (V,); None where they are not known.
    """
    sums = torch.zeros(3, device=device, dtype=torch.float64)  # nats, tokens, bytes
    for batch in batches:
        if leave():
            return None
        # The ends of documents are read, whatever training reads.
        inputs, targets, _ = batch
        counted = targets != IGNORE
        module = getattr(engine, "module", None)
        placed = place(Batch(inputs, targets), module, device)
        documents = () if placed.documents is None else (placed.documents,)
        output = engine.forward(placed.inputs, placed.targets, *documents)
        sums[0] += output.loss.double()
        sums[1] += counted.sum().to(device)
        if token_bytes is not None:
            length = token_bytes[torch.where(counted, targets, 0)] * counted
            sums[2] += length.sum().to(device)
    nats, tokens, size = all_reduce(sums).tolist()
    # A tokenizer may turn all of a text into its unknown token, which stands for no byte.
    return HeldOut(nats / tokens, size / tokens if size else None)
