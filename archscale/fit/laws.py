"""The forms that a law can have: prediction with derivatives, starts of the fit, and the figures
that are reported.

A law works on centred logarithms u = ln x − mean ln x: in them its parameters are nearly
uncorrelated, and FLOPs of 1e21 are harmless.

B fits, n points, p parameters, c columns of x; θ (B, p), u (c, n).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
from scipy import stats

from archscale.fit.intervals import Estimate, Sample, interval, root_interval
from archscale.fit.least_squares import Array, Problem


class Law:
    """A form.

    Attributes:
        formula: for people.
        parameters: p.
        reported: figures that `report` returns, in order. Those that begin with "ln" are positive
            and multiplicative: their intervals are made in the logarithm.
        space: in which residuals are taken unless the settings say: log or linear.
        columns: c.
        positive: whether y has to be above 0.
        extrapolates: whether it is there to predict beyond its points.
    """

    formula: str
    parameters: int
    reported: tuple[str, ...]
    space: str = "log"
    columns: int = 1
    positive: bool = True
    extrapolates: bool = True

    def predict(self, theta: Array, u: Array) -> tuple[Array, Array]:
        """y (B, n) and its derivatives (B, n, p)."""
        raise NotImplementedError

    def starts(self, u: Array, y: Array) -> Array:
        """(any number, p): where to begin; y (n,)."""
        raise NotImplementedError

    def report(self, theta: Array, centre: Array) -> Array:
        """(B, figures), as in `reported`; centre (c,), mean ln x."""
        raise NotImplementedError

    def estimates(self, sample: Sample, centre: Array, confidence: float) -> dict[str, Estimate]:
        """The figures, by name without "ln", with their intervals."""
        estimates = {}
        for i, name in enumerate(self.reported):
            figure = interval(
                lambda theta, i=i: self.report(theta, centre)[:, i], sample, confidence
            )
            estimates[name.removeprefix("ln ")] = figure.exp() if name.startswith("ln ") else figure
        return estimates

    def problem(self, u: Array, y: Array, space: str) -> Problem:
        """The law fitted to y (n,) itself (linear) or to ln y (log)."""
        if space == "linear":
            return Problem(lambda theta: self.predict(theta, u), y)

        def logarithm(theta: Array) -> tuple[Array, Array]:
            prediction, jacobian = self.predict(theta, u)
            return np.log(prediction), jacobian / prediction[..., None]

        return Problem(logarithm, np.log(y))


class Power(Law):
    """y = A x^k. θ = (ln y at the centre, k)."""

    formula = "coefficient · x^exponent"
    parameters = 2
    reported = ("ln coefficient", "exponent")

    def predict(self, theta: Array, u: Array) -> tuple[Array, Array]:
        y = np.exp(theta[:, :1] + theta[:, 1:] * u)
        return y, np.stack([y, y * u], -1)

    def starts(self, u: Array, y: Array) -> Array:
        return _line(u[0], np.log(y)[None])

    def report(self, theta: Array, centre: Array) -> Array:
        return np.stack([theta[:, 0] - theta[:, 1] * centre[0], theta[:, 1]], -1)


class PowerIrreducible(Law):
    """y = E + A x^k, E of any sign: an interval that holds 0 says that no irreducible term is seen.

    θ = (E, ln (y − E) at the centre, k).
    """

    formula = "irreducible + coefficient · x^exponent"
    parameters = 3
    reported = ("irreducible", "ln coefficient", "exponent")

    def predict(self, theta: Array, u: Array) -> tuple[Array, Array]:
        power = np.exp(theta[:, 1:2] + theta[:, 2:] * u)
        return theta[:, :1] + power, np.stack([np.ones_like(power), power, power * u], -1)

    def starts(self, u: Array, y: Array) -> Array:
        below = np.array([1e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0])  # the lowest y, in ranges of y
        E = y.min() - below * max(np.ptp(y), 1e-12 * abs(y.max()))
        return np.concatenate([E[:, None], _line(u[0], np.log(y - E[:, None]))], 1)

    def report(self, theta: Array, centre: Array) -> Array:
        return np.stack([theta[:, 0], theta[:, 1] - theta[:, 2] * centre[0], theta[:, 2]], -1)


class QuadraticLog(Law):
    """y = minimum + curvature (ln x − ln optimum)². θ = coefficients of 1, u, u²."""

    formula = "minimum + curvature · (ln x − ln optimum)²"
    parameters = 3
    reported = ("ln optimum", "minimum", "curvature")
    space = "linear"
    positive = extrapolates = False

    def predict(self, theta: Array, u: Array) -> tuple[Array, Array]:
        powers = np.vander(u[0], 3, increasing=True)
        return theta @ powers.T, np.broadcast_to(powers, (len(theta), *powers.shape))

    def starts(self, u: Array, y: Array) -> Array:
        design = self.predict(np.zeros((1, self.parameters)), u)[1][0]
        return np.linalg.lstsq(design, y, rcond=None)[0][None]

    def report(self, theta: Array, centre: Array) -> Array:
        constant, slope, curvature = theta[:, :3].T
        with np.errstate(all="ignore"):
            lowest = -slope / (2 * curvature)
        return np.stack([centre[0] + lowest, constant + slope * lowest / 2, curvature], -1)

    def estimates(self, sample: Sample, centre: Array, confidence: float) -> dict[str, Estimate]:
        """The optimum is where the slope, θ_1 + 2 θ_2 (ln x − centre), is 0."""
        slope = np.array([[0.0, 1.0, -2 * centre[0]], [0.0, 0.0, 2.0]])
        optimum = root_interval(sample, slope, confidence)
        return super().estimates(sample, centre, confidence) | {"optimum": optimum.exp()}


class ShiftedQuadratic(QuadraticLog):
    """y = minimum + curvature (ln x − ln optimum)² + shift of the block; the shifts sum to 0.

    Points in blocks share errors: runs of one seed see the same initialization and data, so a seed
    shifts its whole bowl. The shift says nothing about where the optimum is, and much about how
    well the minimum is known.

    u has a second row, the number of the block; without it the shift is left out. θ = coefficients
    of 1, u, u², and all shifts but the last.
    """

    def __init__(self, blocks: int):
        self.blocks = blocks
        self.parameters = QuadraticLog.parameters + blocks - 1

    def predict(self, theta: Array, u: Array) -> tuple[Array, Array]:
        y, jacobian = super().predict(theta[:, :3], u)
        codes = np.zeros((u.shape[1], self.blocks - 1))
        if len(u) > 1:
            last = -np.ones(self.blocks - 1)  # minus the sum of the other shifts
            codes = np.vstack([np.eye(self.blocks - 1), last])[u[1].astype(int)]
        every = np.broadcast_to(codes, (len(theta), *codes.shape))
        return y + theta[:, 3:] @ codes.T, np.concatenate([jacobian, every], -1)

    def estimates(self, sample: Sample, centre: Array, confidence: float) -> dict[str, Estimate]:
        """The minimum is that of the mean block. Its interval takes the blocks for a sample of
        many: the variance of their mean is added to that of the bowl, with Student's t."""
        estimates = super().estimates(sample, centre, confidence)
        theta, covariance = sample.theta[0], sample.covariance[0, :3, :3]
        shifts = np.append(theta[3:], -theta[3:].sum())
        lowest = -theta[1] / (2 * theta[2])
        gradient = np.array([1.0, lowest, lowest**2])  # of the minimum
        error = np.sqrt(gradient @ covariance @ gradient + shifts.var(ddof=1) / self.blocks)
        value = estimates["minimum"].value
        low, high = stats.t.interval(confidence, self.blocks - 1, value, error)
        return estimates | {"minimum": Estimate(value, float(low), float(high))}


