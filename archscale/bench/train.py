"""`archscale bench train`: forward and backward pass of a config's model; with experts, beside the
dense model of equal active parameters.

Both are trained as `archscale train` would train them, on one process and random tokens. Arms
alternate within a round, and their order is shuffled. The optimizer's time depends on the matrices
and not on the batch, so it stands apart: with the batch from which on it takes less than 2 % of a
step. FLOPs are structural with the causal half of attention; MFU is their rate over the dense bf16
peak of the device's data sheet, and beside it stands the share of the matmul rate in the same
dtype, which is measured between the arms. Peak memory is that of one whole step that telemetry
reads, on an accelerator by its allocator and on the CPU by the profiler's record of live bytes.

With `telemetry`, whole training steps are timed with and without a look into them (`telemetry`
section of the config, all layers): what a reading costs more, divided by the steps between
readings, is telemetry's share of a step.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from archscale.bench.timing import machine, matmul_rate, paired_ratio, spread, synchronize
from archscale.bench.workload import Workload
from archscale.config import Config
from archscale.plan.counting import parameters, training_flops
from archscale.plan.devices import this_device
from archscale.train.build import DTYPES

OPTIMIZER_SHARE = 0.02  # of a step
MATMUL_ROWS = 1024  # of the products that a CPU's rate is taken from


@dataclass
class Arm:
    """One model, and its times in seconds."""

    label: str
    work: Workload
    seconds: list[float] = field(default_factory=list)  # forward and backward
    updates: list[float] = field(default_factory=list)


@dataclass
class ModelTimes:
    """What was measured of one arm."""

    label: str
    parameters: int
    active: int
    seconds: float  # forward and backward of a micro-batch, median
    spread: float
    tokens_per_second: float  # of forward and backward
    share: float  # of the matmul rate
    mfu: float | None  # share of the data sheet's peak; None where the device has none
    # Tokens/s to the dense model's: median within a round, 95 % interval.
    ratio: tuple[float, float, float] | None
    optimizer: float  # seconds, median
    batch: int  # tokens from which on the optimizer takes less than OPTIMIZER_SHARE
    peak: int  # bytes
    planned: int


def bench_train(config: Config, *, rounds: int = 7, telemetry: bool = False) -> dict[str, Any]:
    """Measure; see the module. Returns {rows, matmul (FLOP/s), dtype, micro_batch, context,
    machine, telemetry}, the last by model: {plain, read (median seconds of a step), ratio (within a
    round, 95 %), share (of a step at `telemetry.every`)}.

    Raises:
        ConfigError: what `archscale plan` would say of the model or the optimizer.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    labels = ("dense", "experts") if config.model.moe else ("dense",)
    arms = [_build(label, config, device) for label in labels]
    peaks = [_peak_bytes(arm, device) for arm in arms]  # warms up too
    resolved = arms[0].work.config
    model, dtype = resolved.model, DTYPES[resolved.precision]
    rates = []
    order = list(arms)
    for round_ in range(rounds):
        random.Random(round_).shuffle(order)
        for arm in order:
            arm.seconds.append(_time(arm.work.passes, device))
            arm.updates.append(_time(arm.work.update, device))
        rates.append(matmul_rate(MATMUL_ROWS, dtype, device))
    rate, tokens = statistics.median(rates), config.training.micro_batch * model.context
    peak_rate = this_device().peak
    rows = []
    for arm, peak in zip(arms, peaks):
        seconds, update = statistics.median(arm.seconds), statistics.median(arm.updates)
        count = parameters(arm.work.config.model)
        achieved = training_flops(arm.work.config.model) * tokens / seconds
        rows.append(
            ModelTimes(
                arm.label,
                count.total,
                count.active,
                seconds,
                spread(arm.seconds),
                tokens / seconds,
                achieved / rate,
                achieved / peak_rate if peak_rate else None,
                paired_ratio(arms[0].seconds, arm.seconds) if arm is not arms[0] else None,
                update,
                round(update * (1 / OPTIMIZER_SHARE - 1) * tokens / seconds),
                peak,
                arm.work.planned,
            )
        )
    looks = {arm.label: _telemetry(arm, rounds, device) for arm in arms} if telemetry else {}
    return {
        "telemetry": looks,
        "rows": rows,
        "matmul": rate,
        "dtype": str(dtype).removeprefix("torch."),
        "machine": machine(device),
        "micro_batch": config.training.micro_batch,
        "context": model.context,
    }


