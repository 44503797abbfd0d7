"""A run in numbers: the head of the page, and the plan beside what was measured."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from archscale.plan.text import duration, size
from archscale.report.read import RunRecord, is_number, lookup
from archscale.report.scale import compact, number

SHAPE = (
    ("depth", "depth"),
    ("width", "width"),
    ("context", "context"),
    ("vocabulary", "vocab_size"),
)


@dataclass(frozen=True)
class Row:
    """One line of a table, or one tile. `kind` colors it: "", good, bad."""

    name: str
    planned: str = ""
    measured: str = ""
    note: str = ""
    kind: str = ""


def state(run: RunRecord) -> tuple[str, str, float | None]:
    """(in a word, its color, share of the planned steps)."""
    planned = run.planned("training", "steps")
    if not len(run.steps):
        return "no metrics yet", "partial", 0.0 if planned else None
    if planned is None:
        return "length not known", "partial", None
    share = min(1.0, int(run.steps[-1]) / planned)
    return ("finished", "good", share) if share >= 1 else (f"{share:.1%} done", "partial", share)


def trained(run: RunRecord) -> str:
    """What was trained, in a sentence."""
    total, active = (run.planned("model", "parameters", key) for key in ("total", "active"))
    if total is None:
        return "What was trained is not known: no plan.json says it."
    kind = "mixture of experts" if lookup(run.plan, "model", "moe") else "dense model"
    if active is not None and active < total:
        kind += f" ({active:,.0f} active parameters)"
    shape = [(label, run.planned("model", key)) for label, key in SHAPE]
    words = [
        f"{total:,.0f} parameters",
        kind,
        *(f"{label} {number(value)}" for label, value in shape if value),
    ]
    rule, lr = (
        lookup(run.plan, "parameterization", "roles", "matrix", key) for key in ("rule", "lr")
    )
    by = f"; matrices under {rule} at learning rate {number(lr)}" if rule and is_number(lr) else ""
    transfer = lookup(run.plan, "parameterization", "kind")
    return ", ".join(words) + by + (f" ({transfer})" if by and transfer else "") + "."


def head(run: RunRecord) -> list[Row]:
    """How far, how good, how long, what went wrong."""
    rows = []
    if len(run.steps):
        step, tokens = int(run.steps[-1]), float(run.tokens[-1])
        planned = run.planned("training", "steps")
        rows.append(Row("steps", "", f"{step:,}", f"of {planned:,.0f}" if planned else ""))
        target = _target(run)
        notes = [f"of {target:,.0f}"] if target else []
        if per_token := run.flops_per_token:
            notes.append(f"{compact(tokens * per_token)} training FLOPs")
        rows.append(Row("tokens", "", number(tokens), "; ".join(notes)))
        rows += _losses(run)
        if (seconds := run.seconds) is not None:
            rows.append(Row("training time", "", duration(seconds), _written(run)))
        if (speed := _median(run, "tokens_per_second")) is not None:
            rows.append(Row("tokens/s", "", number(speed), f"median; {_world(run)}"))
    first = run.events[0] if run.events else None
    if first:
        text, kind = f"{len(run.events):,} event{'s' * (len(run.events) > 1)}", "bad"
        note = f"first at step {first[0]:,}: {first[1][:80]}"
    elif len(run.steps):
        text, note, kind = "none recorded", "every number in the metrics is finite", "good"
    else:
        text, note, kind = "not known", "no metrics yet", ""
    rows.append(Row("problems", "", text, note, kind))
    return rows


def _losses(run: RunRecord) -> list[Row]:
    rows = []
    if (series := run.series.get("loss")) is not None and series.last is not None:
        count = max(1, len(series.values) // 100)
        tail = series.values[-count:]
        mean = (
            f"mean of the last {count}: {number(float(np.nanmean(tail)))}"
            if count > 1 and np.isfinite(tail).any()
            else ""
        )
        rows.append(Row("training loss", "", number(series.last), mean or "nats per token"))
    if (series := run.series.get("val_loss")) is not None and series.last is not None:
        bits = run.series.get("val_bits_per_byte")
        note = (
            f"{number(bits.last)} bits per byte; "
            if bits is not None and bits.last is not None
            else ""
        )
        best = float(np.nanmin(series.values))
        where = "the best" if best == series.last else f"best {number(best)}"
        rows.append(Row("validation loss", "", number(series.last), note + where))
    return rows


def _written(run: RunRecord) -> str:
    """When the last line was written."""
    times = run.times[np.isfinite(run.times)]
    return (
        f"last metrics {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime(float(times[-1])))}"
        if len(times)
        else ""
    )


def _world(run: RunRecord) -> str:
    count, device = run.environment.get("world_size"), run.environment.get("device")
    return (
        f"{count or '?'} × {device}"
        if device
        else f"{count} processes"
        if count
        else "device not known"
    )


def plan_rows(run: RunRecord) -> list[Row]:
    """Figures of plan.json beside what the run directory shows."""
    listed = run.plan.get("devices")
    device = (
        next((d for d in listed if isinstance(d, dict)), {}) if isinstance(listed, list) else {}
    )
    device = {key: value for key, value in device.items() if key == "device" or is_number(value)}
    step, tokens = (int(run.steps[-1]), float(run.tokens[-1])) if len(run.steps) else (None, None)
    rows = [
        _compare(
            "parameters", run.planned("model", "parameters", "total"), _built(run), exact=True
        ),
        _compare("steps", run.planned("training", "steps"), step),
        _compare("tokens", _target(run), tokens),
    ]
    if per_token := run.flops_per_token:
        done = None if tokens is None else tokens * per_token
        rows.append(_compare("training FLOPs", run.planned("flops", "total"), done))
    lr = run.series.get("lr")
    peak = float(np.nanmax(lr.values)) if lr is not None and lr.last is not None else None
    planned_lr = run.planned("parameterization", "roles", "matrix", "lr")
    rows.append(_times_planned("highest learning rate", _text, planned_lr, peak))
    seconds, speed = _median(run, "step_seconds"), _median(run, "tokens_per_second")
    rows.append(
        _times_planned("time of a step", _duration, device.get("step_seconds"), seconds, "median")
    )
    budget = run.planned("training", "tokens")
    planned_speed = budget / device["seconds"] if device.get("seconds") and budget else None
    rows.append(_times_planned("tokens/s", _text, planned_speed, speed, "median"))
    rows.append(_times_planned("training time", _duration, device.get("seconds"), run.seconds))
    rows.append(_mfu(run, device, speed))
    if memory := run.planned("memory", "peak"):
        rows.append(
            Row("memory a device", size(memory), "n/a", "peak; the run does not record its own")
        )
    if disk := run.planned("checkpoint", "bytes"):
        found = run.checkpoint
        note = f"of step {found[0]:,}" if found else ""
        rows.append(Row("a checkpoint", size(disk), size(found[1]) if found else "n/a", note))
    known = [row for row in rows if row.planned != "n/a" or row.measured != "n/a"]
    return [row for row in rows if row in known or (known and row.name == "MFU")]


def _target(run: RunRecord) -> float | None:
    """Tokens of the whole run, which ends with a whole step."""
    return run.planned("training", "trained_tokens") or run.planned("training", "tokens")


def _built(run: RunRecord) -> int | None:
    """Parameters of the model that was built, by its manifest."""
    shapes = [lookup(row, "shape") for row in run.manifest]
    if not shapes or not all(
        isinstance(shape, list) and all(map(is_number, shape)) for shape in shapes
    ):
        return None
    return sum(math.prod(shape) for shape in shapes)


def _compare(name: str, planned: float | None, measured: float | None, exact: bool = False) -> Row:
    """`exact`: a difference is worth a warning; otherwise measured is progress towards planned."""
    note, kind = "", ""
    if planned and measured is not None:
        same = math.isclose(planned, measured, rel_tol=1e-6)
        note = (
            "as planned"
            if same
            else f"{measured / planned:.4g} × planned"
            if exact
            else f"{measured / planned:.1%}"
        )
        kind = "bad" if exact and not same else ""
    return Row(name, _text(planned), _text(measured), note, kind)


def _times_planned(
    name: str,
    write: Callable[[float | None], str],
    planned: float | None,
    measured: float | None,
    note: str = "",
) -> Row:
    """`note`: what is measured, said where there is no plan to compare it with."""
    if planned and measured is not None:
        note = (
            "as planned"
            if math.isclose(planned, measured, rel_tol=1e-3)
            else f"{measured / planned:.3g} × planned"
        )
    return Row(name, write(planned), write(measured), note if measured is not None else "")


def _duration(seconds: float | None) -> str:
    return "n/a" if seconds is None else duration(seconds)


def _percent(value: float) -> str:
    return f"{value:.1%}" if value >= 0.01 else f"{100 * value:.2g}%"


def _text(value: float | None) -> str:
    return "n/a" if value is None else compact(value)


def _median(run: RunRecord, key: str) -> float | None:
    series = run.series.get(key)
    return None if series is None or series.last is None else float(np.nanmedian(series.values))


def _mfu(run: RunRecord, device: dict[str, Any], speed: float | None) -> Row:
    """Measured: what the run wrote, else tokens/s × FLOPs of a token over the devices' peak;
    without a known peak none."""
    peak, assumed = device.get("peak_flops"), device.get("mfu")
    written = _median(run, "mfu")
    if written is None and peak and speed and run.flops_per_token:
        written = speed * run.flops_per_token / (peak * device.get("count", 1))
    planned = f"{assumed:.0%} assumed" if assumed and peak else "n/a"
    note = (
        ""
        if peak or written
        else f"the peak of {device['device']} is not known"
        if "device" in device
        else ""
    )
    return Row("MFU", planned, "n/a" if written is None else _percent(written), note)