class Chinchilla(Law):
    """L(N, D) = E + A N^−α + B D^−β (arXiv:2203.15556, section 3.3), E of any sign.

    θ = (E, ln A, α, ln B, β), A and B at the centre.
    """

    formula = "E + A · N^−alpha + B · D^−beta"
    parameters = 5
    reported = ("E", "ln A", "alpha", "ln B", "beta", "N_exponent")
    columns = 2

    def predict(self, theta: Array, u: Array) -> tuple[Array, Array]:
        E, a, alpha, b, beta = (theta[:, i : i + 1] for i in range(5))
        by_n, by_d = np.exp(a - alpha * u[0]), np.exp(b - beta * u[1])
        y = E + by_n + by_d
        return y, np.stack([np.ones_like(y), by_n, -by_n * u[0], by_d, -by_d * u[1]], -1)

    def starts(self, u: Array, y: Array) -> Array:
        """For exponents on a grid, the other parameters by least squares of relative errors."""
        starts = []
        for alpha, beta in product((0.1, 0.2, 0.35, 0.6), repeat=2):
            terms = np.stack([np.ones_like(y), np.exp(-alpha * u[0]), np.exp(-beta * u[1])], -1)
            E, A, B = np.linalg.lstsq(terms / y[:, None], np.ones_like(y), rcond=None)[0]
            a, b = np.log(np.maximum([A, B], 0.01 * y.mean()))
            starts.append((E, a, alpha, b, beta))
        return np.array(starts)

    def report(self, theta: Array, centre: Array) -> Array:
        E, a, alpha, b, beta = theta.T
        with np.errstate(all="ignore"):
            share = beta / (alpha + beta)
        return np.stack([E, a + alpha * centre[0], alpha, b + beta * centre[1], beta, share], -1)


