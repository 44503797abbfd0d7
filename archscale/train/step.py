"""One optimizer step: the global batch's mean loss per target token, its gradient, clipping,
update.

Every quantity is global: no result depends on how the batch is spread over ranks and micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from archscale.config import MoEConfig
from archscale.distributed import all_reduce
from archscale.model.layers import Probe
from archscale.model.loss import IGNORE
from archscale.optim import MatrixOptimizer
from archscale.parallel.engine import Engine
from archscale.train.balance import StepBalance


class Seen(NamedTuple):
    """What a step saw of every layer, over its whole batch, on the device.

    Attributes:
        sums: of a probe, (L, 6) as `telemetry.stability` wants them.
        load: assignments to each expert, (L, E) int64.
    """

    sums: Tensor | None
    load: Tensor | None


class Supervision(NamedTuple):
    """Who watches a step.

    Attributes:
        allow: asked with the loss and the gradient norm; where it says no, the update is left out.
            All ranks must say the same. None: every update is made.
        first_reduce: sums over ranks in the step's first collective (who times it sees which rank
            arrives last).
    """

    allow: Callable[[Tensor, Tensor], bool] | None = None
    first_reduce: Callable[[Tensor], Tensor] = all_reduce


def train_step(
    engine: Engine,
    optimizer: MatrixOptimizer,
    micro_batches: Sequence[tuple[Tensor, Tensor]],
    device: torch.device,
    grad_clip: float | None,
    moe: MoEConfig | None = None,
    probe: Probe | None = None,
    supervision: Supervision = Supervision(),  # noqa: B008  frozen
) -> tuple[dict[str, Tensor], Seen]:
    """One update from this rank's share of the batch. Waits for nothing on the host.

    Args:
        micro_batches: (inputs, targets), each (micro_batch, context) int64.
        grad_clip: largest global gradient norm; None: no clipping.
        moe: of a model with experts: their load balance joins the objective.
        probe: looks into the forward passes.

    Returns:
        `loss` (nats per target token, global) and `grad_norm` (before clipping), scalars on the
        device; with experts also `aux_loss` (weighted), `moe/max_violation` and `moe/load_entropy`,
        of the whole step's batch. Beside these, what was seen of every layer.
    """
    # Means over the tokens of ALL ranks and micro-batches, so their numbers are needed before the
    # first backward.
    here = float(
        sum((targets != IGNORE).sum().item() for _, targets in micro_batches)
    )  # on the host: no waiting
    tokens = float(sum(inputs.numel() for inputs, _ in micro_batches))
    sizes = supervision.first_reduce(
        torch.stack([torch.full((), here, device=device), torch.full((), tokens, device=device)])
    )
    scale = engine.gradient_scale / sizes[0]
    moved = [(_move(inputs, device), _move(targets, device)) for inputs, targets in micro_batches]
    balance = None
    if moe is not None:
        balance = StepBalance(moe, sizes[1])
        balance.count(engine, [inputs for inputs, _ in moved[1:]])
    total = torch.zeros((), device=device)
    sums: list[Tensor] = []
    for i, (inputs, targets) in enumerate(moved):
        with engine.micro_batch(last=i == len(moved) - 1):
            if balance is None and probe is None:
                loss = engine.forward(inputs, targets)
                objective = loss * scale
            else:
                loss, routing, seen = engine.forward(
                    inputs, targets, routing=balance is not None, probe=probe
                )
                objective = loss * scale
                if balance is not None:
                    objective = objective + balance.loss(routing) * engine.gradient_scale
                if seen is not None:
                    sums.append(seen)
            engine.backward(objective)
        total += loss.detach()
    if balance is None:
        measured = {"loss": all_reduce(total) / sizes[0]}
    else:
        total, auxiliary = all_reduce(torch.stack([total, balance.total]))
        measured = {"loss": total / sizes[0], "aux_loss": auxiliary, **balance.metrics()}
    allow = supervision.allow
    judged = None if allow is None else lambda norm: allow(measured["loss"], norm)
    measured["grad_norm"] = engine.update(optimizer, grad_clip, judged)
    seen_sums = all_reduce(torch.stack(sums).sum(0)) if sums else None
    return measured, Seen(seen_sums, None if balance is None else balance.load)


def _move(tensor: Tensor, device: torch.device) -> Tensor:
    """To the device; from pinned memory on CUDA, because a copy from pageable memory waits."""
    return (
        tensor.pin_memory().to(device, non_blocking=True)
        if device.type == "cuda"
        else tensor.to(device)
    )
