"""What `MatrixOptimizer` tells of itself: what its last step did, what it holds, what it sends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from archscale.distributed import Fragment, local_tensor
from archscale.optim.exchange import Exchange
from archscale.optim.rules import Rule, Step
from archscale.optim.shards import Interval, MatrixView

if TYPE_CHECKING:
    from archscale.optim.engine import MatrixOptimizer


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
    _shapes: list[tuple[int, ...]]
    _intervals: list[list[list[Interval]]]
    _rank: int
    _views: list[MatrixView]
    _steps: list[tuple[Group, Step]]
    _radius: Tensor
    _watched: dict[str, Tensor]
    _exchanges: list[tuple[Exchange, list[int], tuple]]
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
            row = {
                "trust_ratio": step.ratio, "clipped_ratio": step.clipped_ratio, "clipped": step.clipped, "bad": step.bad,
                "calibration": step.calibration, "weight_norm": step.weight_norm, "relative_update": step.relative_update,
                "norm_drift": step.weight_norm / self._radius[group.views] - 1, "effective_decay": decay * step.clipped_ratio,
            }  # fmt: skip
            row |= {key: values[group.views] for key, values in self._watched.items()}
            for key, value in row.items():
                columns.setdefault(key, []).append(value)
        return {key: torch.cat(values) for key, values in columns.items()}

    def fragments(self) -> dict[str, dict[str, Fragment | Tensor]]:
        """The state by parameter name, in its own memory: a `Fragment` where it is laid out as the parameter, and tensors
        that every rank has alike (c and R of each of its matrices, Adam's step count)."""
        places = zip(self._names, self._shapes, self._intervals[self._rank], self._params)
        return {
            name: {
                key: value if key in ("calibration", "radius", "step") else Fragment(shape, lo, local_tensor(value).view(-1))
                for key, value in self.state[p].items()
            }
            for name, shape, [(lo, _)], p in places
        }  # fmt: skip

    def views(self) -> list[tuple[str, str, int, int]]:
        """(parameter, matrix, rows, cols) of every matrix that a rule treats as a whole."""
        return [(self._names[view.param], view.name, view.rows, view.cols) for view in self._views]

    def bytes_sent(self) -> int:
        """Bytes that this rank sends to others in the exchanges of one step (the all-reduced scalars apart)."""
        return sum(x.elements_sent * (wire or compute).itemsize for x, _, (_, compute, wire) in self._exchanges)

    def matrix_names(self) -> list[str]:
        """Names of the matrices, in the order of `diagnostics()`."""
        return [view.name for view in self._views]

    def orthogonal(self) -> Tensor:
        """Numbers of the matrices that are orthogonalized, in the order of `diagnostics()`; int64."""
        return self._indices(sorted(v for _, numbers, _ in self._exchanges for v in numbers))


def measure_gradients(optimizer: MatrixOptimizer, grads: list[Tensor]) -> dict[str, Tensor]:
    """The optimizer's watch on whole gradients, by `gradient_<key>` for each matrix: one more exchange, of gradients.

    Args:
        grads: flat local gradients by parameter; left as they are.
    """
    watch = optimizer.watch
    assert watch is not None
    found = torch.zeros(len(watch.gradients), len(optimizer._views), device=grads[0].device, dtype=optimizer._dtype)
    for exchange, numbers, (_, compute, wire) in optimizer._exchanges:
        # Called within this iteration only, so the loop's variables are the right ones.
        def measure(stack: Tensor, views: list[int]) -> None:
            found[:, optimizer._indices([numbers[v] for v in views])] = watch.of_gradient(stack).to(found.dtype)  # noqa: B023

        params = {optimizer._views[v].param for v in numbers}
        back = {i: torch.empty_like(grads[i]) for i in params}  # what the exchange would return; nobody reads it
        exchange.run({i: grads[i] for i in params}, back, dict.fromkeys(params, 0.0), measure, wire or compute)
    return {f"gradient_{key}": row for key, row in zip(watch.gradients, optimizer._all_reduce(found))}
