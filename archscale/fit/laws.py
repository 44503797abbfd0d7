"""The forms that a law can have: prediction with derivatives, starts of the fit, and the parameters
that are reported.

A law works on centred logarithms u = ln x − mean ln x: in them its parameters are nearly
uncorrelated, and FLOPs of 1e21 are harmless.

B fits, n points, p parameters, c columns of x; θ (B, p), u (c, n).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from archscale.fit.least_squares import Array


@dataclass(frozen=True)
class Reported:
    """A figure of a law.

    Attributes:
        logarithmic: it is positive and multiplicative, so intervals are made in its logarithm.
        root: (constant, slope) if it is mean ln x + the root η of constant·θ + slope·θ η
            (`intervals.root_interval`).
    """

    name: str
    logarithmic: bool = False
    root: tuple[tuple[float, ...], tuple[float, ...]] | None = None


@dataclass(frozen=True)
class Law:
    """A form.

    Attributes:
        formula: for people.
        parameters: p.
        columns: c.
        space: in which residuals are taken unless told otherwise: log or linear.
        reported: what `report` returns, in order.
        positive: whether y has to be above 0.
        extrapolates: whether it is there to predict beyond its points.
    """

    formula: str
    parameters: int
    space: str
    reported: tuple[Reported, ...]
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
        """(B, figures): of `reported`, logarithmic ones as logarithms; centre (c,), mean ln x."""
        raise NotImplementedError


class Power(Law):
    """y = A x^k. θ = (ln y at the centre, k)."""

    def predict(self, theta: Array, u: Array) -> tuple[Array, Array]:
        f = np.exp(theta[:, :1] + theta[:, 1:] * u)
        return f, np.stack([f, f * u], -1)

    def starts(self, u: Array, y: Array) -> Array:
        return _line(u[0], np.log(y)[None])

    def report(self, theta: Array, centre: Array) -> Array:
        return np.stack([theta[:, 0] - theta[:, 1] * centre[0], theta[:, 1]], -1)


class PowerIrreducible(Law):
    """y = E + A x^k, E of any sign: an interval that holds 0 says that no irreducible term is
    seen."""

    def predict(self, theta: Array, u: Array) -> tuple[Array, Array]:
        power = np.exp(theta[:, 1:2] + theta[:, 2:] * u)
        return theta[:, :1] + power, np.stack([np.ones_like(power), power, power * u], -1)

    def starts(self, u: Array, y: Array) -> Array:
        below = np.array([1e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0])
        E = y.min() - below * max(y.max() - y.min(), 1e-12 * abs(y.max()))
        return np.concatenate([E[:, None], _line(u[0], np.log(y - E[:, None]))], 1)

    def report(self, theta: Array, centre: Array) -> Array:
        return np.stack([theta[:, 0], theta[:, 1] - theta[:, 2] * centre[0], theta[:, 2]], -1)


class QuadraticLog(Law):
    """y = minimum + curvature (ln x − ln optimum)². θ = coefficients of 1, u, u²."""

    def predict(self, theta: Array, u: Array) -> tuple[Array, Array]:
        powers = np.stack([np.ones_like(u[0]), u[0], u[0] ** 2], -1)
        return theta @ powers.T, np.repeat(powers[None], len(theta), 0)

    def starts(self, u: Array, y: Array) -> Array:
        return np.linalg.lstsq(np.vander(u[0], 3, increasing=True), y, rcond=None)[0][None]

    def report(self, theta: Array, centre: Array) -> Array:
        constant, slope, curvature = theta.T
        with np.errstate(all="ignore"):
            return np.stack(
                [
                    centre[0] - slope / (2 * curvature),
                    constant - slope**2 / (4 * curvature),
                    curvature,
                ],
                -1,
            )


class Chinchilla(Law):
    """L(N, D) = E + A N^−α + B D^−β (Hoffmann et al. 2022, section 3.3), E of any sign. θ = (E, ln
    A, α, ln B, β)."""

    def predict(self, theta: Array, u: Array) -> tuple[Array, Array]:
        E, a, alpha, b, beta = (theta[:, i : i + 1] for i in range(5))
        of_n, of_d = np.exp(a - alpha * u[0]), np.exp(b - beta * u[1])
        f = E + of_n + of_d
        return f, np.stack([np.ones_like(f), of_n, -of_n * u[0], of_d, -of_d * u[1]], -1)

    def starts(self, u: Array, y: Array) -> Array:
        found = []
        for alpha in (0.1, 0.2, 0.35, 0.6):
            for beta in (0.1, 0.2, 0.35, 0.6):
                terms = np.stack([np.ones_like(y), np.exp(-alpha * u[0]), np.exp(-beta * u[1])], -1)
                E, A, B = np.linalg.lstsq(terms / y[:, None], np.ones_like(y), rcond=None)[0]
                least = 0.01 * y.mean()
                found.append((E, np.log(max(A, least)), alpha, np.log(max(B, least)), beta))
        return np.array(found)

    def report(self, theta: Array, centre: Array) -> Array:
        E, a, alpha, b, beta = theta.T
        with np.errstate(all="ignore"):
            share = beta / (alpha + beta)
        return np.stack([E, a + alpha * centre[0], alpha, b + beta * centre[1], beta, share], -1)


@dataclass(frozen=True)
class JointQuadratic(Law):
    """y = minimum_g + curvature_g (ln x − ln A − k ln t)² for all groups g at once: their optima
    lie on a power law of t.

    u has three rows: ln x, ln t, both centred, and the number of the group. θ = (centred ln A, k, G
    minima, G curvatures).

    Attributes:
        first: (2 + 2 G,), the start, from separate fits of the groups.
    """

    first: Array = field(default_factory=lambda: np.empty(0))

    def predict(self, theta: Array, u: Array) -> tuple[Array, Array]:
        G = (theta.shape[1] - 2) // 2
        group = u[2].astype(int)
        apart = u[0] - theta[:, :1] - theta[:, 1:2] * u[1]
        curvature = theta[:, 2 + G :][:, group]
        f = theta[:, 2 : 2 + G][:, group] + curvature * apart**2
        own = (group[:, None] == np.arange(G)).astype(float)
        pull = -2 * curvature * apart
        minima = np.broadcast_to(own, (len(theta), *own.shape))
        return f, np.concatenate(
            [pull[..., None], (pull * u[1])[..., None], minima, own * apart[..., None] ** 2], -1
        )

    def starts(self, u: Array, y: Array) -> Array:
        return self.first[None]

    def report(self, theta: Array, centre: Array) -> Array:
        return np.stack([theta[:, 0] + centre[0] - theta[:, 1] * centre[1], theta[:, 1]], -1)


COEFFICIENT, EXPONENT = Reported("coefficient", True), Reported("exponent")

LAWS: dict[str, Law] = {
    "power": Power("coefficient · x^exponent", 2, "log", (COEFFICIENT, EXPONENT)),
    "power_irreducible": PowerIrreducible(
        "irreducible + coefficient · x^exponent",
        3,
        "log",
        (Reported("irreducible"), COEFFICIENT, EXPONENT),
    ),
    "quadratic_log": QuadraticLog(
        "minimum + curvature · (ln x − ln optimum)²",
        3,
        "linear",
        (
            Reported("optimum", True, root=((0, 1, 0), (0, 0, 2))),
            Reported("minimum"),
            Reported("curvature"),
        ),
        positive=False,
        extrapolates=False,
    ),
    "chinchilla": Chinchilla(
        "E + A · N^−alpha + B · D^−beta",
        5,
        "log",
        (
            Reported("E"),
            Reported("A", True),
            Reported("alpha"),
            Reported("B", True),
            Reported("beta"),
            Reported("N_exponent"),
        ),
        columns=2,
    ),
}


def joint_quadratic(first: Sequence[float]) -> JointQuadratic:
    """For (len(first) − 2) / 2 groups, starting at `first`."""
    return JointQuadratic(
        "minimum_g + curvature_g · (ln x − ln coefficient − exponent · ln t)²",
        len(first),
        "linear",
        (COEFFICIENT, EXPONENT),
        columns=3,
        positive=False,
        extrapolates=False,
        first=np.asarray(first, dtype=float),
    )


def _line(u: Array, z: Array) -> Array:
    """Least-squares (value at u = 0, slope) of each row of z (rows, n); u (n,) sums to 0."""
    return np.stack([z.mean(1), z @ u / max(float(u @ u), 1e-300)], -1)
