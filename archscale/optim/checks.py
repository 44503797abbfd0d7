"""What `MatrixOptimizer` refuses: each ValueError names the parameter or option and the remedy."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from archscale.distributed import local_pieces, local_tensor
from archscale.optim.orthogonalize import SCHEMES
from archscale.optim.shards import VIEWS
from archscale.rules import Rule, check_clip, get_rule

REPLACED = (
    "whatever put others in their place (DeepSpeed does, with flat partitions) has to keep each"
    " parameter's shape: use fully_shard or DDP, `archscale train` with parallel.engine=deepspeed,"
    " or an optimizer with `fragments`"
)
NEUTRAL = {"clip": None, "ratio_exponent": 1.0, "calibration": None}  # of rules without a ratio
DTYPE_OPTIONS = ("compute_dtype", "wire_dtype", "momentum_dtype")


@contextlib.contextmanager
def in_group(number: int) -> Iterator[None]:
    """Errors within say which parameter group they are about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"parameter group {number}: {error}") from None


def named(params: Sequence[Any], first: int) -> list[tuple[str, Tensor]]:
    """(name, parameter) of a group's parameters; those without a name are called by their
    number."""
    return [
        p if isinstance(p, tuple) else (f"parameter {first + i}", p) for i, p in enumerate(params)
    ]


def check_distinct(params: Sequence[tuple[str, Tensor]]) -> None:
    seen: dict[int, str] = {}
    for name, p in params:
        if id(p) in seen:
            raise ValueError(
                f"parameter {seen[id(p)]!r} is given"
                f" twice{'' if seen[id(p)] == name else f', also as {name!r}'}: list every"
                " parameter once"
            )
        seen[id(p)] = name


def check_unchanged(specs: Sequence[Any], params: Sequence[Tensor]) -> None:
    """Parameters that stand where others stood when the optimizer was built."""
    for spec, p in zip(specs, params):
        shape = tuple(p.shape)
        if spec.start is None and shape != spec.shape:
            raise ValueError(
                f"parameter {spec.name!r} had shape {spec.shape} when the optimizer was built, and"
                f" one of shape {shape} has taken its place; {REPLACED}"
            )
    if len(specs) != len(params):
        name = specs[min(len(params), len(specs) - 1)].name if specs else ""
        raise ValueError(
            f"parameter {name!r}: its group had {len(specs)} parameters when the optimizer was"
            f" built and has {len(params)} now; {REPLACED}"
        )


def check_group_count(names: Sequence[str], built: int, now: int) -> None:
    if built != now:
        raise ValueError(
            f"parameter {names[0] if names else ''!r}: the optimizer was built with {built}"
            f" parameter groups and has {now} now; {REPLACED}"
        )


def check_one_device(params: Sequence[tuple[Any, Tensor]]) -> None:
    for spec, p in params:
        if p.device != params[0][1].device:
            raise ValueError(
                f"parameter {spec.name!r} is on {p.device}, {params[0][0].name!r} on"
                f" {params[0][1].device}: one optimizer takes parameters of one device"
            )


def check_same_everywhere(descriptions: Sequence[Sequence[Any]]) -> None:
    """The `ParameterDescription`s of every rank of a process group, which have to be the same."""
    first = descriptions[0]
    for rank, other in enumerate(descriptions):
        for place in range(max(len(first), len(other))):
            mine: Any = first[place] if place < len(first) else None
            yours: Any = other[place] if place < len(other) else None
            if mine != yours:
                here, there = (_describe(d) for d in (mine, yours))
                if here == there:  # they differ in something else
                    here, there = f"{here}, {tuple(mine)}", f"{there}, {tuple(yours)}"
                raise ValueError(
                    f"the ranks have different parameters: number {place} is {here} on rank 0,"
                    f" {there} on rank {rank}: build the same model and optimizer, in the same"
                    " order, on every rank, or give process_group= the ranks that have the same"
                )


def _describe(parameter: Any | None) -> str:
    if parameter is None:
        return "no parameter"
    return f"{parameter.name!r} {parameter.shape} under rule {parameter.use[0]!r}"


