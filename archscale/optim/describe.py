"""What `MatrixOptimizer` tells of itself: what its last step did, what it holds, what it sends."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from archscale.distributed import Fragment, local_tensor
from archscale.optim.coefficients import Step
from archscale.optim.exchange import Copies
from archscale.optim.layout import PER_MATRIX, Group, Layout, StepPlan
from archscale.optim.state import State


class Watch(Protocol):
    """Measures whole matrices on the ranks that own them.

    Attributes:
        keys: names of what it measures of M̂ and Q.
        gradients: names of what it measures of gradients, which takes an exchange of its own; none:
            no exchange.
    """

    keys: tuple[str, ...]
    gradients: tuple[str, ...]

    def __call__(self, momentum: Tensor, direction: Tensor) -> Tensor:
        """Measure M̂ and its Q, stacks (k, m, n) in the wire's dtype, → (keys, k). Neither may be
        written to."""

    def of_gradient(self, gradient: Tensor) -> Tensor:
        """Measure a stack (k, m, n) of gradients → (gradients, k)."""


class MatrixInfo(NamedTuple):
    """A matrix that a rule treats as a whole."""

    parameter: str
    name: str
    rows: int
    cols: int


@dataclass
class LastStep:
    """What is known of a step when it is done."""

    steps: list[tuple[Group, Step]] = field(default_factory=list)
    watched: dict[str, Tensor] = field(default_factory=dict)  # by key of the watch, (views,)


def diagnostics(last: LastStep, radius: Tensor) -> dict[str, Tensor]:
    """See `MatrixOptimizer.diagnostics`. Args: radius: R, (views,)."""
    columns: dict[str, list[Tensor]] = {}
    for group, step in last.steps:
        decays = group.rule.decay != "none"
        decay = group.options["lr"] * group.options["weight_decay"] if decays else 0.0
        norm = radius[group.views]  # 0: never trained
        row = {
            "trust_ratio": step.ratio,
            "clipped_ratio": step.clipped_ratio,
            "clipped": step.clipped,
            "bad": step.bad,
            "calibration": step.calibration,
            "weight_norm": step.weight_norm,
            "relative_update": step.relative_update,
            "norm_drift": torch.where(norm > 0, step.weight_norm / norm - 1, 0.0),
            "effective_decay": decay * step.clipped_ratio,
        }
        row |= {key: values[group.views] for key, values in last.watched.items()}
        for key, value in row.items():
            columns.setdefault(key, []).append(value)
    return {key: torch.cat(values) for key, values in columns.items()}


def fragments(layout: Layout, state: State) -> dict[str, dict[str, Fragment | Tensor]]:
    """See `MatrixOptimizer.fragments`."""
    whole = (*PER_MATRIX, "step")  # not laid out as the parameter
    held: dict[str, dict[str, Fragment | Tensor]] = {}
    for spec, pieces, p in zip(layout.specs, layout.pieces[layout.rank], layout.params):
        assert sum(piece.count for piece in pieces) < 2, f"{spec.name} is no fragment"
        start = pieces[0].start if pieces else 0
        held[spec.name] = {
            key: value
            if key in whole
            else Fragment(spec.shape, start, local_tensor(value).view(-1))
            for key, value in state.get(p, {}).items()
        }
    return held


def bytes_sent(plan: StepPlan) -> int:
    """See `MatrixOptimizer.bytes_sent`."""
    return sum(
        part.exchange.elements_sent * part.method.wire_dtype.itemsize
        for part in plan.orthogonalizations
    )


def orthogonal(layout: Layout) -> Tensor:
    """See `MatrixOptimizer.orthogonal`."""
    groups = [group for group in layout.groups if not group.rule.elementwise]
    return layout.indices([v for g in groups for v in range(g.views.start, g.views.stop)])


def measure_gradients(
    watch: Watch, layout: Layout, plan: StepPlan, gradients: dict[int, Tensor]
) -> Tensor:
    """What `watch` sees of the whole gradients that this rank owns, (watch.gradients, views), 0
    elsewhere: one more exchange, of gradients.

    Args:
        gradients: flat local gradients by parameter; left as they are.
    """
    shape = len(watch.gradients), len(layout.views)
    measured = torch.zeros(shape, device=layout.device, dtype=layout.dtype)
    for part in plan.orthogonalizations:
        # What the exchange brings back nobody reads.
        params = {layout.views[v].param for v in part.views}
        returned = {i: torch.empty_like(gradients[i]) for i in params}
        ends = Copies(gradients, returned)
        for stack, views in part.exchange.whole_matrices(
            ends, part.method.wire_dtype, layout.device
        ):
            owned = layout.indices([part.views[v] for v in views])
            measured[:, owned] = watch.of_gradient(stack).to(measured.dtype)
    return measured
