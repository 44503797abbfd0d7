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
from archscale.fit.fit import Fit, Points, Settings, fit_law
from archscale.fit.intervals import Sample, standard_errors
from archscale.fit.laws import LAWS, JointQuadratic
from archscale.fit.least_squares import Array, Model, refit

FAR = 20.0  # change of η, a factor of 5e8, beyond which a replicate's optimum is not there


def optimum_law(
    fits: Sequence[Fit], t: ArrayLike, settings: Settings, where: str, names: Sequence[str]
) -> Fit:
    """optimum = coefficient · t^exponent through the optima of `fits`, by least squares in
    `settings.space`.

    Intervals carry both errors. The variance of each η is that of its own fit, v_g (delta method),
    plus τ², how far optima scatter about the law beyond that (`_spread`). A replicate takes each
    group's replicate of the first stage, moves it onto the fitted law, scatters it with τ, and is
    fitted and studentized with its own v_g and τ². Measured coverage with five optima, 95 %
    intervals: 95 % on the law; 90 % where they scatter about it two to three times as far as their
    own errors, because five points hardly tell τ.

    Args:
        fits: of quadratic_log, whose replicates are independent (other seeds).
        t: of each fit, above 0.
        names: of t and of the optimum's column, for errors.

    Raises:
        DataError: fewer than three different t, or one that is not above 0.
    """
    T = np.asarray(t, dtype=float)
    if (T <= 0).any():
        problem = f"a power law takes the logarithm of {names[0]}, and {T.min():g} is not above 0"
        raise DataError(problem, where, "leave it out")
    if (distinct := len(np.unique(T))) < 3:
        raise DataError(
            f"optima at {distinct} different {names[0]} are too few for a power law, which needs 3",
            where,
            f"add runs at other {names[0]}",
        )
    eta, variance = _optima(fits)
    law, points = LAWS["power"], Points.at(T[None], np.exp(eta[0]))
    squares = replace(settings, loss="squares", delta=None, space=settings.space or "log")
    base = fit_law("power", law, points, squares, where)
    theta, linear = base.sample.theta[:1], base.space == "linear"
    log_model = law.problem(points.u, points.y, "log").model
    _, tau2, residuals = _spread(log_model, linear, theta, eta[:1], variance[:1])
    # The optima themselves and those of the replicates.
    generator = np.random.default_rng(np.append(settings.seed, 2))
    scatter = generator.normal(0.0, np.sqrt(tau2[0]), eta[1:].shape)
    eta = np.vstack([eta[:1], eta[1:] - residuals + scatter])
    usable = np.isfinite(variance).all(1) & (np.abs(eta - eta[0]) < FAR).all(1)
    eta[~usable], variance[~usable] = eta[0], 0.0
    z = np.exp(eta) if linear else eta
    refits = refit(law.problem(points.u, points.y, base.space), np.repeat(theta, len(z), 0), z)
    covariance, _, _ = _spread(log_model, linear, refits.theta, eta, variance)
    there = (usable & refits.converged)[:, None]
    sample = Sample(np.where(there, refits.theta, np.nan), covariance)
    estimates = law.estimates(sample, base.centre, settings.confidence)
    return replace(base, sample=sample, estimates=estimates)


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
    first = optimum_law(fits, t, replace(settings, space="log"), where, (against, "x"))
    x, y = (np.concatenate(values) for values in zip(*points))
    group = np.repeat(np.arange(len(points)), [len(y) for _, y in points])
    everything = Points.at(np.stack([x, np.asarray(t, dtype=float)[group]]), y, group)
    level, exponent = first.sample.theta[0]
    centred = level + exponent * (everything.centre[1] - first.centre[0]) - everything.centre[0]
    minima = [fit.estimates["minimum"].value for fit in fits]
    curvatures = [fit.estimates["curvature"].value for fit in fits]
    law = JointQuadratic([centred, exponent, *minima, *curvatures])
    fitted = fit_law("joint_quadratic", law, everything, settings, where)
    return replace(fitted, lows=fitted.lows[1:], highs=fitted.highs[1:])  # of t


def _optima(fits: Sequence[Fit]) -> tuple[Array, Array]:
    """η and its variance, (1 + B, G) both; NaN in replicates whose bowl opens downwards."""
    eta, variance = [], []
    for fit in fits:
        values, errors = standard_errors(
            lambda theta, fit=fit: fit.law.report(theta, fit.centre)[:, 0], fit.sample
        )
        bowl = fit.sample.theta[:, 2] > 0
        eta.append(np.where(bowl, values, np.nan))
        variance.append(np.where(bowl, errors**2, np.nan))
    return np.stack(eta, 1), np.stack(variance, 1)


def _spread(
    log_model: Model, linear: bool, theta: Array, eta: Array, variance: Array
) -> tuple[Array, Array, Array]:
    """Covariance of θ (B, 2, 2), τ² (B,), and residuals of η (B, G), for laws fitted to `eta` (B,
    G), which is known up to `variance` (B, G).

    τ² is the moment estimate from the residuals, at least 0 (DerSimonian and Laird 1986), taken for
    the median of few squares.

    Args:
        log_model: θ → η.
        linear: whether θ is fitted to exp η.
    """
    with np.errstate(all="ignore"):
        prediction, jacobian = log_model(theta)
        residuals, G = eta - prediction, eta.shape[1]
        by_eta = np.linalg.pinv(jacobian)  # ∂θ/∂η (B, 2, G)
        if linear:
            by_eta = np.linalg.pinv(jacobian * np.exp(prediction)[..., None])
            by_eta = by_eta * np.exp(eta)[:, None]
        # Of each group's variance in the sum of squared residuals.
        weight = ((np.eye(G) - jacobian @ by_eta) ** 2).sum(1)
        # A sum of so few squares lies below its mean more often than not (Wilson and Hilferty).
        few = 2 / (9 * (G - 2))
        squares = (residuals**2).sum(1) / (1 - few) ** 3
        tau2 = np.maximum(0.0, (squares - (weight * variance).sum(1)) / weight.sum(1))
        covariance = np.einsum("bpg,bg,bqg->bpq", by_eta, variance + tau2[:, None], by_eta)
    return covariance, tau2, residuals