def check_parameter(
    name: str, p: Tensor, fragment: tuple[Sequence[int], int] | None = None
) -> None:
    if fragment is not None:
        shape, lo = fragment
        if p.ndim != 1 or not 0 <= lo <= lo + p.numel() <= math.prod(shape):
            raise ValueError(
                f"parameter {name!r}: a tensor of shape {tuple(p.shape)} at {lo} is no fragment of"
                f" {tuple(shape)}: give a 1-D tensor and where it begins in the row-major flattened"
                " parameter"
            )
    if p.is_meta:
        raise ValueError(
            f"parameter {name!r} is on the meta device: materialize and initialize the model first"
        )
    if not p.is_floating_point():
        raise ValueError(
            f"parameter {name!r} is {p.dtype}: only real floating-point parameters are supported"
        )
    if not local_tensor(p).is_contiguous():
        raise ValueError(
            f"parameter {name!r} is not contiguous: store it row-major, for example with"
            " .contiguous()"
        )
    try:
        local_pieces(p)
    except ValueError as error:
        raise ValueError(f"parameter {name!r}: {error}") from None


def check_same_use(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """A saved group against the one that it is loaded into: what decides the shapes and the meaning
    of its state."""
    for key in ("rule", "view", "transposed"):
        if saved.get(key, own[key]) != own[key]:
            raise ValueError(
                f"the state dict was saved with the same parameters under {key} {saved[key]!r},"
                f" here they have {own[key]!r}: load a state saved with the same {key}"
            )


def checked_options(options: dict[str, Any], rule: Rule | None = None) -> Rule:
    """Validate one parameter group; leaves plain data in it, for a state dict: names in place of
    the rule and of dtypes.

    Args:
        rule: the group's, where `options` has its name only; None: the one in `options`.
    """
    for key in DTYPE_OPTIONS:
        options[key] = _dtype_name(key, options[key])
    rule = rule or get_rule(options["rule"])
    options["rule"] = rule.name
    for beta in options["betas"]:
        if not 0 <= beta < 1:
            raise ValueError(f"betas {tuple(options['betas'])} must lie in [0, 1)")
    for key in ("lr", "weight_decay", "eps", "adam_eps"):
        if not options[key] >= 0:
            raise ValueError(f"{key} {options[key]} must not be negative")
    if not 0 <= options["momentum"] < 1:
        raise ValueError(f"momentum {options['momentum']} must lie in [0, 1)")
    _check_ratio(options, rule)
    if options["orthogonalizer"] not in SCHEMES:
        raise ValueError(
            f"unknown orthogonalizer {options['orthogonalizer']!r}; one of {', '.join(SCHEMES)}"
        )
    if options["view"] is not None and options["view"] not in VIEWS:
        raise ValueError(f"unknown view {options['view']!r}; one of {', '.join(VIEWS)}")
    if rule.sphere and options["weight_decay"]:
        raise ValueError(
            f"weight decay is a no-op on the sphere (rule {rule.name!r}): set weight_decay=0"
        )
    return rule


def _check_ratio(options: Mapping[str, Any], rule: Rule) -> None:
    """What is to be done to the trust ratio of `rule`."""
    check_clip(options["clip"])
    for key, neutral in NEUTRAL.items():
        if options[key] != neutral and rule.ratio is None:
            raise ValueError(
                f"rule {rule.name!r} has no trust ratio for {key}: leave it at {neutral}"
            )
    if not options["ratio_exponent"] > 0:
        raise ValueError(f"ratio_exponent {options['ratio_exponent']} must be positive")
    if options["calibration"] is not None:
        if not rule.calibrated:
            raise ValueError(f"rule {rule.name!r} is not calibrated: leave calibration at None")
        if not options["calibration"] > 0:
            raise ValueError(f"calibration {options['calibration']} must be positive")


def _dtype_name(key: str, dtype: Any) -> str | None:
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype
    if not isinstance(getattr(torch, str(name), None), torch.dtype):
        raise ValueError(f"{key} {name!r} is no dtype of torch: give one such as torch.bfloat16")
    return name


def check_saved(name: str, saved: Mapping[str, Any], own: Mapping[str, Tensor]) -> None:
    """A parameter's state in a state dict against the one that it is to fill."""
    if saved.keys() != own.keys():
        raise ValueError(
            f"parameter {name!r}: the state dict has {sorted(saved)}, its rule needs {sorted(own)}:"
            " load a state saved with the same rule"
        )
    for key, value in saved.items():
        shape = tuple(torch.as_tensor(value).shape)
        if shape != tuple(own[key].shape):
            raise ValueError(
                f"parameter {name!r}: saved {key} has shape {shape}, not {tuple(own[key].shape)}:"
                " load the state of the same model"
            )
