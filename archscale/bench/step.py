"""`archscale bench step CONFIG --count`: what a training step launches, reads, writes and sends on
rank 0 of a run, without the device and without the run.

Nothing is computed: the model and `MatrixOptimizer` run on tensors without storage (the meta
device), so the figures are the same on every machine. What would be one kernel on a GPU counts as
one: attention, and the symmetric products of the orthogonalization from 16-bit numbers. Of a
sharded model the optimizer is counted on rank 0's shards; FSDP2's gathers and reductions are
arithmetic, and what it copies for them is left out.
"""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from archscale.bench.count import CountedGroup, LaunchCounter
from archscale.bench.one_kernel import OneKernelPasses
from archscale.bench.table import Row, markdown
from archscale.bench.workload import DOCUMENT_TOKENS, EOS, objective
from archscale.config import Config
from archscale.distributed import Fragment
from archscale.errors import ConfigError
from archscale.model.segments import TORCH, Segments, takes_segments
from archscale.optim import MatrixOptimizer, engine
from archscale.optim.roles import assign_roles
from archscale.parallel.engine import clip_gradients
from archscale.plan.devices import Device
from archscale.plan.plan import Plan
from archscale.plan.preflight import plan_config, refuse
from archscale.plan.transfer import transfer_of
from archscale.train.build import build_model, build_optimizer

META = torch.device("meta")
COUNTED_CAPABILITY = (9, 0)  # whose kernels are counted
ENGINE, MODEL = "archscale.optim.engine", "archscale.model.transformer"
PASSES, FUSED = "archscale.optim.passes", "archscale.optim.fused"
PLACES = {
    (MODEL, "Block.forward"): "forward: blocks",
    (MODEL, "Head.forward"): "forward: head and loss",
    ("archscale.optim.orthogonalize", "orthogonalize_"): "optimizer: orthogonalize",
    (PASSES, "Passes.momentum"): "optimizer: momentum and pack",
    (ENGINE, "MatrixOptimizer._orthogonalize"): "optimizer: momentum and pack",
    (PASSES, "Passes.elementwise_directions"): "optimizer: elementwise",
    (FUSED, "FusedPasses.elementwise_directions"): "optimizer: elementwise",
    (PASSES, "Passes.update_elements"): "optimizer: elementwise",
    (PASSES, "Passes.inner_products"): "optimizer: inner products",
    (ENGINE, "MatrixOptimizer._coefficients"): "optimizer: update",
    (ENGINE, "MatrixOptimizer._update"): "optimizer: update",
    (ENGINE, "MatrixOptimizer._step"): "optimizer: inner products",
}
BACKWARD, BACKWARD_BLOCKS = "backward: rest", "backward: blocks"
COUNTING = "counting pass"


class _Shards:
    """What `build_optimizer` wants of an engine: rank 0's shard of every parameter."""

    def __init__(self, module: nn.Module, group: CountedGroup):
        self.module = module
        self._weights: dict[str, Fragment] = {}
        self._parameters: dict[str, nn.Parameter] = {}
        for name, parameter in module.named_parameters():
            piece = group.held(parameter.shape, 0)
            local = parameter
            if group.shard > 1:
                local = nn.Parameter(torch.empty(piece.length, device=META))
            self._parameters[name] = local
            self._weights[name] = Fragment(tuple(parameter.shape), piece.start, local)

    def parameters(self) -> dict[str, nn.Parameter]:
        return self._parameters

    def weights(self) -> dict[str, Fragment]:
        return self._weights


