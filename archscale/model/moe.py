"""Mixture of experts: each token passes K of E feed-forwards and, where there is one, a shared
expert (arXiv 1701.06538, 2401.06066). No token is dropped.

A forward pass returns what it routed instead of storing it: recomputation then counts nothing
twice, and the layers need neither buffers nor collectives for the balance loss. Whoever trains
reduces the counts over ranks and micro-batches and weighs the loss (`model.loss`).

Shapes: B batch, T time, N = B T tokens, D width, E routed experts, K of them that a token passes,
M = N K assignments, F hidden features of one expert, L layers, R ranks that share the experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from archscale.distributed import all_to_all
from archscale.model.layers import FeedForward, Probe


class Routing(NamedTuple):
    """What one layer routed, (B, E) each, or all layers, (L, B, E): by sequence, because that is
    the smallest scope of a balance loss."""

    load: Tensor
    """Assignments to each expert; int64, without gradient."""
    mass: Tensor
    """Σ over a sequence's tokens of the softmax over ALL E logits; float32 or better."""


class MoEOutput(NamedTuple):
    """What `MoE` returns."""

    hidden: Tensor
    """(B, T, D)."""
    routing: Routing
    """What this layer routed, (B, E)."""
    probed: Tensor | None
    """What the probe made of the router's logits; None without a probe."""


