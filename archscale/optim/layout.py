"""Where the parameters of an optimizer lie and what a step of them exchanges: made once, the same
on every rank, and anew when others are put into the parameter groups."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from archscale.distributed import Piece, local_pieces
from archscale.optim.checks import (
    check_group_count,
    check_one_device,
    check_parameter,
    check_unchanged,
    in_group,
)
from archscale.optim.exchange import Exchange, Run
from archscale.optim.shards import MatrixView, matrix_views, plan_exchange
from archscale.rules import Rule

MAX_PLANS = 8  # sets of parameters with gradients for which a plan is kept
BUFFERS = {  # of a parameter's state, by the rule's direction
    "orthogonal": ("momentum",),
    "momentum": ("momentum",),
    "lion": ("exp_avg",),
    "adam": ("exp_avg", "exp_avg_sq"),
}
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


@dataclass
class StepPlan:
    """What a step of some of the parameters exchanges and runs over.

    Attributes:
        members: the parameters.
        exchanges: (exchange, its views, (scheme, compute dtype, wire dtype)).
        taking_part: by view, (views,) bool on the device; None: all of them.
    """

    members: tuple[int, ...]
    exchanges: list[tuple[Exchange, list[int], tuple]] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    taking_part: Tensor | None = None


@dataclass
class Group:
    """What the engine derives once from a parameter group."""

    options: dict[str, Any]  # the torch parameter group itself, so that schedulers act on it
    rule: Rule
    params: list[int]  # numbers of its parameters
    views: slice  # of the stacked per-matrix scalars; empty where a step needs no inner products
    shape_factor: Tensor
    zero_calibration: Tensor


def describe_parameters(
    param_groups: Sequence[Mapping[str, Any]],
    rules: Sequence[Rule],
    specs: Sequence[Sequence[ParameterSpec]],
) -> list[tuple]:
    """List (name, shape, use by its group, blocks, whether it is trained, pieces held here) of
    every parameter; all but the last are the same on every rank.

    Raises:
        ValueError: a parameter that its rule cannot update, or one of another shape than when the
            optimizer was built.
    """
    check_group_count(
        [spec.name for group in specs for spec in group], len(specs), len(param_groups)
    )
    check_one_device(
        [pair for group, own in zip(param_groups, specs) for pair in zip(own, group["params"])]
    )
    description: list[tuple] = []
    for number, (options, rule, own) in enumerate(zip(param_groups, rules, specs)):
        with in_group(number):
            check_unchanged(own, options["params"])
            use = ("view", "transposed", "orthogonalizer", "compute_dtype", "wire_dtype")
            for spec, p in zip(own, options["params"]):
                check_parameter(
                    spec.name, p, None if spec.start is None else (spec.shape, spec.start)
                )
                if rule.direction == "orthogonal":
                    spec.views(0, options["view"], True)  # refuses what is no matrix
                pieces = (
                    [Piece(spec.start, p.numel())] if spec.start is not None else local_pieces(p)
                )
                use_of = (rule.name, *(options[key] for key in use))
                description.append(
                    (spec.name, spec.shape, use_of, spec.blocks, p.requires_grad, pieces)
                )
    return description


class Layout:
    """Parameters, matrices and plans.

    Args:
        param_groups, rules, specs: of the optimizer, by group.
        pieces: by rank and parameter.
        rank, process_group: this rank in its group.

    Attributes:
        params, names: of all groups, in order; their places there are the numbers that everything
            else uses.
        views: matrices that a step treats as a whole.
        spans: by parameter, its part of `views`; none where its step needs no inner products.
        state_keys: by parameter, what its state has.
        device, dtype: of the stacked scalars of matrices.
    """

    def __init__(
        self,
        param_groups: Sequence[dict[str, Any]],
        rules: Sequence[Rule],
        specs: Sequence[Sequence[ParameterSpec]],
        pieces: Sequence[Sequence[Sequence[Piece]]],
        rank: int,
        process_group: Any,
    ):
        self.params: list[Tensor] = [p for group in param_groups for p in group["params"]]
        self.specs = [spec for group in specs for spec in group]
        self.names = [spec.name for spec in self.specs]
        self.pieces, self.rank, self.world, self._process_group = (
            pieces,
            rank,
            len(pieces),
            process_group,
        )
        self.device = self.params[0].device if self.params else torch.device("cpu")
        self.dtype = (
            torch.float64 if any(p.dtype == torch.float64 for p in self.params) else torch.float32
        )
        self.groups: list[Group] = []
        self.group_of: list[Group] = []  # by parameter
        self.views: list[MatrixView] = []
        for options, rule, own in zip(param_groups, rules, specs):
            self._add_group(options, rule, own)
        self.spans: dict[int, slice] = {}
        for v, view in enumerate(self.views):
            self.spans[view.param] = slice(self.spans.get(view.param, slice(v, v)).start, v + 1)
        self.param_of_view = torch.tensor(
            [view.param for view in self.views], device=self.device, dtype=torch.long
        )
        self.state_keys = [
            {*BUFFERS[group.rule.direction]}
            | ({"step"} if group.rule.direction == "adam" else set())
            | ({*PER_MATRIX} if i in self.spans else set())
            for i, group in enumerate(self.group_of)
        ]
        self._indices: dict[tuple[int, ...], Tensor] = {}
        self._plans: dict[tuple, StepPlan] = {}

    def _add_group(
        self, options: dict[str, Any], rule: Rule, specs: Sequence[ParameterSpec]
    ) -> None:
        first_param, first_view = len(self.group_of), len(self.views)
        members = list(range(first_param, first_param + len(specs)))
        for param, spec in (
            zip(members, specs) if rule.direction == "orthogonal" or rule.needs_norms else ()
        ):
            self.views += spec.views(param, options["view"], rule.direction == "orthogonal")
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
        """What a step of these parameters exchanges and what it runs over."""
        uses = tuple(
            tuple(group.options[k] for k in ("orthogonalizer", "compute_dtype", "wire_dtype"))
            for group in self.groups
        )
        key = (members, uses)
        if key in self._plans:
            self._plans[key] = self._plans.pop(key)  # the last one used is the last one to go
            return self._plans[key]
        if len(self._plans) >= MAX_PLANS:
            self._plans.pop(next(iter(self._plans)))
        present = set(members)
        together: dict[
            tuple | None, list[int]
        ] = {}  # views that travel together; None: those that do not travel
        for group, use_of in zip(self.groups, uses):
            views = [
                v
                for v in range(group.views.start, group.views.stop)
                if self.views[v].param in present
            ]
            together.setdefault(
                use_of if group.rule.direction == "orthogonal" else None, []
            ).extend(views)
        plan = StepPlan(members)
        for use, numbers in together.items():
            exchange_plan = plan_exchange([self.views[v] for v in numbers], self.pieces)
            if use is None:
                exchange_plan.batches = []
            exchange = Exchange(
                exchange_plan, self.pieces[self.rank], self.rank, self._process_group
            )
            plan.runs += exchange.runs(numbers)
            if use is not None:
                scheme, compute, wire = use
                dtypes = getattr(torch, compute), getattr(torch, wire or compute)
                plan.exchanges.append((exchange, numbers, (scheme, *dtypes)))
        if self.world == 1 and len(present) < len(self.params):
            taking_part = torch.tensor(
                [view.param in present for view in self.views], dtype=torch.bool
            )
            plan.taking_part = taking_part.to(self.device)
        self._plans[key] = plan
        return plan

    def scalars(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=self.device, dtype=self.dtype)

    def indices(self, numbers: Sequence[int]) -> Tensor:
        """`numbers` as a tensor on the device, made once: every transfer to an accelerator would
        wait for it."""
        key = tuple(numbers)
        if key not in self._indices:
            self._indices[key] = torch.tensor(key, device=self.device, dtype=torch.long)
        return self._indices[key]
