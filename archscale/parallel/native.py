"""The native engine: a plain module on one process, DDP (arXiv 2006.15704) when `shard` is 1, FSDP2
(arXiv 2304.11277) when `replicate` is 1, HSDP otherwise.

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
from archscale.parallel.mesh import MeshSizes, build_expert_mesh, build_mesh


class NativeEngine:
    """`parallel.engine.Engine` on torch's own wrappers.

    Args:
        build: makes the model, whose layers are its `blocks`, and which has its parts compiled by
            `compile_parts()`; called on the meta device. What can spread experts over ranks has a
            method `spread_experts(mesh)`, which returns the module that FSDP2 is to shard over the
            others.
        initialize: fills its parameters, which are by then plain tensors or DTensors on `device`.
        reshard: free a block's gathered parameters between its forward and backward pass; the last
            block's are needed again at once, and stay.
        dtype: of matrix products; FSDP2 gathers parameters in it and reduces gradients in float32.
        compile: compile the model's parts.

    Attributes:
        module: the bare model: names, parameters, state dicts.
        forward: what a training step calls.
        gradient_scale: multiplies the loss so that the reduction becomes a sum.
        keeps_gradients: they are to be zeroed instead of freed.
        shard_group: process group over which parameters are sharded, None where they are whole.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        initialize: Callable[[nn.Module], None],
        *,
        device: torch.device,
        sizes: MeshSizes,
        reshard: bool,
        dtype: torch.dtype,
        compile: bool,
    ):
        with torch.device("meta"):
            self.module = build()
        sharded = world_size() > 1 and sizes.shard > 1
        self.shard_group: Any = None
        if sharded:
            self.shard_group = _shard(self.module, device, sizes, reshard, dtype)
        self.module.to_empty(device=device)
        initialize(self.module)
        if compile:
            # Under DDP the compiler would cut every block where a bucket of gradients is full. The
            # blocks are small enough for reductions to overlap with the backward pass.
            torch._dynamo.config.optimize_ddp = False
            parts: Any = self.module
            parts.compile_parts()
        self.forward: Callable[..., Any] = self.module
        self.gradient_scale = 1.0
        # DDP's gradients are views of its buckets. Without them, accumulation would have gradients
        # of its own beside these.
        self.keeps_gradients = world_size() > 1 and not sharded
        if self.keeps_gradients:
            self.forward = DistributedDataParallel(self.module, gradient_as_bucket_view=True)
            self.gradient_scale = float(world_size())  # DDP averages

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
        # After a forward pass without a backward pass, as in an evaluation, the outermost weights
        # are still gathered, in the dtype of the arithmetic.
        for part in self.module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()
        return {name: fragment(parameter) for name, parameter in self.module.named_parameters()}

    def weights_changed(self) -> None:
        """Nothing is kept beside the parameters themselves."""

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Around forward and backward of one micro-batch. DDP reduces once, with the last one;
        FSDP2 scatters the sums of each over the shards, so that only sharded gradients accumulate,
        and adds up those of the replicas with the last one."""
        if isinstance(self.module, FSDPModule):
            self.module.set_requires_all_reduce(last)
        if isinstance(self.forward, DistributedDataParallel) and not last:
            with self.forward.no_sync():
                yield
        else:
            yield


def _shard(
    module: nn.Module, device: torch.device, sizes: MeshSizes, reshard: bool, dtype: torch.dtype
) -> Any:
    """Put `module`, on the meta device, under FSDP2: experts, blocks, then the rest; returns the
    process group over which parameters are sharded."""
    mesh = build_mesh(device, sizes)
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # the residual stream stays float32
    )

    def data_parallel(mesh: DeviceMesh) -> DeviceMesh:
        return mesh["replicate", "shard"] if sizes.replicate > 1 else mesh["shard"]

    blocks: Any = module.blocks
    last = set(blocks[-1].modules())
    if sizes.expert > 1:
        expert_mesh = build_expert_mesh(device, sizes)
        # A list first: spreading replaces parameters while the modules are walked.
        spreading: list[Any] = [m for m in module.modules() if hasattr(m, "spread_experts")]
        for layer in spreading:
            fully_shard(
                layer.spread_experts(expert_mesh["expert"]),
                mesh=data_parallel(expert_mesh),
                mp_policy=policy,
                reshard_after_forward=reshard and layer not in last,
            )
    for block in blocks:
        # The backward pass begins with the last block: nothing would hide gathering it again.
        again = reshard and block is not blocks[-1]
        fully_shard(block, mesh=data_parallel(mesh), mp_policy=policy, reshard_after_forward=again)
    fully_shard(module, mesh=data_parallel(mesh), mp_policy=policy)  # embedding, final norm, head
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
            part.set_gradient_divide_factor(1.0)
    return mesh["shard"].get_group()
