"""From a resolved config to a model and its optimizer."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from typing import Any

import torch

from archscale.config import Config
from archscale.model import Transformer, initialize
from archscale.optim import MatrixOptimizer
from archscale.optim.roles import ParameterRole, parameter_groups
from archscale.parallel.deepspeed_json import merge, settings
from archscale.parallel.engine import Engine
from archscale.parallel.mesh import MeshSizes
from archscale.parallel.native import NativeEngine
from archscale.parallel.zero import ZeroEngine, check_deepspeed
from archscale.plan import counting
from archscale.plan.transfer import RoleSettings, Transfer

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
}


def build_model(config: Config, eos_id: int | None, transfer: Transfer) -> Transformer:
    """The model of a resolved config, on the current default device."""
    return Transformer(
        config.model,
        DTYPES[config.precision],
        eos_id=eos_id if config.data.document_mask else None,
        recompute=config.training.activation_checkpoint == "block",
        logit_scale=transfer.logit_scale,
        router_logit_scale=transfer.router_logit_scale,
    )


def check_engine(config: Config) -> None:
    """What can be known of an engine before any process group starts.

    Raises:
        ConfigError: DeepSpeed is missing or of another version, or its JSON contradicts the config.
    """
    if config.parallel.engine == "deepspeed":
        check_deepspeed()
        _deepspeed_config(config)


def _deepspeed_config(config: Config) -> dict[str, Any]:
    parallel, training = config.parallel, config.training
    own = settings(
        stage=parallel.zero_stage,
        bf16=config.precision == "bf16",
        micro_batch=training.micro_batch,
        offload=parallel.offload_optimizer,
        parameters=counting.parameters(config.model).total,
    )
    return merge(own, parallel.deepspeed)


def build_engine(
    config: Config, eos_id: int | None, transfer: Transfer, device: torch.device, shard: int
) -> Engine:
    """The engine of a resolved config, with an initialized model.

    Args:
        shard: ranks over which the native engine shards parameters.
    """
    parallel, training = config.parallel, config.training
    dtype = DTYPES[config.precision]
    if parallel.engine == "deepspeed":
        return ZeroEngine(
            lambda: build_model(config, eos_id, transfer),
            lambda model, weights: initialize(model, config.seed, weights),
            config=_deepspeed_config(config),
            device=device,
            dtype=dtype,
            compile=training.compile,
        )
    return NativeEngine(
        lambda: build_model(config, eos_id, transfer),
        lambda model: initialize(model, config.seed),
        device=device,
        sizes=MeshSizes(parallel.replicate, shard, parallel.expert),
        reshard=parallel.reshard_after_forward,
        dtype=dtype,
        compile=training.compile,
    )


def build_optimizer(
    config: Config,
    roles: list[ParameterRole],
    settings: Mapping[str, RoleSettings],
    engine: Engine | None = None,
) -> MatrixOptimizer:
    """The optimizer of a resolved config, each role under the rule and at the rate that `settings`
    gives it.

    Args:
        engine: what updates the parameters of `roles`; None: they are updated themselves.
    """
    matrix, element = config.optimizer.matrix, config.optimizer.element
    options: dict[str, dict[str, Any]] = {
        role: {
            "rule": role_settings.rule,
            "lr": role_settings.lr,
            "weight_decay": role_settings.weight_decay,
            "betas": element.betas,
            "adam_eps": element.eps,
        }
        for role, role_settings in settings.items()
    }
    options["matrix"] |= {
        "momentum": matrix.momentum,
        "nesterov": matrix.nesterov,
        "clip": matrix.clip,
        "ratio_exponent": matrix.ratio_exponent,
        "calibration": matrix.calibration,
        "orthogonalizer": matrix.orthogonalizer,
        "compute_dtype": DTYPES[config.compute_dtype],
        "wire_dtype": DTYPES[config.wire_dtype],
        "momentum_dtype": DTYPES[matrix.momentum_dtype],
    }
    groups = parameter_groups(roles, options, counting.views_of(config.model, matrix))
    parameters, weights = (engine.parameters(), engine.weights()) if engine else ({}, {})
    for group in groups if engine else ():
        names = [name for name, _ in group["params"]]
        group["params"] = [(name, parameters[name]) for name in names]
        group["fragments"] = [
            (
                None
                if tuple(parameters[name].shape) == weights[name].shape
                else (weights[name].shape, weights[name].lo)
            )
            for name in names
        ]
    return MatrixOptimizer(groups, lr=settings["matrix"].lr)


def manifest(roles: list[ParameterRole], optimizer: MatrixOptimizer) -> list[dict[str, Any]]:
    """Parameter → role → rule, and the matrices that each is updated as."""
    rules = {
        name: group["rule"] for group in optimizer.param_groups for name in group["param_names"]
    }
    views: dict[str, list[str]] = {}
    for name, view, rows, cols in optimizer.views():
        views.setdefault(name, []).append(f"{view} {rows}x{cols}")
    return [
        {
            "parameter": row.name,
            "shape": list(row.shape),
            "role": row.role,
            "rule": rules[row.name],
            "matrices": views.get(row.name, []),
        }
        for row in roles
    ]


def cpp_compiler() -> str | None:
    """Path of the C++ compiler that torch.compile would use on a CPU."""
    return shutil.which(os.environ.get("CXX", "")) or shutil.which("g++") or shutil.which("clang++")
