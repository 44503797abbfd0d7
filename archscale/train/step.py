"""One optimizer step: the global batch's mean loss per target token, its gradient, clipping, update.

Every quantity is global: no result depends on how the batch is spread over ranks and micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from archscale.config import MoEConfig
from archscale.distributed import all_reduce, local_tensor
from archscale.model.loss import IGNORE
from archscale.optim import MatrixOptimizer
from archscale.parallel.native import NativeEngine
from archscale.train.balance import StepBalance


def train_step(
    engine: NativeEngine,
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
            objective.backward()
        total += loss.detach()
    norm = clip_gradients(engine.module.parameters(), grad_clip, engine.shard_group)
    optimizer.step()
    optimizer.zero_grad(set_to_none=not engine.keeps_gradients)
    if balance is None:
        return {"loss": all_reduce(total) / sizes[0], "grad_norm": norm}
    total, auxiliary = all_reduce(torch.stack([total, balance.total]))
    return {"loss": total / sizes[0], "aux_loss": auxiliary, "grad_norm": norm, **balance.metrics()}


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], max_norm: float | None, shard_group: object = None) -> Tensor:
    """Scale all gradients so that their global norm is at most `max_norm`; returns the norm before.

    Args:
        shard_group: group over which gradients are sharded; None where every rank has them whole. Replicas hold the
            same gradients and are not reduced over.
    """
    grads = [g for p in parameters if p.grad is not None and (g := local_tensor(p.grad)).numel()]
    device = grads[0].device if grads else torch.device("cpu")
    total = torch.zeros((), device=device)
    if grads:
        total += torch.stack([norm.float().square() for norm in torch._foreach_norm(grads)]).sum()
    if shard_group is not None:
        total = all_reduce(total, group=shard_group)
    norm = total.sqrt()
    if max_norm is not None and grads:
        # A norm that is not finite drops the whole gradient; what is left, nan · 0, the optimizer does not apply.
        factor = torch.where(norm.isfinite(), (max_norm / (norm + 1e-6)).clamp(max=1.0), 0.0)
        torch._foreach_mul_(grads, factor)
    return norm


def _move(tensor: Tensor, device: torch.device) -> Tensor:
    """To the device; from pinned memory on CUDA, because a copy from pageable memory waits."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
