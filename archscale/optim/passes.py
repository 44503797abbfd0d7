"""What a step does to the elements that a rank holds, pass by pass.

    M ← μ M + G,  M̂ = μ M + G;  Q of the elementwise rules       `directions`
    M̂ into what travels, Q out of what comes back                `pack`, `unpack`
    w = ‖W‖², q = ‖Q‖², p = ⟨W, Q⟩                                `inner_products`
    W ← keep · W − apply · Q                                      `update`

`Passes` writes each pass with PyTorch's operators, on any device; it is the reference of
`fused.FusedPasses`, where a pass is one kernel. The mathematics of an element is in
`elementwise.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from archscale.distributed import laid_out_as, local_tensor
from archscale.optim.coefficients import InnerProducts
from archscale.optim.elementwise import (
    adam_directions_,
    dot,
    lion_direction_,
    look_aheads,
    momenta_,
    momentum_direction_,
    update_,
)
from archscale.optim.exchange import Copies
from archscale.optim.layout import Group, Layout, StepPlan
from archscale.optim.state import State

# Elements that are taken through a pass together: few enough that what one operator wrote is still
# in a core's cache for the next one, and enough that calling operators costs little.
CACHED = 1 << 14


@dataclass
class Shards:
    """This rank's flat local tensors of the parameters of a step, by parameter number.

    Attributes:
        directions: G, then M̂ and Q in its memory; zeros where this rank has no gradient.
        moments: by name in the state; copies where this rank has no gradient, so that the state
            stays as it is until it is known whether other ranks have one.
        absent: parameters without a gradient here that other ranks may have one for.
    """

    weights: dict[int, Tensor]
    directions: dict[int, Tensor]
    moments: dict[int, dict[str, Tensor]]
    absent: set[int]

    @classmethod
    def of(cls, layout: Layout, state: State, members: Sequence[int]) -> Shards:
        """Those of the parameters `members`."""
        shards = cls({}, {}, {}, {i for i in members if layout.params[i].grad is None})
        for i in members:
            shards.weights[i] = _flat_weight(layout, i)
            shards.directions[i] = _flat_gradient(layout, i)
            shards.moments[i] = flat_moments(layout, state, i)
            if i in shards.absent:
                shards.moments[i] = {key: m.clone() for key, m in shards.moments[i].items()}
        return shards


def flat_moments(layout: Layout, state: State, param: int) -> dict[str, Tensor]:
    """This rank's moments of a parameter, flat, by name."""
    own = state[layout.params[param]]
    keys = layout.group_of[param].rule.moments
    return {key: local_tensor(own[key]).view(-1) for key in keys}


def _flat_weight(layout: Layout, param: int) -> Tensor:
    local = local_tensor(layout.params[param])
    if not local.is_contiguous():
        raise ValueError(
            f"parameter {layout.names[param]!r} is no longer contiguous (channels_last?): keep"
            " weights row-major"
        )
    return local.view(-1)


def _flat_gradient(layout: Layout, param: int) -> Tensor:
    """This rank's gradient, flat; zero where it has none. A copy where it is not stored
    row-major."""
    p = layout.params[param]
    grad = p.grad
    if grad is None:
        return torch.zeros_like(local_tensor(p), memory_format=torch.contiguous_format).view(-1)
    if grad.layout != torch.strided:
        raise ValueError(
            f"parameter {layout.names[param]!r} has a sparse gradient ({grad.layout}): build"
            " its module with sparse=False"
        )
    return local_tensor(laid_out_as(p, grad)).contiguous().view(-1)


