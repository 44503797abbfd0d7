"""From a resolved config to a model and its optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from archscale.config import Config
from archscale.model import Transformer
from archscale.optim import MatrixOptimizer
from archscale.optim.roles import ParameterRole, parameter_groups
from archscale.scaling.transfer import RoleSettings, transfer_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "fp32": torch.float32, "bf16": torch.bfloat16}


def build_model(config: Config, eos_id: int) -> Transformer:
    """The model of a resolved config, on the current default device."""
    transfer = transfer_of(config)
    return Transformer(
        config.model,
        DTYPES[config.training.precision],
        eos_id=eos_id if config.data.document_mask else None,
        recompute=config.training.activation_checkpoint == "block",
        logit_scale=transfer.logit_scale,
        router_logit_scale=transfer.router_logit_scale,
    )


def build_optimizer(
    config: Config, roles: list[ParameterRole], settings: Mapping[str, RoleSettings]
) -> MatrixOptimizer:
    """The optimizer of a resolved config, each role under the rule and at the rate that `settings` gives it."""
    matrix, element = config.optimizer.matrix, config.optimizer.element
    options: dict[str, dict[str, Any]] = {
        role: {
            "rule": of.rule, "lr": of.lr, "weight_decay": of.weight_decay, "betas": element.betas, "adam_eps": element.eps
        }
        for role, of in settings.items()
    }  # fmt: skip
    options["matrix"] |= {
        "momentum": matrix.momentum, "nesterov": matrix.nesterov, "clip": matrix.clip,
        "orthogonalizer": matrix.orthogonalizer, "compute_dtype": DTYPES[config.compute_dtype],
        "wire_dtype": DTYPES[config.wire_dtype], "momentum_dtype": DTYPES[matrix.momentum_dtype],
    }  # fmt: skip
    groups = parameter_groups(roles, options, config.model.head_dim if matrix.per_head else None)
    return MatrixOptimizer(groups, lr=settings["matrix"].lr)


def manifest(roles: list[ParameterRole], optimizer: MatrixOptimizer) -> list[dict[str, Any]]:
    """Parameter → role → rule, and the matrices that each is updated as."""
    rules = {id(p): group["rule"] for group in optimizer.param_groups for p in group["params"]}
    views: dict[str, list[str]] = {}
    for name, view, rows, cols in optimizer.views():
        views.setdefault(name, []).append(f"{view} {rows}x{cols}")
    return [
        {"parameter": row.name, "shape": list(row.shape), "role": row.role, "rule": rules[id(row.parameter)],
         "matrices": views.get(row.name, [])}
        for row in roles
    ]  # fmt: skip
