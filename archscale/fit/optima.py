"""How optima move: a power law of each group's optimum against another column, such as optimal LR
against tokens.

In two stages: the optimum of each group, then a power law through the optima. Or jointly: one fit
of all points in which the optima lie on a power law, which asks more of the law and gives narrower
intervals where it holds.

G groups, B replicates; η = ln optimum (G,).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike

from archscale.errors import DataError
from archscale.fit.fit import Fit, Settings, estimates_of, fit_law, response
from archscale.fit.intervals import Sample, standard_errors
from archscale.fit.laws import LAWS, joint_quadratic
from archscale.fit.least_squares import Array, solve


def optimum_law(
    fits: Sequence[Fit], t: ArrayLike, settings: Settings, where: str, names: Sequence[str]
) -> Fit:
    """optimum = coefficient · t^exponent through the optima of `fits`, by least squares in
    `settings.space`.

    Intervals carry both errors. The variance of each ln optimum is that of its own fit, v_g (delta
    method), plus τ², how far optima scatter about the law beyond that: the moment estimate from the
    residuals, at least 0 (DerSimonian and Laird 1986), taken for the median of few squares. A
    replicate takes each group's replicate of the first stage, moves it onto the fitted law,
    scatters it with τ, and is fitted and studentized with its own v_g and τ². Measured coverage
    with five optima, 95 % intervals: 95 % on the law; 90 % where they scatter about it two to three
    times as far as their own errors, because five points hardly tell τ.

    Args:
        fits: of quadratic_log, whose replicates are independent (other seeds).
        t: of each fit, above 0.
        names: of t and of the optimum's column, for errors.

    Raises:
        DataError: fewer than three different t, or one that is not above 0.
    """
    T = np.asarray(t, dtype=float)
    plain = replace(settings, loss="squares", delta=None, space=settings.space or "log")
    if (T <= 0).any():
        raise DataError(
            f"a power law takes the logarithm of {names[0]}, and {T.min():g} is not above 0",
            where,
            "leave it out",
        )
    if len(np.unique(T)) < 3:
        raise DataError(
            f"optima at {len(np.unique(T))} different {names[0]} are too few for a power law, which"
            " needs 3",
            where,
            f"add runs at other {names[0]}",
        )
    eta, variance = _optima(fits)
    law = LAWS["power"]
    base = fit_law("power", law, T[None], np.exp(eta[0]), plain, where)
    u = np.log(T)[None] - base.centre[:, None]
    _, model = response(law, u, np.exp(eta[0]), base.space)

    def influence(theta: Array, values: Array) -> tuple[Array, Array, Array]:
        """∂θ/∂η (B, 2, G), residuals of η (B, G), and ∂residuals/∂η (B, G, G)."""
        with np.errstate(all="ignore"):
            f, J = model(theta)
        slope = np.ones_like(f) if base.space == "log" else np.exp(values)  # dz/dη
        of_theta = np.linalg.pinv(J) * slope[:, None, :]
        fitted = f if base.space == "log" else np.log(f)
        back = J if base.space == "log" else J / f[..., None]
        return of_theta, values - fitted, np.eye(len(T)) - back @ of_theta

    few = 2 / (9 * (len(T) - 2))
    # a sum of so few squares lies below its mean more often than not (Wilson and Hilferty)
    unbiased = 1 / (1 - few) ** 3

    def spread(theta: Array, values: Array, v: Array) -> tuple[Array, Array]:
        """Covariance of θ (B, 2, 2) and τ² (B,)."""
        of_theta, residuals, of_residuals = influence(theta, values)
        weight = (of_residuals**2).sum(
            1
        )  # of each group's variance in the sum of squared residuals
        tau2 = np.maximum(
            0.0, (unbiased * (residuals**2).sum(1) - (weight * v).sum(1)) / weight.sum(1)
        )
        return np.einsum("bpg,bg,bqg->bpq", of_theta, v + tau2[:, None], of_theta), tau2

    theta = base.sample.theta[:1]
    covariance, tau2 = spread(theta, eta[:1], variance[:1])
    _, residuals, _ = influence(theta, eta[:1])
    generator = np.random.default_rng(np.append(settings.seed, 2))
    moved = eta[1:] - residuals + generator.normal(0.0, np.sqrt(tau2[0]), (len(eta) - 1, len(T)))
    usable = (
        np.isfinite(moved).all(1)
        & np.isfinite(variance[1:]).all(1)
        & (np.abs(moved - eta[0]).max(1) < 20)
    )
    moved = np.where(usable[:, None], moved, eta[0])
    with np.errstate(all="ignore"):
        again = solve(
            model, moved if base.space == "log" else np.exp(moved), np.repeat(theta, len(moved), 0)
        )
        covariances, _ = spread(again.theta, moved, np.where(usable[:, None], variance[1:], 0.0))
    thetas = np.where((usable & again.converged)[:, None], again.theta, np.nan)
    sample = Sample(np.concatenate([theta, thetas]), np.concatenate([covariance, covariances]))
    found = estimates_of(law, sample, base.centre, settings.confidence)
    return replace(base, sample=sample, estimates=found)


def joint_law(
    points: Sequence[tuple[Array, Array]],
    fits: Sequence[Fit],
    t: ArrayLike,
    settings: Settings,
    where: str,
    against: str = "t",
) -> Fit:
    """optimum = coefficient · t^exponent, fitted to all points at once with a minimum and a
    curvature of each group.

    Errors are taken to be of one size in all groups, and optima to lie on the law.

    Args:
        points: (x, y) of each group.
        fits: of quadratic_log to each, the start.
        t: of each group.
        against: the name of t, for errors.

    Raises:
        DataError: as `optimum_law`, which this starts from.
    """
    start = optimum_law(fits, t, replace(settings, space="log"), where, (against, "x"))
    T = np.asarray(t, dtype=float)
    x, y = (np.concatenate([group[i] for group in points]) for i in (0, 1))
    number = np.repeat(np.arange(len(points)), [len(group[0]) for group in points])
    of_t = np.log(T)[number]
    centre = np.array([np.log(x).mean(), of_t.mean()])
    u = np.stack([np.log(x) - centre[0], of_t - centre[1], number])
    level, exponent = start.sample.theta[0]
    minima, curvatures = (
        [fit.estimates[name].value for fit in fits] for name in ("minimum", "curvature")
    )
    first = [
        level + exponent * (centre[1] - start.centre[0]) - centre[0],
        exponent,
        *minima,
        *curvatures,
    ]
    found = fit_law("joint_quadratic", joint_quadratic(first), u, y, settings, where, centre=centre)
    return replace(found, lows=T.min(keepdims=True), highs=T.max(keepdims=True))


def _optima(fits: Sequence[Fit]) -> tuple[Array, Array]:
    """(η, its variance), (1 + B, G) both; NaN in replicates whose bowl opens downwards."""
    eta, variance = [], []
    for fit in fits:
        theta = fit.sample.theta
        values, errors = standard_errors(
            lambda theta, f=fit: f.law.report(theta, f.centre)[:, 0], [fit.sample]
        )
        bowl = theta[:, 2] > 0
        eta.append(np.where(bowl, values, np.nan))
        variance.append(np.where(bowl, errors**2, np.nan))
    return np.stack(eta, 1), np.stack(variance, 1)
