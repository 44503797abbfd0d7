"""The plan before the bill: what a config will train, cost and need, without starting anything.

`make_plan` gathers figures and every problem it finds. What it lists as a problem, `archscale
train` refuses. Writing for people is in `archscale.plan.text`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from archscale.config import Config, ModelConfig
from archscale.data.training_data import training_sources
from archscale.errors import ConfigError
from archscale.plan import counting
from archscale.plan import transfer as transfers
from archscale.plan.devices import Device
from archscale.plan.memory import Execution, Memory, checkpoint_bytes, communication, memory
from archscale.plan.passes import SourceTokens, data_figures, many_passes, much_padding
from archscale.plan.text import size
from archscale.plan.transfer import Transfer
from archscale.rules import RULES

PADDING = 128  # a multiple that matrix units like for the vocabulary
INITIALIZATION = {  # by `model.init`
    "fan_in": "U(±1/√fan_in)",
    "fan_in_tied": "U(±1/√fan_in), of attention and the ends of branches / √(2 depth)",
    "normal": "N(0, 0.02), of the ends of branches / √(2 depth)",
}


@dataclass
class Plan:
    """What a config amounts to on a number of devices.

    Attributes:
        config: resolved as far as possible.
        world_size: devices, one process each.
        device: what it will run on, where that is known.
        shard: ranks over which parameters are sharded; None where a problem keeps it from being
            known, as with all that follows.
        transfer: rule, rate and decay of each role.
        figures: for people and JSON, by section.
        problems: what training refuses.
        advice: worth a change, refused by nobody.
    """

    config: Config
    world_size: int = 1
    device: Device | None = None
    shard: int | None = None
    transfer: Transfer | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    problems: list[ConfigError] = field(default_factory=list)
    advice: list[ConfigError] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "name": self.config.name,
            **self.figures,
            "problems": [problem.as_dict() for problem in self.problems],
            "advice": [advice.as_dict() for advice in self.advice],
        }


def make_plan(
    config: Config,
    *,
    world_size: int = 1,
    device: Device | None = None,
    mfu: float = 0.4,
    compare: Sequence[Device] = (),
    sources: Sequence[SourceTokens] = (),
) -> Plan:
    """The plan of `config` on `world_size` devices.

    Args:
        device: what it will run on; a plan that does not fit into its memory is a problem. None:
            `training.precision: auto` is bf16, as on every device of the table.
        mfu: share of the peak that training is assumed to reach.
        compare: further devices whose time and fit are worth knowing.
        sources: of the training data; empty where nothing is known of them.
    """
    chosen = config.training.precision == "auto"
    config = config.with_precision("bf16" if device is None else device.precision)
    plan = Plan(config, world_size, device)
    untransferable = list(transfers.problems(config.parameterization, config.optimizer))
    plan.problems += [*config.unavailable(), *untransferable]
    _attempt(plan, lambda: training_sources(config.data))
    plan.shard = shard = _attempt(plan, lambda: config.shard_size(world_size))
    accumulation = _attempt(plan, lambda: config.accumulation(world_size))
    if config.model.vocab_size is None:
        plan.problems.append(
            ConfigError(
                "the vocabulary is not known, so nothing can be counted",
                "model.vocab_size",
                "prepare data.train, or give its size",
            )
        )
        return plan
    plan.advice += _advice(config)
    model = config.model
    plan.figures["model"] = {
        **{
            key: getattr(model, key)
            for key in ("depth", "width", "heads", "kv_heads", "head_dim", "mlp", "mlp_hidden")
        },
        "context": model.context,
        "vocab_size": model.vocab_size,
        "tied_embeddings": model.tied_embeddings,
        "moe": model.moe and model.moe.model_dump(),
        "parameters": asdict(counting.parameters(model)),
        "published_parameters": counting.published_parameters(model),
    }
    resolved = _attempt(plan, lambda: transfers.resolve(config))
    if resolved is None:
        return plan
    plan.config = config = resolved
    plan.transfer = transfer = None if untransferable else transfers.transfer_of(config)
    plan.figures["parameterization"] = _parameterization(config, transfer)
    plan.figures["training"] = _training(config, world_size, accumulation)
    plan.figures["training"]["precision_chosen"] = chosen
    plan.figures["data"] = data = data_figures(
        sources, plan.figures["training"]["trained_tokens"], model.context
    )
    plan.advice += filter(None, (many_passes(config, data), much_padding(data)))
    if accumulation is None and config.model.moe and config.model.moe.counts_first:
        return plan  # what the counting pass costs follows from the accumulation
    plan.figures["flops"] = flops = _flops(config, accumulation or 1)
    if transfer is None or shard is None or accumulation is None:
        return plan
    need = _memory(plan, transfer, shard, accumulation, bool(device and device.name == "cpu"))
    plan.figures["devices"] = [
        _on_device(
            d,
            flops,
            config.steps,
            sum(plan.figures["communication"].values()),
            world_size,
            mfu,
            need.peak,
        )
        for d in ([device] if device else []) + [*compare]
    ]
    if device and device.room is not None and need.peak > device.room:
        problem = _does_not_fit(config, device, need)
        # A compiled model keeps less for its backward pass than is planned; how much less is not
        # known beforehand.
        certain = not config.training.compile or need.peak - need.terms["activations"] > device.room
        (plan.problems if certain else plan.advice).append(problem)
    return plan


def _advice(config: Config) -> Iterator[ConfigError]:
    model, kind = config.model, config.parameterization.kind
    vocab = counting.vocabulary(model)
    if config.precision == "bf16" and vocab % PADDING:
        yield ConfigError(
            f"a vocabulary of {vocab} is slow on matrix units",
            "model.vocab_size",
            f"set it to {-(-vocab // PADDING) * PADDING}; the rest is padding",
        )
    if model.moe and model.moe.routed_per_token == 1:
        yield ConfigError(
            "the gate of one routed expert a token is always 1: the router learns from the balance"
            " loss alone",
            "model.moe.top_k",
            f"set it to at least {model.moe.top_k + 1}",
        )
    if kind != "standard" and not model.depth_mup:
        yield ConfigError(
            f"without Depth-μP {kind} does not transfer over depth",
            "model.depth_mup",
            "set it to true, unless you study it",
        )
    if kind == "hyperp" and model.moe and not model.moe.sqrt_gate:
        yield ConfigError(
            "without SqrtGate hyperp does not transfer over the number of experts",
            "model.moe.sqrt_gate",
            "set it to true, unless you study it",
        )
    if kind == "hyperp" and config.schedule.warmup_tokens:
        yield ConfigError(
            "hyperp's rules were found without warm-up",
            "schedule.warmup_tokens",
            "set it to 0, unless you study it",
        )


def _attempt(plan: Plan, compute: Callable[[], Any]) -> Any:
    try:
        return compute()
    except ConfigError as problem:
        plan.problems.append(problem)
        return None


def _parameterization(config: Config, transfer: Transfer | None) -> dict[str, Any]:
    model, kind = config.model, config.parameterization.kind
    source = config.training.init_from
    figures: dict[str, Any] = {
        "kind": kind,
        "base": config.parameterization.base.model_dump(),
        "residual_multiplier": 1 / math.sqrt(2 * model.depth) if model.depth_mup else 1.0,
    }
    if transfer:
        figures |= {
            "logit_scale": transfer.logit_scale,
            "router_logit_scale": transfer.router_logit_scale,
        }
        figures["roles"] = {
            role: {
                **asdict(settings),
                "initialization": (
                    f"the weights of {source}" if source else _initialization(model, role)
                ),
            }
            for role, settings in transfer.roles.items()
        }
    return figures


def _initialization(model: ModelConfig, role: str) -> str:
    if role == "vector":
        return "1"
    if role == "matrix":
        router = model.moe is not None and model.moe.router_init == "normal"
        return INITIALIZATION[model.init] + (", the router at N(0, 0.02)" if router else "")
    small = role == "embedding" and not model.tied_embeddings and model.init == "fan_in"
    return "N(0, 1e-4)" if small else "N(0, 0.02)"


def _training(config: Config, world_size: int, accumulation: int | None) -> dict[str, Any]:
    """`accumulation` is None where the devices cannot divide the batch, which is a problem of the
    plan."""
    batches, context = config.batches, config.model.context
    steps, parameters = config.steps, counting.parameters(config.model)
    return {
        "tokens": config.tokens,
        "trained_tokens": batches.at(steps)[0] * context,
        "tokens_per_parameter": config.tokens / parameters.total,
        "tokens_per_active_parameter": config.tokens / parameters.active,
        "tokens_per_published_parameter": (
            config.tokens / counting.published_parameters(config.model)
        ),
        "batch_tokens": config.batch_tokens,
        "batch_sizes": batches.sizes,
        "steps": steps,
        "world_size": world_size,
        "world_sizes": config.world_sizes(),
        "micro_batch": config.training.micro_batch,
        "accumulation": accumulation,
        "precision": config.precision,
        "schedule": config.schedule.model_dump(),
    }


def _flops(config: Config, accumulation: int) -> dict[str, Any]:
    """`total` is useful work, as MFU counts it. `executed` is all that runs: also what is computed
    a second time, the counting pass of a load balance (a step's first micro-batch needs none), and
    the optimizer's orthogonalization."""
    model, recompute = config.model, config.training.activation_checkpoint == "block"
    useful = counting.training_flops(model)
    again = counting.training_flops(model, recompute=recompute) - useful
    counted = 0.0
    if model.moe and model.moe.counts_first and accumulation > 1:
        counted = (
            (counting.training_flops(model, counting_pass=True) - useful)
            * (accumulation - 1)
            / accumulation
        )
    elementwise = RULES[config.optimizer.matrix.rule].elementwise
    optimizer = (
        0
        if elementwise
        else counting.optimizer_flops(
            model, views=counting.views_of(model, config.optimizer.matrix)
        )
    )
    return {
        "forward_per_token": counting.forward_flops(model),
        "training_per_token": useful,
        "published_per_token": counting.published_flops_per_token(model),
        "recomputation_per_token": again,
        "counting_pass_per_token": counted,
        "optimizer_per_step": optimizer,
        "optimizer_share": optimizer / (useful * config.batch_tokens),
        "total": useful * config.tokens,
        "executed": (useful + again + counted) * config.tokens + optimizer * config.steps,
    }


def _memory(plan: Plan, transfer: Transfer, shard: int, accumulation: int, on_host: bool) -> Memory:
    """Fill in the figures of memory, communication and disk; returns the memory.

    Args:
        on_host: the device has the host's memory, so that nothing is gained by offloading to it.
    """
    config, model = plan.config, plan.config.model
    matrix, parallel = config.optimizer.matrix, config.parallel
    state = {
        role: 4 * RULES[settings.rule].moment_buffers for role, settings in transfer.roles.items()
    }
    if matrix.momentum_dtype == "bfloat16":  # of Adam's two buffers the second stays float32
        state["matrix"] -= 2
    step = Execution(
        precision=config.precision,
        micro_batch=config.training.micro_batch,
        accumulation=accumulation,
        engine=parallel.engine,
        replicate=parallel.replicate,
        shard=shard,
        expert=parallel.expert,
        zero_stage=parallel.zero_stage,
        reshard_after_forward=parallel.reshard_after_forward,
        recompute=config.training.activation_checkpoint == "block",
        document_mask=config.data.document_mask,
        offload=parallel.offload_optimizer and not on_host,
        state_bytes=state,
        orthogonal=() if RULES[matrix.rule].elementwise else ("matrix",),
        views=counting.views_of(model, matrix),
        compute_bytes=4 if config.compute_dtype == "float32" else 2,
        wire_bytes=4 if config.wire_dtype == "float32" else 2,
        ema=config.training.ema is not None,
        compiled=config.training.compile,
        on_cpu=on_host,
    )
    need = memory(model, step)
    checkpoint = config.checkpoint
    held = memory(model, replace(step, offload=False)).terms
    saved = sum(held[name] for name in ("parameters", "weight_average", "optimizer_state"))
    copy = saved * checkpoint.async_
    if on_host:
        terms = {**need.terms, "checkpoint_copy": copy}
        need = Memory(terms, {phase: size + copy for phase, size in need.phases.items()})
    kept = kept_checkpoints(checkpoint.every, checkpoint.keep, checkpoint.keep_every, config.steps)
    each = checkpoint_bytes(model, state, step.ema)
    plan.figures["memory"] = {"peak": need.peak, "phases": need.phases, "terms": need.terms}
    plan.figures["communication"] = communication(model, step)
    plan.figures["checkpoint"] = {
        "bytes": each,
        "kept": kept,
        "disk": each * (kept + 1),  # a new one is whole before the oldest goes
        "host_copy": copy,
    }
    return need


def kept_checkpoints(every: int, keep: int, keep_every: int | None, steps: int) -> int:
    """How many are there at the end of a run of `steps` steps, by the keys of `checkpoint`.

    Not counted one by one: a run of which only the plan is wanted may have billions of steps.
    """
    newest = min(keep, -(-steps // every))
    if keep_every is None:
        return newest
    # The last step is saved too, so it may be no multiple; all those before are.
    oldest = steps if newest == 1 else (steps - 1) // every * every - (newest - 2) * every
    return newest + (oldest - 1) // math.lcm(every, keep_every)


def _on_device(
    device: Device,
    flops: dict[str, Any],
    steps: int,
    sent: int,
    world_size: int,
    mfu: float,
    peak: int,
) -> dict[str, Any]:
    """Time of all that runs at `mfu` of the peak, and the bandwidth that keeps communication from
    adding to it."""
    seconds = None if device.peak is None else flops["executed"] / (device.peak * mfu * world_size)
    return {
        "device": device.name,
        "count": world_size,
        "peak_flops": device.peak,
        "memory": device.memory,
        "fits": None if device.room is None else peak <= device.room,
        "mfu": mfu,
        "seconds": seconds,
        "step_seconds": seconds and seconds / steps,
        "bandwidth": seconds and sent * steps / seconds,
        "source": device.source,
    }


def _does_not_fit(config: Config, device: Device, need: Memory) -> ConfigError:
    largest = sorted(need.terms, key=lambda key: -need.terms[key])[:2]
    if config.training.micro_batch > 1:
        remedy = f"set training.micro_batch: {config.training.micro_batch // 2}"
    else:
        remedy = "shard over more devices"
    if config.training.activation_checkpoint == "none":
        remedy += ", or training.activation_checkpoint: block"
    assert device.room is not None
    eager = " (eager; a compiled model keeps less)" if config.training.compile else ""
    return ConfigError(
        f"{size(need.peak)} a device{eager} do not fit into the {size(device.room)} that"
        f" {device.name} has for them; the most goes to "
        + " and ".join(f"{key.replace('_', ' ')} ({size(need.terms[key])})" for key in largest),
        "training.micro_batch",
        remedy,
    )
