"""The state of an optimizer's parameters: moments that are laid out as the parameter, and c and R
of its matrices, which are parts of tensors stacked over all matrices.

It stays in torch's `optimizer.state`, by parameter, where checkpoints and users find it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from archscale.distributed import local_tensor
from archscale.optim.coefficients import MatrixScalars, Step
from archscale.optim.elementwise import dot
from archscale.optim.layout import PER_MATRIX, Group, Layout

State = MutableMapping[Tensor, dict[str, Tensor]]  # torch's `optimizer.state`


def weight_norms(layout: Layout, members: Iterable[int]) -> Tensor:
    """‖W‖ of every matrix of these parameters, (views,); 0 for the others. One all-reduce."""
    squares = layout.scalars([0.0] * len(layout.views))
    for run in layout.plan(tuple(members)).runs:
        if run.counted:
            w = run.of(local_tensor(layout.params[run.param]).view(-1))
            squares[run.views] += dot(w, w)
    return layout.all_reduce(squares).sqrt()


class StackedScalars:
    """One number per matrix of a layout, stacked: what a step reads in one piece.

    Args:
        weight_norm: ‖W‖ as it is now.

    Attributes:
        calibration, radius: c and R, (views,); each parameter's state has its part of them.
        weight_norm: ‖W‖ before the last step that the matrix took part in, (views,).
    """

    def __init__(self, layout: Layout, weight_norm: Tensor):
        self._layout = layout
        self.weight_norm = weight_norm
        self.calibration, self.radius = torch.zeros_like(weight_norm), torch.zeros_like(weight_norm)
        self._parts: dict[int, dict[str, Tensor]] = {}  # by parameter, as its state has them

    def of(self, group: Group) -> MatrixScalars:
        return MatrixScalars(
            group.shape_factor,
            group.zero_calibration,
            self.calibration[group.views],
            self.radius[group.views],
        )

    def keep(self, group: Group, step: Step) -> None:
        """Take c and ‖W‖ from a step of the group."""
        self.calibration[group.views] = step.calibration
        self.weight_norm[group.views] = step.weight_norm

    def ensure(self, state: State, members: Iterable[int], norms: Tensor | None = None) -> None:
        """Create the state of parameters that have none, and let c and R of all be parts of the
        stacked ones, whatever has been put into their place (a copy on another device, say).

        Args:
            norms: ‖W‖ of all matrices, where it is known.
        """
        layout, missing = self._layout, []
        for i in members:
            own = state.get(layout.params[i], {})
            if not layout.state_keys[i] <= own.keys():
                missing.append(i)
            elif i in layout.spans and any(
                own[key] is not self._parts.get(i, {}).get(key) for key in PER_MATRIX
            ):
                own |= self._fill(i, {key: own[key] for key in PER_MATRIX})
        if norms is None and any(i in layout.spans for i in missing):
            norms = weight_norms(layout, missing)
        for i in missing:
            own = state[layout.params[i]] = self._moments(i)
            if norms is not None and i in layout.spans:
                own |= self._first_scalars(i, norms[layout.spans[i]])

    def _moments(self, param: int) -> dict[str, Tensor]:
        layout = self._layout
        p, group = layout.params[param], layout.group_of[param]
        moments: dict[str, Tensor] = {}
        for key in group.rule.moments:
            # (1 − β₂) G² is too small an increment of Adam's second moment for a coarser dtype.
            name = group.options["momentum_dtype"] if key != "exp_avg_sq" else None
            dtype = getattr(torch, name) if name else layout.dtype
            moments[key] = torch.zeros_like(p, dtype=dtype, memory_format=torch.contiguous_format)
        if group.rule.direction == "adam":
            moments["step"] = torch.zeros((), device=layout.device, dtype=torch.float32)
        return moments

    def _first_scalars(self, param: int, norms: Tensor) -> dict[str, Tensor]:
        layout, rule = self._layout, self._layout.group_of[param].rule
        span = layout.spans[param]
        zero = (norms == 0).nonzero().flatten().tolist() if rule.sphere else []
        if zero:
            raise ValueError(
                f"matrix {layout.views[span][zero[0]].name!r} is zero: on the sphere (rule"
                f" {rule.name!r}) it could never move; initialize it, or give it another rule"
            )
        self.weight_norm[span] = norms
        uncalibrated = torch.full_like(norms, 0.0 if rule.calibrated else 1.0)
        return self._fill(param, {"calibration": uncalibrated, "radius": norms})

    def _fill(self, param: int, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Write a parameter's c and R into the stacked ones; returns its parts of them."""
        span = self._layout.spans[param]
        parts = {"calibration": self.calibration[span], "radius": self.radius[span]}
        for key, part in parts.items():
            part.copy_(values[key])
        self._parts[param] = parts
        return parts


# --- parameters that stand in another's place


@dataclass(frozen=True)
class Replacement:
    """A parameter that stands in another's place, whose state it has not got."""

    name: str
    old: Tensor
    new: Tensor


def replacements(
    before: Layout | None, present: Sequence[tuple[str, Tensor]], state: State
) -> list[Replacement]:
    """Parameters in the groups now that stand in the place of others.

    Args:
        before: the layout planned last.
        present: (name, parameter) in the groups now.
    """
    old = dict(zip(before.names, before.params)) if before else {}
    return [
        Replacement(name, old[name], p)
        for name, p in present
        if name in old and old[name] is not p and old[name] in state and p not in state
    ]


def has_content(state: Mapping[str, Tensor]) -> bool:
    """Whether a parameter's state says anything, so that dropping it would lose it."""
    return any(
        bool(local_tensor(value).any()) for key, value in state.items() if key not in PER_MATRIX
    )


def carry_state(
    replaced: Sequence[Replacement],
    before: Layout | None,
    after: Layout,
    state: State,
    in_the_way: Sequence[Mapping[str, bool]],
) -> None:
    """Give parameters that stand in another's place its state, where every rank holds the same of
    both.

    Args:
        in_the_way: by rank, `has_content` by name of replaced parameter.

    Raises:
        ValueError: a state with content whose parameter is sharded otherwise now.
    """
    alike = {
        change.name
        for change in replaced
        if before and _held(before, change.name) == _held(after, change.name)
    }
    for change in replaced:  # before anything is changed
        if change.name not in alike and any(rank.get(change.name) for rank in in_the_way):
            raise ValueError(
                f"parameter {change.name!r} has been replaced by one that is sharded otherwise, and"
                " its momentum belongs to the old one: wrap the model before the first step,"
                " or load a state dict afterwards"
            )
    for change in replaced:
        own = state.pop(change.old)
        if change.name in alike:
            state[change.new] = dict(own)
            for key in own.keys() - {*PER_MATRIX, "step"}:
                moved = torch.zeros_like(change.new, dtype=own[key].dtype)
                local_tensor(moved).copy_(local_tensor(own[key]))
                state[change.new][key] = moved


def _held(layout: Layout, name: str) -> list:
    """By rank, the pieces of a parameter that it holds."""
    number = layout.names.index(name)
    return [by_param[number] for by_param in layout.pieces]