class JointQuadratic(Law):
    """y = minimum_g + curvature_g (ln x − ln A − k ln t)² for all groups g at once: their optima
    lie on a power law of t.

    u has three rows: ln x, ln t, both centred, and the number of the group. θ = (centred ln A, k, G
    minima, G curvatures).

    Args:
        start: (2 + 2 G,), θ from separate fits of the groups.
    """

    formula = "minimum_g + curvature_g · (ln x − ln coefficient − exponent · ln t)²"
    reported = ("ln coefficient", "exponent")
    space = "linear"
    columns = 3
    positive = extrapolates = False

    def __init__(self, start: Sequence[float]):
        self.start = np.array(start, dtype=float)
        self.parameters = len(self.start)

    def predict(self, theta: Array, u: Array) -> tuple[Array, Array]:
        G = self.parameters // 2 - 1
        group = u[2].astype(int)
        minimum, curvature = theta[:, 2 + group], theta[:, 2 + G + group]
        distance = u[0] - theta[:, :1] - theta[:, 1:2] * u[1]
        own = np.broadcast_to(np.eye(G)[group], (*distance.shape, G))
        pull = -2 * curvature * distance
        jacobian = [pull[..., None], (pull * u[1])[..., None], own, own * distance[..., None] ** 2]
        return minimum + curvature * distance**2, np.concatenate(jacobian, -1)

    def starts(self, u: Array, y: Array) -> Array:
        return self.start[None]

    def report(self, theta: Array, centre: Array) -> Array:
        return np.stack([theta[:, 0] + centre[0] - theta[:, 1] * centre[1], theta[:, 1]], -1)


LAWS: dict[str, Law] = {
    "power": Power(),
    "power_irreducible": PowerIrreducible(),
    "quadratic_log": QuadraticLog(),
    "chinchilla": Chinchilla(),
}


def _line(u: Array, z: Array) -> Array:
    """Least-squares (value at u = 0, slope) of each row of z (rows, n); u (n,) sums to 0."""
    return np.stack([z.mean(1), z @ u / max(float(u @ u), 1e-300)], -1)
