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

A figure is a function of the parameters, θ (B, p) → (B,).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from archscale.fit.least_squares import Array

Figure = Callable[..., Array]


@dataclass(frozen=True)
class Estimate:
    """A figure and its interval; an end that the data do not bound is infinite."""

    value: float
    low: float
    high: float

    def exp(self) -> Estimate:
        """The estimate of the figure's exponential."""
        with np.errstate(over="ignore"):
            return Estimate(*(float(np.exp(end)) for end in vars(self).values()))

    def as_dict(self) -> dict[str, float | None]:
        """For JSON: what is not finite is null."""
        return {name: end if np.isfinite(end) else None for name, end in vars(self).items()}


@dataclass(frozen=True)
class Sample:
    """Parameters of a fit and of its replicates.

    Attributes:
        theta: (1 + B, p); the fit itself comes first.
        covariance: (1 + B, p, p), each from its own residuals.
    """

    theta: Array
    covariance: Array

    def beside(self, other: Sample) -> Sample:
        """θ of two independent fits in one row."""
        p, q = self.theta.shape[1], other.theta.shape[1]
        covariance = np.zeros((len(self.theta), p + q, p + q))
        covariance[:, :p, :p], covariance[:, p:, p:] = self.covariance, other.covariance
        return Sample(np.hstack([self.theta, other.theta]), covariance)


def interval(figure: Figure, sample: Sample, confidence: float) -> Estimate:
    """The figure of the fit, and its interval."""
    values, errors = standard_errors(figure, sample)
    value, error = float(values[0]), float(errors[0])
    low_t, high_t = _quantiles(values, errors, confidence)
    low = value - error * high_t if np.isfinite(high_t) else -np.inf
    high = value - error * low_t if np.isfinite(low_t) else np.inf
    return Estimate(value, low, high)


def standard_errors(figure: Figure, sample: Sample) -> tuple[Array, Array]:
    """Values of the figure for the fit and each replicate, and their standard errors by the delta
    method, (1 + B,) both."""
    theta, covariance = sample.theta, sample.covariance
    # Derivatives by central differences: steps of a thousandth of a standard error stay where the
    # law is smooth.
    steps = 1e-3 * np.sqrt(np.maximum(np.einsum("bpp->bp", covariance), 0)) + 1e-9
    with np.errstate(all="ignore"):
        slopes = [
            (figure(theta + steps * unit) - figure(theta - steps * unit)) / (2 * (steps @ unit))
            for unit in np.eye(theta.shape[1])
        ]
        variance = np.einsum("pb,bpq,qb->b", slopes, covariance, slopes)
        return figure(theta), np.sqrt(np.maximum(variance, 0))


def root_interval(sample: Sample, line: Array, confidence: float) -> Estimate:
    """Interval of the root η of a + b η, where (a, b) is `line` (2, q) times the first q entries of
    θ, and b is above 0.

    Fieller's: η belongs to the interval if a + b η does not differ from 0, judged by the
    replicates' quantiles of its studentized value. A root whose slope is badly determined is no
    smooth figure, and its own standard error says little: over a bowl as deep as the noise,
    intervals from it covered 84 % instead of 95.
    """
    q = line.shape[1]
    theta, covariance = sample.theta[:, :q], sample.covariance[:, :q, :q]
    a, b = line @ theta[0]
    value = -a / b
    at_root = line[0] + value * line[1]
    errors = np.sqrt(np.maximum(np.einsum("p,bpq,q->b", at_root, covariance, at_root), 0))
    if errors[0] == 0:
        return Estimate(*map(float, (value, value, value)))
    low_t, high_t = _quantiles(theta @ at_root, errors, confidence)
    (v_aa, v_ab), (_, v_bb) = line @ covariance[0] @ line.T

    def end(t: float, unbounded: float) -> float:
        """The η on t's side at which (a + b η)² is t² times its variance."""
        A, B, C = b * b - t * t * v_bb, a * b - t * t * v_ab, a * a - t * t * v_aa
        if not A > 0:
            return unbounded
        return float((-B + np.copysign(np.sqrt(max(B * B - A * C, 0.0)), t)) / A)

    return Estimate(float(value), end(low_t, -np.inf), end(high_t, np.inf))


def _quantiles(values: Array, errors: Array, confidence: float) -> tuple[float, float]:
    """The lower and the upper quantile of the replicates' studentized deviations from the fit;
    `values` and `errors` are (1 + B,), the fit first.

    Replicates in which the figure does not exist count as unboundedly far off on either side.
    """
    with np.errstate(all="ignore"):
        t = (values[1:] - values[0]) / errors[1:]
    t = t[(values[1:] != values[0]) | (errors[1:] != 0)]
    if not len(t):  # a perfect fit: every replicate is the fit
        return 0.0, 0.0
    lost, tail = ~np.isfinite(t), (1 - confidence) / 2
    method = "inverted_cdf" if lost.any() else "weibull"
    low, high = (
        float(np.quantile(np.where(lost, side, t), level, method=method))  # type: ignore[call-overload]
        for side, level in ((-np.inf, tail), (np.inf, 1 - tail))
    )
    return low, high
