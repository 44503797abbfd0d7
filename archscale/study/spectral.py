"""The spectral study (seed 004; REFERENCE 6): edges, divergence, steps to a target, conditioning;
on least squares and on a model."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from archscale.optim import orthogonalize
from archscale.study.config import SpectralStudy
from archscale.study.figures import condition_panels, curve_panels, edge_panels, step_panels
from archscale.study.language import Language
from archscale.study.output import Results, Row, mean_and_spread
from archscale.telemetry.flattening import (
    Conditioning,
    LeastSquares,
    covariance,
    descend,
    directions,
    edge,
    first_at_most,
    flatness,
    guaranteed,
    largest_curvature,
    log_slopes,
    planted,
    power_spectrum,
    preconditioned,
    residual,
)

Say = Callable[[str], None]


def run_spectral(study: SpectralStudy, say: Say) -> Results:
    """All of it; deterministic. Tells `say` what it is at."""
    of = orthogonalizers(study.orthogonalizer)
    tables: dict[str, list[Row]] = {}
    say("least squares: edges")
    tables["edges_least_squares"] = [
        row for seed in study.seeds for row in least_squares_edges(study, seed, of)
    ]
    say("least squares: trajectories")
    tables["race_least_squares"], curves = _collect(
        least_squares_race(study, seed, of) for seed in study.seeds
    )
    tables["curves_least_squares"] = curves
    say("planted curvature: conditioning")
    tables["conditioning_planted"] = [
        row for seed in study.seeds for row in planted_conditioning(study, seed)
    ]
    edges: list[Row] = []
    conditions: list[Row] = []
    for seed in study.seeds:
        say(f"language model, seed {seed}: edges and conditioning")
        found, last = language_edges(study, seed, of)
        edges += found
        conditions += layer_conditioning(last, seed)
    tables["edges_language"], tables["conditioning_language"] = edges, conditions
    say("language model: training at equal step size")
    tables["race_language"], tables["curves_language"] = _collect(
        language_race(study, seed) for seed in study.seeds
    )
    tables["slopes"] = slopes(tables)
    tables["edges_summary"] = edges_summary(tables)
    tables["conditioning_summary"] = conditioning_summary(tables)
    tables["race_summary"] = race_summary(tables)
    results = Results("Spectral flattening", study.model_dump(mode="json"), tables)
    results.shown = {
        "edges_summary": (
            "Edges of the first step, relative to (2/L) ⟨G, D⟩ / ‖D‖² (2/L of gradient descent,"
            " (2/L) σ̄ of exact Muon)"
        ),
        "slopes": "Slopes of log(edge · L/2) on log σ̄ and log σ_max together, and on each alone",
        "race_summary": "Equal step size: diverged runs and steps to the target, over seeds",
        "conditioning_summary": (
            "Condition of H = A ⊗ B before and after Muon's preconditioning, medians"
        ),
    }
    results.figures = {
        "edges": ("Edges against σ̄; line: the guarantee of exact Muon", edge_panels(tables)),
        "divergence_least_squares": (
            "Least squares, first seed: loss relative to the first",
            curve_panels(curves, "loss / first loss", True),
        ),
        "divergence_language": (
            "Language model, first seed: held-out loss",
            curve_panels(tables["curves_language"], "nats per token", False),
        ),
        "steps_to_target": ("Steps to the target, medians over seeds", step_panels(tables)),
        "conditioning": (
            "Gain in effective condition against the spread of the gradient covariance",
            condition_panels(tables),
        ),
    }
    return results


def orthogonalizers(scheme: str) -> dict[str, Callable[[Tensor], Tensor]]:
    """`muon_exact` and `muon` (five iterations), in the dtype of what they get."""
    return {
        "muon_exact": lambda G: orthogonalize(G, "exact", G.dtype),
        "muon": lambda G: orthogonalize(G, scheme, G.dtype),
    }


def _collect(parts: Iterator[tuple[list[Row], list[Row]]]) -> tuple[list[Row], list[Row]]:
    """Rows of all seeds, curves of the first."""
    all_rows, all_curves = zip(*parts)
    return [row for rows in all_rows for row in rows], all_curves[0]


# --- least squares


def curved(
    m: int, n: int, lipschitz: float, condition: float, generator: torch.Generator
) -> LeastSquares:
    """L and the condition number of A ⊗ B as given, the latter shared equally."""
    half = math.sqrt(condition)
    return LeastSquares(lipschitz * covariance(n, half, generator), covariance(m, half, generator))


def least_squares_edges(
    study: SpectralStudy, seed: int, of: Mapping[str, Callable[[Tensor], Tensor]]
) -> Iterator[Row]:
    settings = study.least_squares
    m, n = settings.rows, settings.columns
    generator = torch.Generator().manual_seed(seed)
    for condition in settings.conditions:
        problem = curved(m, n, settings.lipschitz, condition, generator)
        for exponent in settings.exponents:
            for mean in settings.sigma_means:
                G = planted(power_spectrum(min(m, n), exponent, mean), m, n, generator)
                E = problem.error_of(G)
                base = problem.loss(E)
                for name, D in directions(G, of).items():
                    bound = guaranteed([G], [D], problem.lipschitz)
                    rise = _rise(problem, E, D, base)
                    at_most, rms = residual(D) if name in of else (math.nan, math.nan)
                    found = edge(rise, bound / 8, study.tolerance)
                    yield {
                        "seed": seed,
                        "condition": condition,
                        "exponent": exponent,
                        **flatness([G]),
                        "lipschitz": problem.lipschitz,
                        "direction": name,
                        "edge": found,
                        "guaranteed": bound,
                        "ratio": found / bound,
                        "residual_max": at_most,
                        "residual_rms": rms,
                    }


def _rise(problem: LeastSquares, E: Tensor, D: Tensor, base: float) -> Callable[[float], float]:
    return lambda lr: problem.loss(E - lr * D) - base


def least_squares_race(
    study: SpectralStudy, seed: int, of: Mapping[str, Callable[[Tensor], Tensor]]
) -> tuple[list[Row], list[Row]]:
    settings, race = study.least_squares, study.least_squares.race
    m, n = settings.rows, settings.columns
    generator = torch.Generator().manual_seed(seed)
    plain = curved(m, n, settings.lipschitz, race.condition, generator)
    E = plain.error_of(planted(power_spectrum(min(m, n), race.exponent, 1.0), m, n, generator))
    rows, curves = [], []
    for mean in race.sigma_means:  # the loss times σ̄: gradient and curvature with it
        problem = LeastSquares(mean * plain.A, plain.B)
        for name in ("gradient", "normalized", *of):
            step = functools.partial(_direction, name, of)
            for lr in race.lrs:
                losses = descend(problem, E, step, lr, race.steps)
                relative = [loss / losses[0] for loss in losses]
                rows.append(
                    {
                        "seed": seed,
                        "sigma_mean": mean,
                        "rule": name,
                        "lr": lr,
                        **judged(relative, race.target),
                    }
                )
                curves += [
                    {"sigma_mean": mean, "rule": name, "lr": lr, "step": i, "loss": x}
                    for i, x in enumerate(relative)
                ]
    return rows, curves


def _direction(name: str, of: Mapping[str, Callable[[Tensor], Tensor]], G: Tensor) -> Tensor:
    if name == "gradient":
        return G
    return of[name](G) if name in of else G / torch.linalg.matrix_norm(G, 2)


def judged(losses: Sequence[float], target: float) -> Row:
    """Of a trajectory: `first_rise` (the first step after which the loss is above where it began),
    `diverged` (it ends there, or is not finite), `steps_to_target`, `final`."""
    rise = next((i for i, loss in enumerate(losses) if not loss <= losses[0]), None)
    return {
        "first_rise": rise,
        "diverged": not losses[-1] <= losses[0],
        "steps_to_target": first_at_most(losses, target),
        "final": losses[-1],
    }


# --- language model


def language_edges(
    study: SpectralStudy, seed: int, of: Mapping[str, Callable[[Tensor], Tensor]]
) -> tuple[list[Row], Language]:
    """After each number of training steps: edges of every matrix alone and of all together. Also
    the model at the end.

    `second_order` is the edge 2 ⟨G, D⟩ / ⟨D, H D⟩ of the loss's quadratic model along D itself, inf
    where that bends down.
    """
    settings = study.language
    language = Language(settings, seed)
    batch, rows, done = language.held_out(), [], 0
    for after in sorted(settings.after):
        *_, loss = language.train("muon", settings.lr, after - done, settings.momentum, first=done)
        done = after
        gradients = language.gradients(batch)
        steps = [directions(G, of) for G in gradients]
        for i, name in [*((i, view.name) for i, view in enumerate(language.views)), (None, "all")]:
            chosen = range(len(gradients)) if i is None else [i]
            views, G = [language.views[j] for j in chosen], [gradients[j] for j in chosen]
            product = language.curvature(views, batch)
            lipschitz = largest_curvature(product, sum(x.numel() for x in G), settings.lanczos)
            for direction in steps[0]:
                D = [steps[j][direction] for j in chosen]
                flat, slope = (
                    torch.cat([x.flatten() for x in D]),
                    float(sum(torch.sum(x * d) for x, d in zip(G, D))),
                )
                bend = float(flat @ product(flat))
                bound = guaranteed(G, D, lipschitz)
                found = edge(language.rise(views, D, batch), bound / 8, study.tolerance)
                both = [residual(x) for x in D] if direction in of else [(math.nan, math.nan)]
                rows.append(
                    {
                        "seed": seed,
                        "after": after,
                        "loss": loss,
                        "matrix": name,
                        **flatness(G),
                        "lipschitz": lipschitz,
                        "direction": direction,
                        "edge": found,
                        "guaranteed": bound,
                        "ratio": found / bound,
                        "second_order": 2 * slope / bend if bend > 0 else math.inf,
                        "residual_max": max(x for x, _ in both),
                        "residual_rms": max(x for _, x in both),
                    }
                )
    return rows, language


def language_race(study: SpectralStudy, seed: int) -> tuple[list[Row], list[Row]]:
    """Plain steps, without momentum. Muon's do not depend on the scale of the loss, so each of its
    runs stands for all scales."""
    race = study.language.race
    language = Language(study.language, seed)
    natural = flatness(language.gradients(language.held_out()))["sigma_mean"]
    scales: list[tuple[str, float | None]] = [
        ("muon", None),
        *(("sgd", mean) for mean in race.sigma_means),
    ]
    rows, curves = [], []
    for rule, mean in scales:
        for lr in race.lrs:
            fresh = Language(study.language, seed)
            losses = list(
                fresh.train(rule, lr, race.steps, 0.0, 1.0 if mean is None else mean / natural)
            )
            shown = {"sigma_mean": "any" if mean is None else mean, "rule": rule, "lr": lr}
            rows.append({"seed": seed, **shown, **judged(losses, race.target)})
            curves += [{**shown, "step": i, "loss": x} for i, x in enumerate(losses)]
    return rows, curves


# --- conditioning


def planted_conditioning(study: SpectralStudy, seed: int) -> Iterator[Row]:
    """A quadratic that is what the theorem assumes: Gaussian errors, A and B planted. The
    preconditioner from the gradient covariance, and from a single gradient, which is what one step
    of Muon has."""
    settings = study.kronecker
    m, n = settings.rows, settings.columns
    generator = torch.Generator().manual_seed(seed)
    for condition in settings.output_conditions:
        A, B = (
            covariance(n, settings.input_condition, generator),
            covariance(m, condition, generator),
        )
        E = torch.randn(settings.samples, m, n, generator=generator, dtype=torch.float64)
        G = B @ E @ A
        row = {
            "seed": seed,
            "output_condition": condition,
            "input_condition": settings.input_condition,
        }
        yield row | {"gradients": settings.samples} | _gains(preconditioned(A, B, G))
        # G Gᵀ of one gradient has full rank as m ≤ n, Gᵀ G has not: its zeros get the smallest
        # damping that float64 inverts.
        yield row | {"gradients": 1} | _gains(preconditioned(A, B, G[:1], 1e-6))


def layer_conditioning(language: Language, seed: int) -> Iterator[Row]:
    for name, A, B, G in language.covariances():
        for gradients in (len(G), 1):
            found = preconditioned(A, B, G[:gradients], language.settings.damping)
            yield {"seed": seed, "matrix": name, "gradients": gradients, **_gains(found)}


def _gains(found: dict[str, Conditioning]) -> Row:
    row: Row = {f"condition_{key}": of.condition for key, of in found.items()}
    row |= {f"effective_{key}": of.effective for key, of in found.items()}
    for kind in ("condition", "effective"):
        row |= {
            f"{kind}_gain_{side}": row[f"{kind}_before"] / row[f"{kind}_{side}"]
            for side in ("left", "both")
        }
    return row


# --- what the tables say


def _groups(rows: Sequence[Row], keys: Sequence[str]) -> dict[tuple, list[Row]]:
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found


def edge_families(tables: Mapping[str, list[Row]]) -> dict[str, list[Row]]:
    """Edges that belong together: least squares by curvature, single matrices of the model, all of
    its matrices."""
    found = {
        f"least squares, κ = {c:g}": rows
        for (c,), rows in _groups(tables["edges_least_squares"], ["condition"]).items()
    }
    for (after,), rows in _groups(tables["edges_language"], ["after"]).items():
        found[f"one matrix, step {after}"] = [row for row in rows if row["matrix"] != "all"]
        found[f"all matrices, step {after}"] = [row for row in rows if row["matrix"] == "all"]
    return found


def slopes(tables: Mapping[str, list[Row]]) -> list[Row]:
    """Of log(edge · L/2) over each family, by direction. Points without a finite edge are left out
    and counted."""
    found = []
    for family, rows in edge_families(tables).items():
        if family.startswith("all matrices"):
            continue  # a point for each seed: no family of spectra
        for (direction,), all_rows in _groups(rows, ["direction"]).items():
            kept = [row for row in all_rows if 0 < row["edge"] < math.inf]
            y = [row["edge"] * row["lipschitz"] / 2 for row in kept]
            columns = {key: [row[key] for row in kept] for key in ("sigma_mean", "sigma_max")}
            row: Row = {
                "family": family,
                "direction": direction,
                "points": len(kept),
                "without_edge": len(all_rows) - len(kept),
            }
            for key, (slope, error) in log_slopes(y, columns).items():
                row |= {key: slope, f"{key}_se": error}
            for key in columns:
                [(slope, error)] = log_slopes(y, {key: columns[key]}).values()
                row |= {f"{key}_alone": slope, f"{key}_alone_se": error}
            found.append(row)
    return found


def edges_summary(tables: Mapping[str, list[Row]]) -> list[Row]:
    found = []
    for family, rows in edge_families(tables).items():
        for (direction,), all_rows in _groups(rows, ["direction"]).items():
            kept = [row for row in all_rows if 0 < row["edge"] < math.inf]
            ratios = [row["ratio"] for row in kept]
            local = [
                row["edge"] / row["second_order"]
                for row in kept
                if 0 < row.get("second_order", 0) < math.inf
            ]
            per_seed = [
                statistics.median(r["ratio"] for r in part)
                for part in _groups(kept, ["seed"]).values()
            ]
            found.append(
                {
                    "family": family,
                    "direction": direction,
                    "points": len(kept),
                    "without_edge": len(all_rows) - len(kept),
                    "least": min(ratios, default=math.nan),
                    "median": statistics.median(ratios) if ratios else math.nan,
                    "greatest": max(ratios, default=math.nan),
                    "to_second_order": statistics.median(local) if local else math.nan,
                    "sd_of_seed_medians": mean_and_spread(per_seed)[1] if per_seed else math.nan,
                    "residual_max": max(row["residual_max"] for row in all_rows),
                    "residual_rms": max(row["residual_rms"] for row in all_rows),
                }
            )
    return found


def race_summary(tables: Mapping[str, list[Row]]) -> list[Row]:
    found = []
    for where, name in (
        ("least squares", "race_least_squares"),
        ("language model", "race_language"),
    ):
        for (mean, rule, lr), rows in _groups(tables[name], ["sigma_mean", "rule", "lr"]).items():
            reached = [row["steps_to_target"] for row in rows if row["steps_to_target"] is not None]
            rises = [row["first_rise"] for row in rows if row["first_rise"] is not None]
            final, spread = mean_and_spread([row["final"] for row in rows])
            found.append(
                {
                    "where": where,
                    "sigma_mean": mean,
                    "rule": rule,
                    "lr": lr,
                    "seeds": len(rows),
                    "diverged": sum(row["diverged"] for row in rows),
                    "first_rise": min(rises, default=None),
                    "reached": len(reached),
                    "steps_to_target": statistics.median(reached) if reached else None,
                    "least_steps": min(reached, default=None),
                    "most_steps": max(reached, default=None),
                    "final": final,
                    "final_sd": spread,
                }
            )
    return found


def conditioning_summary(tables: Mapping[str, list[Row]]) -> list[Row]:
    """Medians, and the slope of the log gain of the left preconditioner on the log spread of the
    gradient covariance."""
    found = []
    for where, name in (
        ("planted", "conditioning_planted"),
        ("language model", "conditioning_language"),
    ):
        for (gradients,), rows in _groups(tables[name], ["gradients"]).items():
            for kind in ("condition", "effective"):
                gains, spread = (
                    [r[f"{kind}_gain_left"] for r in rows],
                    [r[f"{kind}_spread"] for r in rows],
                )
                [(slope, error)] = log_slopes(gains, {"spread": spread}).values()
                columns = ("before", "left", "both", "gain_left", "gain_both", "spread")
                found.append(
                    {
                        "where": where,
                        "gradients": gradients,
                        "number": kind,
                        **{
                            key: statistics.median(row[f"{kind}_{key}"] for row in rows)
                            for key in columns
                        },
                        "worse": sum(gain < 1 for gain in gains) / len(gains),
                        "slope": slope,
                        "slope_se": error,
                    }
                )
    return found