class MoE(nn.Module):
    """y = Σ_e a_e E_e(x) over the K experts of largest logit, in place of `FeedForward`.

    With g the softmax over the K chosen logits, so Σ g = 1:

        plain      a = g,   y = Σ g_e E_e(x)              + shared(x)
        SqrtGate   a = √g,  y = √½ Σ √g_e E_e(x)          + √½ shared(x);  without shared: no √½

    SqrtGate is HyperP's (arXiv 2603.28743): experts of uncorrelated outputs of RMS ρ give
    RMS(y)² = Σ g_e ρ² = ρ², for every K, where the plain sum shrinks as K grows.

    Args:
        hidden: F. kind: swiglu or relu2.
        experts, active: E and K, without the shared expert.
        shared: one more expert that every token passes.
        logit_scale: multiplies the router's logits (μP).

    Raises:
        ValueError: K is not between 1 and E.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        kind: str,
        experts: int,
        active: int,
        *,
        shared: bool,
        sqrt_gate: bool,
        logit_scale: float = 1.0,
    ):
        super().__init__()
        if not 1 <= active <= experts:
            raise ValueError(
                f"a token cannot pass {active} of {experts} routed experts: set top_k to at least"
                f" {1 + shared}, and sparsity to at least 1"
            )
        self.active, self.sqrt_gate = active, sqrt_gate
        self.share = math.sqrt(0.5) if shared and sqrt_gate else 1.0
        self.router = Router(width, experts, logit_scale)
        self.experts = Experts(experts, width, hidden, kind)
        self.shared = FeedForward(width, hidden, kind) if shared else None
        self.spread_over: DeviceMesh | None = None

    def spread_experts(self, mesh: DeviceMesh) -> Experts:
        """Spread the experts over the ranks of a 1-D device mesh; the model must still be on the
        meta device. Returns what holds them."""
        spread(self.experts, mesh)
        self.spread_over = mesh
        return self.experts

    def forward(self, x: Tensor, probe: Probe | None = None) -> MoEOutput:
        """Route and transform x (B, T, D)."""
        B, T, _ = x.shape
        tokens = x.flatten(0, 1)  # (N, D)
        logits = self.router(tokens)  # (N, E)
        # Which experts are chosen has no derivative; how much each counts has one, by the gates.
        chosen = choose(logits.detach(), self.active)  # (N, K)
        load = torch.zeros(B, logits.shape[1], dtype=torch.int64, device=x.device)
        load.scatter_add_(1, chosen.view(B, -1), torch.ones_like(chosen).view(B, -1))
        mass = logits.softmax(-1).unflatten(0, (B, T)).sum(1)
        gates = self.gates(logits.gather(1, chosen)) * self.share  # (N, K)

        # Assignment n K + j is token n's j-th choice. `order` lists assignments by expert, then by
        # token, so that each expert's rows are contiguous; `place` is the inverse.
        order = narrow(chosen.flatten(), logits.shape[1]).argsort(stable=True)
        place = inverse_permutation(order)
        rows = _Dispatch.apply(tokens, order, place, self.active)  # (M, D)
        row_gates = _Dispatch.apply(gates.flatten()[:, None], order, place, 1)  # (M, 1)
        rows_of_expert = load.sum(0)
        if self.spread_over is None:
            outputs = self.experts(rows, row_gates, rows_of_expert.cumsum(0).to(torch.int32))
        else:
            outputs = run_elsewhere(self.experts, rows, row_gates, rows_of_expert, self.spread_over)
        y = _Combine.apply(outputs, order, place, self.active).view_as(x)
        if self.shared is not None:
            y = torch.add(y, self.shared(x), alpha=self.share)
        probed = None if probe is None else probe.router(logits)
        return MoEOutput(y, Routing(load, mass), probed)

    def gates(self, logits: Tensor) -> Tensor:
        """a from the chosen logits (N, K), (N, K)."""
        log_gates = logits.log_softmax(-1)
        # √g as exp(½ log g): √ has an infinite derivative at a g that has underflown to 0.
        return (log_gates / 2 if self.sqrt_gate else log_gates).exp()


class Router(nn.Module):
    """x (N, D) → logits (N, E), x Wᵀ times `scale`; float32 or better."""

    def __init__(self, width: int, experts: int, scale: float):
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(experts, width))
        self.parameter_roles = {
            "weight": {"role": "matrix", "init": ("uniform", 1 / math.sqrt(width))}
        }

    def forward(self, x: Tensor) -> Tensor:
        # In bf16 close logits would tie. The weight is rounded to x's dtype first, as in every
        # projection: FSDP2 gathers it in that dtype, and a layout that did not round would send
        # some tokens elsewhere.
        dtype = torch.promote_types(x.dtype, torch.float32)
        logits = F.linear(x.to(dtype), self.weight.to(x.dtype).to(dtype))
        return logits if self.scale == 1 else logits * self.scale


def choose(logits: Tensor, count: int) -> Tensor:
    """Columns of the `count` largest of each row, (N, count), largest first; of equal ones the
    first."""
    # A stable sort, because top-k leaves open which of equal values it takes.
    return logits.sort(dim=-1, descending=True, stable=True).indices[:, :count].contiguous()


class Experts(nn.Module):
    """All routed experts: each one's SwiGLU or relu² of its rows, times the row's gate.

    Under expert parallelism: those that this rank holds, for the rows of all ranks that chose them.
    """

    def __init__(self, experts: int, width: int, hidden: int, kind: str):
        super().__init__()
        self.kind = kind
        if kind == "swiglu":
            self.up = ExpertProjection(
                experts, width, 2 * hidden, (("gate", hidden), ("up", hidden))
            )
        else:
            self.up = ExpertProjection(experts, width, hidden)
        self.down = ExpertProjection(experts, hidden, width)

    def forward(self, x: Tensor, gates: Tensor, ends: Tensor) -> Tensor:
        """Every row through its expert.

        Args:
            x: (M, D) sorted by expert. gates: (M, 1).
            ends: (E,) int32, rows up to and including each expert's.

        Returns:
            (M, D).
        """
        h = self.up(x, ends)
        if self.kind == "swiglu":
            gate, up = h.chunk(2, dim=-1)
            h = F.silu(gate) * up
        else:
            h = F.relu(h).square()
        # The gate before the linear map instead of after it: the same product, but the outputs
        # (M, D) need not be kept for the gate's derivative.
        return self.down(h * gates.to(h.dtype), ends)


class ExpertProjection(nn.Module):
    """A stack of matrices (E, fan_out, fan_in) for rows of x sorted by expert.

    Args:
        blocks: (name, rows) of the matrices stored one below the other in each expert's.
    """

    def __init__(
        self, experts: int, fan_in: int, fan_out: int, blocks: tuple[tuple[str, int], ...] = ()
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, fan_out, fan_in))
        init = ("uniform", 1 / math.sqrt(fan_in))
        self.parameter_roles = {
            "weight": {"role": "matrix", "view": "stack", "blocks": blocks, "init": init}
        }

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        return grouped_linear(x, held_here(self.weight).to(x.dtype), ends)


# --- permutation and grouped product


def narrow(numbers: Tensor, count: int) -> Tensor:
    """The same numbers, of which there are `count`, in the fewest bytes: a radix sort passes over
    them once a byte."""
    return numbers.to(torch.uint8 if count <= 256 else torch.int32)


def inverse_permutation(order: Tensor) -> Tensor:
    """`place` with place[order[i]] = i; both (M,) int64."""
    # A scatter takes O(M), sorting once more O(M log M).
    indices = torch.arange(len(order), device=order.device)
    return torch.empty_like(order).scatter_(0, order, indices)


class _Dispatch(torch.autograd.Function):
    """x (N, D) → a row for each of its K assignments, (N K, D), in the order of experts.

    Its derivative is `_Combine`: a gather and a sum in a fixed order, where indexing's own would
    add atomically, in another order on every run.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, place: Tensor, K: int) -> Tensor:
        ctx.save_for_backward(order, place)
        ctx.K = K
        return x.index_select(0, order // K)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        _, place = ctx.saved_tensors
        return grads[0].index_select(0, place).unflatten(0, (-1, ctx.K)).sum(1), None, None, None


class _Combine(torch.autograd.Function):
    """y (N K, D) in the order of experts → Σ over each token's K rows, (N, D), largest logit
    first."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, order: Tensor, place: Tensor, K: int) -> Tensor:
        ctx.save_for_backward(order, place)
        ctx.K = K
        return y.index_select(0, place).unflatten(0, (-1, K)).sum(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        order, _ = ctx.saved_tensors
        return grads[0].index_select(0, order // ctx.K), None, None, None


class _Permute(torch.autograd.Function):
    """x[order], (M, …); its derivative gathers by the inverse instead of adding atomically."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grads[0].index_select(0, inverse), None, None


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x (M, fan_in) sorted by expert, weight (E, fan_out, fan_in), ends (E,) as in
    `Experts.forward` → (M, fan_out)."""
    if has_garbage_gradients(x.device):
        weight = _GradientOfRows.apply(weight, ends)
    if x.dtype == torch.bfloat16 and has_grouped_product(x, weight):
        return F.grouped_mm(x, weight.mT, offs=ends)
    return _untraced_grouped_linear(x, weight, ends)


@torch.compiler.disable  # torch.compile knows grouped_mm of bfloat16 only, and no loop over counts
def _untraced_grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    if has_grouped_product(x, weight):
        return F.grouped_mm(x, weight.mT, offs=ends)
    parts = x.tensor_split(ends[:-1].tolist())  # waits for the device
    return torch.cat(
        [part @ matrix.mT for part, matrix in zip(parts, weight.unbind(), strict=True)]
    )


@torch.compiler.assume_constant_result
def has_garbage_gradients(device: torch.device) -> bool:
    """Whether grouped_mm leaves the weight gradient of an expert without rows as the memory was, as
    on Blackwell (sm_100, seen on B200: pytorch issue 172439; right on Hopper)."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (10, 0)


class _GradientOfRows(torch.autograd.Function):
    """Weights (E, fan_out, fan_in) as they are; their gradient is 0 for experts without rows,
    whatever the product made of it."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(ends)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (ends,) = ctx.saved_tensors
        rows = ends.diff(prepend=ends.new_zeros(1))
        # Not a product by 0, which would leave NaN where the memory held one.
        return grads[0].masked_fill((rows == 0)[:, None, None], 0.0), None


def has_grouped_product(x: Tensor, weight: Tensor) -> bool:
    """Whether grouped_mm takes these: bfloat16 or float32, rows of a multiple of 16 bytes. The rest
    loops over experts."""
    _, fan_out, fan_in = weight.shape
    aligned = all(size * x.element_size() % 16 == 0 for size in (fan_in, fan_out))
    return aligned and x.dtype in (torch.bfloat16, torch.float32)


# --- expert parallelism (arXiv 2006.16668): experts on different ranks, and only routed rows travel
#
# Each of R ranks routes its own tokens and holds E / R of the experts, in order. Rows are sorted by
# expert, so those for one rank are contiguous: two packed all-to-alls, there and back, and their
# transposes in the backward pass. The numbers of rows are exchanged first. They decide the sizes of
# what follows, so the host waits for them once a layer and pass.


def spread(experts: nn.Module, mesh: DeviceMesh) -> None:
    """Make the stacks (E, …) of `experts`, on the meta device, DTensors of which each rank of the
    1-D `mesh` holds an equal part in order.

    Raises:
        ValueError: a stack that the ranks do not divide.
    """
    for module in experts.modules():
        for name, stack in list(module.named_parameters(recurse=False)):
            if len(stack) % mesh.size():
                raise ValueError(f"{len(stack)} experts cannot be spread over {mesh.size()} ranks")
            part = stack.detach()[: len(stack) // mesh.size()]
            setattr(
                module,
                name,
                nn.Parameter(DTensor.from_local(part, mesh, [Shard(0)], run_check=False)),
            )


def held_here(weight: Tensor) -> Tensor:
    """This rank's part of a spread stack, with its gradient; any other weight itself."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


@torch.compiler.disable  # the sizes of what is sent are data
def run_elsewhere(
    experts: Callable[[Tensor, Tensor, Tensor], Tensor],
    rows: Tensor,
    gates: Tensor,
    load: Tensor,
    mesh: DeviceMesh,
) -> Tensor:
    """`experts(rows, gates, ends)` of all ranks' rows, each on the rank that holds its expert.

    Args:
        experts: this rank's `Experts`.
        rows: (M, D) sorted by expert. gates: (M, 1). load: (E,) rows for each expert.

    Returns:
        (M, D) in the order of `rows`.
    """
    group = mesh.get_group()
    ranks = mesh.size()
    even = [len(load) // ranks] * ranks
    arriving, work = all_to_all(load, even, even, group)
    work.wait()
    arriving = arriving.view(ranks, -1)  # (R, E / R): rows by source, for each expert held here
    sends, receives = torch.stack(
        [load.view(ranks, -1).sum(1), arriving.sum(1)]
    ).tolist()  # waits for the device
    # Rows arrive by source and then by expert; the product wants them by expert and then by source.
    expert = torch.arange(arriving.shape[1], device=load.device).repeat(ranks)
    expert = expert.repeat_interleave(arriving.flatten(), output_size=sum(receives))
    order = narrow(expert, arriving.shape[1]).argsort(stable=True)
    place = inverse_permutation(order)
    rows = _Exchange.apply(rows, sends, receives, group)
    gates = _Exchange.apply(gates, sends, receives, group)
    ends = arriving.sum(0).cumsum(0).to(torch.int32)
    y = experts(_Permute.apply(rows, order, place), _Permute.apply(gates, order, place), ends)
    return _Exchange.apply(_Permute.apply(y, place, order), receives, sends, group)


class _Exchange(torch.autograd.Function):
    """Rows cut into `sends` for the ranks of a group → the rows received from them, in the order of
    ranks; its derivative goes the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sends: list[int], receives: list[int], group: Any) -> Tensor:
        ctx.sends, ctx.receives, ctx.group = sends, receives, group
        return _exchange(x, sends, receives, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(grads[0], ctx.receives, ctx.sends, ctx.group), None, None, None


def _exchange(x: Tensor, sends: list[int], receives: list[int], group: Any) -> Tensor:
    """x (Σ sends, …) → (Σ receives, …)."""
    size = x.shape[1:].numel()
    received, work = all_to_all(
        x.contiguous().view(-1), [n * size for n in sends], [n * size for n in receives], group
    )
    work.wait()
    return received.view(-1, *x.shape[1:])
