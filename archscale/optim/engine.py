"""`MatrixOptimizer`: the update rule under any sharding, and its only collectives.

    local momentum update → packed all-to-all → batched orthogonalization → packed all-to-all back (each Q shard into
    the consumed gradient's buffer) → local inner products → ONE all-reduce → local update

A single process is the degenerate case: it owns every matrix and the exchange is a copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from archscale.distributed import all_reduce, gather_objects, is_distributed, local_interval, local_tensor
from archscale.optim.checks import check_distinct, check_options, check_parameter, load_state, parameter_names
from archscale.optim.describe import Described, Group, measure_gradients
from archscale.optim.elementwise import adam_direction_, lion_direction_, momentum_direction_
from archscale.optim.exchange import Exchange, Run, Watch, dot
from archscale.optim.orthogonalize import orthogonalize_
from archscale.optim.rules import InnerProducts, Rule, step_coefficients
from archscale.optim.shards import ExchangePlan, Interval, MatrixView, matrix_views, plan_exchange

STATE_OF = {
    "orthogonal": ("momentum",),
    "momentum": ("momentum",),
    "lion": ("exp_avg",),
    "adam": ("exp_avg", "exp_avg_sq"),
}
SCHEDULED = ("lr", "momentum", "weight_decay", "betas", "eps", "adam_eps", "clip")  # what a state dict may change
W, Q, P, MOMENTUM, WATCH = range(5)  # rows of the reduced sums: ‖W‖², ‖Q‖², ⟨W, Q⟩, ‖M̂‖², and what is watched


class MatrixOptimizer(Described, torch.optim.Optimizer):
    """Every optimizer of `archscale.optim.RULES`, for plain tensors, DDP replicas and FSDP2/HSDP shards.

    `step()` destroys gradients: each direction overwrites the gradient it came from. All ranks of `process_group` must
    construct the optimizer and call `step()` together. A missing gradient counts as zero.

    Args:
        params: parameters, `named_parameters()` (names appear in errors), or parameter groups. A matrix rule takes 2-D
            matrices (fan_out, fan_in) and 3-D stacks (E, fan_out, fan_in); plain tensors or DTensors with Shard(0).
        lr: η. weight_decay: λ, coupled or decoupled as the rule says.
        rule: a name in `RULES` or a `Rule`.
        momentum: μ; nesterov: use μ M + G.
        clip: (r_min, r_max) in place of the rule's own bounds; None takes the rule's.
        eps: ε of the trust ratio.
        orthogonalizer: scheme of `orthogonalize`.
        compute_dtype: of the orthogonalization. wire_dtype: of the exchange; None: the compute dtype.
        momentum_dtype: storage of the momentum; None: float32. betas, adam_eps: of the adam and lion directions.
        process_group: the ranks that hold the parameters; None: the default group if there is one. Plain tensors are
            taken as replicas over it: the work is divided over the ranks. Keys of a parameter group override all of the
            above; `blocks` gives, per parameter, None or the (name, rows) blocks of a fused projection, and `fragments`
            the (whole shape, lo) of parameters that are 1-D tensors holding only their elements from `lo` on, row-major.

    Raises:
        ValueError: naming the parameter and the remedy.
    """

    def __init__(
        self, params: Iterable, lr: float, rule: str | Rule = "orscale_lm", momentum: float = 0.95, nesterov: bool = True,
        weight_decay: float = 0.0, clip: tuple[float, float] | None = None, eps: float = 1e-6,
        orthogonalizer: str = "polar_express", compute_dtype: torch.dtype = torch.bfloat16,
        wire_dtype: torch.dtype | None = None, momentum_dtype: torch.dtype | None = None,
        betas: tuple[float, float] = (0.9, 0.95), adam_eps: float = 1e-8, process_group: Any = None,
    ):  # fmt: skip
        defaults = {
            "lr": lr, "rule": rule, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay, "clip": clip, "eps": eps,
            "orthogonalizer": orthogonalizer, "compute_dtype": compute_dtype, "wire_dtype": wire_dtype,
            "momentum_dtype": momentum_dtype, "betas": betas, "adam_eps": adam_eps, "blocks": None, "fragments": None,
        }  # fmt: skip
        super().__init__(params, defaults)
        self._process_group = process_group
        self._world = dist.get_world_size(process_group) if is_distributed() else 1
        self._rank = dist.get_rank(process_group) if is_distributed() else 0
        self._params: list[Tensor] = [p for group in self.param_groups for p in group["params"]]
        self._names = parameter_names(self.param_groups)
        self._number = {id(p): i for i, p in enumerate(self._params)}
        self.watch: Watch | None = None  # what to measure of whole matrices in every step; None: nothing
        self._build()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only while constructing: the exchange is planned once, for all parameters together."""
        if hasattr(self, "_groups"):
            raise ValueError(
                "add_param_group after construction is not supported: give all groups to MatrixOptimizer(...)"
            )
        super().add_param_group(param_group)

    def _build(self) -> None:
        """Plan the exchanges and create all state eagerly, so that a checkpoint never misses an entry."""
        check_distinct(self._names, self._params)
        self._device = self._params[0].device
        self._dtype = torch.float64 if any(p.dtype == torch.float64 for p in self._params) else torch.float32
        self._index_cache: dict[tuple[int, ...], Tensor] = {}
        self._groups: list[Group] = []
        self._views: list[MatrixView] = []
        self._shapes: list[tuple[int, ...]] = [()] * len(self._params)  # of the whole parameters
        mine: list[list[Interval]] = [[]] * len(self._params)
        exchanges: dict[tuple, list[int]] = {}  # views that travel together, by what they are orthogonalized with
        for options in self.param_groups:
            rule = check_options(options)
            members = [self._number[id(p)] for p in options["params"]]
            blocks = options.pop("blocks") or [None] * len(members)
            fragments = options.pop("fragments") or [None] * len(members)
            first = len(self._views)
            for param, block, of in zip(members, blocks, fragments, strict=True):
                p = self._params[param]
                check_parameter(self._names[param], p, of)
                shape, lo = of or (tuple(p.shape), local_interval(p)[0])
                self._shapes[param], mine[param] = shape, [(lo, lo + local_tensor(p).numel())]
                if rule.direction == "orthogonal" or rule.needs_norms:
                    if rule.direction != "orthogonal" and len(shape) not in (2, 3):
                        shape = (math.prod(shape), 1)
                    self._views += matrix_views(self._names[param], param, shape, block)
            if rule.direction == "orthogonal":
                key = tuple(options[k] for k in ("orthogonalizer", "compute_dtype", "wire_dtype"))
                exchanges.setdefault(key, []).extend(range(first, len(self._views)))
            views = self._views[first:]
            self._groups.append(
                Group(
                    options, rule, members, slice(first, len(self._views)),
                    self._scalars([rule.shape_factor(v.rows, v.cols) for v in views]),
                    self._scalars([0.2 * max(v.rows, v.cols) ** 0.5 for v in views]),
                )
            )  # fmt: skip
        everyone = gather_objects((mine, self._names, self._shapes), self._process_group)
        if any(other[1:] != everyone[0][1:] for other in everyone):
            raise ValueError("the ranks have different parameters: build the same model and optimizer on every rank")
        self._intervals: list[list[list[Interval]]] = [other[0] for other in everyone]
        self._runs: list[Run] = []
        self._exchanges: list[tuple[Exchange, list[int], tuple]] = []
        for key, members in exchanges.items():
            plan = plan_exchange([self._views[v] for v in members], self._intervals)
            self._exchanges.append((Exchange(plan, mine, self._rank, self._process_group), members, key))
            self._add_runs(plan, members)
        travelling = {v for members in exchanges.values() for v in members}
        rest = [v for v in range(len(self._views)) if v not in travelling]  # elementwise rules that need norms
        self._add_runs(plan_exchange([self._views[v] for v in rest], self._intervals), rest)
        self._init_state()

    def _scalars(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=self._device, dtype=self._dtype)

    def _indices(self, views: Sequence[int]) -> Tensor:
        """`views` as a tensor on the device, made once: every transfer to an accelerator would wait for it."""
        key = tuple(views)
        if key not in self._index_cache:
            self._index_cache[key] = torch.tensor(key, device=self._device)
        return self._index_cache[key]

    def _add_runs(self, plan: ExchangePlan, numbers: list[int]) -> None:
        for v, segments in enumerate(plan.segments):
            view = plan.views[v]
            start = self._intervals[self._rank][view.param][0][0]
            for s in segments:
                if self._rank not in s.holders:
                    continue
                run = Run(view.param, view.offset + s.lo - start, s.numel, 1, numbers[v], s.source == self._rank)
                last = self._runs[-1] if self._runs else None
                if (
                    last and last.param == run.param and last.length == run.length and last.counted == run.counted
                    and last.lo + last.count * last.length == run.lo and last.view + last.count == run.view
                ):  # fmt: skip
                    last.count += 1
                else:
                    self._runs.append(run)

    @torch.no_grad()
    def _init_state(self) -> None:
        count = len(self._views)
        self._calibration = self._scalars([0.0] * count)
        sums = self._scalars([0.0] * count)
        weights = [local_tensor(p).view(-1) for p in self._params]
        for run in self._runs:
            if run.counted:
                sums[run.views] += dot(run.of(weights[run.param]), run.of(weights[run.param]))
        self._radius = self._all_reduce(sums).sqrt()
        for group in self._groups:
            if not group.rule.calibrated:
                self._calibration[group.views] = 1.0
            zero = (self._radius[group.views] == 0).nonzero().flatten().tolist() if group.rule.sphere else []
            if zero:
                raise ValueError(
                    f"matrix {self._views[group.views][zero[0]].name!r} is zero: on the sphere (rule {group.rule.name!r}) "
                    "it could never move; initialize it, or give it another rule"
                )
            for param in group.params:
                p = self._params[param]
                state = self.state[p]
                for key in STATE_OF[group.rule.direction]:
                    dtype = group.options["momentum_dtype"] if key != "exp_avg_sq" else None
                    state[key] = torch.zeros_like(p, dtype=dtype or self._dtype)
                if group.rule.direction == "adam":
                    state["step"] = torch.zeros((), device=self._device)
        # Scalars of a parameter's matrices are views of the stacked ones: one entry per matrix.
        first: dict[int, int] = {}
        for v, view in enumerate(self._views):
            span = slice(first.setdefault(view.param, v), v + 1)
            state = self.state[self._params[view.param]]
            state["calibration"], state["radius"] = self._calibration[span], self._radius[span]

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Restore momentum, moments, c, R and step, in the dtypes they are kept in; nothing is recomputed.

        Raises:
            ValueError: a state of another rule or of other shapes, naming the parameter.
        """
        groups, state = state_dict["param_groups"], state_dict["state"]
        if [len(g["params"]) for g in groups] != [len(g["params"]) for g in self.param_groups]:
            raise ValueError(
                "the state dict has other parameter groups: rebuild the optimizer as it was when it was saved"
            )
        for saved_group, group in zip(groups, self.param_groups):
            for key, p in zip(saved_group["params"], group["params"]):
                load_state(self._names[self._number[id(p)]], group["rule"], state.get(key, {}), self.state[p])
            group.update({key: saved_group[key] for key in SCHEDULED if key in saved_group})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter. Gradients are overwritten."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        weights = [local_tensor(p).view(-1) for p in self._params]
        grads = [local_tensor(_gradient(p)).view(-1) for p in self._params]
        rows = 4 if self.watch or any(g.rule.ratio == "momentum" for g in self._groups) else 3
        rows += len(self.watch.keys) if self.watch else 0
        sums = torch.zeros(rows, len(self._views), device=self._device, dtype=self._dtype)
        gradients = measure_gradients(self, grads) if self.watch and self.watch.gradients else {}
        self._elementwise_directions(grads)
        self._whole_matrix_directions(grads, sums)
        for run in self._runs:
            if run.counted:
                w, q = run.of(weights[run.param]), run.of(grads[run.param])
                sums[W, run.views] += dot(w, w)
                sums[Q, run.views] += dot(q, q)
                sums[P, run.views] += dot(w, q)
        self._all_reduce(sums)
        self._update(weights, grads, sums)
        self._watched |= gradients
        return loss

    def _elementwise_directions(self, grads: list[Tensor]) -> None:
        for group in self._groups:
            options = group.options
            for param in group.params:
                if group.views.start == group.views.stop:  # no norm will show what is not finite: take it for zero
                    grads[param].nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
                state = self.state[self._params[param]]
                local = {k: local_tensor(state[k]).view(-1) for k in STATE_OF[group.rule.direction]}
                if group.rule.direction == "adam":
                    state["step"] += 1
                    betas, eps = options["betas"], options["adam_eps"]
                    adam_direction_(grads[param], **local, step=state["step"], betas=betas, eps=eps)
                elif group.rule.direction == "lion":
                    lion_direction_(grads[param], **local, betas=options["betas"])
                elif group.rule.direction == "momentum":
                    momentum_direction_(grads[param], **local, mu=options["momentum"], nesterov=options["nesterov"])

    def _whole_matrix_directions(self, grads: list[Tensor], sums: Tensor) -> None:
        """Momentum, exchange, orthogonalization. The owner adds to `sums` what only it knows of a whole matrix."""
        momenta: dict[int, Tensor] = {}
        look_ahead: dict[int, float] = {}
        for group in self._groups:
            if group.rule.direction == "orthogonal":
                mu = group.options["momentum"]
                for param in group.params:
                    momentum = local_tensor(self.state[self._params[param]]["momentum"]).view(-1)
                    momenta[param] = momentum.mul_(mu).add_(grads[param])
                    look_ahead[param] = mu if group.options["nesterov"] else 0.0
        for exchange, numbers, (scheme, compute_dtype, wire_dtype) in self._exchanges:
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

            local_grads = {param: grads[param] for param in momenta}
            exchange.run(momenta, local_grads, look_ahead, orthogonalize_stack, wire_dtype or compute_dtype)

    def _update(self, weights: list[Tensor], grads: list[Tensor], sums: Tensor) -> None:
        """W ← keep · W − apply · Q, with the coefficients of every matrix from the reduced sums."""
        keep, apply = torch.ones_like(sums[W]), torch.zeros_like(sums[W])
        bad = torch.zeros_like(sums[W], dtype=torch.bool)
        self._steps = []
        for group in self._groups:
            options, views = group.options, group.views
            if views.start == views.stop:
                decay = 1 - options["lr"] * options["weight_decay"] if group.rule.decay == "decoupled" else 1.0
                members = [i for i in group.params if weights[i].numel()]
                if not members:
                    continue
                torch._foreach_mul_([weights[i] for i in members], decay)
                torch._foreach_add_([weights[i] for i in members], [grads[i] for i in members], alpha=-options["lr"])
                continue
            products = InnerProducts(*(row[views] for row in sums[:4]))
            step = step_coefficients(
                group.rule, products, lr=options["lr"], weight_decay=options["weight_decay"],
                shape_factor=group.shape_factor, zero_calibration=group.zero_calibration,
                calibration=self._calibration[views], radius=self._radius[views],
                clip=options["clip"] or group.rule.clip, eps=options["eps"],
            )  # fmt: skip
            self._calibration[views] = step.calibration
            keep[views], apply[views], bad[views] = step.keep, step.apply, step.bad
            self._steps.append((group, step))
        self._watched = dict(zip(self.watch.keys, sums[WATCH:])) if self.watch else {}
        reset = self._device.type != "cpu" or bool(bad.any())  # no host synchronization on an accelerator
        for run in self._runs:
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

    def _all_reduce(self, tensor: Tensor) -> Tensor:
        return all_reduce(tensor, self._process_group) if self._world > 1 and tensor.numel() else tensor


def _gradient(p: Tensor) -> Tensor:
    if p.grad is None:
        p.grad = torch.zeros_like(p)
    return p.grad
