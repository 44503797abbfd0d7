"""Figures of the spectral study, from its tables."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from archscale.study.output import Panel, Row, Series

COLORS = {"gradient": 3, "sgd": 3, "normalized": 1, "muon_exact": 2, "muon": 0}
LABELS = {
    "gradient": "gradient descent",
    "sgd": "SGD",
    "normalized": "G / σ_max",
    "muon_exact": "Muon, exact",
    "muon": "Muon",
}


def edge_panels(tables: Mapping[str, list[Row]]) -> list[Panel]:
    squares = tables["edges_least_squares"]
    parts = {
        f"least squares, κ = {c:g}": [r for r in squares if r["condition"] == c]
        for c in _unique(squares, "condition")
    }
    parts["language model, one matrix"] = [
        row for row in tables["edges_language"] if row["matrix"] != "all"
    ]
    panels = []
    for title, rows in parts.items():
        series = []
        for name in _unique(rows, "direction"):
            chosen = [row for row in rows if row["direction"] == name]
            x, y = (
                [row["sigma_mean"] for row in chosen],
                [row["edge"] * row["lipschitz"] / 2 for row in chosen],
            )
            series.append(Series(LABELS[name], x, y, color=COLORS[name]))
        ends = sorted(row["sigma_mean"] for row in rows)
        ends = [ends[0], ends[-1]]
        panels.append(
            Panel(
                title,
                "σ̄",
                "edge · L / 2",
                [*series, Series("σ̄", ends, ends, "--", "black")],
                log_x=True,
            )
        )
    return panels


def curve_panels(curves: list[Row], y: str, log: bool) -> list[Panel]:
    """One panel for each rule and scale of the loss that matters to the claim: gradient steps and
    Muon's."""
    panels = []
    for rule in ("gradient", "sgd", "muon"):
        for mean in _unique([row for row in curves if row["rule"] == rule], "sigma_mean"):
            rows = [row for row in curves if (row["rule"], row["sigma_mean"]) == (rule, mean)]
            series = []
            for i, lr in enumerate(_unique(rows, "lr")):
                points = [
                    (row["step"], row["loss"])
                    for row in rows
                    if row["lr"] == lr and row["loss"] < 1e6
                ]
                series.append(
                    Series(f"η = {lr:g}", [p[0] for p in points], [p[1] for p in points], "-", i)
                )
            panels.append(Panel(f"{LABELS[rule]}, first σ̄ = {mean}", "step", y, series, log_y=log))
    return panels


def step_panels(tables: Mapping[str, list[Row]]) -> list[Panel]:
    panels = []
    for title, name in (
        ("least squares", "race_least_squares"),
        ("language model", "race_language"),
    ):
        rows, series = tables[name], []
        for rule in _unique(rows, "rule"):
            for i, mean in enumerate(
                _unique([row for row in rows if row["rule"] == rule], "sigma_mean")
            ):
                x, y = [], []
                for lr in _unique(rows, "lr"):
                    key = (rule, mean, lr)
                    chosen = [
                        row for row in rows if (row["rule"], row["sigma_mean"], row["lr"]) == key
                    ]
                    steps = [
                        row["steps_to_target"]
                        for row in chosen
                        if row["steps_to_target"] is not None
                    ]
                    if chosen and len(steps) == len(chosen):
                        x.append(lr)
                        y.append(max(1, statistics.median(steps)))
                style = ("o-", "s--", "^:", "v-.")[i % 4]
                series.append(Series(f"{LABELS[rule]}, σ̄ = {mean}", x, y, style, COLORS[rule]))
        panels.append(Panel(title, "η", "steps to the target", series, log_x=True))
    return panels


def condition_panels(tables: Mapping[str, list[Row]]) -> list[Panel]:
    panels = []
    for title, name in (
        ("planted", "conditioning_planted"),
        ("language model", "conditioning_language"),
    ):
        rows, series = tables[name], []
        for i, count in enumerate(_unique(rows, "gradients")):
            chosen = [row for row in rows if row["gradients"] == count]
            x, y = (
                [row["effective_spread"] for row in chosen],
                [row["effective_gain_left"] for row in chosen],
            )
            series.append(
                Series(
                    f"covariance of {count} gradients" if count > 1 else "one gradient",
                    x,
                    y,
                    color=i,
                )
            )
        ends = [1.0, max(row["effective_spread"] for row in rows)]
        series.append(Series("gain = spread", ends, ends, "--", "black"))
        panels.append(
            Panel(
                title,
                "spread σ_max / σ̄ of the gradient covariance's root",
                "gain",
                series,
                log_x=True,
            )
        )
    return panels


def _unique(rows: list[Row], key: str) -> list:
    return list(dict.fromkeys(row[key] for row in rows))
