"""torch's contract for parameters that lie on several ranks: groups, state and copies, and the
layout that is planned from them. What a step does is in `engine.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from archscale.distributed import Piece, fill, gather_objects, portable, rank
from archscale.optim.checks import (
    NEUTRAL,
    check_distinct,
    check_same_everywhere,
    check_same_use,
    check_saved,
    checked_options,
    in_group,
    named,
)
from archscale.optim.layout import (
    GroupSpec,
    Layout,
    ParameterDescription,
    ParameterSpec,
    describe_parameters,
)
from archscale.optim.state import (
    StackedScalars,
    carry_state,
    has_content,
    replacements,
    weight_norms,
)
from archscale.rules import get_rule


@dataclass
class RankReport:
    """What the ranks tell each other before they plan."""

    error: Exception | None
    descriptions: list[ParameterDescription]
    pieces: list[list[Piece]]
    in_the_way: dict[str, bool]  # by name of a replaced parameter: whether its state says anything


class LaidOutOptimizer(torch.optim.Optimizer):
    """An optimizer that knows where the matrices of its parameters lie on all ranks.

    Args:
        params: as of torch, or `named_parameters()`.
        defaults: of the options of a group. hidden_defaults: those that torch's schedulers must not
            see among the defaults.
        process_group: the ranks that hold the parameters; None: the default group.

    Attributes:
        _layout: what is planned for; None before the first use of a copy.
        _scalars: c, R and ‖W‖ of the layout's matrices.
    """

    _scalars: StackedScalars

    def __init__(
        self,
        params: Iterable,
        defaults: dict[str, Any],
        hidden_defaults: dict[str, Any],
        process_group: Any,
    ):
        self._process_group, self._hidden_defaults = process_group, hidden_defaults
        self._layout: Layout | None = None
        self._specs: list[GroupSpec] = []  # by group: what cannot be read off its parameters
        self._constructed = False
        error: Exception | None = None
        try:
            super().__init__(params, defaults)
        except Exception as caught:  # raised in `_build`, on every rank
            error = caught
        self._build(error)
        self._constructed = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take one more group; the dict itself is left as it is. After construction all ranks have
        to call it together."""
        if not self._constructed:  # the constructor plans once, for all groups
            self._add_group(param_group)
            return
        number = len(self.param_groups)
        error: Exception | None = None
        try:
            self._add_group(param_group)
        except Exception as caught:  # raised in `_build`, on every rank
            error = caught
        try:
            self._build(error)
        except Exception:
            del self.param_groups[number:], self._specs[number:]
            raise

    def _add_group(self, param_group: dict[str, Any]) -> None:
        number, group = len(self.param_groups), dict(param_group)
        params = group["params"]
        if not isinstance(params, set):  # which torch refuses
            group["params"] = [params] if isinstance(params, Tensor) else list(params)
            with in_group(number):
                first = sum(len(own.parameters) for own in self._specs)
                given = named(group["params"], first)
                check_distinct(self._present() + given)
        for key, value in self._hidden_defaults.items():
            group.setdefault(key, value)
        if "rule" in group and not get_rule(group["rule"]).has_trust_ratio:
            # The optimizer's own are for rules with a ratio.
            for key, neutral in NEUTRAL.items():
                group.setdefault(key, neutral)
        elif "rule" in group and not get_rule(group["rule"]).calibrated:
            group.setdefault("calibration", None)
        super().add_param_group(group)
        try:
            with in_group(number):
                self._specs.append(_checked_spec(group, [name for name, _ in given]))
        except Exception:
            del self.param_groups[number:]
            raise

    def _present(self) -> list[tuple[str, Tensor]]:
        """(name, parameter) of all that the groups hold now."""
        groups = zip(self._specs, self.param_groups)
        pairs = (pair for own, group in groups for pair in zip(own.parameters, group["params"]))
        return [(spec.name, p) for spec, p in pairs]

    # --- copies and saved states

    def __getstate__(self) -> dict[str, Any]:
        own = ("_specs", "_hidden_defaults", "_process_group")
        return super().__getstate__() | {key: self.__dict__[key] for key in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._constructed = True
        self._layout = None  # planned at the first use, which in a process group all ranks share

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
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
        self._scalars.ensure(self.state, [i for i, entry in enumerate(entries) if entry])
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

    @property
    def _planned(self) -> Layout:
        assert self._layout is not None
        return self._layout

    @torch.no_grad()
    def _build(self, error: Exception | None = None) -> None:
        """Plan for the parameters that the groups hold now, and create their state.

        Args:
            error: of this rank, on the way here; raised on all of them.
        """
        descriptions: list[ParameterDescription] = []
        pieces: list[list[Piece]] = []
        in_the_way: dict[str, bool] = {}
        if error is None:
            try:
                descriptions, pieces = describe_parameters(self.param_groups, self._specs)
                replaced = replacements(self._layout, self._present(), self.state)
                in_the_way = {r.name: has_content(self.state[r.old]) for r in replaced}
            except Exception as caught:
                error = caught
        everyone = gather_objects(
            RankReport(portable(error), descriptions, pieces, in_the_way), self._process_group
        )
        for report in everyone:
            # Raised on every rank: one that raised alone would leave the others waiting.
            if report.error is not None:
                raise report.error if error is None else error
        check_same_everywhere([report.descriptions for report in everyone])
        by_rank = [report.pieces for report in everyone]
        group = self._process_group
        layout = Layout(self.param_groups, self._specs, by_rank, rank(group), group)
        carry_state(
            replaced, self._layout, layout, self.state, [report.in_the_way for report in everyone]
        )
        self._layout = layout
        for p in layout.params:
            for key, value in self.state.get(p, {}).items():
                self.state[p][key] = value.to(layout.device)  # where the model has been moved
        norms = weight_norms(layout, range(len(layout.params)))
        self._scalars = StackedScalars(layout, norms)
        trainable = {*layout.trainable()}
        members = [i for i, p in enumerate(layout.params) if i in trainable or p in self.state]
        self._scalars.ensure(self.state, members, norms)


def _checked_spec(group: dict[str, Any], names: Sequence[str]) -> GroupSpec:
    """Check a new group's options; leaves plain data in it, so that a state dict holds nothing
    else. Its parameters are checked when they are laid out."""
    rule = checked_options(group)
    params = group["params"]
    blocks = group.pop("blocks", None) or [None] * len(params)
    fragments = group.pop("fragments", None) or [None] * len(params)
    specs = []
    for name, p, block, fragment in zip(names, params, blocks, fragments, strict=True):
        shape, start = fragment or (p.shape, None)
        specs.append(ParameterSpec(name, tuple(shape), start, block))
    return GroupSpec(rule, specs)
