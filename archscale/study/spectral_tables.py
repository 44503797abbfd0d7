"""What the tables of the spectral study say: summaries and figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from archscale.report.plot import INK, Curve, Panel
from archscale.study.flattening import log_slopes
from archscale.study.output import Row, Tables, column, curves, groups, mean_and_spread, median

RACES = {"least squares": "race_least_squares", "language model": "race_language"}
CONDITIONING = {"planted": "conditioning_planted", "language model": "conditioning_language"}
LABELS = {
    "gradient": "gradient descent",
    "sgd": "SGD",
    "normalized": "G / σ_max",
    "muon_exact": "Muon, exact",
    "muon": "Muon",
}


def squares_by_condition(tables: Tables) -> dict[str, list[Row]]:
    parts = groups(tables["edges_least_squares"], "condition")
    return {f"least squares, κ = {condition:g}": rows for (condition,), rows in parts.items()}


def edge_families(tables: Tables) -> Iterator[tuple[Row, list[Row], list[Row]]]:
    """Edges that belong together, by direction: least squares by curvature, single matrices of the
    model, all of its matrices. The first columns of a summary, all rows, those with an edge."""
    families = squares_by_condition(tables)
    for (after,), rows in groups(tables["edges_language"], "after").items():
        families[f"one matrix, step {after}"] = [row for row in rows if row["matrix"] != "all"]
        families[f"all matrices, step {after}"] = [row for row in rows if row["matrix"] == "all"]
    for family, members in families.items():
        for (direction,), rows in groups(members, "direction").items():
            kept = [row for row in rows if 0 < row["edge"] < math.inf]
            first: Row = {"family": family, "direction": direction, "points": len(kept)}
            yield first | {"without_edge": len(rows) - len(kept)}, rows, kept


def scaled_edge(row: Row) -> float:
    """edge · L / 2: σ̄ where the guarantee of exact Muon is an equality."""
    return row["edge"] * row["lipschitz"] / 2


def slopes(tables: Tables) -> Iterator[Row]:
    """Slopes of log(edge · L/2) over each family; points without an edge are only counted."""
    for row, _, kept in edge_families(tables):
        if row["family"].startswith("all matrices"):
            continue  # a point for each seed: no family of spectra
        y = [scaled_edge(edge) for edge in kept]
        columns = {key: [edge[key] for edge in kept] for key in ("sigma_mean", "sigma_max")}
        fits = log_slopes(y, columns)
        fits |= {f"{key}_alone": log_slopes(y, {key: x})[key] for key, x in columns.items()}
        for key, (slope, error) in fits.items():
            row |= {key: slope, f"{key}_se": error}
        yield row


def edges_summary(tables: Tables) -> Iterator[Row]:
    for row, rows, kept in edge_families(tables):
        ratios = column(kept, "ratio")
        curved = [edge for edge in kept if 0 < edge.get("second_order", 0) < math.inf]
        by_seed = [median(column(part, "ratio")) for part in groups(kept, "seed").values()]
        row |= {"least": min(ratios, default=math.nan), "median": median(ratios)}
        row |= {"greatest": max(ratios, default=math.nan)}
        row["to_second_order"] = median([edge["edge"] / edge["second_order"] for edge in curved])
        row["sd_of_seed_medians"] = mean_and_spread(by_seed)[1]
        for key in ("residual_max", "residual_rms"):
            row[key] = max(edge[key] for edge in rows)
        yield row


def race_summary(tables: Tables) -> Iterator[Row]:
    keys = ("sigma_mean", "rule", "lr")
    for where, name in RACES.items():
        for values, rows in groups(tables[name], *keys).items():
            steps, rises = column(rows, "steps_to_target"), column(rows, "first_rise")
            row = {"where": where, **dict(zip(keys, values)), "seeds": len(rows)}
            row["diverged"] = sum(row["diverged"] for row in rows)
            row |= {"first_rise": min(rises, default=None), "reached": len(steps)}
            row["steps_to_target"] = median(steps) if steps else None
            row |= {"least_steps": min(steps, default=None), "most_steps": max(steps, default=None)}
            row["final"], row["final_sd"] = mean_and_spread([row["final"] for row in rows])
            yield row


def conditioning_summary(tables: Tables) -> Iterator[Row]:
    """Medians, and the slope of the log gain of the left preconditioner on the log spread of the
    gradient covariance."""
    for where, name in CONDITIONING.items():
        for (gradients,), rows in groups(tables[name], "gradients").items():
            for kind in ("condition", "effective"):
                row = {"where": where, "gradients": gradients, "number": kind}
                for key in ("before", "left", "both", "gain_left", "gain_both", "spread"):
                    row[key] = median(column(rows, f"{kind}_{key}"))
                gains, spread = (
                    [r[f"{kind}_{key}"] for r in rows] for key in ("gain_left", "spread")
                )
                row["worse"] = sum(gain < 1 for gain in gains) / len(gains)
                row["slope"], row["slope_se"] = log_slopes(gains, {"spread": spread})["spread"]
                yield row


# --- figures


def diagonal(label: str, values: Sequence[float]) -> Curve:
    """The line y = x over these values."""
    ends = np.array([min(values), max(values)])
    return Curve(label, ends, ends, line="--", color=INK)


def edge_panels(tables: Tables) -> Iterator[Panel]:
    single = [row for row in tables["edges_language"] if row["matrix"] != "all"]
    parts = squares_by_condition(tables) | {"language model, one matrix": single}
    for title, rows in parts.items():
        rows = [{**row, "step": LABELS[row["direction"]]} for row in rows]
        points = curves(rows, "step", "sigma_mean", scaled_edge, marker="o")
        points.append(diagonal("σ̄", column(rows, "sigma_mean")))
        yield Panel(title, "σ̄", "edge · L / 2", points, log_y=True)


def curve_panels(rows: Sequence[Row], y: str, log: bool) -> Iterator[Panel]:
    """A panel for each rule and scale of the loss that matters to the claim: gradient steps and
    Muon's."""
    for rule in ("gradient", "sgd", "muon"):
        members = [row for row in rows if row["rule"] == rule and row["loss"] < 1e6]
        for (mean,), part in groups(members, "sigma_mean").items():
            lines = curves(part, "lr", "step", "loss", lambda lr: f"η = {lr:g}", line="-")
            title = f"{LABELS[rule]}, first σ̄ = {mean}"
            yield Panel(title, "step", y, lines, log_x=False, log_y=log)


