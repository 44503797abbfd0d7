"""`MatrixOptimizer`: the update rule under any sharding, and its only collectives.

    local momentum update → packed all-to-all → batched orthogonalization → packed all-to-all back
    (each Q shard into the consumed gradient's buffer) → local inner products → ONE all-reduce →
    local update

A single process is the degenerate case: it owns every matrix and the exchange is a copy.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from archscale.distributed import (
    all_reduce,
    fill,
    gather_objects,
    is_distributed,
    laid_out_as,
    local_tensor,
    portable,
)
from archscale.optim.checks import (
    check_distinct,
    check_parameter,
    check_same_everywhere,
    check_same_use,
    check_saved,
    checked_options,
    in_group,
    named,
)
from archscale.optim.coefficients import InnerProducts, step_coefficients
from archscale.optim.describe import Described, measure_gradients
from archscale.optim.elementwise import adam_direction_, lion_direction_, momentum_direction_
from archscale.optim.exchange import Block, Watch, dot
from archscale.optim.layout import (
    BUFFERS,
    PER_MATRIX,
    Group,
    Layout,
    ParameterSpec,
    StepPlan,
    describe_parameters,
)
from archscale.optim.orthogonalize import orthogonalize_
from archscale.rules import Rule, get_rule

W, Q, P, MOMENTUM, WATCH = range(
    5
)  # rows of the reduced sums: ‖W‖², ‖Q‖², ⟨W, Q⟩, ‖M̂‖², and what is watched


class MatrixOptimizer(Described, torch.optim.Optimizer):
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
        self._warned = False
        self._layout: Layout | None = None
        self._rules: list[Rule] = []  # by group
        self._specs: list[list[ParameterSpec]] = []  # by group: what cannot be read off a parameter
        self.watch: Watch | None = (
            None  # what to measure of whole matrices in every step; None: nothing
        )
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

    # --- torch's contract

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take one more group; the dict itself is left as it is. After construction all ranks have
        to call it together."""
        if self._layout is None:  # within the constructor, or a copy that has not been used yet
            self._add_group(param_group)
            return
        error: Exception | None = None
        try:
            self._add_group(param_group)
        except Exception as caught:  # raised in `_build`, on every rank
            error = caught
        number = len(self.param_groups) - 1
        try:
            self._build(error)
        except Exception:
            if error is None:
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
        if "rule" in group and get_rule(group["rule"]).ratio is None:
            group.setdefault(
                "clip", None
            )  # the optimizer's bounds are meant for rules that have a ratio
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
        """Check a new group; leaves plain data in it, so that a state dict holds nothing else."""
        rule = checked_options(group)
        params = group["params"]
        blocks = group.pop("blocks", None) or [None] * len(params)
        fragments = group.pop("fragments", None) or [None] * len(params)
        specs = []
        for name, p, block, fragment in zip(names, params, blocks, fragments, strict=True):
            check_parameter(name, p, fragment)
            shape, start = fragment or (tuple(p.shape), None)
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
        self.watch = None
        self._warned = False
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
        self._ensure_state(i for i, entry in enumerate(entries) if entry)
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

    @torch.no_grad()
    def _build(self, error: Exception | None = None) -> None:
        """Plan for the parameters that the groups hold now, and create their state.

        Args:
            error: of this rank, on the way here; raised on all of them.
        """
        rank = dist.get_rank(self._process_group) if is_distributed() else 0
        description: list[tuple] = []
        state_is_lost: dict[str, bool] = {}
        if error is None:
            try:
                description = describe_parameters(self.param_groups, self._rules, self._specs)
                state_is_lost = self._state_in_the_way()
            except Exception as caught:
                error = caught
        everyone = gather_objects(
            (portable(error), description, state_is_lost), self._process_group
        )
        for failure, _, _ in everyone:
            if (
                failure is not None
            ):  # raised on every rank: one that raised alone would leave the others waiting
                raise failure if error is None else error
        check_same_everywhere([[entry[:-1] for entry in entries] for _, entries, _ in everyone])
        pieces = [[entry[-1] for entry in entries] for _, entries, _ in everyone]
        layout = Layout(
            self.param_groups, self._rules, self._specs, pieces, rank, self._process_group
        )
        self._carry_state(layout, [lost for _, _, lost in everyone])
        self._layout = layout
        for p in layout.params:
            for key, value in self.state.get(p, {}).items():
                self.state[p][key] = value.to(layout.device)  # where the model has been moved
        # Scalars of a parameter's matrices are views of the stacked ones: one entry per matrix.
        none = [0.0] * len(layout.views)
        self._calibration, self._radius = layout.scalars(none), layout.scalars(none)
        self._slots: dict[
            int, dict[str, Tensor]
        ] = {}  # by parameter: its part of the stacked scalars, in its state
        # ‖W‖ before the last step that a matrix took part in
        self._weight_norm = (
            self._norms(tuple(range(len(layout.params)))) if none else layout.scalars(none)
        )
        trainable = {*layout.trainable()}
        self._ensure_state(
            i for i, p in enumerate(layout.params) if i in trainable or p in self.state
        )

    def _replaced(self) -> list[tuple[str, Tensor, Tensor]]:
        """(name, old, new) of parameters that stand in another's place, whose state they have not
        got."""
        if self._layout is None:
            return []
        old = dict(zip(self._layout.names, self._layout.params))
        params = [p for group in self.param_groups for p in group["params"]]
        names = [spec.name for specs in self._specs for spec in specs]
        return [
            (name, old[name], p)
            for name, p in zip(names, params)
            if name in old
            and old[name] is not p
            and old[name] in self.state
            and p not in self.state
        ]

    def _state_in_the_way(self) -> dict[str, bool]:
        """By name of replaced parameters: whether their state says anything, so that dropping it
        would lose it."""
        return {
            name: any(
                bool(local_tensor(value).any())
                for key, value in self.state[old].items()
                if key not in PER_MATRIX
            )
            for name, old, _ in self._replaced()
        }

    def _carry_state(self, layout: Layout, lost: Sequence[Mapping[str, bool]]) -> None:
        """Give parameters that stand in another's place its state, where every rank holds the same
        of both.

        Args:
            layout: of the present parameters.
            lost: by rank, what `_state_in_the_way` says.
        """
        replaced = self._replaced()
        places = {name: i for i, name in enumerate(layout.names)}
        before = {name: i for i, name in enumerate(self._layout.names)} if self._layout else {}
        alike = {
            name: (
                self._layout is not None
                and [ranks[before[name]] for ranks in self._layout.pieces]
                == [ranks[places[name]] for ranks in layout.pieces]
            )
            for name, _, _ in replaced
        }
        for name, same in alike.items():  # before anything is changed
            if not same and any(rank.get(name) for rank in lost):
                raise ValueError(
                    f"parameter {name!r} has been replaced by one that is sharded otherwise, and"
                    " its momentum belongs to the old one: wrap the model before the first step,"
                    " or load a state dict afterwards"
                )
        for name, old, p in replaced:
            state = self.state.pop(old)
            if alike[name]:
                self.state[p] = dict(state)
                for key in state.keys() - {*PER_MATRIX, "step"}:
                    self.state[p][key] = torch.zeros_like(p, dtype=state[key].dtype)
                    local_tensor(self.state[p][key]).copy_(local_tensor(state[key]))

    # --- state

    @torch.no_grad()
    def _ensure_state(self, members: Iterable[int]) -> None:
        """Create the state of parameters that have none, and let c and R of all be views of the
        stacked ones, whatever has been put into their place (a copy on another device, say)."""
        layout, missing = self._planned, []
        for i in members:
            state = self.state.get(layout.params[i], {})
            if not layout.state_keys[i] <= state.keys():
                missing.append(i)
            elif i in layout.spans and any(
                state[key] is not self._slots.get(i, {}).get(key) for key in PER_MATRIX
            ):
                self._fill_slots(i, {key: state[key] for key in PER_MATRIX})
        if not missing:
            return
        norms = (
            self._norms(tuple(missing))
            if any(i in layout.spans for i in missing)
            else layout.scalars([])
        )
        for i in missing:
            self._create_state(i, layout.group_of[i], norms)

    def _norms(self, members: tuple[int, ...]) -> Tensor:
        """‖W‖ of every matrix of these parameters; 0 for the others."""
        layout = self._planned
        squares = layout.scalars([0.0] * len(layout.views))
        for run in layout.plan(members).runs:
            if run.counted:
                w = run.of(local_tensor(layout.params[run.param]).view(-1))
                squares[run.views] += dot(w, w)
        return self._all_reduce(squares).sqrt()

    @property
    def _planned(self) -> Layout:
        assert self._layout is not None
        return self._layout

    def _create_state(self, param: int, group: Group, norms: Tensor) -> None:
        layout = self._planned
        p, rule = layout.params[param], group.rule
        state: dict[str, Tensor] = {}
        for key in BUFFERS[rule.direction]:
            name = group.options["momentum_dtype"] if key != "exp_avg_sq" else None
            state[key] = torch.zeros_like(
                p,
                dtype=getattr(torch, name) if name else layout.dtype,
                memory_format=torch.contiguous_format,
            )
        if rule.direction == "adam":
            state["step"] = torch.zeros((), device=layout.device, dtype=torch.float32)
        self.state[p] = state
        span = layout.spans.get(param)
        if span is None:
            return
        zero = (norms[span] == 0).nonzero().flatten().tolist() if rule.sphere else []
        if zero:
            raise ValueError(
                f"matrix {layout.views[span][zero[0]].name!r} is zero: on the sphere (rule"
                f" {rule.name!r}) it could never move; initialize it, or give it another rule"
            )
        uncalibrated = torch.full_like(norms[span], 0.0 if rule.calibrated else 1.0)
        self._weight_norm[span] = norms[span]
        self._fill_slots(param, {"calibration": uncalibrated, "radius": norms[span]})

    def _fill_slots(self, param: int, values: Mapping[str, Tensor]) -> None:
        layout = self._planned
        span = layout.spans[param]
        slots = {"calibration": self._calibration[span], "radius": self._radius[span]}
        for key, slot in slots.items():
            slot.copy_(values[key])
        self._slots[param] = slots
        self.state[layout.params[param]] |= slots

    # --- step

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
        members = layout.taking_part()
        if not any(p.grad is not None for p in layout.params):
            self._warn_of_no_gradient()
        if not members:
            return loss
        self._ensure_state(members)
        plan = layout.plan(members)
        weights = {i: self._flat_weight(i) for i in members}
        grads = {i: self._flat_gradient(i) for i in members}
        absent = {
            i for i in members if layout.params[i].grad is None
        }  # on several ranks: others may have it
        rows = 4 if self.watch or any(g.rule.ratio == "momentum" for g in layout.groups) else 3
        rows += len(self.watch.keys) if self.watch else 0
        # One buffer, because it takes one all-reduce: inner products by matrix, and on several
        # ranks by parameter how many of them have a gradient.
        count = rows * len(layout.views)
        reduced = torch.zeros(
            count + (len(layout.params) if layout.world > 1 else 0),
            device=layout.device,
            dtype=layout.dtype,
        )
        sums, holders = reduced[:count].view(rows, -1), reduced[count:]
        gradients: dict[str, Tensor] = {}
        if self.watch and self.watch.gradients:
            measured = self._all_reduce(measure_gradients(self.watch, layout, plan, grads))
            gradients = {f"gradient_{key}": row for key, row in zip(self.watch.gradients, measured)}
        self._elementwise_directions(grads, absent)
        self._whole_matrix_directions(plan, grads, absent, sums)
        for run in plan.runs:
            if run.counted:
                w, q = run.of(weights[run.param]), run.of(grads[run.param])
                sums[W, run.views] += dot(w, w)
                sums[Q, run.views] += dot(q, q)
                sums[P, run.views] += dot(w, q)
        if layout.world > 1:
            have = [float(i in grads and i not in absent) for i in range(len(layout.params))]
            holders.copy_(torch.tensor(have, dtype=layout.dtype), non_blocking=True)
        self._all_reduce(reduced)
        # by parameter: whether any rank had a gradient
        seen = holders > 0 if layout.world > 1 else None
        self._update(plan, weights, grads, sums, seen)
        if seen is not None:
            for i in absent:
                self._decay_state(i, seen[i])
        self._watched |= gradients
        return loss

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

    def _elementwise_directions(self, grads: Mapping[int, Tensor], absent: Set[int]) -> None:
        layout = self._planned
        for group in layout.groups:
            options = group.options
            for param in group.params if group.rule.direction != "orthogonal" else ():
                if param not in grads:
                    continue
                grad, state = grads[param], self.state[layout.params[param]]
                if (
                    group.views.start == group.views.stop
                ):  # no norm will show what is not finite: take it for zero
                    grad.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
                buffers = {
                    k: local_tensor(state[k]).view(-1) for k in BUFFERS[group.rule.direction]
                }
                if param in absent:  # kept as it is until other ranks' gradients are known
                    buffers = {k: value.clone() for k, value in buffers.items()}
                if group.rule.direction == "adam":
                    step = state["step"] + 1
                    if param not in absent:
                        state["step"].copy_(step)
                    adam_direction_(
                        grad, **buffers, step=step, betas=options["betas"], eps=options["adam_eps"]
                    )
                elif group.rule.direction == "lion":
                    lion_direction_(grad, **buffers, betas=options["betas"])
                else:
                    momentum_direction_(
                        grad, **buffers, mu=options["momentum"], nesterov=options["nesterov"]
                    )

    def _whole_matrix_directions(
        self, plan: StepPlan, grads: dict[int, Tensor], absent: Set[int], sums: Tensor
    ) -> None:
        """Momentum, exchange, orthogonalization. The owner adds to `sums` what only it knows of a
        whole matrix."""
        layout = self._planned
        momenta: dict[int, Tensor] = {}
        look_ahead: dict[int, tuple[float, bool]] = {}  # M̂ = factor · M, and + G
        for group in layout.groups:
            for param in group.params if group.rule.direction == "orthogonal" else ():
                if param not in grads:
                    continue
                mu, nesterov = group.options["momentum"], group.options["nesterov"]
                momenta[param] = local_tensor(self.state[layout.params[param]]["momentum"]).view(-1)
                if (
                    param in absent
                ):  # as with a zero gradient, but M stays until other ranks' gradients are known
                    look_ahead[param] = (mu * mu if nesterov else mu), False
                else:
                    momenta[param].mul_(mu).add_(grads[param])
                    look_ahead[param] = (mu if nesterov else 1.0), nesterov

        def read(param: int, block: Block, out: Tensor) -> None:
            factor, nesterov = look_ahead[param]
            momentum = block.of(momenta[param])
            if nesterov:
                torch.add(block.of(grads[param]), momentum, alpha=factor, out=out)
            elif factor == 1.0:
                out.copy_(momentum)
            else:
                torch.mul(momentum, factor, out=out)

        for exchange, numbers, (scheme, compute_dtype, wire_dtype) in plan.exchanges:
            # Called only before the next iteration, so the loop's variables are the right ones.
            def orthogonalize_stack(stack: Tensor, views: list[int]) -> None:
                momentum = stack.clone() if self.watch else None  # the iteration overwrites it
                norm = orthogonalize_(stack, scheme, compute_dtype)  # noqa: B023
                owned = layout.indices([numbers[v] for v in views])  # noqa: B023
                spoiled = torch.where(norm.isfinite(), 0.0, -torch.inf).to(layout.dtype)
                sums[Q].index_put_((owned,), spoiled, accumulate=True)
                if len(sums) > MOMENTUM:
                    sums[MOMENTUM, owned] = norm.square().to(layout.dtype)
                if self.watch and momentum is not None:
                    sums[WATCH:, owned] = self.watch(momentum, stack).to(layout.dtype)

            params = {layout.views[v].param for v in numbers}
            if params:
                exchange.run(read, {i: grads[i] for i in params}, orthogonalize_stack, wire_dtype)

    def _update(
        self,
        plan: StepPlan,
        weights: Mapping[int, Tensor],
        grads: Mapping[int, Tensor],
        sums: Tensor,
        seen: Tensor | None,
    ) -> None:
        """W ← keep · W − apply · Q, with the coefficients of every matrix from the reduced sums."""
        layout = self._planned
        keep, apply = torch.ones_like(sums[W]), torch.zeros_like(sums[W])
        bad = torch.zeros_like(sums[W], dtype=torch.bool)
        taking_part = plan.taking_part if seen is None else seen[layout.param_of_view]
        self._steps = []
        for group in layout.groups:
            options, views = group.options, group.views
            if views.start == views.stop:
                self._update_elements(group, weights, grads, seen)
                continue
            products = InnerProducts(*(row[views] for row in sums[:4]))
            step = step_coefficients(
                group.rule,
                products,
                lr=options["lr"],
                weight_decay=options["weight_decay"],
                shape_factor=group.shape_factor,
                zero_calibration=group.zero_calibration,
                calibration=self._calibration[views],
                radius=self._radius[views],
                clip=options["clip"] or group.rule.clip,
                eps=options["eps"],
                taking_part=None if taking_part is None else taking_part[views],
            )
            self._calibration[views] = step.calibration
            if taking_part is not None:  # ‖W‖ of the others has not been measured
                step.weight_norm = torch.where(
                    taking_part[views], step.weight_norm, self._weight_norm[views]
                )
            self._weight_norm[views] = step.weight_norm
            keep[views], apply[views], bad[views] = step.keep, step.apply, step.bad
            self._steps.append((group, step))
        self._watched = dict(zip(self.watch.keys, sums[WATCH:])) if self.watch else {}
        reset = layout.device.type != "cpu" or bool(
            bad.any()
        )  # no host synchronization on an accelerator
        for run in plan.runs:
            w, q = run.of(weights[run.param]), run.of(grads[run.param])
            a, b = keep[run.views, None], apply[run.views, None]
            if (
                reset
            ):  # a direction that is not finite is not applied, and its momentum starts again
                q.masked_fill_(bad[run.views, None], 0.0)
                for key, state in self.state[layout.params[run.param]].items():
                    if key in ("momentum", "exp_avg", "exp_avg_sq"):
                        run.of(local_tensor(state).view(-1)).masked_fill_(bad[run.views, None], 0.0)
            if w.dtype == layout.dtype:
                w.mul_(a).addcmul_(q, b, value=-1)
            else:
                w.copy_(w * a - q * b)

    def _update_elements(
        self,
        group: Group,
        weights: Mapping[int, Tensor],
        grads: Mapping[int, Tensor],
        seen: Tensor | None,
    ) -> None:
        """The same for a group whose step needs no inner products: keep and apply are alike for all
        its elements."""
        layout = self._planned
        lr, options = group.options["lr"], group.options
        keep = 1 - lr * options["weight_decay"] if group.rule.decay == "decoupled" else 1.0
        here = [
            i
            for i in group.params
            if i in weights and weights[i].numel() and layout.params[i].grad is not None
        ]
        if here:
            directions = [grads[i] for i in here]
            if isinstance(lr, Tensor):
                torch._foreach_mul_(directions, lr)
            torch._foreach_mul_([weights[i] for i in here], keep)
            torch._foreach_add_(
                [weights[i] for i in here],
                directions,
                alpha=-1.0 if isinstance(lr, Tensor) else -lr,
            )
        for i in group.params:
            if seen is not None and i in weights and layout.params[i].grad is None:
                moved = weights[i] * keep - lr * grads[i]
                weights[i].copy_(torch.where(seen[i], moved, weights[i]))

    def _decay_state(self, param: int, seen: Tensor) -> None:
        """What a zero gradient does to the state, where another rank had a gradient (`seen`)."""
        layout = self._planned
        group, state = layout.group_of[param], self.state[layout.params[param]]
        options = group.options
        factors = {
            "orthogonal": {"momentum": options["momentum"]},
            "momentum": {"momentum": options["momentum"]},
            "lion": {"exp_avg": options["betas"][1]},
            "adam": {"exp_avg": options["betas"][0], "exp_avg_sq": options["betas"][1]},
        }[group.rule.direction]
        for key, factor in factors.items():
            local_tensor(state[key]).mul_(1 - (1 - factor) * seen.to(layout.dtype))
        if group.rule.direction == "adam":
            state["step"].add_(seen)

    def _all_reduce(self, tensor: Tensor) -> Tensor:
        return (
            all_reduce(tensor, self._process_group)
            if self._planned.world > 1 and tensor.numel()
            else tensor
        )
