"""One optimizer step: the global batch's mean loss per target token, its gradient, clipping, update.

Every quantity is global: no result depends on how the batch is spread over ranks and micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from archscale.distributed import all_reduce, local_tensor
from archscale.model.loss import IGNORE
from archscale.optim import MatrixOptimizer
from archscale.parallel.native import NativeEngine


def train_step(
    engine: NativeEngine,
    optimizer: MatrixOptimizer,
    micro_batches: Sequence[tuple[Tensor, Tensor]],
    device: torch.device,
    grad_clip: float | None,
) -> dict[str, Tensor]:
    """One update from this rank's share of the batch. Waits for nothing on the host.

    Args:
        micro_batches: (inputs, targets), each (micro_batch, context) int64.
        grad_clip: largest global gradient norm; None: no clipping.

    Returns:
        `loss` (nats per target token, global) and `grad_norm` (before clipping), scalars on the device.
    """
    # Mean over the target tokens of ALL ranks and micro-batches, so it is needed before the first backward.
    count = torch.tensor(float(sum((targets != IGNORE).sum().item() for _, targets in micro_batches)), device=device)
    scale = engine.gradient_scale / all_reduce(count)
    total = torch.zeros((), device=device)
    for i, (inputs, targets) in enumerate(micro_batches):
        with engine.micro_batch(last=i == len(micro_batches) - 1):
            loss = engine.forward(inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True))
            (loss * scale).backward()
        total += loss.detach()
    loss = all_reduce(total) / count
    norm = clip_gradients(engine.module.parameters(), grad_clip, engine.shard_group)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"loss": loss, "grad_norm": norm}


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], max_norm: float | None, shard_group: object = None) -> Tensor:
    """Scale all gradients so that their global norm is at most `max_norm`; returns the norm before.

    Args:
        shard_group: group over which gradients are sharded; None where every rank has them whole. Replicas hold the
            same gradients and are not reduced over.
    """
    grads = [local_tensor(p.grad) for p in parameters if p.grad is not None]
    squares = torch.stack(
        [norm.float().square() for norm in torch._foreach_norm([g for g in grads if g.numel()])] or [torch.zeros(())]
    )
    total = squares.sum()
    if shard_group is not None:
        total = all_reduce(total, group=shard_group)
    norm = total.sqrt()
    if max_norm is not None:
        torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
