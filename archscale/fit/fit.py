"""Fits one law to one set of points: figures, intervals, leave-one-out and extrapolation error.
Arrays in, arrays out.

    fit("power", tokens, best_lr).estimates["exponent"]  # Estimate(value=…, low=…, high=…)
    # As arXiv:2203.15556, section 3.3:
    fit("chinchilla", [parameters, tokens], loss, Settings(loss="huber", delta=1e-3))

Tables with columns and groups are in `groups`, the forms in `laws`, how intervals are made in
`intervals`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from archscale.errors import DataError
from archscale.fit.intervals import Estimate, Sample, interval
from archscale.fit.laws import LAWS, Law, ShiftedQuadratic
from archscale.fit.least_squares import Array, Minima, Problem, covariance, minimize, refit

# × the errors' scale: 95 % as efficient as least squares where errors are Gaussian (Huber)
HUBER = 1.345
COLLINEAR = 1e-4  # 1 − R² of ln D on ln N below which the two terms of L(N, D) cannot be told apart
EXTRAPOLATED = 0.25  # share of the points, those of the largest x, to predict from the others
EXACT = 1e-10  # errors over the scatter of y, below which there are none but rounding


@dataclass(frozen=True)
class Settings:
    """How to fit.

    Attributes:
        space: residuals of ln y (log) or of y (linear); None: the law's own.
        loss: squares or huber.
        delta: where Huber's ρ turns linear, in units of the residual; None: 1.345 robust standard
            deviations.
        replicates: of the bootstrap.
        confidence: of the intervals.
        seed: of the replicates; fits that are combined need different ones.
        nearest: for quadratic_log, to how many different x around the best one to keep; None: all.
    """

    space: str | None = None
    loss: str = "squares"
    delta: float | None = None
    replicates: int = 999
    confidence: float = 0.95
    seed: int | tuple[int, ...] = 0
    nearest: int | None = None


@dataclass(frozen=True)
class Points:
    """What a law is fitted to.

    Attributes:
        u: (c, n) or more rows: ln x − centre; below, what a law takes besides, such as the number
            of a group.
        y: (n,).
        centre: (c,), mean ln x.
        lows, highs: (c,), the range of each x.
    """

    u: Array
    y: Array
    centre: Array
    lows: Array
    highs: Array

    @classmethod
    def at(cls, x: Array, y: Array, *numbers: NDArray[Any]) -> Points:
        """The points that the law is fitted to: x (c, n), y (n,) and further rows of u (n,)."""
        centre = np.log(x).mean(1)
        u = np.vstack([np.log(x) - centre[:, None], *numbers])
        return cls(u, y, centre, x.min(1), x.max(1))


@dataclass(frozen=True)
class Fit:
    """A fitted law.

    Attributes:
        space: of the residuals, log or linear.
        points: n.
        estimates: the law's figures, by name.
        scale: standard deviation of the errors, of ln y in log space, else of y.
        leave_one_out: root mean square error of each point as predicted from all others; in log
            space relative, else in units of y; None where the others do not determine the law.
        extrapolation: likewise, of the quarter of points with the largest x (N · D of two) as
            predicted from the rest; None for bowls, which are not there to extrapolate.
        delta: of Huber's ρ, None under squares.
        lows, highs: (c,), the range of each x.
        centre: (c,), mean ln x.
        sample: θ and its replicates.
    """

    form: str
    law: Law
    space: str
    points: int
    estimates: dict[str, Estimate]
    scale: float
    leave_one_out: float | None
    extrapolation: float | None
    delta: float | None
    lows: Array
    highs: Array
    centre: Array
    sample: Sample
    confidence: float

    def predict(self, x: ArrayLike | Sequence[ArrayLike]) -> Array:
        """y at x, (n,) or (c, n)."""
        return self.law.predict(self.sample.theta[:1], self.centred(x))[0][0]

    def predict_interval(self, x: ArrayLike | Sequence[ArrayLike]) -> list[Estimate]:
        """The law's value (not a new measurement's) at each x, with intervals; x (n,) or (c, n)."""
        law, positive = self.law, self.law.positive

        def figure(theta: Array, u: Array) -> Array:
            y = law.predict(theta, u)[0][:, 0]
            return np.log(y) if positive else y

        estimates = [
            interval(lambda theta, u=u: figure(theta, u), self.sample, self.confidence)
            for u in self.centred(x).T[..., None]
        ]
        return [estimate.exp() for estimate in estimates] if positive else estimates

    def centred(self, x: ArrayLike | Sequence[ArrayLike]) -> Array:
        """ln x − centre, (c, n)."""
        return np.log(np.atleast_2d(np.asarray(x, dtype=float))) - self.centre[:, None]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: an end without a bound is null."""
        return {
            "points": self.points,
            "parameters": {name: estimate.as_dict() for name, estimate in self.estimates.items()},
            "scale": self.scale,
            "leave_one_out": self.leave_one_out,
            "extrapolation": self.extrapolation,
            "error_unit": "relative" if self.space == "log" else "y",
            "delta": self.delta,
        }