class Passes:
    """The passes of one step, in the order in which they are called."""

    def __init__(self, layout: Layout, state: State, plan: StepPlan, shards: Shards):
        self.layout, self.state, self.plan, self.shards = layout, state, plan, shards
        self.ends = Copies({}, shards.directions)  # M̂ by parameter, and where Q goes

    # --- M̂, and Q of the elementwise rules

    def directions(self) -> None:
        """Moments, M̂ of what is to be orthogonalized, and Q of the elementwise rules."""
        for group in self.layout.groups:
            members = self.members(group)
            if group.rule.direction == "orthogonal":
                self.momentum(group, members)
            else:
                self.elementwise_directions(group, members)

    def momentum(self, group: Group, members: Sequence[int]) -> None:
        """M ← μ M + G, and M̂ in the memory of G."""
        mu, nesterov = group.options["momentum"], group.options["nesterov"]
        shards = self.shards
        for chunk in _cache_sized(members, shards.weights):
            M = [shards.moments[i]["momentum"] for i in chunk]
            G = [shards.directions[i] for i in chunk]
            momenta_(M, G, mu)
            self.ends.shards |= zip(chunk, look_aheads(M, G, mu, nesterov))

    def elementwise_directions(self, group: Group, members: Sequence[int]) -> None:
        """Q of a rule that needs nothing but the elements of the gradient."""
        shards, options = self.shards, group.options
        if not group.has_views:  # no norm will show what is not finite: take it for zero
            for i in members:
                shards.directions[i].nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        if group.rule.direction == "adam":
            steps = self.count_steps(members)
            for chunk in _cache_sized(members, shards.weights):
                adam_directions_(
                    [shards.directions[i] for i in chunk],
                    [shards.moments[i]["exp_avg"] for i in chunk],
                    [shards.moments[i]["exp_avg_sq"] for i in chunk],
                    [steps[i] for i in chunk],
                    betas=options["betas"],
                    eps=options["adam_eps"],
                )
            return
        for i in members:
            G, moments = shards.directions[i], shards.moments[i]
            if group.rule.direction == "momentum":
                mu, nesterov = options["momentum"], options["nesterov"]
                momentum_direction_(G, **moments, mu=mu, nesterov=nesterov)
            else:
                lion_direction_(G, **moments, betas=options["betas"])

    def count_steps(self, members: Sequence[int]) -> dict[int, Tensor]:
        """The number of this step by parameter, 1 at the first; counted in the state of those with
        a gradient here."""
        counts = {i: self.state[self.layout.params[i]]["step"] for i in members}
        present = [i for i in members if i not in self.shards.absent]
        if present:
            torch._foreach_add_([counts[i] for i in present], 1)
        return counts | {i: counts[i] + 1 for i in members if i in self.shards.absent}

    # --- after the orthogonalization

    def inner_products(self, products: InnerProducts) -> None:
        """Add this rank's part of w, q and p."""
        runs = [run for run in self.plan.runs if run.counted]
        if not runs:
            return
        pairs = [
            (run.of(self.shards.weights[run.param]), run.of(self.shards.directions[run.param]))
            for run in runs
        ]
        views = self.layout.indices([v for run in runs for v in range(*run.views.indices(1 << 62))])
        for total, parts in (
            (products.w, [dot(W, W) for W, _ in pairs]),
            (products.q, [dot(Q, Q) for _, Q in pairs]),
            (products.p, [dot(W, Q) for W, Q in pairs]),
        ):
            # Adds up equal views in a fixed order, on any device.
            total.index_put_((views,), torch.cat(parts).to(total.dtype), accumulate=True)

    def update(self, keep: Tensor, apply: Tensor, bad: Tensor) -> None:
        """W ← keep · W − apply · Q of every matrix; the moments of a bad one become zero.

        Args:
            keep, apply, bad: by view, (views,) each.
        """
        # 0 · NaN is NaN: what is not finite must leave Q, although its `apply` is 0, and the
        # moments. To ask an accelerator whether there is any would make the host wait.
        reset = self.layout.device.type != "cpu" or bool(bad.any())
        keep, apply, bad = keep[:, None], apply[:, None], bad[:, None]
        for run in self.plan.runs:
            Q = run.of(self.shards.directions[run.param])
            if reset:
                moments = flat_moments(self.layout, self.state, run.param).values()
                for tensor in (Q, *map(run.of, moments)):
                    tensor.masked_fill_(bad[run.views], 0.0)
            update_(run.of(self.shards.weights[run.param]), Q, keep[run.views], apply[run.views])

    def update_elements(self, group: Group, has_gradient: Tensor | None) -> None:
        """The same for a group whose step needs no inner products: keep and apply are alike for all
        its elements.

        Args:
            has_gradient: by parameter, whether any rank has one; None: those of the step have.
        """
        shards, lr = self.shards, group.options["lr"]
        decays = group.rule.decay == "decoupled"
        keep = 1 - lr * group.options["weight_decay"] if decays else 1.0
        members = self.members(group)
        stored = [i for i in members if i not in shards.absent and shards.weights[i].numel()]
        if stored:
            weights = [shards.weights[i] for i in stored]
            directions = [shards.directions[i] for i in stored]
            if isinstance(lr, Tensor):  # `alpha` takes numbers, and reading it would wait
                torch._foreach_mul_(directions, lr)
            if isinstance(keep, Tensor) or keep != 1:
                torch._foreach_mul_(weights, keep)
            torch._foreach_add_(weights, directions, alpha=-1.0 if isinstance(lr, Tensor) else -lr)
        if has_gradient is not None:
            for i in shards.absent.intersection(members):
                W, Q = shards.weights[i], shards.directions[i]
                W.copy_(torch.where(has_gradient[i], W * keep - lr * Q, W))

    def decay_moments(self, param: int, has_gradient: Tensor) -> None:
        """What a zero gradient does to the moments, where another rank has one."""
        layout = self.layout
        group = layout.group_of[param]
        beta1, beta2 = group.options["betas"]
        first = beta2 if group.rule.direction == "lion" else beta1
        decay = {"momentum": group.options["momentum"], "exp_avg": first, "exp_avg_sq": beta2}
        for key, moment in flat_moments(layout, self.state, param).items():
            moment.mul_(1 - (1 - decay[key]) * has_gradient.to(layout.dtype))
        if group.rule.direction == "adam":
            self.state[layout.params[param]]["step"].add_(has_gradient)

    def members(self, group: Group) -> list[int]:
        """The parameters of a group that take part in the step."""
        return [i for i in group.params if i in self.shards.weights]


def _cache_sized(members: Sequence[int], tensors: Mapping[int, Tensor]) -> Iterator[list[int]]:
    """Parameters in order, as many at a time as have `CACHED` elements together, or one."""
    chunk: list[int] = []
    size = 0
    for i in members:
        if chunk and size + tensors[i].numel() > CACHED:
            yield chunk
            chunk, size = [], 0
        chunk.append(i)
        size += tensors[i].numel()
    if chunk:
        yield chunk
