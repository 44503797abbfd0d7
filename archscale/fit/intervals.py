"""Bootstrap intervals of figures that follow from fitted parameters.

A percentile bootstrap of a dozen points covers too little: it knows neither that residuals are
smaller than errors nor that their scale is itself estimated. Here it is the **studentized
bootstrap** (bootstrap-t; Efron and Tibshirani 1993, chapter 12; Davison and Hinkley 1997, section
5.2): each replicate is fitted anew, its deviation from the estimate is divided by its own standard
error, and the quantiles of that ratio take the place of Student's. Where the law is linear in its
parameters and the errors are Gaussian this is Student's t interval itself, at any number of points;
where it bends, the quantiles bend with it. Measured coverage of 95 % intervals, 12 to 16 points,
1,000 draws: 94 to 96 % under least squares, 93 to 95 % under Huber's loss, whose δ is estimated
once and not in each replicate.

A figure is a function of the parameters of one or several independent fits: g(θ_1 (B, p_1), θ_2 (B,
p_2), …) → (B,).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from archscale.fit.least_squares import Array

Figure = Callable[..., Array]


@dataclass(frozen=True)
class Sample:
    """Parameters of a fit and of its replicates.

    Attributes:
        theta: (1 + B, p); the fit itself comes first.
        covariance: (1 + B, p, p), each from its own residuals.
    """

    theta: Array
    covariance: Array


def standard_errors(figure: Figure, samples: Sequence[Sample]) -> tuple[Array, Array]:
    """(values, standard errors by the delta method) of the figure for the fits and each replicate,
    (1 + B,) both."""
    thetas = [sample.theta for sample in samples]
    variance = np.zeros(len(thetas[0]))
    with np.errstate(all="ignore"):
        values = figure(*thetas)
        for which, sample in enumerate(samples):
            p = sample.theta.shape[1]
            # Derivatives by central differences: steps of a thousandth of a standard error stay
            # where the law is smooth.
            steps = 1e-3 * np.sqrt(np.maximum(np.einsum("bpp->bp", sample.covariance), 0)) + 1e-9
            gradient = np.empty_like(sample.theta)
            for i in range(p):
                change = np.zeros_like(sample.theta)
                change[:, i] = steps[:, i]
                ends = [
                    figure(*thetas[:which], sample.theta + s * change, *thetas[which + 1 :])
                    for s in (1, -1)
                ]
                gradient[:, i] = (ends[0] - ends[1]) / (2 * steps[:, i])
            variance += np.einsum("bp,bpq,bq->b", gradient, sample.covariance, gradient)
    return values, np.sqrt(np.maximum(variance, 0))


def interval(
    figure: Figure, samples: Sequence[Sample], confidence: float
) -> tuple[float, float, float]:
    """(value, low, high) of a figure; an end that the data do not bound is infinite."""
    return studentized(*standard_errors(figure, samples), confidence)


def root_interval(
    sample: Sample, constant: Array, slope: Array, confidence: float
) -> tuple[float, float, float]:
    """(value, low, high) of the root of `constant·θ + slope·θ η` in η, which rises there.

    Fieller's: η belongs to the interval if the expression at η does not differ from 0, judged by
    the replicates' quantiles of its studentized value. A root whose slope is badly determined is no
    smooth figure, and its own standard error says little: over a bowl as deep as the noise,
    intervals from it covered 84 % instead of 95.
    """
    theta, C = sample.theta[0], sample.covariance[0]
    a, b = float(constant @ theta), float(slope @ theta)
    value = -a / b
    at_root = constant + value * slope
    pivots = sample.theta @ at_root  # 0 for the fit itself
    errors = np.sqrt(np.maximum(np.einsum("p,bpq,q->b", at_root, sample.covariance, at_root), 0))
    _, low_q, high_q = studentized(
        pivots / max(errors[0], 1e-300), errors / max(errors[0], 1e-300), confidence
    )
    if errors[0] == 0:
        return value, value, value
    ends = []
    for q, unbounded in ((-high_q, -np.inf), (-low_q, np.inf)):  # quantiles of t, low and high
        v_aa, v_ab, v_bb = (
            float(left @ C @ right)
            for left, right in ((constant, constant), (constant, slope), (slope, slope))
        )
        A, B, D = b * b - q * q * v_bb, a * b - q * q * v_ab, a * a - q * q * v_aa
        roots = (
            (-B + np.array([-1.0, 1.0]) * np.sqrt(max(B * B - A * D, 0.0))) / A
            if A > 0
            else np.empty(0)
        )
        fits = [root for root in roots if (a + b * root) * q >= 0]
        ends.append(
            float(min(fits, key=lambda root: abs(root - value)))
            if np.isfinite(q) and fits
            else unbounded
        )
    return value, ends[0], ends[1]


def studentized(values: Array, errors: Array, confidence: float) -> tuple[float, float, float]:
    """(value, low, high) from (1 + B,) values and standard errors, the fit first.

    Replicates in which the figure does not exist count as unboundedly far off on either side.
    """
    value, error = float(values[0]), float(errors[0])
    with np.errstate(all="ignore"):
        t = (values[1:] - value) / errors[1:]
    t = t[~((values[1:] == value) & (errors[1:] == 0))]  # a perfect fit: every replicate is the fit
    if not len(t):
        return value, value, value
    lost = ~np.isfinite(t)
    tail = (1 - confidence) / 2
    ends = []
    for side, level in ((np.inf, 1 - tail), (-np.inf, tail)):
        q = float(
            np.quantile(
                np.where(lost, side, t), level, method="inverted_cdf" if lost.any() else "weibull"
            )
        )
        ends.append(value - error * q if np.isfinite(q) else -side)
    return value, ends[0], ends[1]
