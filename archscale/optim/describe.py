"""What `MatrixOptimizer` tells of itself: what its last step did, what it holds, what it sends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from archscale.distributed import Fragment, local_tensor
from archscale.optim.coefficients import Step
from archscale.optim.exchange import Block, Watch
from archscale.optim.layout import PER_MATRIX, Group, Layout, StepPlan


class Described:
    """The part of `MatrixOptimizer` that changes nothing. After parameters have been replaced, and
    on a copy, the first call plans anew, which all ranks do together."""

    _synchronize: Callable[[], Layout]
    _steps: list[tuple[Group, Step]]
    _radius: Tensor
    _watched: dict[str, Tensor]
    state: Any

    def diagnostics(self) -> dict[str, Tensor]:
        """What the last step did, per matrix, still on the device; `matrix_names()` gives their
        order.

        Keys: `trust_ratio` (raw), `clipped_ratio`, `clipped`, `bad`, `calibration`, `weight_norm`,
        `relative_update`, `norm_drift` (‖W‖/‖W₀‖ − 1), `effective_decay` (η r̂ λ, or η λ), and
        after a step with a `watch` its keys (zero for matrices that are not orthogonalized).
        """
        assert hasattr(self, "_steps"), "diagnostics() describes a step: call step() first"
        columns: dict[str, list[Tensor]] = {}
        for group, step in self._steps:
            decay = (
                group.options["lr"] * group.options["weight_decay"]
                if group.rule.decay != "none"
                else 0.0
            )
            radius = self._radius[group.views]
            drift = torch.where(
                radius > 0, step.weight_norm / radius - 1, 0.0
            )  # no radius: never trained
            row = {
                "trust_ratio": step.ratio,
                "clipped_ratio": step.clipped_ratio,
                "clipped": step.clipped,
                "bad": step.bad,
                "calibration": step.calibration,
                "weight_norm": step.weight_norm,
                "relative_update": step.relative_update,
                "norm_drift": drift,
                "effective_decay": decay * step.clipped_ratio,
            }
            row |= {key: values[group.views] for key, values in self._watched.items()}
            for key, value in row.items():
                columns.setdefault(key, []).append(value)
        return {key: torch.cat(values) for key, values in columns.items()}

    def fragments(self) -> dict[str, dict[str, Fragment | Tensor]]:
        """The state by parameter name, in its own memory: a `Fragment` where it is laid out as the
        parameter, and tensors that every rank has alike (c and R of each of its matrices, Adam's
        step count)."""
        layout = self._synchronize()
        fragments: dict[str, dict[str, Fragment | Tensor]] = {}
        for spec, pieces, p in zip(layout.specs, layout.pieces[layout.rank], layout.params):
            assert sum(piece.count for piece in pieces) < 2, f"{spec.name} is no fragment"
            start = pieces[0].start if pieces else 0
            fragments[spec.name] = {
                key: (
                    value
                    if key in (*PER_MATRIX, "step")
                    else Fragment(spec.shape, start, local_tensor(value).view(-1))
                )
                for key, value in self.state.get(p, {}).items()
            }
        return fragments

    def views(self) -> list[tuple[str, str, int, int]]:
        """(parameter, matrix, rows, cols) of every matrix that a rule treats as a whole."""
        layout = self._synchronize()
        return [
            (layout.names[view.param], view.name, view.rows, view.cols) for view in layout.views
        ]

    def bytes_sent(self) -> int:
        """Bytes that this rank sends to others in the exchanges of one step (the all-reduced
        scalars apart)."""
        layout = self._synchronize()
        plan = layout.plan(layout.trainable())
        return sum(
            exchange.elements_sent * wire.itemsize for exchange, _, (_, _, wire) in plan.exchanges
        )

    def matrix_names(self) -> list[str]:
        """Names of the matrices, in the order of `diagnostics()`."""
        return [view.name for view in self._synchronize().views]

    def orthogonal(self) -> Tensor:
        """Numbers of the matrices that are orthogonalized, in the order of `diagnostics()`;
        int64."""
        layout = self._synchronize()
        orthogonal = (
            group.views for group in layout.groups if group.rule.direction == "orthogonal"
        )
        return layout.indices([v for views in orthogonal for v in range(views.start, views.stop)])


def measure_gradients(
    watch: Watch, layout: Layout, plan: StepPlan, grads: dict[int, Tensor]
) -> Tensor:
    """What `watch` sees of the whole gradients that this rank owns, (watch.gradients, views), 0
    elsewhere: one more exchange, of gradients.

    Args:
        grads: flat local gradients by parameter; left as they are.
    """
    measured = torch.zeros(
        len(watch.gradients), len(layout.views), device=layout.device, dtype=layout.dtype
    )

    def read(param: int, block: Block, out: Tensor) -> None:
        out.copy_(block.of(grads[param]))

    for exchange, numbers, (_, _, wire) in plan.exchanges:
        # Called within this iteration only, so the loop's variables are the right ones.
        def measure(stack: Tensor, views: list[int]) -> None:
            owned = layout.indices([numbers[v] for v in views])  # noqa: B023
            measured[:, owned] = watch.of_gradient(stack).to(measured.dtype)

        params = {layout.views[v].param for v in numbers}
        returned = {
            i: torch.empty_like(grads[i]) for i in params
        }  # what the exchange brings back; nobody reads it
        if params:
            exchange.run(read, returned, measure, wire)
    return measured
