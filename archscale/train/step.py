"""One optimizer step: the global batch's mean loss per target token, its gradient, clipping, update.

Every quantity is global: no result depends on how the batch is spread over ranks and micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from archscale.config import MoEConfig
from archscale.distributed import all_reduce
from archscale.model.loss import IGNORE
from archscale.optim import MatrixOptimizer
from archscale.parallel.engine import Engine
from archscale.train.balance import StepBalance


def train_step(
    engine: Engine,
    optimizer: MatrixOptimizer,
    micro_batches: Sequence[tuple[Tensor, Tensor]],
    device: torch.device,
    grad_clip: float | None,
    moe: MoEConfig | None = None,
) -> dict[str, Tensor]:
    """One update from this rank's share of the batch. Waits for nothing on the host.

    Args:
        micro_batches: (inputs, targets), each (micro_batch, context) int64.
        grad_clip: largest global gradient norm; None: no clipping.
        moe: of a model with experts: their load balance joins the objective.

    Returns:
        `loss` (nats per target token, global) and `grad_norm` (before clipping), scalars on the device; with experts also
        `aux_loss` (weighted), `moe/max_violation` and `moe/load_entropy`, of the whole step's batch.
    """
    # Means over the tokens of ALL ranks and micro-batches, so their numbers are needed before the first backward.
    here = float(sum((targets != IGNORE).sum().item() for _, targets in micro_batches))  # on the host: no waiting
    tokens = float(sum(inputs.numel() for inputs, _ in micro_batches))
    sizes = all_reduce(torch.stack([torch.full((), here, device=device), torch.full((), tokens, device=device)]))
    scale = engine.gradient_scale / sizes[0]
    moved = [(_move(inputs, device), _move(targets, device)) for inputs, targets in micro_batches]
    balance = None
    if moe is not None:
        balance = StepBalance(moe, sizes[1])
        balance.count(engine, [inputs for inputs, _ in moved[1:]])
    total = torch.zeros((), device=device)
    for i, (inputs, targets) in enumerate(moved):
        with engine.micro_batch(last=i == len(moved) - 1):
            if balance is None:
                loss = engine.forward(inputs, targets)
                objective = loss * scale
            else:
                loss, routing = engine.forward(inputs, targets, routing=True)
                objective = loss * scale + balance.loss(routing) * engine.gradient_scale
            engine.backward(objective)
        total += loss.detach()
    norm = engine.update(optimizer, grad_clip)
    if balance is None:
        return {"loss": all_reduce(total) / sizes[0], "grad_norm": norm}
    total, auxiliary = all_reduce(torch.stack([total, balance.total]))
    return {"loss": total / sizes[0], "aux_loss": auxiliary, "grad_norm": norm, **balance.metrics()}


def _move(tensor: Tensor, device: torch.device) -> Tensor:
    """To the device; from pinned memory on CUDA, because a copy from pageable memory waits."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
