"""Training under other people's wrappers, as pool workers run it: the same model, data and steps
whatever wraps them, so that one process without a wrapper gives the expected weights.

Each function returns, by parameter name, the whole weights after `STEPS` steps. `which` is "ours"
or "adamw", torch's own optimizer as the control: where that is right and ours is not, the fault is
ours.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from archscale.optim import MatrixOptimizer

STEPS = 5
BATCH = 12  # divides by every number of ranks here
Weights = dict[str, Tensor]


class Mlp(nn.Module):
    """Two matrices whose sides no number of ranks divides, and vectors."""

    def __init__(self, hidden: int = 19):
        super().__init__()
        self.norm = nn.LayerNorm(10)
        self.up = nn.Linear(10, hidden)
        self.down = nn.Linear(hidden, 7, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(self.norm(x))))


def model(hidden: int = 19) -> Mlp:
    torch.manual_seed(0)
    return Mlp(hidden)


def optimizer(
    which: str, model: nn.Module, rule: str = "orscale_lm", **options
) -> torch.optim.Optimizer:
    params = list(model.named_parameters())
    if which == "adamw":
        return torch.optim.AdamW([p for _, p in params], lr=1e-2, weight_decay=0.1)
    decay = 0.0 if rule == "muonh" else 0.1
    groups = [
        {"params": [(n, p) for n, p in params if p.ndim == 2], "weight_decay": decay},
        {"params": [(n, p) for n, p in params if p.ndim < 2], "rule": "adamw", "weight_decay": 0.1},
    ]
    return MatrixOptimizer(groups, lr=1e-2, rule=rule, compute_dtype=torch.float32, **options)


def batch(step: int) -> tuple[Tensor, Tensor]:
    """This rank's part of the step's batch. Ranks in the same place of a tensor-parallel group call
    `batch_of` instead."""
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    return batch_of(step, world, rank)


def batch_of(step: int, parts: int, part: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(BATCH, 10, generator=generator), torch.randn(BATCH, 7, generator=generator)
    return x[part::parts], y[part::parts]


def loss(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    return (model(x) - y).square().mean()


def weights(model: nn.Module) -> Weights:
    return {
        name.replace("_forward_module.", "").removeprefix("module."): (
            (p.full_tensor() if isinstance(p, DTensor) else p).detach()
        )
        for name, p in model.named_parameters()
    }


def alone(which: str, rule: str = "orscale_lm", hidden: int = 19) -> Weights:
    """One process, no wrapper."""
    net = model(hidden)
    opt = optimizer(which, net, rule)
    for step in range(STEPS):
        loss(net, *batch_of(step, 1, 0)).backward()
        opt.step()
        opt.zero_grad()
    return weights(net)


def with_torch(which: str, layout: str, rule: str = "orscale_lm", hidden: int = 19) -> Weights:
    """DDP, FSDP2, HSDP, tensor parallelism and FSDP2 × tensor parallelism, as torch makes them."""
    net, world = model(hidden), dist.get_world_size()
    data, part = world, dist.get_rank()
    wrapped: nn.Module = net
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    if layout == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(net)
    elif layout == "fsdp2":
        mesh = init_device_mesh("cpu", (world,))
        fully_shard(net.up, mesh=mesh)
        fully_shard(net, mesh=mesh)
    elif layout == "hsdp":
        fully_shard(
            net,
            mesh=init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard")),
        )
    elif layout == "tp":
        parallelize_module(net, init_device_mesh("cpu", (world,)), plan)
        data, part = 1, 0
    elif layout == "fsdp2 x tp":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "tp"))
        parallelize_module(net, mesh["tp"], plan)
        fully_shard(net, mesh=mesh["dp"])
        data, part = 2, mesh.get_local_rank("dp")
    opt = optimizer(which, net, rule)
    for step in range(STEPS):
        loss(wrapped, *batch_of(step, data, part)).backward()
        opt.step()
        opt.zero_grad()
    return weights(net)


def with_accelerate(which: str, layout: str) -> Weights:
    """accelerate's `prepare`, which wraps the model after the optimizer was built and, under FSDP2,
    puts other parameters into its groups. accelerate offers FSDP2 on accelerators only: its state
    is told so here."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    try:
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)
        accelerator = Accelerator(cpu=True)
        if layout == "fsdp2":
            accelerator.state.distributed_type = DistributedType.FSDP
            accelerator.state.fsdp_plugin = plugin
        net = model()
        opt = optimizer(which, net)
        net, opt = accelerator.prepare(net, opt)
        assert isinstance(next(net.parameters()), DTensor) == (layout == "fsdp2")
        for step in range(STEPS):
            accelerator.backward(loss(net, *batch(step)))
            opt.step()
            opt.zero_grad()
        return weights(net)
    finally:
        for state in (AcceleratorState, PartialState, GradientState):
            state._reset_state()


