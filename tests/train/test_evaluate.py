"""Validation loss over tokens that stand for no text."""

from types import SimpleNamespace

import pytest
import torch

from archscale.data.loader import Batch
from archscale.train.evaluate import evaluate


@pytest.mark.parametrize("length", [0, 2])
def test_bits_per_byte_only_where_there_are_bytes(length: int) -> None:
    loss = torch.tensor(6.0)  # summed over the batch, nats
    engine = SimpleNamespace(forward=lambda inputs, targets: SimpleNamespace(loss=loss))
    batch = torch.tensor([[0, 1, 2]])
    held_out = evaluate(
        engine,
        [Batch(batch, batch)],
        torch.full((3,), length),
        torch.device("cpu"),  # type: ignore
    )
    assert held_out.loss == 2.0
    assert (held_out.bits_per_byte is not None) == (length > 0)