def _build(label: str, config: Config, device: torch.device) -> Arm:
    values = config.resolved()
    values["model"]["moe"] = values["model"]["moe"] if label == "experts" else None
    values["training"]["batch_tokens"] = config.training.micro_batch * config.model.context
    return Arm(label, Workload(values, device))


def _telemetry(arm: Arm, rounds: int, device: torch.device) -> dict[str, Any]:
    times: dict[bool, list[float]] = {False: [], True: []}
    for round_ in range(-1, rounds):
        for looking in random.Random(round_).sample((False, True), 2):
            seconds = _time(lambda: arm.work.step(looking), device)  # noqa: B023
            if round_ >= 0:
                times[looking].append(seconds)
    ratio = paired_ratio(times[True], times[False])
    plain, read = (statistics.median(times[key]) for key in (False, True))
    return {
        "plain": plain,
        "read": read,
        "ratio": ratio,
        "share": (ratio[0] - 1) / arm.work.config.telemetry.every,
    }


def _time(run: Callable[[], Any], device: torch.device) -> float:
    synchronize(device)
    began = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - began


def _peak_bytes(arm: Arm, device: torch.device) -> int:
    """Live bytes at the fullest moment of a step that is read, parameters and optimizer state
    included; other arms' left out."""
    arm.work.step(True)
    held = arm.work.resident()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        arm.work.step(True)
        torch.cuda.synchronize()
        return held + torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        arm.work.step(True)
    assert record.profiler is not None
    changes = [
        (e.start_ns(), e.nbytes())
        for e in record.profiler.kineto_results.events()
        if e.name() == "[memory]"
    ]
    live = peak = 0
    for _, size in sorted(changes):
        live += size
        peak = max(peak, live)
    return held + peak


def report(config: Config, *, rounds: int, telemetry: bool, as_json: bool) -> str:
    """All of `archscale bench train`, as a Markdown table or as JSON."""
    measured = bench_train(config, rounds=rounds, telemetry=telemetry)
    if as_json:
        return json.dumps({**measured, "rows": [asdict(row) for row in measured["rows"]]}, indent=1)
    lines = [
        (
            f"\n{config.name}: {measured['micro_batch']} × {measured['context']} tokens,"
            f" {measured['dtype']}, on {measured['machine']}; matmul"
            f" {measured['matmul'] / 1e9:,.0f} GFLOP/s"
        ),
        "",
        (
            "| model | parameters | active | forward and backward, ms | spread | tokens/s | of"
            " matmul rate | MFU | to dense, 95 % | optimizer, ms | under"
            f" {OPTIMIZER_SHARE:.0%} of a step from | peak memory, MB | planned |"
        ),
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in measured["rows"]:
        ratio = "{:.3f} [{:.3f}, {:.3f}]".format(*row.ratio) if row.ratio else "–"
        lines.append(
            f"| {row.label} | {row.parameters:,} | {row.active:,} | {row.seconds * 1e3:,.1f} |"
            f" {row.spread:.0%} | {row.tokens_per_second:,.0f} | {row.share:.0%} |"
            f" {'–' if row.mfu is None else format(row.mfu, '.0%')} | {ratio} |"
            f" {row.optimizer * 1e3:,.1f} | {row.batch:,} tokens | {row.peak / 1e6:,.1f} |"
            f" {row.planned / 1e6:,.1f} |"
        )
    for label, look in measured["telemetry"].items():
        ratio = "{:.3f} [{:.3f}, {:.3f}]".format(*look["ratio"])
        lines.append(
            f"telemetry, {label}: a step that is read takes {look['read'] * 1e3:,.1f} ms against"
            f" {look['plain'] * 1e3:,.1f} ms ({ratio}); every {config.telemetry.every} steps that"
            f" is {look['share']:.1%} of training"
        )
    return "\n".join(lines)