def fit(
    form: str,
    x: ArrayLike | Sequence[ArrayLike],
    y: ArrayLike,
    settings: Settings | None = None,
    *,
    blocks: ArrayLike | None = None,
    block: str = "block",
    where: str = "the data",
    names: Sequence[str] = ("x", "y"),
) -> Fit:
    """Fits one of `LAWS`.

    Errors are taken to be independent and of one size in the fit's space. Under squares a
    replicate's errors are Gaussian, for which least squares is made; under huber they are drawn
    from the residuals, each divided by √(1 − leverage), since outliers belong into the replicates
    too.

    Args:
        x: (n,), or (c, n) for a form of c columns; above 0.
        y: (n,).
        blocks: with quadratic_log: n of them, such as seeds, each of which shifts y by an amount of
            its own (`laws.ShiftedQuadratic`).
        block: what they are called, for errors.
        where: what errors name.
        names: of x's columns and then y, for errors.

    Raises:
        DataError: too few points, numbers that have no logarithm, or a law that the points do not
            determine.
    """
    settings = settings or Settings()
    X, Y = np.atleast_2d(np.asarray(x, dtype=float)), np.asarray(y, dtype=float)
    labels = np.asarray(np.zeros(len(Y)) if blocks is None else blocks, dtype=object)
    if settings.nearest is not None:
        near = around_best(X, Y, settings.nearest)
        X, Y, labels = X[:, near], Y[near], labels[near]
    check_points(form, X, Y, settings, where, names)
    number = np.unique([*map(repr, labels)], return_inverse=True)[1]  # of each point's block
    law, points = LAWS[form], Points.at(X, Y)
    if number.any():
        law, points = ShiftedQuadratic(number.max() + 1), Points.at(X, Y, number)
        check_blocks(law, points, block, where, names[0])
    fitted = fit_law(form, law, points, settings, where)
    check_optimum(fitted, where, names)
    return fitted


def fit_law(form: str, law: Law, points: Points, settings: Settings, where: str) -> Fit:
    """`fit` of a law whose points are checked already.

    Raises:
        DataError: the points do not determine it.
    """
    u, y, n, space = points.u, points.y, len(points.y), settings.space or law.space
    with np.errstate(all="ignore"):
        problem, best = _minimum(law.problem(u, y, space), law.starts(u, y), settings)
        uncertainty = covariance(best, problem.delta)
        if not best.converged[0] or not np.isfinite(uncertainty).all():
            raise DataError(
                f"{form} does not settle: the points do not determine its {law.parameters}"
                " parameters",
                where,
                "add points over a wider range, or choose a form with fewer parameters",
            )
        scale = float(np.sqrt((best.residuals**2).sum() / (n - law.parameters)))
        if scale < EXACT * (problem.z.std() + 1e-300):
            theta = np.repeat(best.theta, 1 + settings.replicates, 0)
            sample = Sample(theta, np.zeros((len(theta), *uncertainty.shape[1:])))
        else:
            z = problem.z - best.residuals + _errors(problem, best, scale, settings)
            again = refit(problem, np.repeat(best.theta, len(z), 0), z)
            theta = np.where(again.converged[:, None], again.theta, np.nan)
            sample = Sample(
                np.concatenate([best.theta, theta]),
                np.concatenate([uncertainty, covariance(again, problem.delta)]),
            )
        size = u.sum(0)
        largest = size >= np.sort(size)[-max(1, int(EXTRAPOLATED * n))] - 1e-12
        return Fit(
            form,
            law,
            space,
            n,
            law.estimates(sample, points.centre, settings.confidence),
            scale,
            _error_without(np.eye(n, dtype=bool), problem, best, u),
            _error_without(largest[None], problem, best, u) if law.extrapolates else None,
            problem.delta if settings.loss == "huber" else None,
            points.lows,
            points.highs,
            points.centre,
            sample,
            settings.confidence,
        )


