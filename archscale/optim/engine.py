"""`MatrixOptimizer`: one step of every rule, in order, under any sharding.

What crosses ranks does so in `exchange.py` (matrices) and `layout.py` (sums).

A step in the order of the papers (OrScale, arXiv 2605.07815; HyperP, arXiv 2603.28743), with W, G
and M a rank's flat local shards:

    M ← μ M + G,  M̂ = μ M + G                 `Passes.directions`; elementwise rules have Q here
    gather M̂;  Q ≈ U Vᵀ;  return Q            `_orthogonalize`: two packed all-to-alls
    w = ‖W‖², q = ‖Q‖², p = ⟨W, Q⟩            `Passes.inner_products`, then ONE all-reduce
                                              (one more where a watch measures gradients)
    keep, apply from w, q, p                  `_coefficients`
    W ← keep · W − apply · Q                  `Passes.update`

M̂ and then Q overwrite the gradient that they came from. A single process is the degenerate case: it
owns every matrix and the exchange is a copy. Groups, copies and saved states are in `contract.py`.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from archscale.distributed import Fragment
from archscale.optim import describe
from archscale.optim.coefficients import InnerProducts, Step, step_coefficients
from archscale.optim.contract import LaidOutOptimizer
from archscale.optim.describe import LastStep, MatrixInfo, Watch, measure_gradients
from archscale.optim.exchange import Ends
from archscale.optim.fused import choose_passes
from archscale.optim.layout import Group, Layout, StepPlan
from archscale.optim.orthogonalize import orthogonalize_
from archscale.optim.passes import Passes, Shards
from archscale.rules import Rule, get_rule


@dataclass
class Sums:
    """What the all-reduce of a step adds up: one buffer, and its parts by name.

    Attributes:
        products: of every matrix, (views,) each.
        watched: what a `Watch` measures of M̂ and Q, (keys, views).
        holders: how many ranks have a gradient, (parameters,); None on one process.
    """

    buffer: Tensor
    products: InnerProducts
    watched: Tensor
    holders: Tensor | None

    @classmethod
    def zeros(cls, layout: Layout, watched: int) -> Sums:
        """Sums to add to; `keys` is how many numbers a watch measures of each matrix."""
        matrices = len(layout.views)
        with_momentum = any(group.rule.ratio == "momentum" for group in layout.groups)
        rows = 4 + with_momentum + watched
        flags = len(layout.params) if layout.world > 1 else 0
        size = rows * matrices + flags
        buffer = torch.zeros(size, device=layout.device, dtype=layout.dtype)
        table = buffer[: rows * matrices].view(rows, matrices)
        w, q, p, not_finite = table[:4]
        products = InnerProducts(w, q, p, not_finite, table[4] if with_momentum else None)
        holders = buffer[rows * matrices :] if layout.world > 1 else None
        return cls(buffer, products, table[rows - watched :], holders)


class MatrixOptimizer(LaidOutOptimizer):
    """Every optimizer of `archscale.optim.RULES`, for plain tensors, DDP replicas, FSDP2, HSDP and
    tensor-parallel shards.

    It keeps the contract of `torch.optim.Optimizer`, with one exception: `step()` overwrites
    gradients, because each direction takes the place of the gradient that it came from. Under a
    process group all ranks construct the optimizer and call `step()` together. A parameter without
    a gradient on any rank is left alone; where only some ranks have one, it counts as zero on the
    others.

    Args:
        params: parameters, `named_parameters()` (names appear in errors), or parameter groups
            (`matrix_groups(model)` makes them). A matrix rule takes 2-D matrices (fan_out, fan_in),
            and parameters of more dimensions in a group that says what they are (`view`); plain
            tensors or DTensors with `Replicate` and `Shard` placements.
        lr: η. weight_decay: λ, coupled or decoupled as the rule says.
        rule: a name in `RULES` or a `Rule`.
        momentum: μ; nesterov: use μ M + G.
        clip: (r_min, r_max) in place of the rule's own bounds; None takes the rule's.
        eps: ε of the trust ratio. ratio_exponent: x, its exponent.
        calibration: c of a calibrated rule; None: such that the first ratio is 1.
        orthogonalizer: scheme of `orthogonalize`.
        compute_dtype: of the orthogonalization. wire_dtype: of the exchange; None: the compute
            dtype.
        momentum_dtype: storage of the momentum; None: float32. betas, adam_eps: of the adam and
            lion directions.
        view: what parameters of more than two dimensions are: "stack", (E, m, n) as E matrices;
            "flatten", (m, …) as one matrix of m rows.
        process_group: the ranks that hold the parameters; None: the default group if there is one.
            Plain tensors are taken as replicas over it: the work is divided over the ranks. Keys of
            a parameter group override all of the above; `blocks` gives, per parameter, None or the
            (name, rows) blocks of a fused projection, and `fragments` the (whole shape, lo) of
            parameters that are 1-D tensors holding only their elements from `lo` on, row-major;
            `transposed` says that matrices are stored as (fan_in, fan_out).

    Raises:
        ValueError: naming the parameter and the remedy.
    """

    def __init__(  # noqa: PLR0913  the options of a `torch.optim.Optimizer`
        self,
        params: Iterable,
        lr: float,
        rule: str | Rule = "orscale_lm",
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        clip: tuple[float, float] | None = None,
        eps: float = 1e-6,
        ratio_exponent: float = 1.0,
        calibration: float | None = None,
        orthogonalizer: str = "polar_express",
        compute_dtype: torch.dtype = torch.bfloat16,
        wire_dtype: torch.dtype | None = None,
        momentum_dtype: torch.dtype | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        adam_eps: float = 1e-8,
        view: str | None = None,
        process_group: Any = None,
    ):
        # torch's cyclic schedulers cycle β₁ where the defaults have `betas`, and `momentum` where
        # they have not.
        optional = {"momentum": momentum, "betas": betas}
        cycled = "betas" if get_rule(rule).direction in ("adam", "lion") else "momentum"
        defaults_cycled = {cycled: optional.pop(cycled)}
        defaults = {
            "lr": lr,
            "rule": rule,
            **defaults_cycled,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "clip": clip,
            "eps": eps,
            "ratio_exponent": ratio_exponent,
            "calibration": calibration,
            "orthogonalizer": orthogonalizer,
            "compute_dtype": compute_dtype,
            "wire_dtype": wire_dtype,
            "momentum_dtype": momentum_dtype,
            "adam_eps": adam_eps,
            "view": view,
            "transposed": False,
        }
        self._forget()
        super().__init__(params, defaults, optional, process_group)

    def _forget(self) -> None:
        """What is not copied with an optimizer."""
        self.watch: Watch | None = None  # measures whole matrices in every step; None: nothing does
        self._last: LastStep | None = None
        self._warned = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()

    # --- the step

    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient. Gradients are overwritten.

        Raises:
            ValueError: a sparse gradient, or parameters that have been replaced by others of
                another shape.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        layout = self._synchronize()
        if all(p.grad is None for p in layout.params):
            self._warn_of_no_gradient()
        members = layout.taking_part()
        if members:
            self._scalars.ensure(self.state, members)
            self._step(layout.plan(members))
        return loss

    def _step(self, plan: StepPlan) -> None:
        layout, keys = self._planned, self.watch.keys if self.watch else ()
        shards = Shards.of(layout, self.state, plan.members)
        passes = choose_passes(layout, self.state, plan, shards)
        sums = Sums.zeros(layout, len(keys))
        watched = self._watch_gradients(plan, shards)

        passes.directions()
        self._orthogonalize(plan, passes.ends, sums)
        passes.inner_products(sums.products)
        self._count_holders(shards, sums)
        layout.all_reduce(sums.buffer)
        has_gradient = None if sums.holders is None else sums.holders > 0  # on any rank
        steps = self._coefficients(plan, sums.products, has_gradient)
        self._update(passes, steps, has_gradient)

        self._last = LastStep(steps, watched | dict(zip(keys, sums.watched)))

    def _orthogonalize(self, plan: StepPlan, ends: Ends, sums: Sums) -> None:
        """Gather M̂ on the ranks that own the matrices, orthogonalize it, and return Q. The owner
        adds to `sums` what only it knows of a whole matrix."""
        layout, products = self._planned, sums.products
        views: list[int] = []  # of the matrices that this rank owns, in the order of `norms`
        norms: list[Tensor] = []
        for part in plan.orthogonalizations:
            wire_dtype, method = part.method.wire_dtype, part.method
            for stack, own in part.exchange.whole_matrices(ends, wire_dtype, layout.device):
                momentum = stack.clone() if self.watch else None  # the iteration overwrites it
                norms.append(orthogonalize_(stack, method.scheme, method.compute_dtype))
                numbers = [part.views[v] for v in own]
                views += numbers
                if self.watch and momentum is not None:
                    owned = layout.indices(numbers)
                    sums.watched[:, owned] = self.watch(momentum, stack).to(layout.dtype)
        if norms:
            owned, norm = layout.indices(views), torch.cat(norms)
            products.not_finite[owned] = (~norm.isfinite()).to(layout.dtype)
            if products.momentum is not None:
                products.momentum[owned] = norm.square().to(layout.dtype)

    def _count_holders(self, shards: Shards, sums: Sums) -> None:
        """Add this rank's gradients to the count of their holders."""
        if sums.holders is not None:
            present = shards.directions.keys() - shards.absent
            flags = [float(i in present) for i in range(len(sums.holders))]
            sums.holders.copy_(torch.tensor(flags, dtype=sums.holders.dtype), non_blocking=True)

    def _coefficients(
        self, plan: StepPlan, products: InnerProducts, has_gradient: Tensor | None
    ) -> list[tuple[Group, Step]]:
        """The step of every matrix, the same on each rank, by group; stores c and ‖W‖
        for the next one.

        Args:
            has_gradient: by parameter, whether any rank has one; None: the plan says.
        """
        layout, scalars = self._planned, self._scalars
        taking_part = (
            plan.taking_part if has_gradient is None else has_gradient[layout.param_of_view]
        )
        steps: list[tuple[Group, Step]] = []
        for group in layout.groups:
            if not group.has_views:
                continue
            in_step = None if taking_part is None else taking_part[group.views]
            step = step_coefficients(
                group.rule, group.hyperparameters, scalars.of(group), products[group.views], in_step
            )
            if in_step is not None:  # ‖W‖ of the others has not been measured
                before = scalars.weight_norm[group.views]
                step.weight_norm = torch.where(in_step, step.weight_norm, before)
            scalars.keep(group, step)
            steps.append((group, step))
        return steps

    def _update(
        self,
        passes: Passes,
        steps: Sequence[tuple[Group, Step]],
        has_gradient: Tensor | None,
    ) -> None:
        """W ← keep · W − apply · Q."""
        for group in self._planned.groups:
            if not group.has_views:
                passes.update_elements(group, has_gradient)
        if steps:
            keep = torch.cat([step.keep for _, step in steps])
            apply = torch.cat([step.apply for _, step in steps])
            bad = torch.cat([step.bad for _, step in steps])
            passes.update(keep, apply, bad)
        if has_gradient is not None:
            for i in passes.shards.absent:
                passes.decay_moments(i, has_gradient[i])

    def _watch_gradients(self, plan: StepPlan, shards: Shards) -> dict[str, Tensor]:
        """What the watch measures of whole gradients, by key, (views,) each."""
        layout = self._planned
        if self.watch is None or not self.watch.gradients:
            return {}
        measured = measure_gradients(self.watch, layout, plan, shards.directions)
        rows = layout.all_reduce(measured)
        return {f"gradient_{key}": row for key, row in zip(self.watch.gradients, rows)}

    def _warn_of_no_gradient(self) -> None:
        if self._warned:
            return
        self._warned, level, frame = True, 2, sys._getframe(1)
        while frame.f_back and frame.f_globals.get("__name__", "").startswith(
            ("torch.", "archscale.optim.engine")
        ):
            # Name the caller's line, not the profiler's wrapper around `step`.
            level, frame = level + 1, frame.f_back
        warnings.warn(
            "MatrixOptimizer.step() found no gradient in any of its parameters on this rank: where"
            " a wrapper (fully_shard, DeepSpeed) has made new parameters, build the optimizer"
            " after it",
            stacklevel=level,
        )

    # --- introspection. The first call after parameters were replaced, or on a copy, plans anew:
    # all ranks make it together.

    def diagnostics(self) -> dict[str, Tensor]:
        """What the last step did, per matrix, still on the device; `matrix_names()` gives their
        order.

        Keys: `trust_ratio` (raw), `clipped_ratio`, `clipped`, `bad`, `calibration`, `weight_norm`,
        `relative_update`, `norm_drift` (‖W‖/‖W₀‖ − 1), `effective_decay` (η r̂ λ, or η λ), and
        after a step with a `watch` its keys (zero for matrices that are not orthogonalized).
        """
        assert self._last is not None, "diagnostics() describes a step: call step() first"
        return describe.diagnostics(self._last, self._scalars.radius)

    def fragments(self) -> dict[str, dict[str, Fragment | Tensor]]:
        """The state by parameter name, in its own memory: a `Fragment` where it is laid out as the
        parameter, and tensors that every rank has alike (c and R of each of its matrices, Adam's
        step count)."""
        return describe.fragments(self._synchronize(), self.state)

    def views(self) -> list[MatrixInfo]:
        """Every matrix that a rule treats as a whole, in the order of `diagnostics()`."""
        layout = self._synchronize()
        return [MatrixInfo(layout.names[v.param], v.name, v.rows, v.cols) for v in layout.views]

    def matrix_names(self) -> list[str]:
        """Names of the matrices, in the order of `diagnostics()`."""
        return [view.name for view in self._synchronize().views]

    def orthogonal(self) -> Tensor:
        """Numbers of the matrices that are orthogonalized, in the order of `diagnostics()`;
        int64."""
        return describe.orthogonal(self._synchronize())

    def radii(self) -> Tensor:
        """R, the norm that it keeps, of every matrix under a rule on a sphere; in the order of
        `diagnostics()`."""
        layout = self._synchronize()
        groups = [group for group in layout.groups if group.rule.sphere]
        numbers = [v for g in groups for v in range(g.views.start, g.views.stop)]
        return self._scalars.radius[layout.indices(numbers)]

    def bytes_sent(self) -> int:
        """Bytes that this rank sends to others in the exchanges of one step (the all-reduced
        scalars apart)."""
        layout = self._synchronize()
        return describe.bytes_sent(layout.plan(layout.trainable()))
