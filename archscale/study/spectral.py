"""The spectral study (arXiv 2605.13079): edges, divergence, steps to a target, conditioning; on
least squares and on a language model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from archscale.study import flattening
from archscale.study.config import SpectralStudy
from archscale.study.flattening import Conditioning, LeastSquares, directions
from archscale.study.language import Language, flat
from archscale.study.output import Results, Row
from archscale.study.spectral_tables import SHOWN, SUMMARIES, figures

Trajectory = tuple[Row, list[float]]  # its columns in the tables, and its losses


def run_spectral(study: SpectralStudy, say: Callable[[str], None]) -> Results:
    """All of it; deterministic. `say` is called with what comes next."""
    tables: dict[str, list[Row]] = {}

    def measure(name: str, rows: Callable[[SpectralStudy, int], Iterator[Row]]) -> None:
        tables[name] = [row for seed in study.seeds for row in rows(study, seed)]

    def race(place: str, runs: Callable[..., Iterator[Trajectory]], target: float) -> None:
        """A row for each trajectory of all seeds, and the curves of the first."""
        rows, curves = tables[f"race_{place}"], tables[f"curves_{place}"] = [], []
        for number, seed in enumerate(study.seeds):
            for columns, losses in runs(study, seed):
                rows.append({"seed": seed, **columns, **flattening.judged(losses, target)})
                if number == 0:
                    curves += [{**columns, "step": i, "loss": x} for i, x in enumerate(losses)]

    say("least squares: edges")
    measure("edges_least_squares", squares_edges)
    say("least squares: trajectories")
    race("least_squares", squares_trajectories, study.least_squares.race.target)
    say("planted curvature: conditioning")
    measure("conditioning_planted", planted_conditioning)
    tables |= {"edges_language": [], "conditioning_language": []}
    for seed in study.seeds:
        say(f"language model, seed {seed}: edges and conditioning")
        language = Language(study.language, seed)
        tables["edges_language"] += language_edges(study, language)
        tables["conditioning_language"] += layer_conditioning(language)
    say("language model: training at equal step size")
    race("language", language_trajectories, study.language.race.target)
    tables |= {name: list(rows(tables)) for name, rows in SUMMARIES.items()}
    settings = study.model_dump(mode="json")
    return Results("Spectral flattening", settings, tables, SHOWN, figures(tables))


def edge_rows(
    study: SpectralStudy,
    G: list[Tensor],
    rise: Callable[..., Callable[[float], float]],
    lipschitz: float,
    product: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[Row]:
    """Edges of all compared steps beside their guarantees.

    Args:
        G: gradients of the matrices that move together.
        rise: *D → the function η → f(W − η D) − f(W).
        product: v → H v; adds `second_order`, the edge 2 ⟨G, D⟩ / ⟨D, H D⟩ of the quadratic model
            along D itself, inf where that bends down.
    """
    for name, step in directions(study.orthogonalizer).items():
        D = [step(x) for x in G]
        bound = flattening.guaranteed(G, D, lipschitz)
        end = flattening.edge(rise(*D), bound / 8, study.tolerance)
        row: Row = {**flattening.flatness(G), "lipschitz": lipschitz, "direction": name}
        row |= {"edge": end, "guaranteed": bound, "ratio": end / bound}
        if product is not None:
            slope = float(sum(torch.sum(x * d) for x, d in zip(G, D)))
            bend = float(flat(D) @ product(flat(D)))
            row["second_order"] = 2 * slope / bend if bend > 0 else math.inf
        exact = name.startswith("muon")
        residuals = [flattening.residual(Q) if exact else (math.nan, math.nan) for Q in D]
        row["residual_max"], row["residual_rms"] = (max(values) for values in zip(*residuals))
        yield row


def squares_edges(study: SpectralStudy, seed: int) -> Iterator[Row]:
    settings = study.least_squares
    m, n, L = settings.rows, settings.columns, settings.lipschitz
    generator = torch.Generator().manual_seed(seed)
    for condition in settings.conditions:
        problem = LeastSquares.planted(m, n, L, condition, generator)
        for exponent, mean in itertools.product(settings.exponents, settings.sigma_means):
            spectrum = flattening.power_spectrum(min(m, n), exponent, mean)
            G = flattening.planted(spectrum, m, n, generator)
            rise = partial(problem.rise, problem.error_of(G))
            for row in edge_rows(study, [G], rise, problem.lipschitz):
                yield {"seed": seed, "condition": condition, "exponent": exponent, **row}


def language_edges(study: SpectralStudy, language: Language) -> Iterator[Row]:
    """After each number of training steps: edges of every matrix alone and of all together."""
    settings, batch, trained = study.language, language.held_out(), 0
    parts = {view.name: [i] for i, view in enumerate(language.views)}
    parts["all"] = list(range(len(parts)))
    for after in sorted(settings.after):
        count, momentum = after - trained, settings.momentum
        *_, loss = language.train("muon", settings.lr, count, momentum, first=trained)
        trained, gradients = after, language.gradients(batch)
        for matrix, chosen in parts.items():
            views, G = [language.views[i] for i in chosen], [gradients[i] for i in chosen]
            product = language.curvature(views, batch)
            size = sum(x.numel() for x in G)
            L = flattening.largest_curvature(product, size, settings.lanczos)
            rise = partial(language.rise, views, batch)
            for row in edge_rows(study, G, rise, L, product):
                yield {"seed": language.seed, "after": after, "loss": loss, "matrix": matrix, **row}


def squares_trajectories(study: SpectralStudy, seed: int) -> Iterator[Trajectory]:
    """Losses relative to the first."""
    settings, race = study.least_squares, study.least_squares.race
    m, n, L = settings.rows, settings.columns, settings.lipschitz
    generator = torch.Generator().manual_seed(seed)
    plain = LeastSquares.planted(m, n, L, race.condition, generator)
    spectrum = flattening.power_spectrum(min(m, n), race.exponent, 1.0)
    E = plain.error_of(flattening.planted(spectrum, m, n, generator))
    steps = directions(study.orthogonalizer)
    for mean, rule, lr in itertools.product(race.sigma_means, steps, race.lrs):
        problem = LeastSquares(mean * plain.A, plain.B)  # the loss times σ̄, and with it G and L
        losses = flattening.descend(problem, E, steps[rule], lr, race.steps)
        columns = {"sigma_mean": mean, "rule": rule, "lr": lr}
        yield columns, [loss / losses[0] for loss in losses]


def language_trajectories(study: SpectralStudy, seed: int) -> Iterator[Trajectory]:
    """Plain steps, without momentum. Muon's do not depend on the scale of the loss, so each of its
    runs stands for all scales."""
    race, language = study.language.race, Language(study.language, seed)
    natural = flattening.flatness(language.gradients(language.held_out()))["sigma_mean"]
    scales = [("muon", "any", 1.0), *(("sgd", mean, mean / natural) for mean in race.sigma_means)]
    for (rule, mean, scale), lr in itertools.product(scales, race.lrs):
        fresh = Language(study.language, seed)
        losses = list(fresh.train(rule, lr, race.steps, 0.0, scale))
        yield {"sigma_mean": mean, "rule": rule, "lr": lr}, losses


def planted_conditioning(study: SpectralStudy, seed: int) -> Iterator[Row]:
    """A quadratic that is what the theorem assumes: Gaussian errors, A and B planted. The
    preconditioner from the gradient covariance, and from a single gradient, which is what one step
    of Muon has."""
    settings = study.kronecker
    m, n, condition = settings.rows, settings.columns, settings.input_condition
    generator = torch.Generator().manual_seed(seed)
    for output_condition in settings.output_conditions:
        A = flattening.covariance(n, condition, generator)
        B = flattening.covariance(m, output_condition, generator)
        E = torch.randn(settings.samples, m, n, generator=generator, dtype=torch.float64)
        G = B @ E @ A
        row = {"seed": seed, "output_condition": output_condition, "input_condition": condition}
        # G Gᵀ of one gradient has full rank as m ≤ n, Gᵀ G has not: its zeros get the smallest
        # damping that float64 inverts.
        for samples, damping in ((G, 0.0), (G[:1], 1e-6)):
            numbers = flattening.preconditioned(A, B, samples, damping)
            yield {**row, "gradients": len(samples), **gains(numbers)}


def layer_conditioning(language: Language) -> Iterator[Row]:
    for matrix, A, B, G in language.covariances():
        for samples in (G, G[:1]):
            numbers = flattening.preconditioned(A, B, samples, language.settings.damping)
            row = {"seed": language.seed, "matrix": matrix, "gradients": len(samples)}
            yield row | gains(numbers)


def gains(numbers: dict[str, Conditioning]) -> Row:
    """Both condition numbers of everything, and what each preconditioner gains in them."""
    kinds, sides = ("condition", "effective"), ("left", "both")
    row = {f"{kind}_{key}": getattr(numbers[key], kind) for kind in kinds for key in numbers}
    for kind, side in itertools.product(kinds, sides):
        row[f"{kind}_gain_{side}"] = row[f"{kind}_before"] / row[f"{kind}_{side}"]
    return row
