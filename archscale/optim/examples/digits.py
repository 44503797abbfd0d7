"""What the examples train: a small ConvNet on scikit-learn's 1,797 handwritten digits of 8 × 8."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

TRAINING = 1400  # images; the other 397 are held out


class ConvNet(nn.Module):
    """Images (B, 1, 8, 8) → logits (B, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.GroupNorm(4, 32), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.GroupNorm(4, 64), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(256, 64), nn.ReLU()),
        )
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images))


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, held-out images and labels; the split is always the same."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x = (torch.tensor(images, dtype=torch.float32) / 8 - 1).view(-1, 1, 8, 8)[order]
    y = torch.tensor(labels)[order]
    return x[:TRAINING], y[:TRAINING], x[TRAINING:], y[TRAINING:]


def batches(epochs: int, rank: int = 0, ranks: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches of 100 images, of which each rank gets an equal part; 14 in an epoch."""
    x, y, _, _ = digits()
    for epoch in range(epochs):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch))
        for batch in order.split(100):
            mine = batch[rank::ranks]
            yield x[mine], y[mine]


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """Share of held-out images that are classified rightly."""
    device = next(model.parameters()).device
    _, _, x, y = (tensor.to(device) for tensor in digits())
    model.eval()
    right = (model(x).argmax(1) == y).float().mean().item()
    model.train()
    return right
