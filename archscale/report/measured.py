"""A run in numbers: the head of the page, and the plan beside what was measured."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from archscale.plan.text import duration, size
from archscale.report.page import State, Tile
from archscale.report.read import RunRecord, is_number, lookup
from archscale.report.scale import compact, number

SHAPE = (
    ("depth", "depth"),
    ("width", "width"),
    ("context", "context"),
    ("vocabulary", "vocab_size"),
)


@dataclass(frozen=True)
class Comparison:
    """A figure of the plan beside what was measured. `kind` colors it: "" or bad."""

    name: str
    planned: str
    measured: str
    note: str = ""
    kind: str = ""


def state(run: RunRecord) -> State:
    """How many of the planned steps are done, and whether the loss is finite after them."""
    planned = run.planned("training", "steps")
    if not len(run.steps):
        return State("no metrics yet", "partial", 0.0 if planned else None)
    if planned is None:
        return State("length not known", "partial", None)
    share = min(1.0, int(run.steps[-1]) / planned)
    loss = run.series.get("loss")
    diverged = loss is not None and len(loss.values) > 0 and not math.isfinite(loss.values[-1])
    if share >= 1:
        return State("diverged", "bad", share) if diverged else State("finished", "good", share)
    if diverged:
        return State(f"{share:.1%} done, diverged", "bad", share)
    return State(f"{share:.1%} done", "partial", share)


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


def tiles(run: RunRecord) -> list[Tile]:
    """How far, how good, how long, what went wrong."""
    return [*_progress(run), *_losses(run), *_speed(run), _problems(run)]


def _progress(run: RunRecord) -> Iterator[Tile]:
    if not len(run.steps):
        return
    planned, target = run.planned("training", "steps"), _target(run)
    yield Tile("steps", f"{int(run.steps[-1]):,}", f"of {planned:,.0f}" if planned else "")
    tokens = float(run.tokens[-1])
    notes = [f"of {target:,.0f}"] if target else []
    if run.flops_per_token:
        notes.append(f"{compact(tokens * run.flops_per_token)} training FLOPs")
    yield Tile("tokens", number(tokens), "; ".join([*notes, *_repetition(run, tokens)]))


def _repetition(run: RunRecord, tokens: float) -> Iterator[str]:
    """How many of the tokens that are trained on come on a parameter, and how often a source has
    been read so far, the most repeated one of a mixture."""
    planned, real = _target(run), run.planned("data", "real_tokens")
    if parameters := run.planned("model", "parameters", "total"):
        share = real / planned if real and planned else 1.0  # the rest is padding
        yield f"{number(share * tokens / parameters)} a parameter"
    sources = lookup(run.plan, "data", "sources")
    passes = [
        (source["passes"], source.get("name"))
        for source in (sources if isinstance(sources, list) else [])
        if isinstance(source, dict) and is_number(source.get("passes"))
    ]
    if passes and planned:
        most, name = max(passes, key=lambda each: float(each[0]))
        what = f"source {name}" if name else "the data"
        yield f"{what} read {number(most * tokens / planned)} times"


def _losses(run: RunRecord) -> Iterator[Tile]:
    if (series := run.series.get("loss")) is not None and series.last is not None:
        count = max(1, len(series.values) // 100)
        tail = series.values[-count:]
        several = count > 1 and np.isfinite(tail).any()
        mean = f"mean of the last {count}: {number(float(np.nanmean(tail)))}" if several else ""
        yield Tile("training loss", number(series.last), mean or "nats per token")
    if (series := run.series.get("val_loss")) is not None and series.last is not None:
        bits = run.series.get("val_bits_per_byte")
        per_byte = number(bits.last) if bits is not None and bits.last is not None else ""
        best = float(np.nanmin(series.values))
        notes = [f"{per_byte} bits per byte"] if per_byte else []
        notes.append("the best" if best == series.last else f"best {number(best)}")
        yield Tile("validation loss", number(series.last), "; ".join(notes))


def _speed(run: RunRecord) -> Iterator[Tile]:
    if run.seconds is not None:
        yield Tile("training time", duration(run.seconds), _written(run))
    if (speed := _median(run, "tokens_per_second")) is not None:
        yield Tile("tokens/s", number(speed), f"median; {_world(run)}")


def _problems(run: RunRecord) -> Tile:
    if run.events:
        (step, event), count = run.events[0], len(run.events)
        note = f"first at step {step:,}: {event[:80]}"
        return Tile("problems", f"{count:,} event{'s' * (count > 1)}", note, "bad")
    if len(run.steps):
        note = "every number in the metrics is finite"
        return Tile("problems", "none recorded", note, "good")
    return Tile("problems", "not known", "no metrics yet")


def _written(run: RunRecord) -> str:
    """When the last line was written."""
    times = run.times[np.isfinite(run.times)]
    if not len(times):
        return ""
    return f"last metrics {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime(float(times[-1])))}"


def _world(run: RunRecord) -> str:
    count, device = run.environment.get("world_size"), run.environment.get("device")
    if device:
        return f"{count or '?'} × {device}"
    return f"{count} processes" if count else "device not known"


def _device(run: RunRecord) -> dict[str, Any]:
    """The plan's first device: its name and what is a number."""
    listed = run.plan.get("devices")
    devices = [d for d in listed if isinstance(d, dict)] if isinstance(listed, list) else []
    first = devices[0] if devices else {}
    return {key: value for key, value in first.items() if key == "device" or is_number(value)}


