"""python -m archscale.optim.examples.one_process --rule orscale

A ConvNet under any rule, every parameter in the right group.
"""

from __future__ import annotations

import argparse

import torch
from torch.nn.functional import cross_entropy

from archscale.optim import RULES, MatrixOptimizer, matrix_groups
from archscale.optim.examples.digits import ConvNet, accuracy, batches

LEARNING_RATE = {"muon": 0.02, "orscale": 0.05, "moonlight": 0.01, "orscale_lm": 0.01}


def train(rule: str, seed: int = 0, epochs: int = 8) -> tuple[ConvNet, float]:
    """The trained model and its last loss."""
    torch.manual_seed(seed)
    model = ConvNet()
    groups = matrix_groups(model, head=model.head, element={"lr": 3e-3})
    print(groups)
    lr = LEARNING_RATE.get(rule, 3e-3)
    # On a CPU without bfloat16 units float32 is faster; the default suits a GPU.
    optimizer = MatrixOptimizer(
        groups, lr=lr, rule=rule, weight_decay=5e-4, compute_dtype=torch.float32
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=14 * epochs)
    for images, labels in batches(epochs):
        loss = cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model, loss.item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rule", default="orscale", choices=list(RULES))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model, loss = train(arguments.rule, arguments.seed)
    print(f"loss {loss:.4f}, held-out accuracy {accuracy(model):.4f}")
