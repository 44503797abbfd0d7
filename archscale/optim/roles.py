"""Each parameter gets its role from the module that owns it, never from its name or its number of
dimensions.

A module declares its own parameters in a plain attribute:

    self.parameter_roles = {"weight": {"role": "matrix", "blocks": [("q", 512), ("k", 128), ("v",
    128)]}}

Roles: `matrix` (whole-matrix rule), `embedding`, `head`, `vector`. A matrix role of more than two
dimensions says what it is: `"view": "stack"` (E, m, n) or `"flatten"` (m, …). Every parameter is
claimed exactly once; a tied weight follows the module that comes first (the embedding). A parameter
that nobody claims is an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from archscale.errors import ConfigError
from archscale.rules import Views

ROLES = ("matrix", "embedding", "head", "vector")


@dataclass(frozen=True)
class ParameterRole:
    """One row of the start-up manifest."""

    name: str
    role: str
    shape: tuple[int, ...]
    blocks: tuple[tuple[str, int], ...]
    parameter: nn.Parameter
    view: str | None = None  # "stack": (E, m, n); "flatten": (m, …) as one matrix; None: (m, n)
    transposed: bool = False  # stored as (fan_in, fan_out)


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """Also under ZeRO-3, which leaves an empty tensor in the parameter's place, and the shape
    beside it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def assign_roles(model: nn.Module) -> list[ParameterRole]:
    """Every trainable parameter of `model` with its role, in registration order.

    Raises:
        ConfigError: a parameter that no module claims, an unknown role, or a claim that matches no
            parameter.
    """
    claimed: dict[int, ParameterRole] = {}
    for prefix, module in model.named_modules():
        roles = getattr(module, "parameter_roles", {})
        own = dict(module.named_parameters(recurse=False))
        for key in roles.keys() - own.keys():
            raise ConfigError(
                f"role declared for a parameter {key!r} that does not exist",
                prefix,
                "remove it from parameter_roles",
            )
        for key, parameter in own.items():
            name = clean_name(f"{prefix}.{key}" if prefix else key)
            if id(parameter) in claimed or not parameter.requires_grad:
                continue
            if key not in roles:
                raise ConfigError(
                    f"{type(module).__name__} gives no role to its parameter",
                    name,
                    f"add parameter_roles = {{{key!r}: {{'role': ...}}}} to the module",
                )
            role, blocks = roles[key]["role"], tuple(roles[key].get("blocks", ()))
            if role not in ROLES:
                raise ConfigError(f"unknown role {role!r}", name, f"use one of {', '.join(ROLES)}")
            view = roles[key].get("view")
            claimed[id(parameter)] = ParameterRole(
                name, role, whole_shape(parameter), blocks, parameter, view
            )
    return list(claimed.values())


def clean_name(name: str) -> str:
    """The parameter's name without what DDP, torch.compile and activation checkpointing add to
    it."""
    return re.sub(r"\b(_orig_mod|_checkpoint_wrapped_module)\.", "", name).removeprefix("module.")


def parameter_groups(
    roles: list[ParameterRole],
    options: Mapping[str, dict[str, Any]],
    views: Views = Views(),  # noqa: B008  frozen
) -> list[dict[str, Any]]:
    """Parameter groups for `MatrixOptimizer`, one per role, view and orientation that occurs, which
    it carries as keys.

    Args:
        options: by role, what its group holds (`rule`, `lr`, …).
        views: which matrices the blocks of a parameter are.
    """
    kinds: dict[tuple[str, str | None, bool], list[ParameterRole]] = {}
    for row in sorted(roles, key=lambda row: ROLES.index(row.role)):
        kinds.setdefault((row.role, row.view, row.transposed), []).append(row)
    return [
        {
            **options[role],
            "role": role,
            "params": [(row.name, row.parameter) for row in rows],
            "blocks": [views.matrices(row.blocks) or None for row in rows],
            "view": view,
            "transposed": transposed,
        }
        for (role, view, transposed), rows in kinds.items()
    ]
