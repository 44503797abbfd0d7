"""`MatrixOptimizer`: the update rule under any sharding, and its only collectives.

    local momentum update → packed all-to-all → batched orthogonalization → packed all-to-all back (each Q shard into
    the consumed gradient's buffer) → local inner products → ONE all-reduce → local update

A single process is the degenerate case: it owns every matrix and the exchange is a copy.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from archscale.distributed import Piece, all_reduce, gather_objects, is_distributed, local_pieces, local_tensor
from archscale.optim.checks import (
    REPLACED,
    check_distinct,
    check_parameter,
    check_same_everywhere,
    check_unchanged,
    checked_options,
    in_group,
    load_value,
    named,
)
from archscale.optim.describe import Described, Group, ParameterSpec, StepPlan, measure_gradients
from archscale.optim.elementwise import adam_direction_, lion_direction_, momentum_direction_
from archscale.optim.exchange import Block, Exchange, Watch, dot
from archscale.optim.orthogonalize import orthogonalize_
from archscale.optim.rules import InnerProducts, Rule, get_rule, step_coefficients
from archscale.optim.shards import MatrixView, plan_exchange

STATE_OF = {
    "orthogonal": ("momentum",),
    "momentum": ("momentum",),
    "lion": ("exp_avg",),
    "adam": ("exp_avg", "exp_avg_sq"),
}
PER_MATRIX = ("calibration", "radius")  # scalars of a parameter's matrices in its state
W, Q, P, MOMENTUM, WATCH = range(5)  # rows of the reduced sums: ‖W‖², ‖Q‖², ⟨W, Q⟩, ‖M̂‖², and what is watched
MAX_PLANS = 8  # sets of parameters with gradients for which a plan is kept


class MatrixOptimizer(Described, torch.optim.Optimizer):
    """Every optimizer of `archscale.optim.RULES`, for plain tensors, DDP replicas, FSDP2, HSDP and tensor-parallel shards.

    It keeps the contract of `torch.optim.Optimizer`, with one exception: `step()` overwrites gradients, because each
    direction takes the place of the gradient that it came from. Under a process group all ranks construct the optimizer and
    call `step()` together. A parameter without a gradient on any rank is left alone; where only some ranks have one, it
    counts as zero on the others.

    Args:
        params: parameters, `named_parameters()` (names appear in errors), or parameter groups (`matrix_groups(model)` makes
            them). A matrix rule takes 2-D matrices (fan_out, fan_in), and parameters of more dimensions in a group that
            says what they are (`view`); plain tensors or DTensors with `Replicate` and `Shard` placements.
        lr: η. weight_decay: λ, coupled or decoupled as the rule says.
        rule: a name in `RULES` or a `Rule`.
        momentum: μ; nesterov: use μ M + G.
        clip: (r_min, r_max) in place of the rule's own bounds; None takes the rule's.
        eps: ε of the trust ratio.
        orthogonalizer: scheme of `orthogonalize`.
        compute_dtype: of the orthogonalization. wire_dtype: of the exchange; None: the compute dtype.
        momentum_dtype: storage of the momentum; None: float32. betas, adam_eps: of the adam and lion directions.
        view: what parameters of more than two dimensions are: "stack", (E, m, n) as E matrices; "flatten", (m, …) as one
            matrix of m rows.
        process_group: the ranks that hold the parameters; None: the default group if there is one. Plain tensors are
            taken as replicas over it: the work is divided over the ranks. Keys of a parameter group override all of the
            above; `blocks` gives, per parameter, None or the (name, rows) blocks of a fused projection, and `fragments`
            the (whole shape, lo) of parameters that are 1-D tensors holding only their elements from `lo` on, row-major;
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
        self._built = self._warned = False
        self._rules: list[Rule] = []  # by group
        self._specs: list[list[ParameterSpec]] = []  # by group: what cannot be read off a parameter
        self.watch: Watch | None = None  # what to measure of whole matrices in every step; None: nothing
        # torch's cyclic schedulers cycle β₁ where the defaults have `betas`, and `momentum` where they have not.
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
        super().__init__(params, defaults)
        self._build()

    # ------------------------------------------------------------------------------------------------ torch's contract

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take one more group. After construction all ranks have to call it together."""
        number = len(self.param_groups)
        params = param_group["params"]
        param_group["params"] = [params] if isinstance(params, Tensor) else list(params)
        with in_group(number):
            given = named(param_group["params"], sum(map(len, self._specs)))
            before = [
                (s.name, p)
                for group, specs in zip(self.param_groups, self._specs)
                for p, s in zip(group["params"], specs)
            ]
            check_distinct(before + given)
        for key, value in self._more_defaults.items():
            param_group.setdefault(key, value)
        super().add_param_group(param_group)
        try:
            with in_group(number):
                rule, specs = self._take(self.param_groups[-1], [name for name, _ in given])
                self._rules.append(rule)
                self._specs.append(specs)
            if self._built:
                self._build()
        except ValueError:
            del self.param_groups[number:], self._rules[number:], self._specs[number:]
            raise

    def _take(self, group: dict[str, Any], names: Sequence[str]) -> tuple[Rule, list[ParameterSpec]]:
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
        own = {key: self.__dict__[key] for key in ("_rules", "_specs", "_more_defaults", "_process_group")}
        return super().__getstate__() | own

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.watch = None
        self._warned = False
        self._built = False  # planned at the first use, which in a process group all ranks share

    def __deepcopy__(self, memo: dict[int, Any]) -> MatrixOptimizer:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        memo[id(self._process_group)] = self._process_group  # a handle, which cannot be copied
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self._process_group is not None:
            raise ValueError(
                "an optimizer with a process_group of its own cannot be pickled: save its state_dict(), or copy.deepcopy it"
            )
        return super().__reduce_ex__(protocol)

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Restore momentum, moments, c, R, step and every key of the groups. State keeps the dtypes that it has here,
        whatever the parameters' dtype; a whole tensor is cut to this rank's shard. Nothing is recomputed.

        Raises:
            ValueError: a state of another rule or of other shapes, naming the parameter.
        """
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            result = hook(self, state_dict)
            state_dict = state_dict if result is None else dict(result)
        self._synchronize()
        saved_groups, saved_state = copy.deepcopy(state_dict["param_groups"]), state_dict["state"]
        if [len(g["params"]) for g in saved_groups] != [len(g["params"]) for g in self.param_groups]:
            raise ValueError(
                "the state dict has other parameter groups: rebuild the optimizer as it was when it was saved"
            )
        entries: list[Mapping[str, Any]] = []  # by parameter
        for number, (saved_group, group) in enumerate(zip(saved_groups, self._groups)):
            with in_group(number):
                if saved_group.get("rule", group.rule.name) != group.rule.name:
                    raise ValueError(
                        f"the state dict was saved with the same parameters under rule {saved_group['rule']!r}, here they "
                        f"have {group.rule.name!r}: load a state saved with the same rule"
                    )
                entries += [saved_state.get(key, {}) for key in saved_group["params"]]
        self._ensure_state(i for i, entry in enumerate(entries) if entry)
        for i, entry in enumerate(entries):
            p = self._params[i]
            if not entry:  # not saved because it had none: it starts anew
                self.state.pop(p, None)
                continue
            own = self.state[p]
            if entry.keys() != own.keys():
                raise ValueError(
                    f"parameter {self._names[i]!r}: the state dict has {sorted(entry)}, its rule needs {sorted(own)}: "
                    "load a state saved with the same rule"
                )
            for key, value in entry.items():
                load_value(self._names[i], key, value, own[key], self._pieces[self._rank][i])
        for saved_group, group in zip(saved_groups, self._groups):
            names = group.options.get("param_names")
            group.options |= {key: value for key, value in saved_group.items() if key != "params"}
            if names is not None:
                group.options["param_names"] = names
            checked_options(group.options)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    # ---------------------------------------------------------------------------------------------------------- plans

    def _synchronize(self) -> None:
        """Plan anew where the parameters are not those that the plans were made for: torch lets anybody replace them."""
        params = [p for group in self.param_groups for p in group["params"]]
        if not (
            self._built
            and len(self.param_groups) == len(self._groups)
            and len(params) == len(self._params)
            and all(p is q and p.device == self._device for p, q in zip(params, self._params))
        ):
            self._build()
        for number, (group, options) in enumerate(zip(self._groups, self.param_groups)):
            group.options = options
            if options["rule"] != group.rule.name:
                raise ValueError(
                    f"parameter group {number} has been built with rule {group.rule.name!r} and has {options['rule']!r} now: "
                    "build a new optimizer for another rule"
                )

    @torch.no_grad()
    def _build(self) -> None:
        """Plan for the parameters that the groups hold now, and create their state."""
        before = self._layout_before() if self._built else {}
        self._world = dist.get_world_size(self._process_group) if is_distributed() else 1
        self._rank = dist.get_rank(self._process_group) if is_distributed() else 0
        error: ValueError | None = None
        description: list[tuple] = []
        try:
            description = self._describe()
            self._carry(before, description)
        except ValueError as caught:
            error = caught
        everyone = gather_objects((error, description), self._process_group)
        for failure, _ in everyone:
            if failure is not None:  # raised on every rank: one that raised alone would leave the others waiting
                raise failure
        check_same_everywhere([[entry[:-1] for entry in entries] for _, entries in everyone])
        self._pieces = [[entry[-1] for entry in entries] for _, entries in everyone]
        first = self._params[0] if self._params else torch.zeros(())
        self._device = first.device
        self._dtype = torch.float64 if any(p.dtype == torch.float64 for p in self._params) else torch.float32
        self._index_cache: dict[tuple[int, ...], Tensor] = {}
        self._plans: dict[tuple, StepPlan] = {}
        self._groups = []
        self._views: list[MatrixView] = []
        at = 0
        for options, rule, specs in zip(self.param_groups, self._rules, self._specs):
            members, first_view = list(range(at, at + len(specs))), len(self._views)
            at += len(specs)
            for param, spec in zip(members, specs) if rule.direction == "orthogonal" or rule.needs_norms else ():
                self._views += spec.views(param, options["view"], rule.direction == "orthogonal")
            views = self._views[first_view:]
            outs_and_ins = [(v.cols, v.rows) if options["transposed"] else (v.rows, v.cols) for v in views]
            self._groups.append(
                Group(
                    options,
                    rule,
                    members,
                    slice(first_view, len(self._views)),
                    self._scalars([rule.shape_factor(*fans) for fans in outs_and_ins]),
                    self._scalars([0.2 * max(v.rows, v.cols) ** 0.5 for v in views]),
                )
            )
        self._spans: dict[int, slice] = {}  # by parameter: its matrices
        for v, view in enumerate(self._views):
            self._spans[view.param] = slice(self._spans.get(view.param, slice(v, v)).start, v + 1)
        self._param_of_view = torch.tensor([view.param for view in self._views], device=self._device, dtype=torch.long)
        count = len(self._views)
        self._calibration, self._radius = self._scalars([0.0] * count), self._scalars([0.0] * count)
        self._weight_norm = self._scalars([0.0] * count)  # ‖W‖ before the last step that the matrix took part in
        self._built = True
        self._slots: dict[int, dict[str, Tensor]] = {}  # by parameter: its part of the stacked scalars, in its state
        self._ensure_state(
            i for i, p in enumerate(self._params) if p.requires_grad or p.grad is not None or p in self.state
        )

    def _describe(self) -> list[tuple]:
        """(name, shape, what its group does with it, pieces held here) of every parameter."""
        if len(self.param_groups) != len(self._specs):
            first = self._specs[0][0].name if self._specs and self._specs[0] else ""
            raise ValueError(
                f"parameter {first!r}: the optimizer was built with {len(self._specs)} parameter groups and has "
                f"{len(self.param_groups)} now; {REPLACED}"
            )
        self._params, self._names = [], []
        description: list[tuple] = []
        for number, (options, rule, specs) in enumerate(zip(self.param_groups, self._rules, self._specs)):
            with in_group(number):
                check_unchanged(specs, options["params"])
                use = (
                    rule.name,
                    *(options[k] for k in ("view", "transposed", "orthogonalizer", "compute_dtype", "wire_dtype")),
                )
                for spec, p in zip(specs, options["params"]):
                    if self._params and p.device != self._params[0].device:
                        raise ValueError(
                            f"parameter {spec.name!r} is on {p.device}, {self._names[0]!r} on {self._params[0].device}: "
                            "one optimizer takes parameters of one device"
                        )
                    if rule.direction == "orthogonal":
                        spec.views(0, options["view"], True)  # refuses what is no matrix
                    pieces = [Piece(spec.start, p.numel())] if spec.start is not None else local_pieces(p)
                    description.append((spec.name, spec.shape, use, spec.blocks, pieces))
                    self._params.append(p)
                    self._names.append(spec.name)
        return description

    def _layout_before(self) -> dict[str, tuple[Tensor, list[Piece]]]:
        """By name: the parameter that was planned for, and the pieces of it that were held here."""
        return dict(zip(self._names, zip(self._params, self._pieces[self._rank])))

    def _carry(self, before: Mapping[str, tuple[Tensor, list[Piece]]], description: Sequence[tuple]) -> None:
        """Give parameters that stand in another's place its state, where it is laid out alike."""
        for p, (name, *_, pieces) in zip(self._params, description):
            old, held = before.get(name, (p, pieces))
            if old is p or old not in self.state or p in self.state:
                continue
            state = self.state.pop(old)
            buffers = {key: value for key, value in state.items() if key not in (*PER_MATRIX, "step")}
            if held == pieces:
                self.state[p] = state | {key: torch.zeros_like(p, dtype=value.dtype) for key, value in buffers.items()}
                for key, value in buffers.items():
                    local_tensor(self.state[p][key]).copy_(local_tensor(value))
            elif any(bool(local_tensor(value).any()) for value in buffers.values()):
                raise ValueError(
                    f"parameter {name!r} has been replaced by one that is sharded otherwise, and its momentum belongs to the "
                    "old one: wrap the model before the first step, or load a state dict afterwards"
                )

    def _planned(self) -> tuple[int, ...]:
        """Parameters that take part in a step. On one process those with a gradient; on several a rank cannot know
        of the others' gradients, so all that may have one."""
        if self._world == 1:
            return tuple(i for i, p in enumerate(self._params) if p.grad is not None)
        return tuple(i for i, p in enumerate(self._params) if p.requires_grad or p.grad is not None)

    def _plan(self, members: tuple[int, ...]) -> StepPlan:
        """What a step of these parameters exchanges and what it runs over."""
        uses = tuple(
            tuple(group.options[k] for k in ("orthogonalizer", "compute_dtype", "wire_dtype")) for group in self._groups
        )
        key = (members, uses)
        if key in self._plans:
            return self._plans[key]
        if len(self._plans) >= MAX_PLANS:
            self._plans.pop(next(iter(self._plans)))
        present = set(members)
        together: dict[tuple | None, list[int]] = {}  # views that travel together; None: those that do not travel
        for group, options in zip(self._groups, uses):
            views = [v for v in range(group.views.start, group.views.stop) if self._views[v].param in present]
            together.setdefault(options if group.rule.direction == "orthogonal" else None, []).extend(views)
        plan = StepPlan(members)
        for use, numbers in together.items():
            exchange_plan = plan_exchange([self._views[v] for v in numbers], self._pieces)
            if use is None:
                exchange_plan.batches = []
            exchange = Exchange(exchange_plan, self._pieces[self._rank], self._rank, self._process_group)
            plan.runs += exchange.runs(numbers)
            if use is not None:
                scheme, compute, wire = use
                compute_dtype = getattr(torch, compute)
                plan.exchanges.append(
                    (exchange, numbers, (scheme, compute_dtype, getattr(torch, wire) if wire else compute_dtype))
                )
        if self._world == 1 and len(present) < len(self._params):
            taking_part = torch.tensor([view.param in present for view in self._views], dtype=torch.bool)
            plan.taking_part = taking_part.to(self._device)
        self._plans[key] = plan
        return plan

    def _scalars(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=self._device, dtype=self._dtype)

    def _indices(self, views: Sequence[int]) -> Tensor:
        """`views` as a tensor on the device, made once: every transfer to an accelerator would wait for it."""
        key = tuple(views)
        if key not in self._index_cache:
            self._index_cache[key] = torch.tensor(key, device=self._device, dtype=torch.long)
        return self._index_cache[key]

    # ---------------------------------------------------------------------------------------------------------- state

    @torch.no_grad()
    def _ensure_state(self, members: Iterable[int]) -> None:
        """Create the state of parameters that have none, and let c and R of all be views of the stacked ones, whatever
        has been put into their place (a copy on another device, say)."""
        missing = []
        for i in members:
            state = self.state.get(self._params[i], {})
            if not self._state_keys(i) <= state.keys():
                missing.append(i)
            elif i in self._spans and any(state[key] is not self._slots.get(i, {}).get(key) for key in PER_MATRIX):
                self._fill_slots(i, {key: state[key] for key in PER_MATRIX})
                for key in self._state_keys(i) - {*PER_MATRIX}:
                    state[key] = state[key].to(self._device)
        if not missing:
            return
        norms = self._scalars([0.0] * len(self._views))
        for run in self._plan(tuple(missing)).runs if any(i in self._spans for i in missing) else ():
            if run.counted:
                w = run.of(local_tensor(self._params[run.param]).view(-1))
                norms[run.views] += dot(w, w)
        norms = self._all_reduce(norms).sqrt()
        for group in self._groups:
            for i in group.params:
                if i in missing:
                    self._create_state(i, group, norms)

    def _state_keys(self, param: int) -> set[str]:
        direction = self._group_of(param).rule.direction
        keys = {*STATE_OF[direction]} | ({"step"} if direction == "adam" else set())
        return keys | {*PER_MATRIX} if param in self._spans else keys

    def _group_of(self, param: int) -> Group:
        return next(group for group in self._groups if group.params[0] <= param <= group.params[-1])

    def _create_state(self, param: int, group: Group, norms: Tensor) -> None:
        p, rule = self._params[param], group.rule
        state: dict[str, Tensor] = {}
        for key in STATE_OF[rule.direction]:
            name = group.options["momentum_dtype"] if key != "exp_avg_sq" else None
            state[key] = torch.zeros_like(
                p, dtype=getattr(torch, name) if name else self._dtype, memory_format=torch.contiguous_format
            )
        if rule.direction == "adam":
            state["step"] = torch.zeros((), device=self._device, dtype=torch.float32)
        self.state[p] = state
        span = self._spans.get(param)
        if span is None:
            return
        zero = (norms[span] == 0).nonzero().flatten().tolist() if rule.sphere else []
        if zero:
            raise ValueError(
                f"matrix {self._views[span][zero[0]].name!r} is zero: on the sphere (rule {rule.name!r}) "
                "it could never move; initialize it, or give it another rule"
            )
        uncalibrated = torch.full_like(norms[span], 0.0 if rule.calibrated else 1.0)
        self._weight_norm[span] = norms[span]
        self._fill_slots(param, {"calibration": uncalibrated, "radius": norms[span]})

    def _fill_slots(self, param: int, values: Mapping[str, Tensor]) -> None:
        span = self._spans[param]
        slots = {"calibration": self._calibration[span], "radius": self._radius[span]}
        for key, slot in slots.items():
            slot.copy_(values[key])
        self._slots[param] = slots
        self.state[self._params[param]] |= slots

    # ----------------------------------------------------------------------------------------------------------- step

    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient. Gradients are overwritten.

        Raises:
            ValueError: a sparse gradient, or parameters that have been replaced by others of another shape.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._synchronize()
        members = self._planned()
        if not any(p.grad is not None for p in self._params):
            self._warn_of_no_gradient()
        if not members:
            return loss
        self._ensure_state(members)
        plan = self._plan(members)
        weights = {i: local_tensor(self._params[i]).view(-1) for i in members}
        grads = {i: self._flat_gradient(i) for i in members}
        absent = [i for i in members if self._params[i].grad is None]  # on several ranks: others may have it
        rows = 4 if self.watch or any(g.rule.ratio == "momentum" for g in self._groups) else 3
        rows += len(self.watch.keys) if self.watch else 0
        # One buffer, because it takes one all-reduce: inner products by matrix, and on several ranks by parameter
        # how many of them have a gradient.
        count = rows * len(self._views)
        reduced = torch.zeros(
            count + (len(self._params) if self._world > 1 else 0), device=self._device, dtype=self._dtype
        )
        sums, holders = reduced[:count].view(rows, -1), reduced[count:]
        gradients = measure_gradients(self, plan, grads) if self.watch and self.watch.gradients else {}
        self._elementwise_directions(grads, absent)
        self._whole_matrix_directions(plan, grads, absent, sums)
        for run in plan.runs:
            if run.counted:
                w, q = run.of(weights[run.param]), run.of(grads[run.param])
                sums[W, run.views] += dot(w, w)
                sums[Q, run.views] += dot(q, q)
                sums[P, run.views] += dot(w, q)
        if self._world > 1:
            holders[self._indices([i for i in members if self._params[i].grad is not None])] = 1.0
        self._all_reduce(reduced)
        seen = holders > 0 if self._world > 1 else None  # by parameter: whether any rank had a gradient
        self._update(plan, weights, grads, sums, seen)
        if seen is not None:
            for i in absent:
                self._decay_state(i, seen[i])
        self._watched |= gradients
        return loss

    def _flat_gradient(self, param: int) -> Tensor:
        """This rank's gradient, flat; zero where it has none. A copy where it is not stored row-major."""
        p = self._params[param]
        grad = p.grad
        if grad is None:
            return torch.zeros_like(local_tensor(p), memory_format=torch.contiguous_format).view(-1)
        if grad.layout != torch.strided:
            raise ValueError(
                f"parameter {self._names[param]!r} has a sparse gradient ({grad.layout}): build its module with sparse=False"
            )
        if isinstance(p, DTensor) and isinstance(grad, DTensor) and grad.placements != p.placements:
            grad = grad.redistribute(placements=p.placements)
        return local_tensor(grad).contiguous().view(-1)

    def _warn_of_no_gradient(self) -> None:
        if not self._warned:
            warnings.warn(
                "MatrixOptimizer.step() found no gradient in any of its parameters and changed nothing: where a wrapper "
                "(fully_shard, DeepSpeed) has made new parameters, build the optimizer after it",
                stacklevel=4,
            )
        self._warned = True

    def _elementwise_directions(self, grads: Mapping[int, Tensor], absent: Sequence[int]) -> None:
        for group in self._groups:
            options = group.options
            for param in group.params if group.rule.direction != "orthogonal" else ():
                if param not in grads:
                    continue
                grad, state = grads[param], self.state[self._params[param]]
                if group.views.start == group.views.stop:  # no norm will show what is not finite: take it for zero
                    grad.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
                buffers = {k: local_tensor(state[k]).view(-1) for k in STATE_OF[group.rule.direction]}
                if param in absent:  # kept as it is until other ranks' gradients are known
                    buffers = {k: value.clone() for k, value in buffers.items()}
                if group.rule.direction == "adam":
                    step = state["step"] + 1
                    if param not in absent:
                        state["step"].copy_(step)
                    adam_direction_(grad, **buffers, step=step, betas=options["betas"], eps=options["adam_eps"])
                elif group.rule.direction == "lion":
                    lion_direction_(grad, **buffers, betas=options["betas"])
                else:
                    momentum_direction_(grad, **buffers, mu=options["momentum"], nesterov=options["nesterov"])

    def _whole_matrix_directions(
        self, plan: StepPlan, grads: dict[int, Tensor], absent: Sequence[int], sums: Tensor
    ) -> None:
        """Momentum, exchange, orthogonalization. The owner adds to `sums` what only it knows of a whole matrix."""
        momenta: dict[int, Tensor] = {}
        look_ahead: dict[int, tuple[float, bool]] = {}  # M̂ = factor · M, and + G
        for group in self._groups:
            for param in group.params if group.rule.direction == "orthogonal" else ():
                if param not in grads:
                    continue
                mu, nesterov = group.options["momentum"], group.options["nesterov"]
                momenta[param] = local_tensor(self.state[self._params[param]]["momentum"]).view(-1)
                if param in absent:  # as with a zero gradient, but M stays until other ranks' gradients are known
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
                owned = self._indices([numbers[v] for v in views])  # noqa: B023
                spoiled = torch.where(norm.isfinite(), 0.0, -torch.inf).to(self._dtype)
                sums[Q].index_put_((owned,), spoiled, accumulate=True)
                if len(sums) > MOMENTUM:
                    sums[MOMENTUM, owned] = norm.square().to(self._dtype)
                if self.watch and momentum is not None:
                    sums[WATCH:, owned] = self.watch(momentum, stack).to(self._dtype)

            params = {self._views[v].param for v in numbers}
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
        keep, apply = torch.ones_like(sums[W]), torch.zeros_like(sums[W])
        bad = torch.zeros_like(sums[W], dtype=torch.bool)
        taking_part = plan.taking_part if seen is None else seen[self._param_of_view]
        self._steps = []
        for group in self._groups:
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
                step.weight_norm = torch.where(taking_part[views], step.weight_norm, self._weight_norm[views])
            self._weight_norm[views] = step.weight_norm
            keep[views], apply[views], bad[views] = step.keep, step.apply, step.bad
            self._steps.append((group, step))
        self._watched = dict(zip(self.watch.keys, sums[WATCH:])) if self.watch else {}
        reset = self._device.type != "cpu" or bool(bad.any())  # no host synchronization on an accelerator
        for run in plan.runs:
            w, q = run.of(weights[run.param]), run.of(grads[run.param])
            a, b = keep[run.views, None], apply[run.views, None]
            if reset:  # a direction that is not finite is not applied, and its momentum starts again
                q.masked_fill_(bad[run.views, None], 0.0)
                for key, state in self.state[self._params[run.param]].items():
                    if key in ("momentum", "exp_avg", "exp_avg_sq"):
                        run.of(local_tensor(state).view(-1)).masked_fill_(bad[run.views, None], 0.0)
            if w.dtype == self._dtype:
                w.mul_(a).addcmul_(q, b, value=-1)
            else:
                w.copy_(w * a - q * b)

    def _update_elements(
        self, group: Group, weights: Mapping[int, Tensor], grads: Mapping[int, Tensor], seen: Tensor | None
    ) -> None:
        """The same for a group whose step needs no inner products: keep and apply are alike for all its elements."""
        lr, options = group.options["lr"], group.options
        keep = 1 - lr * options["weight_decay"] if group.rule.decay == "decoupled" else 1.0
        here = [i for i in group.params if i in weights and weights[i].numel() and self._params[i].grad is not None]
        if here:
            directions = [grads[i] for i in here]
            if isinstance(lr, Tensor):
                torch._foreach_mul_(directions, lr)
            torch._foreach_mul_([weights[i] for i in here], keep)
            torch._foreach_add_([weights[i] for i in here], directions, alpha=-1.0 if isinstance(lr, Tensor) else -lr)
        for i in group.params:
            if seen is not None and i in weights and self._params[i].grad is None:
                moved = weights[i] * keep - lr * grads[i]
                weights[i].copy_(torch.where(seen[i], moved, weights[i]))

    def _decay_state(self, param: int, seen: Tensor) -> None:
        """What a zero gradient does to the state, where another rank had a gradient (`seen`)."""
        group, state = self._group_of(param), self.state[self._params[param]]
        options = group.options
        factors = {
            "orthogonal": {"momentum": options["momentum"]},
            "momentum": {"momentum": options["momentum"]},
            "lion": {"exp_avg": options["betas"][1]},
            "adam": {"exp_avg": options["betas"][0], "exp_avg_sq": options["betas"][1]},
        }[group.rule.direction]
        for key, factor in factors.items():
            local_tensor(state[key]).mul_(1 - (1 - factor) * seen.to(self._dtype))
        if group.rule.direction == "adam":
            state["step"].add_(seen)

    def _all_reduce(self, tensor: Tensor) -> Tensor:
        return all_reduce(tensor, self._process_group) if self._world > 1 and tensor.numel() else tensor
