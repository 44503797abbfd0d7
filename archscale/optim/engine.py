"""`MatrixOptimizer`: one step of every rule under any sharding, and its only collectives.

A step in the order of the papers (OrScale, arXiv 2605.07815; HyperP, arXiv 2603.28743), with W, G
and M a rank's flat local shards:

    M ← μ M + G,  M̂ = μ M + G                 `_directions`; elementwise rules have their Q here
    gather M̂;  Q ≈ U Vᵀ;  return Q            `_orthogonalize`: two packed all-to-alls
    w = ‖W‖², q = ‖Q‖², p = ⟨W, Q⟩            `_add_inner_products`, then ONE all-reduce
    keep, apply from w, q, p                  `_coefficients`
    W ← keep · W − apply · Q                  `_update`

M̂ and then Q overwrite the gradient that they came from. A single process is the degenerate case: it
owns every matrix and the exchange is a copy.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from archscale.distributed import (
    Fragment,
    Piece,
    fill,
    gather_objects,
    is_distributed,
    laid_out_as,
    local_tensor,
    portable,
)
from archscale.optim import describe
from archscale.optim.checks import (
    check_distinct,
    check_same_everywhere,
    check_same_use,
    check_saved,
    checked_options,
    in_group,
    named,
)
from archscale.optim.coefficients import Hyperparameters, InnerProducts, Step, step_coefficients
from archscale.optim.describe import LastStep, MatrixInfo, Watch, measure_gradients
from archscale.optim.elementwise import (
    adam_direction_,
    dot,
    lion_direction_,
    look_ahead,
    momentum_,
    momentum_direction_,
    update_,
)
from archscale.optim.layout import (
    Group,
    Layout,
    ParameterDescription,
    ParameterSpec,
    StepPlan,
    describe_parameters,
)
from archscale.optim.orthogonalize import orthogonalize_
from archscale.optim.state import (
    StackedScalars,
    carry_state,
    has_content,
    replacements,
    weight_norms,
)
from archscale.rules import Rule, get_rule


@dataclass
class Shards:
    """This rank's flat local tensors of the parameters of a step, by parameter number.

    Attributes:
        directions: G, then M̂ and Q in its memory; zeros where this rank has no gradient.
        absent: parameters without a gradient here that other ranks may have one for.
    """

    weights: dict[int, Tensor]
    directions: dict[int, Tensor]
    absent: set[int]


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
    def zeros(cls, layout: Layout, keys: int) -> Sums:
        matrices = len(layout.views)
        with_momentum = any(group.rule.ratio == "momentum" for group in layout.groups)
        rows = 4 + with_momentum + keys
        flags = len(layout.params) if layout.world > 1 else 0
        size = rows * matrices + flags
        buffer = torch.zeros(size, device=layout.device, dtype=layout.dtype)
        table = buffer[: rows * matrices].view(rows, matrices)
        w, q, p, not_finite = table[:4]
        products = InnerProducts(w, q, p, not_finite, table[4] if with_momentum else None)
        holders = buffer[rows * matrices :] if layout.world > 1 else None
        return cls(buffer, products, table[rows - keys :], holders)


@dataclass
class RankReport:
    """What the ranks tell each other before they plan."""

    error: Exception | None
    descriptions: list[ParameterDescription]
    pieces: list[list[Piece]]
    in_the_way: dict[str, bool]  # by name of a replaced parameter: whether its state says anything


class MatrixOptimizer(torch.optim.Optimizer):
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
        eps: ε of the trust ratio.
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

    def __init__(
        self,
        params: Iterable,
        lr: float,
        rule: str | Rule = "orscale_lm",
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        clip: tuple[float, float] | None = None,
        eps: float = 1e-6,
        orthogonalizer: str = "polar_express",
        compute_dtype: torch.dtype = torch.bfloat16,
        wire_dtype: torch.dtype | None = None,
        momentum_dtype: torch.dtype | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        adam_eps: float = 1e-8,
        view: str | None = None,
        process_group: Any = None,
    ):
        self._process_group = process_group
        self._warned = self._constructed = False
        self._layout: Layout | None = None
        self._last: LastStep | None = None
        self._rules: list[Rule] = []  # by group
        self._specs: list[list[ParameterSpec]] = []  # by group: what cannot be read off a parameter
        self.watch: Watch | None = None  # measures whole matrices in every step
        # torch's cyclic schedulers cycle β₁ where the defaults have `betas`, and `momentum` where
        # they have not.
        optional = {"momentum": momentum, "betas": betas}
        cycled = "betas" if get_rule(rule).direction in ("adam", "lion") else "momentum"
        defaults_cycled = {cycled: optional.pop(cycled)}
        self._more_defaults = optional
        defaults = {
            "lr": lr,
            "rule": rule,
            **defaults_cycled,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "clip": clip,
            "eps": eps,
            "orthogonalizer": orthogonalizer,
            "compute_dtype": compute_dtype,
            "wire_dtype": wire_dtype,
            "momentum_dtype": momentum_dtype,
            "adam_eps": adam_eps,
            "view": view,
            "transposed": False,
        }
        error: Exception | None = None
        try:
            super().__init__(params, defaults)
        except Exception as caught:  # raised in `_build`, on every rank
            error = caught
        self._build(error)
        self._constructed = True

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
        layout = self._planned
        shards = Shards(
            {i: self._flat_weight(i) for i in plan.members},
            {i: self._flat_gradient(i) for i in plan.members},
            {i for i in plan.members if layout.params[i].grad is None},
        )
        sums = Sums.zeros(layout, len(self.watch.keys) if self.watch else 0)
        watched = self._watch_gradients(plan, shards)

        look_aheads = self._directions(shards)
        self._orthogonalize(plan, look_aheads, shards, sums)
        self._add_inner_products(plan, shards, sums)
        layout.all_reduce(sums.buffer)
        seen = None if sums.holders is None else sums.holders > 0
        steps = self._coefficients(plan, sums.products, seen)
        self._update(plan, shards, steps, seen)

        if self.watch:
            watched |= dict(zip(self.watch.keys, sums.watched))
        self._last = LastStep(steps, watched)

    def _directions(self, shards: Shards) -> dict[int, Tensor]:
        """Moments, and Q of the elementwise rules; returns M̂ of what is to be orthogonalized.

        The state of parameters without a gradient here stays as it is until it is known whether
        other ranks have one (`_decay_moments`).
        """
        layout = self._planned
        look_aheads: dict[int, Tensor] = {}
        for group in layout.groups:
            options, direction = group.options, group.rule.direction
            mu, nesterov, betas = options["momentum"], options["nesterov"], options["betas"]
            for i in group.params:
                if i not in shards.directions:
                    continue
                G, state = shards.directions[i], self.state[layout.params[i]]
                moments = self._moments(i)
                if i in shards.absent:
                    moments = {key: moment.clone() for key, moment in moments.items()}
                if not group.has_views:  # no norm will show what is not finite: take it for zero
                    G.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
                if direction == "orthogonal":
                    momentum_(moments["momentum"], G, mu)
                    look_aheads[i] = look_ahead(moments["momentum"], G, mu, nesterov)
                elif direction == "momentum":
                    momentum_direction_(G, **moments, mu=mu, nesterov=nesterov)
                elif direction == "lion":
                    lion_direction_(G, **moments, betas=betas)
                else:
                    step = state["step"] + 1
                    if i not in shards.absent:
                        state["step"].copy_(step)
                    adam_direction_(G, **moments, step=step, betas=betas, eps=options["adam_eps"])
        return look_aheads

    def _orthogonalize(
        self, plan: StepPlan, look_aheads: Mapping[int, Tensor], shards: Shards, sums: Sums
    ) -> None:
        """Gather M̂ on the ranks that own the matrices, orthogonalize it, and return Q. The owner
        adds to `sums` what only it knows of a whole matrix."""
        layout, products = self._planned, sums.products
        for part in plan.orthogonalizations:
            stacks = part.exchange.whole_matrices(
                look_aheads, shards.directions, part.use.wire_dtype
            )
            for stack, views in stacks:
                owned = layout.indices([part.views[v] for v in views])
                momentum = stack.clone() if self.watch else None  # the iteration overwrites it
                norm = orthogonalize_(stack, part.use.scheme, part.use.compute_dtype)
                products.not_finite[owned] = (~norm.isfinite()).to(layout.dtype)
                if products.momentum is not None:
                    products.momentum[owned] = norm.square().to(layout.dtype)
                if self.watch and momentum is not None:
                    sums.watched[:, owned] = self.watch(momentum, stack).to(layout.dtype)

    def _add_inner_products(self, plan: StepPlan, shards: Shards, sums: Sums) -> None:
        """Add this rank's part of w, q and p, and its gradients to the count of their holders."""
        for run in plan.runs:
            if run.counted:
                W = run.of(shards.weights[run.param])
                Q = run.of(shards.directions[run.param])
                sums.products.w[run.views] += dot(W, W)
                sums.products.q[run.views] += dot(Q, Q)
                sums.products.p[run.views] += dot(W, Q)
        if sums.holders is not None:
            present = shards.directions.keys() - shards.absent
            flags = [float(i in present) for i in range(len(sums.holders))]
            sums.holders.copy_(torch.tensor(flags, dtype=sums.holders.dtype), non_blocking=True)

    def _coefficients(
        self, plan: StepPlan, products: InnerProducts, seen: Tensor | None
    ) -> list[tuple[Group, Step]]:
        """The step of every matrix, the same on each rank, by group; c and ‖W‖ are kept.

        Args:
            seen: by parameter, whether any rank had a gradient; None: the plan says.
        """
        layout, scalars = self._planned, self._scalars
        taking_part = plan.taking_part if seen is None else seen[layout.param_of_view]
        steps: list[tuple[Group, Step]] = []
        for group in layout.groups:
            if not group.has_views:
                continue
            here = None if taking_part is None else taking_part[group.views]
            options = Hyperparameters(
                group.options["lr"],
                group.options["weight_decay"],
                group.options["clip"] or group.rule.clip,
                group.options["eps"],
            )
            products_here, matrices = products[group.views], scalars.of(group)
            step = step_coefficients(group.rule, options, matrices, products_here, here)
            if here is not None:  # ‖W‖ of the others has not been measured
                before = scalars.weight_norm[group.views]
                step.weight_norm = torch.where(here, step.weight_norm, before)
            scalars.keep(group, step)
            steps.append((group, step))
        return steps

    def _update(
        self,
        plan: StepPlan,
        shards: Shards,
        steps: Sequence[tuple[Group, Step]],
        seen: Tensor | None,
    ) -> None:
        """W ← keep · W − apply · Q."""
        layout = self._planned
        for group in layout.groups:
            if not group.has_views:
                self._update_elements(group, shards, seen)
        if steps:
            keep = torch.cat([step.keep for _, step in steps])
            apply = torch.cat([step.apply for _, step in steps])
            bad = torch.cat([step.bad for _, step in steps])
            # An accelerator does not wait to hear whether there are any.
            reset = layout.device.type != "cpu" or bool(bad.any())
            for run in plan.runs:
                Q = run.of(shards.directions[run.param])
                if reset:
                    for tensor in (Q, *map(run.of, self._moments(run.param).values())):
                        tensor.masked_fill_(bad[run.views, None], 0.0)
                W = run.of(shards.weights[run.param])
                update_(W, Q, keep[run.views, None], apply[run.views, None])
        if seen is not None:
            for i in shards.absent:
                self._decay_moments(i, seen[i])

    def _update_elements(self, group: Group, shards: Shards, seen: Tensor | None) -> None:
        """The same for a group whose step needs no inner products: keep and apply are alike for all
        its elements."""
        layout, lr = self._planned, group.options["lr"]
        decays = group.rule.decay == "decoupled"
        keep = 1 - lr * group.options["weight_decay"] if decays else 1.0
        members = [i for i in group.params if i in shards.weights]
        present = [i for i in members if layout.params[i].grad is not None]
        here = [i for i in present if shards.weights[i].numel()]
        if here:
            weights = [shards.weights[i] for i in here]
            directions = [shards.directions[i] for i in here]
            if isinstance(lr, Tensor):
                torch._foreach_mul_(directions, lr)
            torch._foreach_mul_(weights, keep)
            torch._foreach_add_(weights, directions, alpha=-1.0 if isinstance(lr, Tensor) else -lr)
        if seen is not None:
            for i in shards.absent.intersection(members):
                W, Q = shards.weights[i], shards.directions[i]
                W.copy_(torch.where(seen[i], W * keep - lr * Q, W))

    def _decay_moments(self, param: int, seen: Tensor) -> None:
        """What a zero gradient does to the moments, where another rank had a gradient (`seen`)."""
        layout = self._planned
        group = layout.group_of[param]
        beta1, beta2 = group.options["betas"]
        first = beta2 if group.rule.direction == "lion" else beta1
        decay = {"momentum": group.options["momentum"], "exp_avg": first, "exp_avg_sq": beta2}
        for key, moment in self._moments(param).items():
            moment.mul_(1 - (1 - decay[key]) * seen.to(layout.dtype))
        if group.rule.direction == "adam":
            self.state[layout.params[param]]["step"].add_(seen)

    # --- local tensors

    def _moments(self, param: int) -> dict[str, Tensor]:
        """This rank's moments of a parameter, flat."""
        layout = self._planned
        state = self.state[layout.params[param]]
        keys = layout.group_of[param].rule.moments
        return {key: local_tensor(state[key]).view(-1) for key in keys}

    def _flat_weight(self, param: int) -> Tensor:
        local = local_tensor(self._planned.params[param])
        if not local.is_contiguous():
            raise ValueError(
                f"parameter {self._planned.names[param]!r} is no longer contiguous"
                " (channels_last?): keep weights row-major"
            )
        return local.view(-1)

    def _flat_gradient(self, param: int) -> Tensor:
        """This rank's gradient, flat; zero where it has none. A copy where it is not stored
        row-major."""
        layout = self._planned
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
            level, frame = (
                level + 1,
                frame.f_back,
            )  # the caller's line, not the profiler's around `step`
        warnings.warn(
            "MatrixOptimizer.step() found no gradient in any of its parameters on this rank: where"
            " a wrapper (fully_shard, DeepSpeed) has made new parameters, build the optimizer"
            " after it",
            stacklevel=level,
        )

    # --- torch's contract

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take one more group; the dict itself is left as it is. After construction all ranks have
        to call it together."""
        if not self._constructed:  # the constructor plans once, for all groups
            self._add_group(param_group)
            return
        number = len(self.param_groups)
        error: Exception | None = None
        try:
            self._add_group(param_group)
        except Exception as caught:  # raised in `_build`, on every rank
            error = caught
        try:
            self._build(error)
        except Exception:
            del self.param_groups[number:], self._rules[number:], self._specs[number:]
            raise

    def _add_group(self, param_group: dict[str, Any]) -> None:
        number, group = len(self.param_groups), dict(param_group)
        params = group["params"]
        if not isinstance(params, set):  # which torch refuses
            group["params"] = [params] if isinstance(params, Tensor) else list(params)
            with in_group(number):
                given = named(group["params"], sum(map(len, self._specs)))
                members = zip(self.param_groups, self._specs)
                before = [
                    (s.name, p) for other, specs in members for p, s in zip(other["params"], specs)
                ]
                check_distinct(before + given)
        for key, value in self._more_defaults.items():
            group.setdefault(key, value)
        if "rule" in group and not get_rule(group["rule"]).has_trust_ratio:
            group.setdefault("clip", None)  # the optimizer's bounds are for rules with a ratio
        super().add_param_group(group)
        try:
            with in_group(number):
                rule, specs = self._take(group, [name for name, _ in given])
        except Exception:
            del self.param_groups[number:]
            raise
        self._rules.append(rule)
        self._specs.append(specs)

    def _take(
        self, group: dict[str, Any], names: Sequence[str]
    ) -> tuple[Rule, list[ParameterSpec]]:
        """Check a new group's options; leaves plain data in it, so that a state dict holds nothing
        else. Its parameters are checked when they are laid out."""
        rule = checked_options(group)
        params = group["params"]
        blocks = group.pop("blocks", None) or [None] * len(params)
        fragments = group.pop("fragments", None) or [None] * len(params)
        specs = []
        for name, p, block, fragment in zip(names, params, blocks, fragments, strict=True):
            shape, start = fragment or (p.shape, None)
            specs.append(ParameterSpec(name, tuple(shape), start, block))
        return rule, specs

    def __getstate__(self) -> dict[str, Any]:
        own = {
            key: self.__dict__[key]
            for key in ("_rules", "_specs", "_more_defaults", "_process_group")
        }
        return super().__getstate__() | own

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.watch = self._last = None
        self._warned, self._constructed = False, True
        self._layout = None  # planned at the first use, which in a process group all ranks share

    def __deepcopy__(self, memo: dict[int, Any]) -> MatrixOptimizer:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        memo[id(self._process_group)] = self._process_group  # a handle, which cannot be copied
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self._process_group is not None:
            raise ValueError(
                "an optimizer with a process_group of its own cannot be pickled: save its"
                " state_dict(), or copy.deepcopy it"
            )
        return super().__reduce_ex__(protocol)

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Restore momentum, moments, c, R, step and every key of the groups. State keeps the dtypes
        that it has here, whatever the parameters' dtype; a whole tensor is cut to this rank's
        shard. Nothing is recomputed.

        Raises:
            ValueError: a state of another rule or of other shapes, naming the parameter.
        """
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            result = hook(self, state_dict)
            state_dict = state_dict if result is None else dict(result)
        layout = self._synchronize()
        saved_groups, saved_state = copy.deepcopy(state_dict["param_groups"]), state_dict["state"]
        if [len(g["params"]) for g in saved_groups] != [
            len(g["params"]) for g in self.param_groups
        ]:
            raise ValueError(
                "the state dict has other parameter groups: rebuild the optimizer as it was when it"
                " was saved"
            )
        entries: list[Mapping[str, Any]] = []  # by parameter
        for number, (saved_group, group) in enumerate(zip(saved_groups, layout.groups)):
            with in_group(number):
                check_same_use(saved_group, group.options)
                checked_options(
                    group.options | {k: v for k, v in saved_group.items() if k != "params"},
                    group.rule,
                )
                entries += [saved_state.get(key, {}) for key in saved_group["params"]]
        self._scalars.ensure(self.state, [i for i, entry in enumerate(entries) if entry])
        for i, entry in enumerate(entries):
            p = layout.params[i]
            if not entry:  # not saved because it had none: it starts anew
                self.state.pop(p, None)
                continue
            own = self.state[p]
            check_saved(layout.names[i], entry, own)
            for key, value in entry.items():
                fill(own[key], torch.as_tensor(value))
        for saved_group, group in zip(saved_groups, layout.groups):
            names = group.options.get("param_names")
            group.options |= {key: value for key, value in saved_group.items() if key != "params"}
            if names is not None:
                group.options["param_names"] = names
            checked_options(group.options, group.rule)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    # --- layout

    def _synchronize(self) -> Layout:
        """Plan anew where the groups hold other parameters than were planned for: torch lets
        anybody replace them."""
        if self._layout is None or not self._layout.is_of(self.param_groups):
            self._build()
        layout = self._planned
        for number, (group, options) in enumerate(zip(layout.groups, self.param_groups)):
            group.options = options
            if options["rule"] != group.rule.name:
                raise ValueError(
                    f"parameter group {number} has been built with rule {group.rule.name!r} and has"
                    f" {options['rule']!r} now: build a new optimizer for another rule"
                )
        return layout

    @property
    def _planned(self) -> Layout:
        assert self._layout is not None
        return self._layout

    @torch.no_grad()
    def _build(self, error: Exception | None = None) -> None:
        """Plan for the parameters that the groups hold now, and create their state.

        Args:
            error: of this rank, on the way here; raised on all of them.
        """
        rank = dist.get_rank(self._process_group) if is_distributed() else 0
        descriptions: list[ParameterDescription] = []
        pieces: list[list[Piece]] = []
        in_the_way: dict[str, bool] = {}
        if error is None:
            try:
                descriptions, pieces = describe_parameters(
                    self.param_groups, self._rules, self._specs
                )
                replaced = replacements(self._layout, self._present(), self.state)
                in_the_way = {r.name: has_content(self.state[r.old]) for r in replaced}
            except Exception as caught:
                error = caught
        everyone = gather_objects(
            RankReport(portable(error), descriptions, pieces, in_the_way), self._process_group
        )
        for report in everyone:
            # Raised on every rank: one that raised alone would leave the others waiting.
            if report.error is not None:
                raise report.error if error is None else error
        check_same_everywhere([report.descriptions for report in everyone])
        by_rank = [report.pieces for report in everyone]
        layout = Layout(
            self.param_groups, self._rules, self._specs, by_rank, rank, self._process_group
        )
        carry_state(
            replaced, self._layout, layout, self.state, [report.in_the_way for report in everyone]
        )
        self._layout = layout
        for p in layout.params:
            for key, value in self.state.get(p, {}).items():
                self.state[p][key] = value.to(layout.device)  # where the model has been moved
        norms = weight_norms(layout, range(len(layout.params)))
        self._scalars = StackedScalars(layout, norms)
        trainable = {*layout.trainable()}
        members = [i for i, p in enumerate(layout.params) if i in trainable or p in self.state]
        self._scalars.ensure(self.state, members, norms)

    def _present(self) -> list[tuple[str, Tensor]]:
        """(name, parameter) of all that the groups hold now."""
        names = [spec.name for specs in self._specs for spec in specs]
        return list(zip(names, (p for group in self.param_groups for p in group["params"])))

    # --- what it tells of itself. After parameters have been replaced, and on a copy, the first
    # call plans anew, which all ranks do together.

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

    def bytes_sent(self) -> int:
        """Bytes that this rank sends to others in the exchanges of one step (the all-reduced
        scalars apart)."""
        layout = self._synchronize()
        return describe.bytes_sent(layout.plan(layout.trainable()))
