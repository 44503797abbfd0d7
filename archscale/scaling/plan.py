"""The plan before the bill: what a config will train, cost and need, without starting anything.

`make_plan` gathers figures and every problem it finds. What it lists as a problem, `archscale train` refuses. Writing for
people is in `archscale.scaling.plan_text`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from archscale.config import Config
from archscale.errors import ConfigError
from archscale.model import counting
from archscale.model.memory import Memory, checkpoint_bytes, communication, memory
from archscale.scaling import transfer as rules
from archscale.scaling.devices import Device
from archscale.scaling.plan_text import size

# Float32 buffers per element that a rule keeps; a test compares them with the optimizer's.
STATE_BUFFERS = {"adamw": 2, "adamh": 2, "lamb": 2}
ELEMENTWISE = ("adamw", "adamh", "lamb", "lion", "sgd")  # rules that orthogonalize nothing
PADDING = 128  # a multiple that matrix units like for the vocabulary
INITIALIZATION = {
    "matrix": "U(±1/√fan_in)", "embedding": "N(0, 1e-4)", "head": "N(0, 0.02)", "vector": "1", "tied": "N(0, 0.02)"
}  # fmt: skip


@dataclass
class Plan:
    """What a config amounts to. A section of `figures` is missing where a problem keeps it from being known."""

    config: Config  # resolved as far as possible
    figures: dict[str, Any] = field(default_factory=dict)
    problems: list[ConfigError] = field(default_factory=list)
    advice: list[ConfigError] = field(default_factory=list)  # worth a change, refused by nobody

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "name": self.config.name,
            **self.figures,
            "problems": [{"what": p.what, "where": p.where, "remedy": p.remedy} for p in self.problems],
            "advice": [{"what": p.what, "where": p.where, "remedy": p.remedy} for p in self.advice],
        }


def make_plan(config: Config, *, world_size: int = 1, device: Device | None = None, mfu: float = 0.4,
              compare: Sequence[Device] = ()) -> Plan:  # fmt: skip
    """The plan of `config` on `world_size` devices.

    Args:
        device: what it will run on; a plan that does not fit into its memory is a problem.
        mfu: share of the peak that training is assumed to reach.
        compare: further devices whose time and fit are worth knowing.
    """
    plan = Plan(config)
    plan.problems += config.unavailable()
    plan.problems += rules.problems(config.model, config.parameterization, config.optimizer)
    consistent = _attempt(plan, lambda: (config.shard_size(world_size), config.accumulation(world_size)))
    resolved = _attempt(plan, lambda: rules.resolve(config))
    if resolved is None or config.model.vocab_size is None:
        if resolved is not None:
            plan.problems.append(
                ConfigError(
                    "the vocabulary is not known, so nothing can be counted", "model.vocab_size",
                    "prepare data.train, or give its size",
                )
            )  # fmt: skip
        return plan
    plan.config = config = resolved
    model, vocab = config.model, counting.vocabulary(config.model)
    if config.training.precision == "bf16" and vocab % PADDING:
        plan.advice.append(
            ConfigError(
                f"a vocabulary of {vocab} is slow on matrix units", "model.vocab_size",
                f"set it to {-(-vocab // PADDING) * PADDING}; the rest is padding",
            )
        )  # fmt: skip
    plan.figures["model"] = {
        **{key: getattr(model, key) for key in ("depth", "width", "heads", "kv_heads", "head_dim", "mlp", "mlp_hidden")},
        "context": model.context, "vocab_size": vocab, "tied_embeddings": model.tied_embeddings,
        "moe": model.moe and model.moe.model_dump(), "parameters": asdict(counting.parameters(model)),
        "published_parameters": counting.published_parameters(model),
    }  # fmt: skip
    known = not any(rules.problems(model, config.parameterization, config.optimizer))
    transfer = rules.transfer_of(config) if known else None
    plan.figures["parameterization"] = _parameterization(config, transfer)
    plan.figures["training"] = _training(config, world_size)
    plan.figures["flops"] = flops = _flops(config)
    if transfer is None or consistent is None:
        return plan
    need = _memory(plan, world_size, transfer)
    plan.figures["devices"] = [
        _on_device(d, flops["total"], world_size, mfu, need.peak) for d in ([device] if device else []) + [*compare]
    ]
    if device and device.memory and need.peak > device.memory:
        plan.problems.append(_does_not_fit(config, device, need.peak, need.terms))
    return plan


def _attempt(plan: Plan, compute: Callable[[], Any]) -> Any:
    try:
        return compute()
    except ConfigError as problem:
        plan.problems.append(problem)
        return None


def _parameterization(config: Config, transfer: rules.Transfer | None) -> dict[str, Any]:
    model, kind = config.model, config.parameterization.kind
    found: dict[str, Any] = {
        "kind": kind,
        "base": config.parameterization.base.model_dump(),
        "residual_multiplier": 1 / math.sqrt(2 * model.depth) if model.depth_mup else 1.0,
    }
    if transfer:
        found |= {"logit_scale": transfer.logit_scale, "router_logit_scale": transfer.router_logit_scale}
        found["roles"] = {
            role: {
                **asdict(settings),
                "initialization": INITIALIZATION["tied" if role == "embedding" and model.tied_embeddings else role],
            }
            for role, settings in transfer.roles.items()
        }
    return found


def _training(config: Config, world_size: int) -> dict[str, Any]:
    batches, context = config.batches, config.model.context
    steps = config.steps
    return {
        "tokens": config.tokens,
        "trained_tokens": batches.at(steps)[0] * context,
        "tokens_per_parameter": config.tokens / counting.published_parameters(config.model),
        "batch_tokens": config.batch_tokens,
        "batch_sizes": batches.sizes,
        "steps": steps,
        "world_size": world_size,
        "micro_batch": config.training.micro_batch,
        "accumulation": config.batch_size / (config.training.micro_batch * world_size),
        "schedule": config.schedule.model_dump(),
    }


def _flops(config: Config) -> dict[str, Any]:
    model = config.model
    per_token = counting.training_flops(model)
    elementwise = config.optimizer.matrix.rule in ELEMENTWISE
    optimizer = 0 if elementwise else counting.optimizer_flops(
        model, per_head=model.head_dim if config.optimizer.matrix.per_head else None
    )  # fmt: skip
    return {
        "forward_per_token": counting.forward_flops(model),
        "training_per_token": per_token,
        "published_per_token": counting.published_flops_per_token(model),
        "total": per_token * config.tokens,
        "optimizer_per_step": optimizer,
        "optimizer_share": optimizer / (per_token * config.batch_tokens),
    }


def _memory(plan: Plan, world_size: int, transfer: rules.Transfer) -> Memory:
    """Memory, communication and disk; returns the first."""
    config, model = plan.config, plan.config.model
    matrix, parallel = config.optimizer.matrix, config.parallel
    state = {role: 4 * STATE_BUFFERS.get(of.rule, 1) for role, of in transfer.roles.items()}
    state["matrix"] -= 2 * (matrix.momentum_dtype == "bfloat16")  # of Adam's two buffers only the first one
    step: dict[str, Any] = {
        "precision": config.training.precision, "micro_batch": config.training.micro_batch,
        "accumulation": config.accumulation(world_size), "engine": parallel.engine, "replicate": parallel.replicate,
        "shard": config.shard_size(world_size), "expert": parallel.expert, "zero_stage": parallel.zero_stage,
        "reshard_after_forward": parallel.reshard_after_forward, "orthogonal": () if matrix.rule in ELEMENTWISE else ("matrix",),
        "recompute": config.training.activation_checkpoint == "block",
        "wire_bytes": 4 if config.wire_dtype == "float32" else 2,
    }  # fmt: skip
    need = memory(
        model, **step, document_mask=config.data.document_mask, state_bytes=state,
        compute_bytes=4 if config.compute_dtype == "float32" else 2,
    )  # fmt: skip
    each = checkpoint_bytes(model, state)
    plan.figures["memory"] = {"peak": need.peak, "phases": need.phases, "terms": need.terms}
    plan.figures["communication"] = communication(model, **step)
    plan.figures["checkpoint"] = {
        "bytes": each,
        "kept": config.checkpoint.keep,
        "disk": each * (config.checkpoint.keep + 1),
    }
    return need


def _on_device(device: Device, total: float, world_size: int, mfu: float, peak: int) -> dict[str, Any]:
    return {
        "device": device.name,
        "count": world_size,
        "peak_flops": device.peak,
        "memory": device.memory,
        "fits": None if device.memory is None else peak <= device.memory,
        "mfu": mfu,
        "seconds": None if device.peak is None else total / (device.peak * mfu * world_size),
        "source": device.source,
    }


def _does_not_fit(config: Config, device: Device, peak: int, terms: dict[str, int]) -> ConfigError:
    largest = sorted(terms, key=lambda key: -terms[key])[:2]
    if config.training.micro_batch > 1:
        remedy = f"set training.micro_batch: {config.training.micro_batch // 2}"
    else:
        remedy = "shard over more devices"
    if config.training.activation_checkpoint == "none":
        remedy += ", or training.activation_checkpoint: block"
    assert device.memory is not None
    return ConfigError(
        f"{size(peak)} a device do not fit into the {size(device.memory)} of {device.name}; the most goes to "
        + " and ".join(f"{key.replace('_', ' ')} ({size(terms[key])})" for key in largest),
        "training.micro_batch", remedy,
    )  # fmt: skip
