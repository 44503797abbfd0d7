"""The native engine: a plain module on one process, DDP when shard is 1, FSDP2 when replicate is 1,
HSDP otherwise.

Experts may be spread over part of the ranks of a shard group (`expert`); FSDP2 then shards each
one's part over the rest. Gradients are SUMMED over ranks whatever the layout; the step divides by
the global number of target tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from archscale.distributed import Fragment, fragment, world_size
from archscale.parallel.engine import Allow, Optimizer, clip_gradients
from archscale.parallel.mesh import build_expert_mesh, build_mesh


class NativeEngine:
    """Owns a model's layout.

    Args:
        build: makes the model; called on the meta device. What can spread experts over ranks has a
            method `spread_experts(mesh)`, which returns the module that FSDP2 is to shard over the
            others.
        initialize: fills its parameters, which are by then plain tensors or DTensors on `device`.
        replicate, shard: mesh sizes; their product is the world size. expert: divides shard.
        reshard: free a block's gathered parameters between its forward and backward pass.
        dtype: of matrix products; FSDP2 gathers parameters in it and reduces gradients in float32.

    Attributes:
        module: the bare model: names, parameters, state dicts.
        forward: what a training step calls.
        keeps_gradients: they are to be zeroed instead of freed.
        shard_group: process group over which parameters are sharded, None where they are whole.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        initialize: Callable[[nn.Module], None],
        *,
        device: torch.device,
        replicate: int,
        shard: int,
        reshard: bool,
        dtype: torch.dtype,
        compile: bool,
        expert: int = 1,
    ):
        with torch.device("meta"):
            self.module = build()
        blocks: Any = self.module.blocks
        world = world_size()
        self.shard_group: Any = None
        if world > 1 and shard > 1:
            mesh = build_mesh(device, replicate, shard)
            self.shard_group = mesh["shard"].get_group()
            policy = MixedPrecisionPolicy(
                param_dtype=None if dtype == torch.float32 else dtype,
                reduce_dtype=torch.float32,
                cast_forward_inputs=False,  # the residual stream stays float32
            )

            def sharded(mesh: DeviceMesh) -> DeviceMesh:
                return mesh["replicate", "shard"] if replicate > 1 else mesh["shard"]

            if expert > 1:
                experts = build_expert_mesh(device, replicate, shard, expert)
                spreading: list[Any] = [
                    m for m in self.module.modules() if hasattr(m, "spread_experts")
                ]
                for module in spreading:
                    part = module.spread_experts(experts["expert"])
                    fully_shard(
                        part, mesh=sharded(experts), mp_policy=policy, reshard_after_forward=reshard
                    )
            for block in blocks:
                fully_shard(
                    block, mesh=sharded(mesh), mp_policy=policy, reshard_after_forward=reshard
                )
            fully_shard(
                self.module, mesh=sharded(mesh), mp_policy=policy
            )  # embedding, head and final norm
            for module in self.module.modules():
                if isinstance(module, FSDPModule):
                    module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
                    module.set_gradient_divide_factor(1.0)
        self.module.to_empty(device=device)
        initialize(self.module)
        if compile:
            for block in blocks:
                block.compile()
        self.forward: Callable[..., Any] = self.module
        self.gradient_scale = (
            1.0  # multiplies the loss so that the engine's reduction becomes a sum
        )
        # DDP's gradients are views of its buckets. Without them, accumulation would have gradients
        # of its own beside these.
        self.keeps_gradients = world > 1 and shard == 1
        if self.keeps_gradients:
            self.forward = DistributedDataParallel(self.module, gradient_as_bucket_view=True)
            self.gradient_scale = float(world)  # DDP averages

    def backward(self, objective: Tensor) -> None:
        objective.backward()

    def update(
        self, optimizer: Optimizer, grad_clip: float | None, allow: Allow | None = None
    ) -> Tensor:
        grads = (p.grad for p in self.module.parameters() if p.grad is not None)
        norm = clip_gradients(grads, grad_clip, self.shard_group)
        if allow is None or allow(norm):
            optimizer.step()
        optimizer.zero_grad(set_to_none=not self.keeps_gradients)
        return norm

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.module.named_parameters())

    def weights(self) -> dict[str, Fragment]:
        return {name: fragment(parameter) for name, parameter in self.module.named_parameters()}

    def weights_changed(self) -> None:
        """Nothing is kept beside the parameters themselves."""

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Around forward and backward of one micro-batch. DDP reduces once, with the last one;
        FSDP2 reduces each, so that only sharded gradients accumulate."""
        if isinstance(self.forward, DistributedDataParallel) and not last:
            with self.forward.no_sync():
                yield
        else:
            yield
