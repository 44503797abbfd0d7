"""Where the parameters of an optimizer lie and what a step of them exchanges: made once, the same
on every rank, and anew when others are put into the parameter groups."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from archscale.distributed import Piece, all_reduce, local_pieces
from archscale.optim.checks import (
    check_group_count,
    check_one_device,
    check_parameter,
    check_unchanged,
    in_group,
)
from archscale.optim.coefficients import Hyperparameters
from archscale.optim.exchange import Exchange, Run
from archscale.optim.shards import MatrixView, matrix_views, plan_exchange
from archscale.rules import Rule

MAX_PLANS = 8  # sets of parameters with gradients for which a plan is kept
PER_MATRIX = ("calibration", "radius")  # scalars of a parameter's matrices, in its state


@dataclass(frozen=True)
class ParameterSpec:
    """What the optimizer was told of a parameter and cannot read off the tensor.

    Attributes:
        shape: of the whole parameter.
        start: where a 1-D tensor that holds a part of it begins in its row-major flattening; None:
            it is the parameter.
        blocks: (name, rows) of the matrices of a fused projection.
    """

    name: str
    shape: tuple[int, ...]
    start: int | None
    blocks: Sequence[tuple[str, int]] | None

    def views(self, param: int, view: str | None, orthogonal: bool) -> list[MatrixView]:
        """Its matrices; for an elementwise rule whose step needs norms, one of all elements where
        it is no matrix."""
        shape: tuple[int, ...] = self.shape
        if not orthogonal and len(shape) != 2 and view is None:
            shape = (math.prod(shape), 1)
        return matrix_views(self.name, param, shape, self.blocks, view)


@dataclass(frozen=True)
class GroupSpec:
    """What the optimizer was told of a parameter group, beside its options."""

    rule: Rule
    parameters: Sequence[ParameterSpec]


class Method(NamedTuple):
    """How the matrices of a group are orthogonalized; those of one method travel together."""

    scheme: str
    compute_dtype: torch.dtype
    wire_dtype: torch.dtype


@dataclass(frozen=True)
class Orthogonalization:
    """The matrices of one method, and how their shards come together."""

    method: Method
    exchange: Exchange
    views: list[int]  # the optimizer's numbers of the exchange's views


@dataclass
class StepPlan:
    """What a step of some of the parameters exchanges and runs over.

    Attributes:
        members: the parameters.
        runs: this rank's pieces of their matrices.
        taking_part: by view, (views,) bool on the device; None: all of them.
        tables: what fused passes run over (`fused.Tables`), once there are any.
    """

    members: tuple[int, ...]
    orthogonalizations: list[Orthogonalization] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    taking_part: Tensor | None = None
    tables: Any = None


@dataclass
class Group:
    """What the engine derives once from a parameter group."""

    options: dict[str, Any]  # the torch parameter group itself, so that schedulers act on it
    rule: Rule
    params: list[int]  # numbers of its parameters
    views: slice  # of the stacked per-matrix scalars; empty where a step needs no inner products
    shape_factor: Tensor  # s of each matrix
    zero_calibration: Tensor  # 0.2 √max(m, n) of each matrix

    @property
    def has_views(self) -> bool:
        return self.views.start < self.views.stop

    @property
    def hyperparameters(self) -> Hyperparameters:
        """As they stand now: schedulers change them."""
        options = self.options
        clip = options["clip"] or self.rule.clip
        return Hyperparameters(
            options["lr"],
            options["weight_decay"],
            clip,
            options["eps"],
            options["ratio_exponent"],
            options["calibration"],
        )

    @property
    def method(self) -> Method:
        compute, wire = self.options["compute_dtype"], self.options["wire_dtype"]
        return Method(
            self.options["orthogonalizer"], getattr(torch, compute), getattr(torch, wire or compute)
        )


class ParameterDescription(NamedTuple):
    """What all ranks have to have been given alike of a parameter."""

    name: str
    shape: tuple[int, ...]
    use: tuple  # rule and what else of its group decides what it is
    blocks: Sequence[tuple[str, int]] | None
    trained: bool


def describe_parameters(
    param_groups: Sequence[Mapping[str, Any]], specs: Sequence[GroupSpec]
) -> tuple[list[ParameterDescription], list[list[Piece]]]:
    """Every parameter, and the pieces of it that this rank holds.

    Raises:
        ValueError: a parameter that its rule cannot update, or one of another shape than when the
            optimizer was built.
    """
    everything = [spec for group in specs for spec in group.parameters]
    check_group_count([spec.name for spec in everything], len(specs), len(param_groups))
    descriptions: list[ParameterDescription] = []
    pieces: list[list[Piece]] = []
    for number, (options, own) in enumerate(zip(param_groups, specs)):
        with in_group(number):
            check_unchanged(own.parameters, options["params"])
            keys = ("view", "transposed", "orthogonalizer", "compute_dtype", "wire_dtype")
            use = (own.rule.name, *(options[key] for key in keys))
            for spec, p in zip(own.parameters, options["params"]):
                fragment = None if spec.start is None else (spec.shape, spec.start)
                check_parameter(spec.name, p, fragment)
                if not own.rule.elementwise:
                    spec.views(0, options["view"], True)  # refuses what is no matrix
                descriptions.append(
                    ParameterDescription(spec.name, spec.shape, use, spec.blocks, p.requires_grad)
                )
                pieces.append(
                    local_pieces(p) if spec.start is None else [Piece(spec.start, p.numel())]
                )
    check_one_device(list(zip(everything, (p for group in param_groups for p in group["params"]))))
    return descriptions, pieces


class Layout:
    """Parameters, matrices and plans.

    Args:
        param_groups, specs: of the optimizer, by group.
        pieces: by rank and parameter.
        rank, process_group: this rank in its group.

    Attributes:
        params, names: of all groups, in order; their places there are the numbers that everything
            else uses.
        views: matrices that a step treats as a whole.
        spans: by parameter, its part of `views`; none where its step needs no inner products.
        state_keys: by parameter, what its state has.
        param_of_view: by view, (views,) int64 on the device.
        device, dtype: of the stacked scalars of matrices.
    """

    def __init__(
        self,
        param_groups: Sequence[dict[str, Any]],
        specs: Sequence[GroupSpec],
        pieces: Sequence[Sequence[Sequence[Piece]]],
        rank: int,
        process_group: Any,
    ):
        self.params: list[Tensor] = [p for group in param_groups for p in group["params"]]
        self.specs = [spec for group in specs for spec in group.parameters]
        self.names = [spec.name for spec in self.specs]
        self.pieces, self.rank, self.world = pieces, rank, len(pieces)
        self._process_group = process_group
        self.device = self.params[0].device if self.params else torch.device("cpu")
        self.dtype = (
            torch.float64 if any(p.dtype == torch.float64 for p in self.params) else torch.float32
        )
        self.groups: list[Group] = []
        self.group_of: list[Group] = []  # by parameter
        self.views: list[MatrixView] = []
        for options, spec in zip(param_groups, specs):
            self._add_group(options, spec)
        self.spans: dict[int, slice] = {}
        for v, view in enumerate(self.views):
            self.spans[view.param] = slice(self.spans.get(view.param, slice(v, v)).start, v + 1)
        self.param_of_view = torch.tensor(
            [view.param for view in self.views], device=self.device, dtype=torch.long
        )
        self.state_keys = [
            {*group.rule.moments}
            | ({"step"} if group.rule.direction == "adam" else set())
            | ({*PER_MATRIX} if i in self.spans else set())
            for i, group in enumerate(self.group_of)
        ]
        self._indices: dict[tuple[int, ...], Tensor] = {}
        self._plans: dict[tuple, StepPlan] = {}
        self._kept: dict[str, tuple[list, Tensor]] = {}

    def _add_group(self, options: dict[str, Any], group_spec: GroupSpec) -> None:
        rule, specs = group_spec.rule, group_spec.parameters
        first_param, first_view = len(self.group_of), len(self.views)
        members = list(range(first_param, first_param + len(specs)))
        for param, spec in zip(members, specs) if rule.per_matrix else ():
            self.views += spec.views(param, options["view"], not rule.elementwise)
        views = self.views[first_view:]
        fans = [(v.cols, v.rows) if options["transposed"] else (v.rows, v.cols) for v in views]
        group = Group(
            options,
            rule,
            members,
            slice(first_view, len(self.views)),
            self.scalars([rule.shape_factor(*out_and_in) for out_and_in in fans]),
            self.scalars([0.2 * max(v.rows, v.cols) ** 0.5 for v in views]),
        )
        self.groups.append(group)
        self.group_of += [group] * len(specs)

    def is_of(self, param_groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the groups still hold the parameters that this was made for."""
        params = [p for group in param_groups for p in group["params"]]
        return (
            len(param_groups) == len(self.groups)
            and len(params) == len(self.params)
            and all(
                len(options["params"]) == len(group.params)
                for options, group in zip(param_groups, self.groups)
            )
            and all(p is q and p.device == self.device for p, q in zip(params, self.params))
        )

    def trainable(self) -> tuple[int, ...]:
        """Parameters that may get a gradient. On several ranks all of them have to say the same, so
        what happens to have one here does not count."""
        if self.world > 1:
            return tuple(i for i, p in enumerate(self.params) if p.requires_grad)
        return tuple(i for i, p in enumerate(self.params) if p.requires_grad or p.grad is not None)

    def taking_part(self) -> tuple[int, ...]:
        """Parameters that take part in a step. On one process those with a gradient; on several a
        rank cannot know of the others' gradients, so all that may have one."""
        if self.world > 1:
            return self.trainable()
        return tuple(i for i, p in enumerate(self.params) if p.grad is not None)

    def plan(self, members: tuple[int, ...]) -> StepPlan:
        """What a step of these parameters exchanges and runs over; kept for the next one."""
        key = members, tuple(group.method for group in self.groups)
        plan = self._plans.pop(key, None) or self._make_plan(members)
        if len(self._plans) >= MAX_PLANS:
            self._plans.pop(next(iter(self._plans)))
        self._plans[key] = plan  # the last one used is the last one to go
        return plan

    def _make_plan(self, members: tuple[int, ...]) -> StepPlan:
        plan, present = StepPlan(members), set(members)
        travelling: dict[Method, list[int]] = {}  # views
        staying: list[int] = []
        for group in self.groups:
            views = staying if group.rule.elementwise else travelling.setdefault(group.method, [])
            views += [
                v
                for v in range(group.views.start, group.views.stop)
                if self.views[v].param in present
            ]
        for method, views in travelling.items():
            exchange = self._exchange(views)
            plan.orthogonalizations.append(Orthogonalization(method, exchange, views))
            plan.runs += exchange.runs(views)
        plan.runs += self._exchange(staying, batches=False).runs(staying)
        if self.world == 1 and len(present) < len(self.params):
            taking_part = [view.param in present for view in self.views]
            plan.taking_part = torch.tensor(taking_part, dtype=torch.bool).to(self.device)
        return plan

    def _exchange(self, views: Sequence[int], batches: bool = True) -> Exchange:
        """Plan the exchange of some views; without `batches` they are cut into pieces, and nothing
        travels."""
        plan = plan_exchange([self.views[v] for v in views], self.pieces)
        if not batches:
            plan.batches = []
        return Exchange(plan, self.pieces[self.rank], self.rank, self._process_group)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, in place; returns the tensor."""
        alone = self.world == 1 or not tensor.numel()
        return tensor if alone else all_reduce(tensor, self._process_group)

    def scalars(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=self.device, dtype=self.dtype)

    def indices(self, numbers: Sequence[int]) -> Tensor:
        """`numbers` as a tensor on the device, made once: every transfer to an accelerator would
        wait for it."""
        key = tuple(numbers)
        if key not in self._indices:
            self._indices[key] = torch.tensor(key, device=self.device, dtype=torch.long)
        return self._indices[key]

    def on_device(self, name: str, rows: list, dtype: torch.dtype) -> Tensor:
        """`rows` as a tensor on the device, the same one while they stay the same. The host does
        not wait for the transfer."""
        if name not in self._kept or self._kept[name][0] != rows:
            values = torch.tensor(rows, dtype=dtype)
            if self.device.type == "cuda":
                values = values.pin_memory()
            self._kept[name] = rows, values.to(self.device, non_blocking=True)
        return self._kept[name][1]