def step_panels(tables: Tables) -> Iterator[Panel]:
    """Medians of the rates at which every seed reaches the target; at least 1, which a logarithmic
    axis can show."""

    def steps(row: Row) -> float:
        return max(1, row["steps_to_target"]) if row["reached"] == row["seeds"] else math.nan

    for (where,), rows in groups(tables["race_summary"], "where").items():
        named = [{**r, "run": f"{LABELS[r['rule']]}, σ̄ = {r['sigma_mean']}"} for r in rows]
        lines = curves(named, "run", "lr", steps, line="-", marker="o")
        yield Panel(where, "η", "steps to the target", lines, log_y=True)


def condition_panels(tables: Tables) -> Iterator[Panel]:
    def label(count: int) -> str:
        return f"covariance of {count} gradients" if count > 1 else "one gradient"

    x, y = "effective_spread", "effective_gain_left"
    for title, name in CONDITIONING.items():
        points = curves(tables[name], "gradients", x, y, label, marker="o")
        points.append(diagonal("gain = spread", [1.0, *column(tables[name], x)]))
        x_label = "spread σ_max / σ̄ of the gradient covariance's root"
        yield Panel(title, x_label, "gain", points, log_y=True)


SUMMARIES: dict[str, Callable[[Tables], Iterator[Row]]] = {
    "slopes": slopes,
    "edges_summary": edges_summary,
    "conditioning_summary": conditioning_summary,
    "race_summary": race_summary,
}
SHOWN = {
    "edges_summary": "Edges of the first step, relative to (2/L) ⟨G, D⟩ / ‖D‖² (2/L of gradient"
    " descent, (2/L) σ̄ of exact Muon)",
    "slopes": "Slopes of log(edge · L/2) on log σ̄ and log σ_max together, and on each alone",
    "race_summary": "Equal step size: diverged runs and steps to the target, over seeds",
    "conditioning_summary": "Condition of H = A ⊗ B before and after Muon's preconditioning,"
    " medians",
}


def figures(tables: Tables) -> dict[str, tuple[str, list[Panel]]]:
    squares, language = tables["curves_least_squares"], tables["curves_language"]
    drawn = {
        "edges": ("Edges against σ̄; line: the guarantee of exact Muon", edge_panels(tables)),
        "divergence_least_squares": (
            "Least squares, first seed: loss relative to the first",
            curve_panels(squares, "loss / first loss", True),
        ),
        "divergence_language": (
            "Language model, first seed: held-out loss",
            curve_panels(language, "nats per token", False),
        ),
        "steps_to_target": ("Steps to the target, medians over seeds", step_panels(tables)),
        "conditioning": (
            "Gain in effective condition against the spread of the gradient covariance",
            condition_panels(tables),
        ),
    }
    return {name: (caption, list(panels)) for name, (caption, panels) in drawn.items()}
