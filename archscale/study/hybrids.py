"""The ablation of the three failing hybrids (OrScale; REFERENCE 1): each predicted symptom, read
from metrics.jsonl of real runs."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from archscale.files import MANIFEST, METRICS
from archscale.optim import RULES
from archscale.study.config import Arm, HybridStudy
from archscale.study.output import Panel, Results, Row, Series, mean_and_spread
from archscale.train.trainer import train

MATRIX = "optimizer/matrix/"


def run_hybrids(study: HybridStudy, out: Path, say: Callable[[str], None]) -> Results:
    """Trains every arm and seed into `out`/runs (finished ones are kept, as with `archscale train`)
    and reads their telemetry."""
    trained: dict[str, list[list[Row]]] = {}
    matrices, arms = [], []
    for arm in study.arms:
        for seed in study.seeds:
            directory = out / "runs" / f"{arm.label}_seed{seed}"
            say(f"{arm.label}: {arm.rule}, η = {arm.lr:g}, λ = {arm.weight_decay:g}, seed {seed}")
            train(study.config(arm, seed), directory)
            lines = [json.loads(line) for line in (directory / METRICS).read_text().splitlines()]
            shapes = read_shapes(directory)
            readings = [line for line in lines if any(key.startswith(MATRIX) for key in line)]
            trained.setdefault(arm.label, []).append(readings)
            each = [
                {"arm": arm.label, "seed": seed, **row}
                for row in matrix_rows(arm, readings, shapes)
            ]
            matrices += each
            arms.append({"arm": arm.label, "seed": seed, **arm_row(arm, readings, each, lines[-1])})
    tables = {"matrices": matrices, "runs": arms, "symptoms": symptoms(study, matrices, arms)}
    results = Results(
        "Hybrids that fail",
        study.model_dump(mode="json"),
        tables,
        shown={"symptoms": "Symptoms, over matrices and seeds"},
    )
    results.figures = figures(study, trained)
    return results


def read_shapes(directory: Path) -> dict[str, tuple[int, int]]:
    """Rows and columns of every matrix of a run."""
    found = {}
    for row in json.loads((directory / MANIFEST).read_text()):
        for text in row["matrices"]:
            name, shape = text.rsplit(" ", 1)
            m, n = shape.split("x")
            found[name] = int(m), int(n)
    return found


def matrix_rows(arm: Arm, readings: Sequence[Row], shapes: dict[str, tuple[int, int]]) -> list[Row]:
    """One matrix each, over the readings of a run.

    `denominator` is what the trust ratio divides ‖W‖ by, from the telemetry of ‖W‖ and r (ε apart),
    over √min(m, n); `variation` its standard deviation over time, relative to its mean, and
    `ratio_variation` that of r̂. `growth` is η s² / c² ÷ 2 λ, above 1 where ‖W‖ should run away if
    directions were independent, with c = ‖W₀‖ / √min(m, n) (REFERENCE 1). They are not:
    `correlation` is K = (Δ ln ‖W‖² + 2 η λ) / (‖ΔW‖² / ‖W‖²) per step, with decay left out of ΔW: 1
    for independent ones, NaN where decay is most of what moves W. K · growth is the ratio that
    decides. `ceiling`: what the clip leaves ‖W‖ / ‖W₀‖ to settle at under decoupled decay, where r̂
    = r_max: r_max √(K · growth).
    """
    rule = RULES[arm.rule]
    found = []
    for name, (m, n) in shapes.items():
        if f"{MATRIX}{name}/trust_ratio" not in readings[0]:
            continue
        ratio = [line[f"{MATRIX}{name}/trust_ratio"] for line in readings]
        norm = [line[f"{MATRIX}{name}/weight_norm"] for line in readings]
        root = math.sqrt(min(m, n))
        row: Row = {
            "matrix": name,
            "rows": m,
            "columns": n,
            "norm_first": norm[0],
            "norm_last": norm[-1],
        }
        row |= {"runaway": norm[-1] / norm[0], "ratio_first": ratio[0], "ratio_last": ratio[-1]}
        if rule.ratio is not None:
            low, high = rule.clip or (0.0, math.inf)
            below = [w / r / root for w, r in zip(norm, ratio)]
            clipped = [min(max(r, low), high) for r in ratio]
            row |= {
                "denominator": statistics.mean(below),
                "variation": _variation(below),
                "ratio_variation": _variation(clipped),
                "at_least": sum(r <= low for r in ratio) / len(ratio),
                "at_most": sum(r >= high for r in ratio) / len(ratio),
            }
            decay = (
                arm.lr
                * arm.weight_decay
                * (statistics.mean(clipped) if rule.decay == "coupled" else 1.0)
            )
            moved = (
                statistics.mean(line[f"{MATRIX}{name}/relative_update"] ** 2 for line in readings)
                - decay**2
            )
            steps = readings[-1]["step"] - readings[0]["step"]
            gained = 2 * math.log(norm[-1] / norm[0]) / max(steps, 1) + 2 * decay
            correlation = gained / moved if steps and moved > 0 and gained > 0 else math.nan
            row["correlation"] = correlation
            if rule.calibrated and arm.weight_decay:
                row["growth"] = (
                    arm.lr
                    * (rule.shape_factor(m, n) * root / norm[0]) ** 2
                    / (2 * arm.weight_decay)
                )
                if rule.decay == "decoupled":
                    row["ceiling"] = high * math.sqrt(correlation * row["growth"])
        found.append(row)
    return found


def arm_row(arm: Arm, readings: Sequence[Row], matrices: Sequence[Row], last: Row) -> Row:
    """One run: over its matrices and readings."""
    return {
        "rule": arm.rule,
        "lr": arm.lr,
        "weight_decay": arm.weight_decay,
        "clip_fraction": statistics.mean(line["optimizer/clip_fraction"] for line in readings),
        "runaway_median": statistics.median(row["runaway"] for row in matrices),
        "runaway_max": max(row["runaway"] for row in matrices),
        "loss": last["loss"],
        "val_loss": last.get("val_loss", math.nan),
    }


def symptoms(study: HybridStudy, matrices: Sequence[Row], runs: Sequence[Row]) -> list[Row]:
    """One line an arm: medians over matrices and seeds (± standard deviation over seeds where it
    says so)."""
    found = []
    for arm in study.arms:
        each = [row for row in matrices if row["arm"] == arm.label]
        of = [row for row in runs if row["arm"] == arm.label]
        row: Row = {
            "arm": arm.label,
            "rule": arm.rule,
            "lr": arm.lr,
            "weight_decay": arm.weight_decay,
            "seeds": len(of),
        }
        for key in (
            "denominator",
            "variation",
            "ratio_variation",
            "at_least",
            "at_most",
            "growth",
            "correlation",
            "ceiling",
            "runaway",
        ):
            values = [r[key] for r in each if not math.isnan(r.get(key, math.nan))]
            row[key] = statistics.median(values) if values else math.nan
        for key in ("runaway_max", "val_loss"):
            row[key], row[f"{key}_sd"] = mean_and_spread([r[key] for r in of])
        found.append(row)
    return found


def _variation(values: Sequence[float]) -> float:
    mean, spread = mean_and_spread(values)
    return spread / mean


def figures(
    study: HybridStudy, trained: dict[str, list[list[Row]]]
) -> dict[str, tuple[str, list[Panel]]]:
    """Over time, each line one arm: of the first seed, the mean over matrices, or the largest."""

    def lines(of: Callable[[Row, Row], float]) -> list[Series]:
        return [
            Series(
                arm.label,
                [r["step"] for r in readings],
                [of(r, readings[0]) for r in readings],
                "-",
                i,
            )
            for i, arm in enumerate(study.arms)
            for readings in trained[arm.label][:1]
        ]

    def norms(reading: Row) -> list[float]:
        return [
            value
            for key, value in reading.items()
            if key.startswith(MATRIX) and key.endswith("/weight_norm")
        ]

    def runaway(reading: Row, first: Row) -> float:
        return max(now / then for now, then in zip(norms(reading), norms(first)))

    return {
        "symptoms": (
            "Trust ratio, share of matrices clipped, largest ‖W‖ / ‖W₀‖ and loss; first seed",
            [
                Panel(
                    "trust ratio before the clip, mean",
                    "step",
                    "r",
                    lines(lambda r, _: r["optimizer/trust_ratio_mean"]),
                ),
                Panel(
                    "clipped",
                    "step",
                    "share",
                    lines(lambda r, _: r["optimizer/clip_fraction"]),
                    log_y=False,
                ),
                Panel("largest ‖W‖ / ‖W₀‖", "step", "", lines(runaway)),
                Panel(
                    "training loss",
                    "step",
                    "nats per token",
                    lines(lambda r, _: r["loss"]),
                    log_y=False,
                ),
            ],
        )
    }
