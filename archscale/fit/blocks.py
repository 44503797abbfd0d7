"""Bowls whose points share errors: runs of one seed see the same initialization and data, so a seed
shifts its whole bowl.

The shift says nothing about where the optimum is, and much about how well the minimum is known: the
optimum comes from a parabola with a shift of its own for each block (a two-way layout), the
minimum's interval from how far the shifts scatter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from archscale.errors import DataError
from archscale.fit.fit import (
    Estimate,
    Fit,
    Settings,
    around_best,
    check_law,
    check_points,
    fit,
    fit_law,
)
from archscale.fit.laws import LAWS, QuadraticLog, Reported
from archscale.fit.least_squares import Array


@dataclass(frozen=True)
class ShiftedQuadratic(QuadraticLog):
    """y = minimum + curvature (ln x − ln optimum)² + shift of the block; the shifts sum to 0.

    u has a second row, the number of the block; without it the shift is left out. θ = coefficients
    of 1, u, u², and all shifts but the last.
    """

    def predict(self, theta: Array, u: Array) -> tuple[Array, Array]:
        y, jacobian = super().predict(theta[:, :3], u[:1])
        codes = np.zeros((u.shape[1], theta.shape[1] - 3))
        if len(u) > 1:
            codes = np.concatenate([np.eye(codes.shape[1]), -np.ones((1, codes.shape[1]))])[
                u[1].astype(int)
            ]
        return y + theta[:, 3:] @ codes.T, np.concatenate(
            [jacobian, np.repeat(codes[None], len(theta), 0)], -1
        )

    def starts(self, u: Array, y: Array) -> Array:
        design = self.predict(np.zeros((1, self.parameters)), u)[1][0]
        return np.linalg.lstsq(design, y, rcond=None)[0][None]

    def report(self, theta: Array, centre: Array) -> Array:
        return super().report(theta[:, :3], centre)


def fit_blocks(
    x: ArrayLike,
    y: ArrayLike,
    blocks: ArrayLike,
    settings: Settings,
    where: str,
    names: Sequence[str] = ("x", "y"),
    block: str = "block",
) -> Fit:
    """`fit("quadratic_log", …)` of points in blocks, each of which shifts y by an amount of its
    own.

    The optimum's interval is free of the shifts. The minimum is that of the mean block; its
    interval takes the blocks for a sample of many, with Student's t of as many degrees of freedom
    as there are blocks less one.

    Args:
        x: (n,) or (1, n), above 0.
        y: (n,).
        blocks: n of them, such as seeds.
        block: what they are called, for errors.

    Raises:
        DataError: as `fit`; or too few points for so many blocks.
    """
    X, Y, of = (
        np.atleast_2d(np.asarray(x, dtype=float)),
        np.asarray(y, dtype=float),
        np.asarray(blocks, dtype=object),
    )
    if settings.nearest is not None:
        near = around_best(X, Y, settings.nearest)
        X, Y, of = X[:, near], Y[near], of[near]
    number = np.unique([repr(one) for one in of], return_inverse=True)[1]
    count = int(number.max()) + 1 if len(number) else 0
    if count < 2:
        return fit("quadratic_log", X, Y, settings, where=where, names=names)
    check_points("quadratic_log", X, Y, settings, where, names)
    plain = LAWS["quadratic_log"]
    parameters = plain.parameters + count - 1
    reported = tuple(_padded(one, count - 1) for one in plain.reported)
    law = ShiftedQuadratic(
        plain.formula, parameters, plain.space, reported, positive=False, extrapolates=False
    )
    centre = np.log(X).mean(1)
    u = np.concatenate([np.log(X) - centre[:, None], number[None]])
    design = law.predict(np.zeros((1, parameters)), u)[1][0]
    if len(Y) <= parameters or np.linalg.matrix_rank(design) < parameters:
        raise DataError(
            f"{len(Y)} points in {count} different {block} are too few for a bowl and a shift of"
            f" each, which need {parameters + 1}",
            where,
            f"add runs, so that each {block} is at several {names[0]}, or fit without it",
        )
    with np.errstate(all="ignore"):
        found = fit_law("quadratic_log", law, u, Y, settings, where, centre=centre)
    found = replace(found, lows=X.min(1), highs=X.max(1))
    check_law(found, where, names)
    return replace(found, estimates=found.estimates | {"minimum": _minimum(found, law, count)})


def _padded(reported: Reported, count: int) -> Reported:
    if reported.root is None:
        return reported
    constant, slope = (part + (0.0,) * count for part in reported.root)
    return replace(reported, root=(constant, slope))


def _minimum(found: Fit, law: ShiftedQuadratic, count: int) -> Estimate:
    """With the blocks as a sample: the variance of their mean is added to that of the bowl."""
    theta, covariance = found.sample.theta[0], found.sample.covariance[0]
    shifts = np.append(theta[3:], -theta[3:].sum())
    _, slope, curvature = theta[:3]
    gradient = np.zeros(len(theta))
    gradient[:3] = 1.0, -slope / (2 * curvature), (slope / (2 * curvature)) ** 2
    variance = gradient @ covariance @ gradient + shifts.var(ddof=1) / count
    value = found.estimates["minimum"].value
    reach = student(found.confidence, count - 1) * float(np.sqrt(variance))
    return Estimate(value, value - reach, value + reach)


def student(confidence: float, freedom: int) -> float:
    """The t that Student's variable of so many degrees of freedom stays within on both sides, with
    this probability."""
    angle = np.linspace(0, np.pi / 2, 200_001)  # t = √ν tan: the density becomes cos^(ν − 1)
    density = np.cos(angle) ** (freedom - 1)
    share = np.concatenate([[0], np.cumsum(density[1:] + density[:-1])])
    return float(np.sqrt(freedom) * np.tan(np.interp(confidence, share / share[-1], angle)))