def with_fabric(which: str, layout: str) -> Weights:
    """Lightning Fabric: DDP, FSDP2 through its ModelParallelStrategy, or one process."""
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments import TorchElasticEnvironment
    from lightning_fabric.strategies import ModelParallelStrategy

    devices = dist.get_world_size() if dist.is_initialized() else 1
    strategy = {"one process": "auto", "ddp": "ddp"}.get(layout) or ModelParallelStrategy(
        lambda net, mesh: fully_shard(net, mesh=mesh["data_parallel"]),
        data_parallel_size=devices,
        tensor_parallel_size=1,
    )
    plugins = [TorchElasticEnvironment()] if dist.is_initialized() else []
    fabric = Fabric(accelerator="cpu", devices=devices, strategy=strategy, plugins=plugins)
    fabric.launch()
    net = model()
    if layout == "fsdp2":  # Fabric sets these up one by one
        net = fabric.setup_module(net)
        opt = fabric.setup_optimizers(optimizer(which, net.module))
    else:
        net, opt = fabric.setup(net, optimizer(which, net))
    for step in range(STEPS):
        fabric.backward(loss(net, *batch(step)))
        opt.step()
        opt.zero_grad()
    return weights(net)


def with_trainer(which: str, folder: str) -> Weights:
    """The Trainer of transformers with its own loop, scheduler and checkpoints, one process: half
    of the steps, then a second Trainer resumes from the checkpoint."""
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint

    class WithLoss(Mlp):
        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            return {"loss": (super().forward(x) - y).square().mean()}

    data = [
        dict(zip("xy", pair)) for step in range(STEPS + 1) for pair in zip(*batch_of(step, 1, 0))
    ]
    for stop in ((STEPS + 1) // 2, STEPS + 1):
        torch.manual_seed(0)
        net = WithLoss()
        opt = optimizer(which, net)
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=BATCH,
            max_steps=stop,
            save_steps=(STEPS + 1) // 2,
            use_cpu=True,
            max_grad_norm=0,
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step))
        trainer = Trainer(net, arguments, train_dataset=data, optimizers=(opt, scheduler))
        trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(data)
        trainer.train(resume_from_checkpoint=get_last_checkpoint(folder))
    return weights(net)


def alone_with_a_schedule(which: str) -> Weights:
    net = model()
    opt = optimizer(which, net)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step))
    for step in range(STEPS + 1):
        loss(net, *batch_of(step, 1, 0)).backward()
        opt.step()
        scheduler.step()
        opt.zero_grad()
    return weights(net)


def with_deepspeed(which: str, stage: int, bf16: bool) -> Weights:
    """DeepSpeed puts flat partitions into the groups of the optimizer that it is given. Returns how
    far the weights have moved; at stage 3 nothing, because they lie elsewhere between steps."""
    from archscale.parallel.zero import import_deepspeed

    deepspeed = import_deepspeed(torch.device("cpu"))
    net = model()
    config = {
        "train_micro_batch_size_per_gpu": BATCH // dist.get_world_size(),
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if bf16:
        config |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    engine, *_ = deepspeed.initialize(
        model=net, optimizer=optimizer(which, net), config=config, dist_init_required=False
    )
    dtype = torch.bfloat16 if bf16 else torch.float32
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for step in range(STEPS):
        x, y = batch(step)
        engine.backward(loss(engine, x.to(dtype), y.to(dtype)))
        engine.step()
    return {name: p.detach() - before[name] for name, p in net.named_parameters() if stage < 3}
