"""The three hybrids that fail (arXiv 2605.07815): each predicted symptom, read from the telemetry
of real runs."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from archscale.files import MANIFEST, METRICS
from archscale.report.plot import Panel
from archscale.rules import RULES
from archscale.study.config import Arm, HybridStudy
from archscale.study.output import Results, Row, column, curves, groups, mean_and_spread, median
from archscale.sweep.pages import report_if_possible
from archscale.telemetry.sinks import read_lines
from archscale.train.trainer import train

MATRIX = "optimizer/matrix/"
ADAPTATION = ("denominator", "variation", "ratio_variation", "at_least", "at_most")
GROWTH = ("growth", "correlation", "ceiling", "runaway")


def run_hybrids(study: HybridStudy, directory: Path, say: Callable[[str], None]) -> Results:
    """Trains every arm and seed into `directory`/runs (finished ones are kept, as with
    `archscale train`) and reads their telemetry."""
    tables: dict[str, list[Row]] = {"matrices": [], "runs": []}
    drawn: list[Row] = []  # readings of the first seed
    for arm, seed in itertools.product(study.arms, study.seeds):
        run = directory / "runs" / f"{arm.label}_seed{seed}"
        say(f"{arm.label}: {arm.rule}, η = {arm.lr:g}, λ = {arm.weight_decay:g}, seed {seed}")
        train(study.config(arm, seed), run)
        report_if_possible(run)
        lines = read_lines(run / METRICS)
        readings = [line for line in lines if any(key.startswith(MATRIX) for key in line)]
        rows = matrix_rows(arm, readings, read_shapes(run))
        first = {"arm": arm.label, "seed": seed}
        tables["matrices"] += [first | row for row in rows]
        tables["runs"].append(first | run_row(arm, readings, rows, lines[-1]))
        if seed == study.seeds[0]:
            drawn += [
                {**line, "arm": arm.label, "runaway": largest(line, readings[0])}
                for line in readings
            ]
    tables["symptoms"] = list(symptoms(tables["matrices"], tables["runs"]))
    settings, shown = study.model_dump(mode="json"), "Symptoms, over matrices and seeds"
    caption = "Trust ratio, share of matrices clipped, largest ‖W‖ / ‖W₀‖ and loss; first seed"
    figures = {"symptoms": (caption, list(panels(drawn)))}
    return Results("Hybrids that fail", settings, tables, {"symptoms": shown}, figures)


def run_row(arm: Arm, readings: Sequence[Row], rows: Sequence[Row], last: Row) -> Row:
    """A run: over its matrices and readings."""
    runaways = column(rows, "runaway")
    return {
        "rule": arm.rule,
        "lr": arm.lr,
        "weight_decay": arm.weight_decay,
        "clip_fraction": statistics.mean(column(readings, "optimizer/clip_fraction")),
        "runaway_median": median(runaways),
        "runaway_max": max(runaways),
        "loss": last["loss"],
        "val_loss": last.get("val_loss", math.nan),
    }


def largest(reading: Row, first: Row) -> float:
    """‖W‖ / ‖W₀‖ of the matrix that has grown most."""
    norms = [key for key in first if key.startswith(MATRIX) and key.endswith("/weight_norm")]
    return max(reading[key] / first[key] for key in norms)


def read_shapes(run: Path) -> dict[str, tuple[int, ...]]:
    """Rows and columns of every matrix of a run."""
    texts = [text for row in json.loads((run / MANIFEST).read_text()) for text in row["matrices"]]
    named = (text.rsplit(" ", 1) for text in texts)
    return {name: tuple(map(int, shape.split("x"))) for name, shape in named}


def matrix_rows(
    arm: Arm, readings: Sequence[Row], shapes: Mapping[str, tuple[int, ...]]
) -> list[Row]:
    """A row for each matrix, over the readings of a run.

    `denominator` is what the trust ratio divides ‖W‖ by, from the telemetry of ‖W‖ and r (ε apart),
    over √min(m, n); `variation` its standard deviation over time, relative to its mean, and
    `ratio_variation` that of r̂. `growth` is η s² / c² ÷ 2 λ, above 1 where ‖W‖ should run away if
    directions were independent, with c = ‖W₀‖ / √min(m, n). They are not: `correlation` is
    K = (Δ ln ‖W‖² + 2 η λ) / (‖ΔW‖² / ‖W‖²) per step, with decay left out of ΔW: 1 for independent
    ones, NaN where decay is most of what moves W. K · growth is the ratio that decides. `ceiling`:
    what the clip leaves ‖W‖ / ‖W₀‖ to settle at under decoupled decay, where r̂ = r_max:
    r_max √(K · growth).
    """
    rule = RULES[arm.rule]
    low, high = rule.clip or (0.0, math.inf)
    rows = []
    for name, (m, n) in shapes.items():
        if f"{MATRIX}{name}/trust_ratio" not in readings[0]:
            continue
        ratio, norm, update = (
            [line[f"{MATRIX}{name}/{key}"] for line in readings]
            for key in ("trust_ratio", "weight_norm", "relative_update")
        )
        root, runaway = math.sqrt(min(m, n)), norm[-1] / norm[0]
        row: Row = {"matrix": name, "rows": m, "columns": n}
        row |= {"norm_first": norm[0], "norm_last": norm[-1], "runaway": runaway}
        row |= {"ratio_first": ratio[0], "ratio_last": ratio[-1]}
        rows.append(row)
        if rule.ratio is None:
            continue
        below = [w / r / root for w, r in zip(norm, ratio)]
        clipped = [min(max(r, low), high) for r in ratio]
        row |= {"denominator": statistics.mean(below), "variation": _variation(below)}
        row["ratio_variation"] = _variation(clipped)
        row["at_least"] = sum(r <= low for r in ratio) / len(ratio)
        row["at_most"] = sum(r >= high for r in ratio) / len(ratio)
        coupling = statistics.mean(clipped) if rule.decay == "coupled" else 1.0
        decay = arm.lr * arm.weight_decay * coupling
        moved = statistics.mean(u**2 for u in update) - decay**2
        steps = readings[-1]["step"] - readings[0]["step"]
        gained = 2 * math.log(runaway) / max(steps, 1) + 2 * decay
        decided = steps and moved > 0 and gained > 0
        row["correlation"] = K = gained / moved if decided else math.nan
        if rule.calibrated and arm.weight_decay:
            step = rule.shape_factor(m, n) * root / norm[0]  # s / c
            row["growth"] = arm.lr * step**2 / (2 * arm.weight_decay)
            if rule.decay == "decoupled":
                row["ceiling"] = high * math.sqrt(K * row["growth"])
    return rows


def symptoms(matrices: Sequence[Row], runs: Sequence[Row]) -> Iterator[Row]:
    """A row for each arm: medians over matrices and seeds; `_sd` is a standard deviation over
    seeds."""
    by_arm = groups(matrices, "arm")
    for (arm,), members in groups(runs, "arm").items():
        row = {key: members[0][key] for key in ("arm", "rule", "lr", "weight_decay")}
        row["seeds"] = len(members)
        for key in (*ADAPTATION, *GROWTH):
            row[key] = median(column(by_arm.get((arm,), ()), key))
        for key in ("runaway_max", "val_loss"):
            row[key], row[f"{key}_sd"] = mean_and_spread([run[key] for run in members])
        yield row


def _variation(values: Sequence[float]) -> float:
    mean, spread = mean_and_spread(values)
    return spread / mean


def panels(readings: Sequence[Row]) -> Iterator[Panel]:
    """Over time, a curve for each arm: the mean over matrices, or the largest."""
    for title, unit, key, log in (
        ("trust ratio before the clip, mean", "r", "optimizer/trust_ratio_mean", True),
        ("clipped", "share", "optimizer/clip_fraction", False),
        ("largest ‖W‖ / ‖W₀‖", "", "runaway", True),
        ("training loss", "nats per token", "loss", False),
    ):
        lines = curves(readings, "arm", "step", key, line="-")
        yield Panel(title, "step", unit, lines, log_x=False, log_y=log)
