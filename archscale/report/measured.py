"""A run in numbers: the head of the page, and the plan beside what was measured."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from archscale.report.read import RunRecord
from archscale.report.scale import compact, number
from archscale.scaling.plan_text import duration, size


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
    planned = run.planned_steps
    if not len(run.steps):
        return "no metrics yet", "partial", 0.0 if planned else None
    if planned is None:
        return "length not known", "partial", None
    share = min(1.0, int(run.steps[-1]) / planned)
    return ("finished", "good", share) if share >= 1 else (f"{share:.1%} done", "partial", share)


def trained(run: RunRecord) -> str:
    """What was trained, in a sentence."""
    model, plan = run.plan.get("model", {}), run.plan
    count = model.get("parameters", {})
    if not count:
        return "No plan.json: what was trained is not known."
    experts = model.get("moe")
    kind = f"mixture of experts ({count['active']:,} active parameters)" if experts else "dense model"
    shape = f"depth {model['depth']}, width {model['width']}, context {model['context']}, vocabulary {model['vocab_size']:,}"
    roles = plan.get("parameterization", {}).get("roles", {})
    matrix = roles.get("matrix", {})
    by = f"{matrix['rule']} at learning rate {matrix['lr']:.4g} ({plan['parameterization']['kind']})" if matrix else ""
    return f"{count['total']:,} parameters, {kind}, {shape}{'; matrices under ' + by if by else ''}."


def head(run: RunRecord) -> list[Row]:
    """How far, how good, how long, what went wrong."""
    rows = []
    training = run.plan.get("training", {})
    if len(run.steps):
        step, tokens = int(run.steps[-1]), float(run.tokens[-1])
        planned = run.planned_steps
        rows.append(Row("steps", "", f"{step:,}", f"of {planned:,}" if planned else ""))
        target = training.get("trained_tokens") or training.get("tokens")
        notes = [f"of {target:,.0f}"] if target else []
        if per_token := run.flops_per_token:
            notes.append(f"{compact(tokens * per_token)} training FLOPs")
        rows.append(Row("tokens", "", number(tokens), "; ".join(notes)))
        rows += _losses(run)
        if (seconds := run.seconds) is not None:
            rows.append(Row("training time", "", duration(seconds), _wall(run, seconds)))
        if "tokens_per_second" in run.series:
            speed = float(np.nanmedian(run.series["tokens_per_second"].values))
            rows.append(Row("tokens/s", "", number(speed), f"median; {_world(run)}"))
    first = run.events[0] if run.events else None
    text = "none" if not first else f"{len(run.events):,} event{'s' * (len(run.events) > 1)}"
    note = f"first at step {first[0]:,}: {first[1][:80]}" if first else "no event, every number finite"
    rows.append(Row("problems", "", text, note if len(run.steps) else "", "bad" if first else "good"))
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
        note = f"{number(bits.last)} bits per byte; " if bits is not None and bits.last is not None else ""
        best = float(np.nanmin(series.values))
        where = "the best" if best == series.last else f"best {number(best)}"
        rows.append(Row("validation loss", "", number(series.last), note + where))
    return rows


def _wall(run: RunRecord, seconds: float) -> str:
    """When the last line was written, and the time that passed beside the steps."""
    times = run.times[np.isfinite(run.times)]
    if not len(times):
        return ""
    return f"last metrics {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime(float(times[-1])))}"


def _world(run: RunRecord) -> str:
    count, device = run.environment.get("world_size"), run.environment.get("device")
    return f"{count or '?'} × {device}" if device else f"{count} processes" if count else "device not known"


def plan_rows(run: RunRecord) -> list[Row]:
    """Figures of plan.json beside what the run directory shows."""
    plan, training = run.plan, run.plan.get("training", {})
    device = next((d for d in plan.get("devices", []) if isinstance(d, dict)), {})
    rows = [_counted(run)]
    if len(run.steps):
        rows += [
            _compare("steps", training.get("steps"), int(run.steps[-1])),
            _compare("tokens", training.get("trained_tokens") or training.get("tokens"), float(run.tokens[-1])),
        ]
    else:
        rows += [_compare("steps", training.get("steps"), None), _compare("tokens", training.get("tokens"), None)]
    if per_token := run.flops_per_token:
        done = float(run.tokens[-1]) * per_token if len(run.steps) else None
        rows.append(_compare("training FLOPs", plan["flops"].get("total"), done))
    roles = plan.get("parameterization", {}).get("roles", {})
    lr = run.series.get("lr")
    peak = float(np.nanmax(lr.values)) if lr is not None and lr.last is not None else None
    rows.append(_times_planned("highest learning rate", roles.get("matrix", {}).get("lr"), peak))
    seconds = _median(run, "step_seconds")
    per_step = device.get("step_seconds")
    rows.append(_times("time of a step", per_step, seconds, "median" if seconds else ""))
    planned_speed = training["tokens"] / device["seconds"] if device.get("seconds") and training.get("tokens") else None
    speed = _median(run, "tokens_per_second")
    rows.append(_times_planned("tokens/s", planned_speed, speed, "median" if speed else ""))
    rows.append(_times("training time", device.get("seconds"), run.seconds, ""))
    rows.append(_mfu(run, device, speed))
    if memory := plan.get("memory", {}).get("peak"):
        rows.append(Row("memory a device", size(memory), "n/a", "peak; the run does not record its own"))
    if disk := plan.get("checkpoint", {}).get("bytes"):
        found = run.checkpoint
        note = f"of step {found[0]:,}" if found else ""
        rows.append(Row("a checkpoint", size(disk), size(found[1]) if found else "n/a", note))
    known = [row for row in rows if row.planned not in ("", "n/a") or row.measured not in ("", "n/a")]
    return [row for row in rows if row in known or (known and row.name == "MFU")]


def _counted(run: RunRecord) -> Row:
    planned = run.plan.get("model", {}).get("parameters", {}).get("total")
    shapes = [row.get("shape") for row in run.manifest]
    built = sum(math.prod(shape) for shape in shapes if isinstance(shape, list)) if shapes else None
    return _compare("parameters", planned, built, exact=True)


def _compare(name: str, planned: Any, measured: Any, exact: bool = False) -> Row:
    """`exact`: a difference is worth a warning; otherwise measured is progress towards planned."""
    p, m = (float(v) if isinstance(v, (int, float)) else None for v in (planned, measured))
    note, kind = "", ""
    if p and m is not None:
        same = math.isclose(p, m, rel_tol=1e-6)
        note = "as planned" if same else f"{m / p:.4g} × planned" if exact else f"{m / p:.1%}"
        kind = "bad" if exact and not same else ""
    return Row(name, _text(p), _text(m), note, kind)


def _times_planned(name: str, planned: Any, measured: float | None, note: str = "") -> Row:
    return Row(name, _text(planned), _text(measured), _ratio(planned, measured) or note)


def _times(name: str, planned: Any, measured: float | None, note: str) -> Row:
    before, found = ("n/a" if v is None else duration(v) for v in (planned, measured))
    return Row(name, before, found, _ratio(planned, measured) or note)


def _ratio(planned: Any, measured: float | None) -> str:
    if not planned or measured is None:
        return ""
    return "as planned" if math.isclose(planned, measured, rel_tol=1e-3) else f"{measured / planned:.3g} × planned"


def _percent(value: float) -> str:
    return f"{value:.1%}" if value >= 0.01 else f"{100 * value:.2g}%"


def _text(value: float | None) -> str:
    return "n/a" if value is None else compact(value)


def _median(run: RunRecord, key: str) -> float | None:
    series = run.series.get(key)
    return None if series is None or series.last is None else float(np.nanmedian(series.values))


def _mfu(run: RunRecord, device: dict[str, Any], speed: float | None) -> Row:
    """Measured: what the run wrote, else tokens/s × FLOPs of a token over the devices' peak; without a known peak none."""
    peak, assumed = device.get("peak_flops"), device.get("mfu")
    written = _median(run, "mfu")
    if written is None and peak and speed and run.flops_per_token:
        written = speed * run.flops_per_token / (peak * device.get("count", 1))
    planned = f"{assumed:.0%} assumed" if assumed and peak else "n/a"
    note = "" if peak else f"the peak of {device['device']} is not known" if device.get("device") else ""
    return Row("MFU", planned, "n/a" if written is None else _percent(written), note)