def around_best(x: Array, y: Array, count: int) -> NDArray[np.bool_]:
    """(n,) bool: the points at `count` neighbouring x, in the middle the best one; x (1, n).

    A bowl is a parabola near its bottom only: what lies far up its sides would move the optimum.
    """
    values = np.unique(x[0])
    if not len(values):
        return np.zeros(0, dtype=bool)
    best = lowest([y[x[0] == value] for value in values])
    return np.isin(x[0], values[window(best, count, len(values))])


def lowest(points: Sequence[Array]) -> int:
    """Which of several samples has the lowest mean, of those with at least half as many points as
    the largest one.

    Where only the best few have several seeds, the mean of a single one is no match for theirs.
    """
    most = max(len(values) for values in points)
    means = [values.mean() if 2 * len(values) >= most else np.inf for values in points]
    return int(np.argmin(means))


def window(best: int, count: int, length: int) -> slice:
    """`count` neighbours of `length` with `best` in the middle, moved inside at the ends."""
    first = min(max(0, best - (count - 1) // 2), max(0, length - count))
    return slice(first, first + count)


def needed(form: str, settings: Settings) -> int:
    """Points that a form asks for: one more than parameters, so that errors have a size; twice as
    many to see outliers."""
    parameters = LAWS[form].parameters
    return 2 * parameters if settings.loss == "huber" else parameters + 1


def check_points(
    form: str, X: Array, Y: Array, settings: Settings, where: str, names: Sequence[str]
) -> None:
    """Refuses points from which the form cannot be fitted."""
    law = LAWS[form]
    if len(X) != law.columns:
        columns = "one column of x" if law.columns == 1 else f"{law.columns} columns of x"
        raise DataError(f"{form} takes {columns}, got {len(X)}", where, f"give {law.columns}")
    logarithms = [*zip(names, X)]
    if law.positive or settings.space == "log":
        logarithms.append((names[-1], Y))
    for name, values in logarithms:
        if (bad := values[values <= 0]).size:
            raise DataError(
                f"{form} takes the logarithm of {name}, and {bad.size} of its values are not above"
                f" 0, such as {bad[0]:g}",
                where,
                "leave those rows out, or choose another column",
            )
    n, least, distinct = len(Y), needed(form, settings), np.unique(X, axis=1).shape[1]
    if n < least or distinct < law.parameters:
        spread = f" at {distinct} different {' and '.join(names[:-1])}" if n >= least else ""
        raise DataError(
            f"{n} points{spread} are too few for {form}, which needs {least} at {law.parameters}"
            " different ones",
            where,
            "add runs, or choose a form with fewer parameters",
        )
    if law.columns == 2:
        _check_plane(form, X, where, names)


def _check_plane(form: str, X: Array, where: str, names: Sequence[str]) -> None:
    """Refuses points (2, n) that do not span both directions."""
    for name, values in zip(names, X):
        if (distinct := len(np.unique(values))) < 3:
            raise DataError(
                f"{form} needs 3 different values of {name}, there are {distinct}",
                where,
                f"add runs with other {name}",
            )
    if 1 - np.corrcoef(np.log(X))[0, 1] ** 2 < COLLINEAR:
        raise DataError(
            f"{names[0]} and {names[1]} move together, so their terms cannot be told apart",
            where,
            f"add runs that change {names[1]} at fixed {names[0]}, or fit a power law of one of"
            " them",
        )


def check_optimum(fitted: Fit, where: str, names: Sequence[str]) -> None:
    """Refuses a bowl without a minimum, or with one outside the grid."""
    if fitted.form != "quadratic_log":
        return
    low, high, x, y = fitted.lows[0], fitted.highs[0], names[0], names[-1]
    if not fitted.estimates["curvature"].value > 0:
        raise DataError(
            f"the bowl of {y} opens downwards, so it has no minimum over {x}",
            where,
            f"add runs on both sides of the best {x}, or more seeds",
        )
    optimum = fitted.estimates["optimum"].value
    if not low <= optimum <= high:
        side, direction = ("below", "lower") if optimum < low else ("above", "higher")
        raise DataError(
            f"the optimal {x} {optimum:.4g} lies {side} the grid, which spans {low:.4g} to"
            f" {high:.4g}",
            where,
            f"add runs with a {direction} {x}",
        )


def check_blocks(law: ShiftedQuadratic, points: Points, block: str, where: str, x: str) -> None:
    """Refuses points that do not tell a bowl from the shifts of the blocks."""
    design = law.predict(np.zeros((1, law.parameters)), points.u)[1][0]
    if len(design) <= law.parameters or np.linalg.matrix_rank(design) < law.parameters:
        raise DataError(
            f"{len(design)} points in {law.blocks} different {block} are too few for a bowl and a"
            f" shift of each, which need {law.parameters + 1}",
            where,
            f"add runs, so that each {block} is at several {x}, or fit without it",
        )


def _minimum(problem: Problem, starts: Array, settings: Settings) -> tuple[Problem, Minima]:
    """The problem with its δ, and its minimum. A δ that is not given follows the residuals' median
    until it settles."""
    best = minimize(problem, starts)  # of squares
    if settings.loss != "huber":
        return problem, best
    if settings.delta is not None:
        problem = replace(problem, delta=settings.delta)
        return problem, minimize(problem, best.theta)
    for _ in range(10):
        # Residuals' median is that of n − p errors: the p smallest belong to points that the law
        # passes by construction.
        sizes = np.sort(np.abs(best.residuals[0]))[starts.shape[1] - 1 :]
        delta = float(max(HUBER * 1.4826 * np.median(sizes), 1e-12 * np.abs(problem.z).max()))
        settled = abs(delta / problem.delta - 1) < 1e-3
        problem = replace(problem, delta=delta)
        if settled:
            break
        best = minimize(problem, best.theta)
    return problem, best


def _errors(problem: Problem, best: Minima, scale: float, settings: Settings) -> Array:
    """Errors of the replicates, (replicates, n), as `fit` describes them."""
    generator = np.random.default_rng(settings.seed)
    shape = (settings.replicates, len(problem.z))
    if settings.loss == "squares":
        return generator.normal(0.0, scale, shape)
    leverage = np.diag(best.jacobian[0] @ np.linalg.pinv(best.jacobian[0]))
    errors = best.residuals[0] / np.sqrt(np.maximum(1 - leverage, 1 / len(problem.z)))
    return generator.choice(errors - errors.mean(), shape)


def _error_without(
    left_out: NDArray[np.bool_], problem: Problem, best: Minima, u: Array
) -> float | None:
    """Root mean square error of the points that each row of `left_out` (rows, n) leaves out,
    predicted from the others; None where these do not determine the law."""
    if any(np.unique(u[:, ~row], axis=1).shape[1] < best.theta.size for row in left_out):
        return None
    others = refit(problem, np.repeat(best.theta, len(left_out), 0), weights=1.0 - left_out)
    errors = others.residuals[left_out]
    if not others.converged.all() or not np.isfinite(errors).all():
        return None
    return float(np.sqrt((errors**2).mean()))
