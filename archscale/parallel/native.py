"""The native engine: a plain module on one process, DDP when shard is 1, FSDP2 when replicate is 1, HSDP otherwise.

Gradients are SUMMED over ranks whatever the layout; the step divides by the global number of target tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from archscale.distributed import world_size
from archscale.parallel.mesh import build_mesh


class NativeEngine:
    """Owns a model's layout.

    Args:
        build: makes the model; called on the meta device.
        initialize: fills its parameters, which are by then plain tensors or DTensors on `device`.
        replicate, shard: mesh sizes; their product is the world size.
        reshard: free a block's gathered parameters between its forward and backward pass.
        dtype: of matrix products; FSDP2 gathers parameters in it and reduces gradients in float32.

    Attributes:
        module: the bare model: names, parameters, state dicts.
        forward: what a training step calls.
        keeps_gradients: they are to be zeroed instead of freed.
        shard_group: process group over which parameters are sharded, None where they are whole.
    """

    def __init__(
        self, build: Callable[[], nn.Module], initialize: Callable[[nn.Module], None], *, device: torch.device,
        replicate: int, shard: int, reshard: bool, dtype: torch.dtype, compile: bool,
    ):  # fmt: skip
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
            layout = mesh if replicate > 1 else mesh["shard"]
            for block in blocks:
                fully_shard(block, mesh=layout, mp_policy=policy, reshard_after_forward=reshard)
            fully_shard(self.module, mesh=layout, mp_policy=policy)  # embedding, head and final norm
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
        self.gradient_scale = 1.0  # multiplies the loss so that the engine's reduction becomes a sum
        # DDP's gradients are views of its buckets. Without them, accumulation would have gradients of its own beside these.
        self.keeps_gradients = world > 1 and shard == 1
        if self.keeps_gradients:
            self.forward = DistributedDataParallel(self.module, gradient_as_bucket_view=True)
            self.gradient_scale = float(world)  # DDP averages

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Around forward and backward of one micro-batch. DDP reduces once, with the last one; FSDP2 reduces each,
        so that only sharded gradients accumulate."""
        if isinstance(self.forward, DistributedDataParallel) and not last:
            with self.forward.no_sync():
                yield
        else:
            yield
