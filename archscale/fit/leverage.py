"""Compute-efficiency leverage of one loss curve over another.

    leverage(C) = C_B / C, where L_B(C_B) = L_A(C)

how many times the FLOPs of A the law of B needs for the loss that A reaches with C FLOPs. HyperP's
1.58 at 6e21 FLOPs is this ratio against Muon.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from archscale.errors import DataError
from archscale.fit.fit import Fit
from archscale.fit.intervals import Estimate, interval
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

    def as_dict(self) -> dict[str, Any]:
        """For JSON: a ratio that is infinite is null."""
        start = {"x": self.x, "loss": self.loss}
        return start | self.ratio.as_dict() | {"extrapolated": list(self.extrapolated)}


def leverage(
    a: Fit, b: Fit, at: Sequence[float], names: tuple[str, str], where: str
) -> list[Leverage]:
    """Leverage of curve `a` over curve `b` at each of `at`, or at five points of the range that
    both cover.

    Raises:
        DataError: a form that is not a curve over one x, a curve that does not fall, an x without
            a logarithm, ranges without overlap.
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
        raise DataError(f"{min(at):g} FLOPs have no logarithm", where, "give --at a number above 0")
    low, high = max(a.lows[0], b.lows[0]), min(a.highs[0], b.highs[0])
    if not at and low >= high:
        raise DataError(
            f"{names[0]} and {names[1]} have no x in common",
            where,
            f"say where with --at, such as --at {high:.3g}; it extrapolates",
        )
    return [_at(a, b, float(x), names) for x in at or np.geomspace(low, high, POINTS)]


def _at(a: Fit, b: Fit, x: float, names: tuple[str, str]) -> Leverage:
    u, p = a.centred(x), a.law.parameters

    def log_ratio(theta: Array) -> Array:
        theta_b = theta[:, p:]
        loss = a.law.predict(theta[:, :p], u)[0][:, 0]
        irreducible = theta_b[:, 0] if b.form == "power_irreducible" else 0.0
        level, slope = theta_b[:, -2], theta_b[:, -1]
        reducible = np.where(loss > irreducible, loss - irreducible, np.nan)  # else never reached
        return b.centre[0] + (np.log(reducible) - level) / slope - np.log(x)

    ratio = interval(log_ratio, a.sample.beside(b.sample), a.confidence).exp()
    if not np.isfinite(ratio.value):
        ratio = Estimate(np.inf, 0.0, np.inf)
    used = [(names[0], a, x), (names[1], b, ratio.value * x)]
    extrapolated = tuple(
        name for name, fit, c in used if not 0.999 * fit.lows[0] <= c <= 1.001 * fit.highs[0]
    )
    return Leverage(x, float(a.predict(x)[0]), ratio, extrapolated)
