"""Validation loss over tokens that stand for no text."""

from types import SimpleNamespace

import pytest
import torch

from archscale.train.evaluate import evaluate


@pytest.mark.parametrize("length", [0, 2])
def test_bits_per_byte_only_where_there_are_bytes(length: int) -> None:
    loss = torch.tensor(6.0)  # summed over the batch, nats
    engine = SimpleNamespace(forward=lambda inputs, targets: SimpleNamespace(loss=loss))
    batch = torch.tensor([[0, 1, 2]])
    losses = evaluate(
        engine,
        [(batch, batch)],
        torch.full((3,), length),
        torch.device("cpu"),  # type: ignore
    )
    assert losses["val_loss"] == 2.0
    assert ("val_bits_per_byte" in losses) == (length > 0)
