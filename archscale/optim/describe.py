"""What `MatrixOptimizer` tells of itself: what its last step did, what it holds, what it sends."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from archscale.distributed import Fragment, Piece, local_tensor
from archscale.optim.exchange import Block, Exchange, Run
from archscale.optim.rules import Rule, Step
from archscale.optim.shards import MatrixView, matrix_views

if TYPE_CHECKING:
    from archscale.optim.engine import MatrixOptimizer


@dataclass(frozen=True)
class ParameterSpec:
    """What the optimizer was told of a parameter and cannot read off the tensor.

    Attributes:
        shape: of the whole parameter.
        start: where a 1-D tensor that holds a part of it begins in its row-major flattening; None: it is the parameter.
        blocks: (name, rows) of the matrices of a fused projection.
    """

    name: str
    shape: tuple[int, ...]
    start: int | None
    blocks: Sequence[tuple[str, int]] | None

    def views(self, param: int, view: str | None, orthogonal: bool) -> list[MatrixView]:
        """Its matrices; for an elementwise rule whose step needs norms, one of all elements where it is no matrix."""
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


class Described:
    """The part of `MatrixOptimizer` that changes nothing."""

    _params: list[Tensor]
    _names: list[str]
    _specs: list[list[ParameterSpec]]
    _pieces: list[list[list[Piece]]]
    _rank: int
    _views: list[MatrixView]
    _steps: list[tuple[Group, Step]]
    _radius: Tensor
    _watched: dict[str, Tensor]
    _plan: Callable[[tuple[int, ...]], StepPlan]
    _groups: list[Group]
    _synchronize: Callable[[], None]
    _indices: Callable[[Sequence[int]], Tensor]
    state: Any

    def diagnostics(self) -> dict[str, Tensor]:
        """What the last step did, per matrix, still on the device; `matrix_names()` gives their order.

        Keys: `trust_ratio` (raw), `clipped_ratio`, `clipped`, `bad`, `calibration`, `weight_norm`, `relative_update`,
        `norm_drift` (‖W‖/‖W₀‖ − 1), `effective_decay` (η r̂ λ, or η λ), and after a step with a `watch` its keys (zero for
        matrices that are not orthogonalized).
        """
        assert hasattr(self, "_steps"), "diagnostics() describes a step: call step() first"
        columns: dict[str, list[Tensor]] = {}
        for group, step in self._steps:
            decay = group.options["lr"] * group.options["weight_decay"] if group.rule.decay != "none" else 0.0
            radius = self._radius[group.views]
            drift = torch.where(radius > 0, step.weight_norm / radius - 1, 0.0)  # no radius: never trained
            row = {
                "trust_ratio": step.ratio, "clipped_ratio": step.clipped_ratio, "clipped": step.clipped, "bad": step.bad,
                "calibration": step.calibration, "weight_norm": step.weight_norm, "relative_update": step.relative_update,
                "norm_drift": drift, "effective_decay": decay * step.clipped_ratio,
            }  # fmt: skip
            row |= {key: values[group.views] for key, values in self._watched.items()}
            for key, value in row.items():
                columns.setdefault(key, []).append(value)
        return {key: torch.cat(values) for key, values in columns.items()}

    def fragments(self) -> dict[str, dict[str, Fragment | Tensor]]:
        """The state by parameter name, in its own memory: a `Fragment` where it is laid out as the parameter, and tensors
        that every rank has alike (c and R of each of its matrices, Adam's step count)."""
        self._synchronize()
        specs = [spec for group in self._specs for spec in group]
        fragments: dict[str, dict[str, Fragment | Tensor]] = {}
        for spec, pieces, p in zip(specs, self._pieces[self._rank], self._params):
            assert sum(piece.count for piece in pieces) < 2, f"{spec.name} is no fragment"
            start = pieces[0].start if pieces else 0
            fragments[spec.name] = {
                key: value
                if key in ("calibration", "radius", "step")
                else Fragment(spec.shape, start, local_tensor(value).view(-1))
                for key, value in self.state.get(p, {}).items()
            }
        return fragments

    def views(self) -> list[tuple[str, str, int, int]]:
        """(parameter, matrix, rows, cols) of every matrix that a rule treats as a whole."""
        self._synchronize()
        return [(self._names[view.param], view.name, view.rows, view.cols) for view in self._views]

    def bytes_sent(self) -> int:
        """Bytes that this rank sends to others in the exchanges of one step (the all-reduced scalars apart)."""
        self._synchronize()
        members = tuple(i for i, p in enumerate(self._params) if p.requires_grad or p.grad is not None)
        return sum(x.elements_sent * wire.itemsize for x, _, (_, _, wire) in self._plan(members).exchanges)

    def matrix_names(self) -> list[str]:
        """Names of the matrices, in the order of `diagnostics()`."""
        self._synchronize()
        return [view.name for view in self._views]

    def orthogonal(self) -> Tensor:
        """Numbers of the matrices that are orthogonalized, in the order of `diagnostics()`; int64."""
        self._synchronize()
        orthogonal = (group.views for group in self._groups if group.rule.direction == "orthogonal")
        return self._indices([v for views in orthogonal for v in range(views.start, views.stop)])


def measure_gradients(optimizer: MatrixOptimizer, plan: StepPlan, grads: dict[int, Tensor]) -> dict[str, Tensor]:
    """The optimizer's watch on whole gradients, by `gradient_<key>` for each matrix: one more exchange, of gradients.

    Args:
        grads: flat local gradients by parameter; left as they are.
    """
    watch = optimizer.watch
    assert watch is not None
    measured = torch.zeros(
        len(watch.gradients), len(optimizer._views), device=optimizer._device, dtype=optimizer._dtype
    )

    def read(param: int, block: Block, out: Tensor) -> None:
        out.copy_(block.of(grads[param]))

    for exchange, numbers, (_, _, wire) in plan.exchanges:
        # Called within this iteration only, so the loop's variables are the right ones.
        def measure(stack: Tensor, views: list[int]) -> None:
            owned = optimizer._indices([numbers[v] for v in views])  # noqa: B023
            measured[:, owned] = watch.of_gradient(stack).to(measured.dtype)

        params = {optimizer._views[v].param for v in numbers}
        returned = {i: torch.empty_like(grads[i]) for i in params}  # what the exchange brings back; nobody reads it
        if params:
            exchange.run(read, returned, measure, wire)
    return {f"gradient_{key}": row for key, row in zip(watch.gradients, optimizer._all_reduce(measured))}
