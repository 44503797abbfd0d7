"""Compute-efficiency leverage of one loss curve over another.

    leverage(C) = C_B / C, where L_B(C_B) = L_A(C)

how many times the FLOPs of A the law of B needs for the loss that A reaches with C FLOPs. HyperP's
1.58 at 6e21 FLOPs is this ratio against Muon.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from archscale.errors import DataError
from archscale.fit.fit import Estimate, Fit
from archscale.fit.intervals import interval
from archscale.fit.least_squares import Array

CURVES = ("power", "power_irreducible")
POINTS = 5  # over the common range


@dataclass(frozen=True)
class Leverage:
    """At one x.

    Attributes:
        x: FLOPs of A.
        loss: that A reaches with them.
        ratio: how many times as many B needs; infinite where B never reaches that loss.
        extrapolated: names of the curves that are used beyond their points.
    """

    x: float
    loss: float
    ratio: Estimate
    extrapolated: tuple[str, ...]


def leverage(
    a: Fit, b: Fit, at: Sequence[float], names: tuple[str, str], where: str
) -> list[Leverage]:
    """Leverage of curve `a` over curve `b` at each of `at`, or at five points of the range that
    both cover.

    Raises:
        DataError: a form that is not a curve over one x, a curve that does not fall, ranges without
            overlap.
    """
    for fit, name in zip((a, b), names):
        if fit.form not in CURVES:
            raise DataError(
                f"{fit.form} is no curve of loss over compute", where, f"fit {' or '.join(CURVES)}"
            )
        if not fit.estimates["exponent"].value < 0:
            raise DataError(
                f"the curve of {name} does not fall",
                where,
                "choose x and y so that loss falls with compute",
            )
        if min(at, default=1.0) <= 0:
            raise DataError(
                f"{min(at):g} FLOPs have no logarithm", where, "give --at a number above 0"
            )
    low, high = max(a.lows[0], b.lows[0]), min(a.highs[0], b.highs[0])
    if not at and low >= high:
        raise DataError(
            f"{names[0]} and {names[1]} have no x in common",
            where,
            f"say where with --at, such as --at {min(a.highs[0], b.highs[0]):.3g}; it extrapolates",
        )
    return [_at(a, b, float(x), names) for x in at or np.geomspace(low, high, POINTS)]


def _at(a: Fit, b: Fit, x: float, names: tuple[str, str]) -> Leverage:
    u = a.centred(x)

    def log_ratio(theta_a: Array, theta_b: Array) -> Array:
        loss = a.law.predict(theta_a, u)[0][:, 0]
        if b.form == "power":
            level, slope, left = theta_b[:, 0], theta_b[:, 1], loss
        else:
            level, slope, left = theta_b[:, 1], theta_b[:, 2], loss - theta_b[:, 0]
        left = np.where(left > 0, left, np.nan)  # below B's irreducible term
        return b.centre[0] + (np.log(left) - level) / slope - np.log(x)

    ends = interval(log_ratio, [a.sample, b.sample], a.confidence)
    with np.errstate(all="ignore"):
        value, below, above = (float(end) for end in np.exp(ends))
    if not np.isfinite(value):
        value, below, above = np.inf, 0.0, np.inf
    outside = [(names[0], a, x), (names[1], b, value * x)]
    extrapolated = tuple(
        name for name, fit, c in outside if not 0.999 * fit.lows[0] <= c <= 1.001 * fit.highs[0]
    )
    return Leverage(x, float(a.predict(x)[0]), Estimate(value, below, above), extrapolated)
