"""Mixture of experts: token choice, no token dropped, SqrtGate, switch load balance (REFERENCE 4:
HyperP, Switch Transformer).

Shapes: B batch, T time, N = B T tokens, D width, E routed experts, K of them that a token passes, M
= N K assignments, F hidden features of one expert, L layers.

A forward pass returns what it routed instead of storing it: recomputation then counts nothing
twice, and the layers need neither buffers nor collectives. Whoever trains reduces the counts over
ranks and micro-batches and weighs the balance loss.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archscale.model.expert_parallel import held_here, run_elsewhere, spread
from archscale.model.layers import FeedForward, Probe


class Routing(NamedTuple):
    """What the layers routed, by sequence, because that is the smallest scope of a balance loss.

    Attributes:
        load: assignments to each expert, (L, B, E) int64; without gradient.
        mass: Σ over a sequence's tokens of the softmax over ALL routed logits, (L, B, E), float32
            or better.
    """

    load: Tensor
    mass: Tensor


class Router(nn.Module):
    """x (N, D) → logits (N, E) times `scale`, float32 or better.

    The product is float32, the weight is rounded to x's dtype first as in every projection: FSDP2
    gathers it in that dtype, and a layout that did not round would route some tokens elsewhere.
    """

    def __init__(self, width: int, experts: int, scale: float):
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(experts, width))
        self.parameter_roles = {
            "weight": {"role": "matrix", "init": ("uniform", 1 / math.sqrt(width))}
        }

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        logits = F.linear(x.to(dtype), self.weight.to(x.dtype).to(dtype))
        return logits if self.scale == 1 else logits * self.scale


class ExpertProjection(nn.Module):
    """A stack (E, fan_out, fan_in): rows of x sorted by expert, each times its expert's matrix.

    Args:
        blocks: (name, rows) of the logical matrices stored one below the other in each expert's.
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


class Experts(nn.Module):
    """All routed experts: each one's SwiGLU or relu² of its rows, times the row's gate.

    Under expert parallelism: of those that this rank holds, for the rows of all ranks that chose
    them.
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
        """x (M, D) sorted by expert, gates (M, 1), ends (E,) int32: rows up to and including each
        expert's → (M, D)."""
        h = self.up(x, ends)
        if self.kind == "swiglu":
            gate, up = h.chunk(2, dim=-1)
            h = F.silu(gate) * up
        else:
            h = F.relu(h).square()
        # Before the linear map instead of after it: the outputs (M, D) then need not be kept for
        # the gates' gradient.
        return self.down(h * gates.to(h.dtype), ends)


class MoE(nn.Module):
    """y = Σ_e a_e E_e(x) over the K experts of largest logit, in place of `FeedForward`.

    g = softmax over the chosen logits. Plain gate: a = g, plus shared(x). SqrtGate: a = √g, and
    with a shared expert y = √½ Σ √g_e E_e(x) + √½ shared(x): experts of uncorrelated outputs of RMS
    ρ then give RMS(y) = ρ for every K.

    Args:
        hidden: F. kind: swiglu or relu2.
        experts, active: E and K, without the shared expert.
        shared: one more expert that every token passes.
        logit_scale: multiplies the router's logits (μP).
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
        self.spread_over: Any = None  # mesh

    def spread_experts(self, mesh: Any) -> Experts:
        """Spread the experts over the ranks of a 1-D device mesh; the model must still be on the
        meta device."""
        spread(self.experts, mesh)
        self.spread_over = mesh
        return self.experts

    def forward(
        self, x: Tensor, probe: Probe | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """x (B, T, D) → y (B, T, D), of each sequence `Routing.load` and `Routing.mass`, (B, E),
        and what a probe sees in the router's logits."""
        B, T, _ = x.shape
        tokens = x.flatten(0, 1)
        logits = self.router(tokens)
        chosen = choose(logits.detach(), self.active)
        load = torch.zeros(B, logits.shape[1], dtype=torch.int64, device=x.device)
        load.scatter_add_(1, chosen.view(B, -1), torch.ones_like(chosen).view(B, -1))
        mass = logits.softmax(-1).unflatten(0, (B, T)).sum(1)
        gates = self.gates(logits.gather(1, chosen)) * self.share

        order = chosen.flatten().argsort(
            stable=True
        )  # by expert, then by token: assignment n K + j of each row
        place = torch.empty_like(order).scatter_(
            0, order, torch.arange(len(order), device=order.device)
        )
        rows = _Dispatch.apply(tokens, order, place, self.active)
        row_gates = _Dispatch.apply(gates.flatten()[:, None], order, place, 1)
        count = load.sum(0)
        if self.spread_over is None:
            outputs = self.experts(rows, row_gates, count.cumsum(0).to(torch.int32))
        else:
            outputs = run_elsewhere(self.experts, rows, row_gates, count, self.spread_over)
        y = _Combine.apply(outputs, order, place, self.active).view_as(x)
        if self.shared is not None:
            y = torch.add(y, self.shared(x), alpha=self.share)
        return y, load, mass, None if probe is None else probe.router(logits)

    def gates(self, logits: Tensor) -> Tensor:
        """a of the chosen logits (N, K). √g as exp(½ log g): √ of a g that has underflown has an
        infinite derivative."""
        log_gates = logits.log_softmax(-1)
        return (log_gates / 2 if self.sqrt_gate else log_gates).exp()


