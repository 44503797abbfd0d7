"""One optimizer step: the global batch's mean loss per target token, its gradient, clipping,
update.

Every quantity is global: no result depends on how the batch is spread over ranks and micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from archscale.data.loader import Batch
from archscale.distributed import all_reduce
from archscale.model.layers import Probe
from archscale.model.loss import IGNORE
from archscale.optim import MatrixOptimizer
from archscale.parallel.engine import Engine
from archscale.telemetry.profiling import phase
from archscale.telemetry.stability import LayerSums
from archscale.train.balance import LoadedExperts, StepBalance
from archscale.train.placing import place

PADDING = "data/padding"


class Seen(NamedTuple):
    """What a step showed of every layer, over the whole step's batch, on the device."""

    sums: LayerSums | None
    """What a probe summed, (L,) each; None without a probe."""
    load: Tensor | None
    """Assignments to each expert, (L, E) int64; None without experts."""


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
    micro_batches: Sequence[Batch],
    device: torch.device,
    grad_clip: float | None,
    experts: LoadedExperts | None = None,
    probe: Probe | None = None,
    supervision: Supervision = Supervision(),  # noqa: B008  frozen
) -> tuple[dict[str, Tensor], Seen]:
    """One update from this rank's share of the batch. Waits for nothing on the host.

    Args:
        micro_batches: of the batch; padding, whose targets are `loss.IGNORE`, may lie anywhere.
        grad_clip: largest global gradient norm; None: no clipping.
        experts: of a model that has them: their load balance joins the objective.
        probe: looks into the forward passes.

    Returns:
        `loss` (nats per target token, global), `PADDING` (share of positions without a target) and
        `grad_norm` (before clipping), scalars on the device; with experts also `aux_loss`
        (weighted), `moe/max_violation` and `moe/load_entropy`, of the whole step's batch. Beside
        these, what was seen of every layer.
    """
    # Means over the tokens of ALL ranks and micro-batches, so their numbers are needed before the
    # first backward.
    # On the host: no waiting.
    here = float(sum((batch.targets != IGNORE).sum().item() for batch in micro_batches))
    tokens = float(sum(batch.inputs.numel() for batch in micro_batches))
    sizes = supervision.first_reduce(
        torch.stack([torch.full((), here, device=device), torch.full((), tokens, device=device)])
    )
    scale = engine.gradient_scale / sizes[0]
    moved = [place(batch, engine.module, device) for batch in micro_batches]
    balance = None
    if experts is not None:
        balance = StepBalance(experts.moe, sizes[1], experts.load)
        balance.count(engine, moved[1:])
    total = torch.zeros((), device=device)
    probed: list[tuple[LayerSums, ...]] = []  # by micro-batch, by layer
    for i, batch in enumerate(moved):
        with engine.micro_batch(last=i == len(moved) - 1):
            with phase("forward"):
                output = engine.forward(*batch, probe=probe)
                objective = output.loss * scale
                if balance is not None:
                    objective = objective + balance.loss(output.routing) * engine.gradient_scale
            with phase("backward"):
                engine.backward(objective)
        if output.probed is not None:
            probed.append(output.probed)
        total += output.loss.detach()
    if balance is None:
        measured = {"loss": all_reduce(total) / sizes[0]}
    else:
        total, auxiliary = all_reduce(torch.stack([total, balance.total]))
        measured = {"loss": total / sizes[0], "aux_loss": auxiliary, **balance.metrics()}
    measured[PADDING] = 1 - sizes[0] / sizes[1]
    allow = supervision.allow
    judged = None if allow is None else lambda norm: allow(measured["loss"], norm)
    with phase("update"):
        measured["grad_norm"] = engine.update(optimizer, grad_clip, judged)
    sums = _add_up(probed) if probed else None
    if balance is None or experts is None:
        return measured, Seen(sums, None)
    experts.load = balance.load
    return measured, Seen(sums, balance.load)


def _add_up(probed: Sequence[tuple[LayerSums, ...]]) -> LayerSums:
    """The sums of every layer, (L,) each, over all micro-batches and ranks: one collective."""
    # (micro-batches, L, fields); `router_lse`, which a dense model has not, is the last field.
    packed = torch.stack(
        [
            torch.stack(
                [torch.stack([value for value in layer if value is not None]) for layer in layers]
            )
            for layers in probed
        ]
    )
    return LayerSums(*all_reduce(packed.sum(0)).unbind(1))
