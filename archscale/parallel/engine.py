"""What training asks of an engine, and what engines share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from archscale.distributed import Fragment, all_reduce, local_tensor

Allow = Callable[[Tensor], bool]
"""Decides by the global gradient norm whether an update is made; the same on all ranks."""


class Optimizer(Protocol):
    """What an engine needs of an optimizer."""

    def step(self) -> Any: ...

    def zero_grad(self, set_to_none: bool = True) -> None: ...


class Engine(Protocol):
    """Owns a model's layout: who stores which part of a parameter, and how gradients are SUMMED
    over ranks.

    Attributes:
        module: the bare model: names and roles.
        forward: what a training step calls.
        gradient_scale: multiplies the loss so that the engine's reduction becomes a sum.
    """

    module: nn.Module
    forward: Callable[..., Any]
    gradient_scale: float

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of one micro-batch of a step."""

    def backward(self, objective: Tensor) -> None:
        """Add the gradient of one micro-batch's objective."""

    def update(
        self, optimizer: Optimizer, grad_clip: float | None, allow: Allow | None = None
    ) -> Tensor:
        """Once a step: clip, step, drop the gradients; returns their global norm before clipping,
        on the device.

        Args:
            allow: where it says no, the optimizer does nothing.
        """

    def parameters(self) -> dict[str, nn.Parameter]:
        """What the optimizer updates, by name: the module's own, or 1-D tensors that hold what
        `weights` says of each."""

    def weights(self) -> dict[str, Fragment]:
        """The float32 parameters that the optimizer updates, by name: what checkpoints save, and
        load in place."""

    def weights_changed(self) -> None:
        """Whoever wrote into `weights()` calls this."""


@torch.no_grad()
def clip_gradients(
    grads: Iterable[Tensor], max_norm: float | None, shard_group: object = None
) -> Tensor:
    """Scale all gradients in place so that their global L2 norm is at most `max_norm`; returns the
    norm before, a float32 scalar on the device.

    Args:
        grads: plain tensors or DTensors, of which each rank has its part.
        max_norm: None: only the norm.
        shard_group: group over which gradients are sharded; None where every rank has them whole.
            Replicas hold the same gradients and are not reduced over.
    """
    # A rank can hold nothing of a short parameter, and norms of nothing fail.
    grads = [part for grad in grads if (part := local_tensor(grad)).numel()]
    device = grads[0].device if grads else torch.device("cpu")
    total = torch.zeros((), device=device)
    if grads:
        total += torch.stack(torch._foreach_norm(grads)).float().square().sum()
    if shard_group is not None:
        total = all_reduce(total, group=shard_group)
    norm = total.sqrt()
    if max_norm is not None and grads:
        # A norm that is not finite drops the whole gradient; what is left of it, nan · 0 = nan, the
        # optimizer does not apply.
        factor = torch.where(norm.isfinite(), (max_norm / (norm + 1e-6)).clamp(max=1.0), 0.0)
        torch._foreach_mul_(grads, factor)
    return norm