def choose(logits: Tensor, count: int) -> Tensor:
    """Columns of the `count` largest of each row, (N, count), largest first; of equal ones the
    first.

    A stable sort, because top-k leaves open which of equal values it takes.
    """
    return logits.sort(dim=-1, descending=True, stable=True).indices[:, :count].contiguous()


# --- permutation and grouped product


class _Dispatch(torch.autograd.Function):
    """x (N, D) → a row for each of its K assignments, (N K, D), in the order of experts.

    Its derivative is `_Combine`: a gather and a sum in a fixed order, where indexing's own would
    add atomically.
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


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x (M, fan_in) sorted by expert, weight (E, fan_out, fan_in), ends (E,) as in
    `Experts.forward` → (M, fan_out)."""
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


def has_grouped_product(x: Tensor, weight: Tensor) -> bool:
    """Whether grouped_mm takes these: bfloat16 or float32, rows of a multiple of 16 bytes. The rest
    loops over experts."""
    _, fan_out, fan_in = weight.shape
    aligned = all(size * x.element_size() % 16 == 0 for size in (fan_in, fan_out))
    return aligned and x.dtype in (torch.bfloat16, torch.float32)


# --- balance


def balance_loss(mass: Tensor, share: Tensor, tokens: Tensor | float, weight: float) -> Tensor:
    """γ E Σ_e f_e P_e, summed over layers: the part of the tokens in `mass`; scalar.

    Given f it is linear in the probabilities. Parts of different tokens therefore add up to the
    loss of all of them, and so do their gradients; nothing but f has to be reduced before the
    backward pass.

    Args:
        mass: `Routing.mass`, (L, B, E).
        share: f, share of the assignments of a scope that goes to each expert: (L, 1, E) where the
            scope is everything, (L, B, E) where it is each sequence, whose losses are then
            averaged.
        tokens: of the whole batch, those elsewhere included.
        weight: γ.
    """
    return weight * share.shape[-1] / tokens * (share.to(mass.dtype) * mass).sum()


def load_share(load: Tensor) -> Tensor:
    """f (…, E) of counts (…, E), float32: what goes to each expert of all that is assigned."""
    return load.float() / load.sum(-1, keepdim=True).clamp(min=1).float()


def load_metrics(load: Tensor) -> dict[str, Tensor]:
    """Of counts (L, E), means over layers: `moe/max_violation`, largest load over mean load − 1,
    and `moe/load_entropy`, −Σ f log f in nats; equal loads have 0 and log E."""
    f = load_share(load)
    return {
        "moe/max_violation": (f.amax(-1) * f.shape[-1] - 1).mean(),
        "moe/load_entropy": -torch.special.xlogy(f, f).sum(-1).mean(),
    }