def plan_rows(run: RunRecord) -> list[Comparison]:
    """Figures of plan.json beside what the run directory shows."""
    device, budget = _device(run), run.planned("training", "tokens")
    step, tokens = (int(run.steps[-1]), float(run.tokens[-1])) if len(run.steps) else (None, None)
    lr = run.series.get("lr")
    peak = float(np.nanmax(lr.values)) if lr is not None and lr.last is not None else None
    planned_lr = run.planned("parameterization", "roles", "matrix", "lr")
    seconds, speed = _median(run, "step_seconds"), _median(run, "tokens_per_second")
    planned_speed = budget / device["seconds"] if device.get("seconds") and budget else None
    rows = [
        _parameters(run),
        _progress_of("steps", run.planned("training", "steps"), step),
        _progress_of("tokens", _target(run), tokens),
        *_flops(run, tokens),
        _compare("highest learning rate", planned_lr, peak),
        _compare("time of a step", device.get("step_seconds"), seconds, _duration, "median"),
        _compare("tokens/s", planned_speed, speed, note="median"),
        _compare("training time", device.get("seconds"), run.seconds, _duration),
        _mfu(run, device, speed),
        *_sizes(run),
    ]
    known = [row for row in rows if row.planned != "n/a" or row.measured != "n/a"]
    return [row for row in rows if row in known or (known and row.name == "MFU")]


def _flops(run: RunRecord, tokens: float | None) -> Iterator[Comparison]:
    if per_token := run.flops_per_token:
        done = None if tokens is None else tokens * per_token
        yield _progress_of("training FLOPs", run.planned("flops", "total"), done)


def _sizes(run: RunRecord) -> Iterator[Comparison]:
    if memory := run.planned("memory", "peak"):
        yield _memory(run, memory)
    if planned := run.planned("checkpoint", "bytes"):
        step, written = run.checkpoint or (None, None)
        measured = "n/a" if written is None else size(written)
        note = "" if step is None else f"of step {step:,}"
        yield Comparison("a checkpoint", size(planned), measured, note)


def _memory(run: RunRecord, planned: float) -> Comparison:
    """The most that any rank has held; on a CPU with all else that the process holds."""
    series, name = run.series.get("peak_memory_bytes"), "memory a device"
    if series is None or series.last is None:
        return Comparison(name, size(planned), "n/a", "peak; the run has not recorded its own")
    measured = float(np.nanmax(series.values))
    if "cpu" in str(lookup(run.environment, "device") or ""):
        note = "peak; measured with the libraries that the process has loaded"
        return Comparison(name, size(planned), size(measured), note)
    return Comparison(
        name, size(planned), size(measured), f"peak; {measured / planned:.3g} × planned"
    )


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


def _compare(
    name: str,
    planned: float | None,
    measured: float | None,
    write: Callable[[float | None], str] | None = None,
    note: str = "",
    tolerance: float = 1e-3,
) -> Comparison:
    """`note`: what is measured, said where there is no plan to compare it with."""
    write = write or _text
    if planned and measured is not None:
        same = math.isclose(planned, measured, rel_tol=tolerance)
        note = "as planned" if same else f"{measured / planned:.3g} × planned"
    return Comparison(name, write(planned), write(measured), note if measured is not None else "")


def _progress_of(name: str, planned: float | None, measured: float | None) -> Comparison:
    """Comparison of a figure that grows until the run ends."""
    row = _compare(name, planned, measured, tolerance=1e-6)
    if planned and measured is not None and row.note != "as planned":
        return replace(row, note=f"{measured / planned:.1%}")
    return row


def _parameters(run: RunRecord) -> Comparison:
    """A difference is worth a warning."""
    planned, built = run.planned("model", "parameters", "total"), _built(run)
    row = _compare("parameters", planned, built, tolerance=1e-6)
    if planned and built is not None and row.note != "as planned":
        return replace(row, note=f"{built / planned:.4g} × planned", kind="bad")
    return row


def _duration(seconds: float | None) -> str:
    return "n/a" if seconds is None else duration(seconds)


def _percent(value: float) -> str:
    return f"{value:.1%}" if value >= 0.01 else f"{100 * value:.2g}%"


def _text(value: float | None) -> str:
    return "n/a" if value is None else compact(value)


def _median(run: RunRecord, key: str) -> float | None:
    series = run.series.get(key)
    return None if series is None or series.last is None else float(np.nanmedian(series.values))


def _mfu(run: RunRecord, device: dict[str, Any], speed: float | None) -> Comparison:
    """Measured: what the run wrote, else tokens/s × FLOPs of a token over the devices' peak;
    without a known peak none."""
    peak, assumed = device.get("peak_flops"), device.get("mfu")
    written = _median(run, "mfu")
    if written is None and peak and speed and run.flops_per_token:
        written = speed * run.flops_per_token / (peak * device.get("count", 1))
    planned = f"{assumed:.0%} assumed" if assumed and peak else "n/a"
    note = f"the peak of {device['device']} is not known" if "device" in device else ""
    measured = "n/a" if written is None else _percent(written)
    return Comparison("MFU", planned, measured, "" if peak or written else note)