def count_step(
    config: Config, *, processes: int = 1, device: Device | None = None
) -> tuple[list[Row], list[Row]]:
    """The parts and the collectives of a step on rank 0, as rows. `times`: how often a part happens
    in a step; launches and bytes are of one time, milliseconds of a step.

    Args:
        device: whose memory bandwidth turns bytes into milliseconds.

    Raises:
        ConfigError: what `archscale plan` would say, or a layout that cannot be counted.
    """
    if device is not None:
        config = config.with_precision(device.precision)
    plan = plan_config(config, world_size=processes)
    refuse(plan)
    config = plan.config
    for key, value, only in (
        ("parallel.engine", config.parallel.engine, "native"),
        ("parallel.expert", config.parallel.expert, 1),
    ):
        if value != only:
            raise ConfigError(f"{value} is not counted", key, f"set it to {only}")
    group = CountedGroup(processes, config.shard_size(processes))
    accumulation = config.accumulation(processes)
    counter, transfer = LaunchCounter(PLACES), transfer_of(config)
    with torch.device(META):
        module = build_model(config, EOS, transfer)
    shards: Any = _Shards(module, group)
    with group.active():
        with _without_values():
            optimizer = build_optimizer(config, assign_roles(module), transfer.roles, shards)
        group.calls.clear()
        _count_passes(counter, module, config, accumulation)
        _count_update(counter, shards, optimizer, config, group)
    parts = []
    for part, tally in counter.tallies.items():
        once = part.startswith("optimizer")
        times = 1 if once else accumulation - (part == COUNTING)
        row: Row = {"part": part, "times": times, "launches": tally.launches}
        row["bytes"] = tally.bytes
        if device is not None and device.bandwidth is not None:
            row["ms at bandwidth"] = times * tally.bytes / device.bandwidth * 1e3
        parts.append(row)
    return parts, _collectives(plan, group, accumulation)


def _count_passes(counter: LaunchCounter, module: Any, config: Config, accumulation: int) -> None:
    """Forward and backward of one micro-batch; with experts also the counting pass."""
    moe = config.model.moe
    shape = config.training.micro_batch, config.model.context
    tokens = torch.empty(shape, dtype=torch.int64, device=META)
    if config.training.compile:
        module.compile_parts()
        _mark_backward(counter, module)
    with torch.compiler.set_stance("force_eager"), _fused_attention():
        if moe is not None and moe.counts_first and accumulation > 1:
            alone = LaunchCounter({})
            with torch.no_grad(), alone.part(COUNTING):
                module(tokens, documents=_segments(module, config), head=False)
            counter.tallies |= alone.tallies
        with counter.part("forward: rest"):
            forward = functools.partial(module, documents=_segments(module, config))
            loss = objective(forward, moe, tokens, tokens)
        with counter.part(BACKWARD):
            loss.backward()


def _segments(module: Any, config: Config) -> Segments | None:
    """Documents and windows as the GPU that is counted takes them; None where it takes a mask."""
    model, batch = config.model, config.training.micro_batch
    if not (config.data.document_mask or model.window) or not takes_segments(
        "cuda", COUNTED_CAPABILITY, module.dtype, model.head_dim, TORCH
    ):
        return None
    documents = batch
    if config.data.document_mask:
        documents += batch * model.context // DOCUMENT_TOKENS
    bounds = torch.empty(documents + 1, dtype=torch.int32, device=META)
    return Segments(bounds, model.context, model.window)


def _mark_backward(counter: LaunchCounter, module: Any) -> None:
    """Let each compiled block's backward pass be one region: it begins with the gradient of the
    block's output, and ends where that of its input is there."""

    def first(values: Any) -> Tensor | None:
        tensors = (t for t in torch.utils._pytree.tree_leaves(values) if isinstance(t, Tensor))
        return next((t for t in tensors if t.requires_grad), None)

    def leave(block: nn.Module, inputs: Any) -> None:
        if (x := first(inputs)) is not None:
            x.register_hook(lambda _: counter.end_region())

    def enter(block: nn.Module, inputs: Any, output: Any) -> None:
        if (x := first(output)) is not None:
            x.register_hook(lambda _: counter.begin_region(BACKWARD_BLOCKS))

    module.blocks[0].register_forward_pre_hook(leave)
    for block in module.blocks:
        block.register_forward_hook(enter)


def _count_update(
    counter: LaunchCounter,
    shards: Any,
    optimizer: MatrixOptimizer,
    config: Config,
    group: CountedGroup,
) -> None:
    """Clipping and the optimizer's step."""
    parameters = list(shards.parameters().values())
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    with _one_kernel_passes(None):
        optimizer.step()  # the first one plans
    group.calls.clear()
    with counter.part("optimizer: clip"):
        gradients = (p.grad for p in parameters if p.grad is not None)
        sharded = object() if group.shard > 1 else None
        clip_gradients(gradients, config.optimizer.grad_clip, sharded)
    with _one_kernel_passes(counter), counter.part("optimizer: inner products"):
        optimizer.step()


