"""What `MatrixOptimizer` refuses: each ValueError names the parameter or option and the remedy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from archscale.distributed import local_interval, local_tensor
from archscale.optim.orthogonalize import SCHEMES
from archscale.optim.rules import Rule, check_clip, get_rule


def parameter_names(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    names: list[str] = []
    for group in groups:
        own = group.get("param_names") or [f"parameter {len(names) + i}" for i in range(len(group["params"]))]
        names += own
    return names


def check_distinct(names: Sequence[str], params: Sequence[Tensor]) -> None:
    seen: dict[int, str] = {}
    for name, p in zip(names, params):
        if id(p) in seen:
            raise ValueError(f"parameter {seen[id(p)]!r} is given twice: list every parameter once")
        seen[id(p)] = name


def check_parameter(name: str, p: Tensor, fragment: tuple[Sequence[int], int] | None = None) -> None:
    if fragment is not None:
        shape, lo = fragment
        if p.ndim != 1 or not 0 <= lo <= lo + p.numel() <= math.prod(shape):
            raise ValueError(
                f"parameter {name!r}: a tensor of shape {tuple(p.shape)} at {lo} is no fragment of {tuple(shape)}: give a "
                "1-D tensor and where it begins in the row-major flattened parameter"
            )
    if p.is_meta:
        raise ValueError(f"parameter {name!r} is on the meta device: materialize and initialize the model first")
    if not p.is_floating_point():
        raise ValueError(f"parameter {name!r} is {p.dtype}: only real floating-point parameters are supported")
    if not local_tensor(p).is_contiguous():
        raise ValueError(f"parameter {name!r} is not contiguous: store it row-major, for example with .contiguous()")
    try:
        local_interval(p)
    except ValueError as error:
        raise ValueError(f"parameter {name!r}: {error}") from None


def check_options(options: dict[str, Any]) -> Rule:
    """Validate one parameter group; leaves the rule's name in it, so that a state dict holds plain data."""
    rule = get_rule(options["rule"])
    options["rule"] = rule.name
    for key in ("lr", "weight_decay", "eps"):
        if not options[key] >= 0:
            raise ValueError(f"{key} {options[key]} must not be negative")
    if not 0 <= options["momentum"] < 1:
        raise ValueError(f"momentum {options['momentum']} must lie in [0, 1)")
    check_clip(options["clip"])
    if options["clip"] is not None and rule.ratio is None:
        raise ValueError(f"rule {rule.name!r} has no trust ratio to clip: leave clip at None")
    if options["orthogonalizer"] not in SCHEMES:
        raise ValueError(f"unknown orthogonalizer {options['orthogonalizer']!r}; one of {', '.join(SCHEMES)}")
    if rule.sphere and options["weight_decay"]:
        raise ValueError(f"weight decay is a no-op on the sphere (rule {rule.name!r}): set weight_decay=0")
    return rule


def load_state(name: str, rule: str, saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    if saved.keys() != own.keys():
        raise ValueError(
            f"parameter {name!r}: the state dict has {sorted(saved)}, rule {rule!r} needs {sorted(own)}: "
            "load a state saved with the same rule"
        )
    for key, value in saved.items():
        if value.shape != own[key].shape:
            raise ValueError(
                f"parameter {name!r}: saved {key} has shape {tuple(value.shape)}, not {tuple(own[key].shape)}: "
                "load the state of the same model"
            )
        own[key].copy_(value)