def _collectives(plan: Plan, group: CountedGroup, accumulation: int) -> list[Row]:
    """The model's by arithmetic, as FSDP2 and DDP call them; the optimizer's as counted."""
    if group.world == 1:
        return []
    config, sent = plan.config, plan.figures["communication"]
    blocks, replicas = config.model.depth, group.world // group.shard
    again = (blocks - 1) * config.parallel.reshard_after_forward  # the last one is kept
    gathers, reductions = accumulation * (blocks + 1 + again), accumulation * (blocks + 1)
    if group.shard == 1:  # in as many calls as DDP makes buckets
        calls: dict[str, tuple[int | None, int]] = {
            "gradients: all-reduce": (None, sent["gradients"])
        }
    else:
        kind = "reduce-scatter" + (" and all-reduce" if replicas > 1 else "")
        calls = {
            "parameters: all-gather": (gathers, sent["parameters"]),
            f"gradients: {kind}": (
                reductions + (blocks + 1) * (replicas > 1),  # replicas with the last micro-batch
                sent["gradients"],
            ),
        }
    calls |= {f"update: {name}": counted for name, counted in group.calls.items()}
    return [
        {"collective": name, "calls": count, "bytes": size} for name, (count, size) in calls.items()
    ]


@contextlib.contextmanager
def _without_values() -> Iterator[None]:
    """Let an optimizer be built over tensors without storage: they pass for real ones, no matrix of
    which is zero."""
    with (
        mock.patch.object(Tensor, "is_meta", False, create=True),
        mock.patch.object(Tensor, "nonzero", lambda t: t.new_empty(0), create=True),
        mock.patch.object(Tensor, "tolist", return_value=[], create=True),
    ):
        yield


@contextlib.contextmanager
def _fused_attention() -> Iterator[None]:
    """Attention as the one kernel that a GPU has for it, forward and backward."""

    def attention(
        q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        kernel = torch.ops.aten._scaled_dot_product_cudnn_attention
        causal, scale = options["is_causal"], options["scale"]
        return kernel(q, k, v, attn_mask, True, 0.0, causal, False, scale=scale)[0]

    with mock.patch.object(nn.functional, "scaled_dot_product_attention", attention):
        yield


@contextlib.contextmanager
def _one_kernel_passes(counter: LaunchCounter | None) -> Iterator[None]:
    """Passes and products as they are on a GPU, in one kernel each."""

    def passes(*args: Any) -> OneKernelPasses:
        layout, state, plan, shards = args
        return OneKernelPasses(layout, state, plan, shards, counter)

    with mock.patch.object(engine, "choose_passes", passes), _one_kernel_products():
        yield


@contextlib.contextmanager
def _one_kernel_products() -> Iterator[None]:
    """Symmetric products, and the scaling before them, as the one kernel that each is on a GPU
    (`archscale.optim.kernels`)."""
    module: Any = sys.modules["archscale.optim.orthogonalize"]
    plain = module.symmetric_product

    def product(
        X: Tensor, add: Tensor | None = None, alpha: float = 1.0, beta: float = 1.0
    ) -> Tensor:
        if X.dtype == torch.float32:
            return plain(X, add, alpha, beta)
        if add is None:
            return torch.bmm(X, X.mT)
        return torch.baddbmm(add, X, X.mT, beta=beta, alpha=alpha)

    def scaled(M: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.mul(M, scale[:, None, None], out=torch.empty_like(M, dtype=dtype))

    with mock.patch.multiple(module, symmetric_product=product, scaled=scaled):
        yield


def report(config: Config, *, processes: int, device: Device | None, as_json: bool) -> str:
    """All of `archscale bench step --count`, as Markdown tables or as JSON."""
    parts, collectives = count_step(config, processes=processes, device=device)
    if as_json:
        return json.dumps({"parts": parts, "collectives": collectives}, indent=1)
    where = f"rank 0 of {processes}" if processes > 1 else "one process"
    at = "" if device is None else f"; {device.name} at {device.bandwidth:.3g} bytes/s"
    tables = [markdown(rows) for rows in (parts, collectives) if rows]
    return "\n\n".join([f"\n{config.name}, counted on {where}{at}", *tables])
