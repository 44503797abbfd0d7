"""Fits one law to one set of points: parameters, intervals, leave-one-out and extrapolation error.
Arrays in, arrays out.

    fit("power", tokens, best_lr).estimates["exponent"]          # Estimate(value=…, low=…, high=…)
    fit("chinchilla", [parameters, tokens], loss, Settings(loss="huber", delta=1e-3))  # as Hoffmann
                                                                                       et al. 2022

Tables with columns and groups are in `archscale.fit.groups`, the forms in `laws`, how
intervals are made in `intervals`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from archscale.errors import DataError
from archscale.fit.intervals import Sample, interval, root_interval
from archscale.fit.laws import LAWS, Law
from archscale.fit.least_squares import Array, Solution, covariance, solve

# × the errors' scale: 95 % as efficient as least squares where errors are Gaussian (Huber)
HUBER = 1.345
COLLINEAR = 1e-4  # 1 − R² of ln D on ln N below which the two terms of L(N, D) cannot be told apart
EXTRAPOLATED = (
    0.25  # share of the points, those of the largest x, that the extrapolation error leaves out
)


@dataclass(frozen=True)
class Settings:
    """How to fit.

    Attributes:
        space: residuals of ln y (log) or of y (linear); None: as the form's table row says.
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
class Estimate:
    """A figure and its interval; an end that the data do not bound is infinite."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Fit:
    """A fitted law.

    Attributes:
        form: its name.
        space: of the residuals, log or linear.
        points: n.
        estimates: by name, as in the form's `reported`.
        scale: standard deviation of the errors, of ln y in log space, else of y.
        leave_one_out: root mean square error of each point as predicted from all others; in log
            space relative, else in units of y; None where the others do not determine the law.
        extrapolation: likewise, of the quarter of points with the largest x (N · D of two) as
            predicted from the rest; None for bowls, which are not there to extrapolate.
        delta: of Huber's ρ, None under squares.
        lows, highs: (c,), the range of each x.
        sample: θ and its replicates.
        centre: (c,), mean ln x.
    """

    form: str
    space: str
    points: int
    estimates: dict[str, Estimate]
    scale: float
    leave_one_out: float | None
    extrapolation: float | None
    delta: float | None
    lows: Array
    highs: Array
    sample: Sample
    centre: Array
    law: Law
    confidence: float

    def predict(self, x: ArrayLike | Sequence[ArrayLike]) -> Array:
        """y at x, (n,) or (c, n)."""
        return self.law.predict(self.sample.theta[:1], self.centred(x))[0][0]

    def predict_interval(self, x: ArrayLike | Sequence[ArrayLike]) -> list[Estimate]:
        """The law's value (not a new measurement's) at each x, with intervals; x (n,) or (c, n)."""
        u = self.centred(x)
        positive = self.law.positive

        def figure(theta: Array, i: int) -> Array:
            y = self.law.predict(theta, u[:, i : i + 1])[0][:, 0]
            return np.log(y) if positive else y

        found = [
            interval(lambda theta, i=i: figure(theta, i), [self.sample], self.confidence)
            for i in range(u.shape[1])
        ]
        return [Estimate(*(map(_exp, ends) if positive else ends)) for ends in found]

    def centred(self, x: ArrayLike | Sequence[ArrayLike]) -> Array:
        """ln x − centre, (c, n)."""
        return np.log(np.atleast_2d(np.asarray(x, dtype=float))) - self.centre[:, None]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: an end without a bound is null."""
        return {
            "points": self.points,
            "parameters": {
                name: estimate_dict(estimate) for name, estimate in self.estimates.items()
            },
            "scale": self.scale,
            "leave_one_out": self.leave_one_out,
            "extrapolation": self.extrapolation,
            "error_unit": "relative" if self.space == "log" else "y",
            "delta": self.delta,
        }


def estimate_dict(estimate: Estimate) -> dict[str, float | None]:
    """For JSON: what is not finite is null."""
    ends = {"value": estimate.value, "low": estimate.low, "high": estimate.high}
    return {key: end if np.isfinite(end) else None for key, end in ends.items()}


def fit(
    form: str,
    x: ArrayLike | Sequence[ArrayLike],
    y: ArrayLike,
    settings: Settings | None = None,
    *,
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
        where: what errors name.
        names: of x's columns and then y, for errors.

    Raises:
        DataError: too few points, numbers that have no logarithm, or a law that the points do not
            determine.
    """
    settings = settings or Settings()
    law, X, Y = LAWS[form], np.atleast_2d(np.asarray(x, dtype=float)), np.asarray(y, dtype=float)
    if settings.nearest is not None:
        near = around_best(X, Y, settings.nearest)
        X, Y = X[:, near], Y[near]
    check_points(form, X, Y, settings, where, names)
    with np.errstate(all="ignore"):
        fitted = fit_law(form, law, X, Y, settings, where)
    check_law(fitted, where, names)
    return fitted


def fit_law(
    form: str,
    law: Law,
    X: Array,
    Y: Array,
    settings: Settings,
    where: str,
    centre: Array | None = None,
) -> Fit:
    """`fit` of a law whose points are checked already; `centre` where not all rows of X have
    logarithms."""
    if centre is None:
        centre = np.log(X).mean(1)
        u = np.log(X) - centre[:, None]
    else:
        u = X
    space = settings.space or law.space
    z, model = response(law, u, Y, space)
    solution, delta = _best(model, z, law.starts(u, Y), settings)
    scatter = z.std() + 1e-300
    unknown = covariance(solution, delta)
    if not solution.converged[0] or not np.isfinite(unknown).all():
        raise DataError(
            f"{form} does not settle: the points do not determine its {law.parameters} parameters",
            where,
            "add points over a wider range, or choose a form with fewer parameters",
        )
    scale = float(np.sqrt((solution.residuals[0] ** 2).sum() / (len(z) - law.parameters)))
    noise = _noise(solution, delta, settings, scale)
    if scale < 1e-10 * scatter:  # rounding: the points lie on the law
        noise = np.zeros_like(noise)
    again = solve(
        model, z - solution.residuals + noise, np.repeat(solution.theta, len(noise), 0), delta=delta
    )
    theta = np.where(again.converged[:, None], again.theta, np.nan)
    sample = Sample(
        np.concatenate([solution.theta, theta]), np.concatenate([unknown, covariance(again, delta)])
    )
    if scale < 1e-10 * scatter:
        sample = Sample(
            np.repeat(solution.theta, 1 + len(noise), 0), np.zeros_like(sample.covariance)
        )
    estimates = estimates_of(law, sample, centre, settings.confidence)
    return Fit(
        form,
        space,
        len(Y),
        estimates,
        scale,
        _leave_one_out(model, z, u, law, solution, delta),
        _extrapolation(model, z, u, law, solution, delta),
        delta,
        X.min(1),
        X.max(1),
        sample,
        centre,
        law,
        settings.confidence,
    )


def estimates_of(law: Law, sample: Sample, centre: Array, confidence: float) -> dict[str, Estimate]:
    """The law's figures with their intervals."""
    estimates = {}
    for i, reported in enumerate(law.reported):
        if reported.root and sample.theta[0] @ np.array(reported.root[1]) > 0:
            constant, slope = map(np.array, reported.root)
            ends = [end + centre[0] for end in root_interval(sample, constant, slope, confidence)]
        else:
            ends = [
                *interval(lambda theta, i=i: law.report(theta, centre)[:, i], [sample], confidence)
            ]
        estimates[reported.name] = Estimate(*(map(_exp, ends) if reported.logarithmic else ends))
    return estimates


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
    """Refuses points from which the form cannot be fitted.

    Raises:
        DataError: as `fit`.
    """
    law = LAWS[form]
    if len(X) != law.columns:
        what = "one column of x" if law.columns == 1 else f"{law.columns} columns of x"
        raise DataError(f"{form} takes {what}, got {len(X)}", where, f"give {law.columns}")
    logarithms = [
        *zip(names, X),
        *([(names[-1], Y)] if law.positive or settings.space == "log" else []),
    ]
    for name, values in logarithms:
        if (values <= 0).any():
            raise DataError(
                f"{form} takes the logarithm of {name}, and {np.count_nonzero(values <= 0)} of its"
                f" values are not above 0, such as {values[values <= 0][0]:g}",
                where,
                "leave those rows out, or choose another column",
            )
    n, distinct = len(Y), np.unique(X, axis=1).shape[1]
    least = needed(form, settings)
    if n < least or distinct < law.parameters:
        have = (
            f"{n} points"
            if n < least
            else f"{n} points at {distinct} different {' and '.join(names[:-1])}"
        )
        raise DataError(
            f"{have} are too few for {form}, which needs {least} at {law.parameters} different"
            " ones",
            where,
            "add runs, or choose a form with fewer parameters",
        )
    if law.columns == 2:
        for name, values in zip(names, X):
            if len(np.unique(values)) < 3:
                raise DataError(
                    f"{form} needs 3 different values of {name}, there are"
                    f" {len(np.unique(values))}",
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


def check_law(fitted: Fit, where: str, names: Sequence[str]) -> None:
    """Refuses a fitted law that says nothing about what was asked.

    Raises:
        DataError: a bowl without a minimum, or one outside the grid.
    """
    if fitted.form != "quadratic_log":
        return
    found = {name: estimate.value for name, estimate in fitted.estimates.items()}
    low, high, x, y = fitted.lows[0], fitted.highs[0], names[0], names[-1]
    if not found["curvature"] > 0:
        raise DataError(
            f"the bowl of {y} opens downwards, so it has no minimum over {x}",
            where,
            f"add runs on both sides of the best {x}, or more seeds",
        )
    if not low <= found["optimum"] <= high:
        side, direction = ("below", "lower") if found["optimum"] < low else ("above", "higher")
        raise DataError(
            f"the optimal {x} {found['optimum']:.4g} lies {side} the grid, which spans {low:.4g} to"
            f" {high:.4g}",
            where,
            f"add runs with a {direction} {x}",
        )


def _exp(value: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.exp(value))


def response(
    law: Law, u: Array, Y: Array, space: str
) -> tuple[Array, Callable[[Array], tuple[Array, Array]]]:
    """What is fitted, ln y or y (n,), and the law's prediction of it with derivatives."""
    if space == "linear":
        return Y, lambda theta: law.predict(theta, u)

    def model(theta: Array) -> tuple[Array, Array]:
        f, jacobian = law.predict(theta, u)
        return np.log(f), jacobian / f[..., None]

    return np.log(Y), model


def _best(
    model: Callable[[Array], tuple[Array, Array]], z: Array, starts: Array, settings: Settings
) -> tuple[Solution, float | None]:
    """The best of all starts, and δ. A δ that is not given follows the residuals' median until it
    settles."""
    delta = settings.delta if settings.loss == "huber" else None
    # A start far off can creep along a valley for long: all take a few steps, the best of them go
    # to the end.
    few = solve(model, z[None], starts, delta=delta, limit=12)
    starts = few.theta[np.argsort(few.objective)[:3]]
    solution = _least(solve(model, z[None], starts, delta=delta))
    if settings.loss != "huber" or settings.delta is not None:
        return solution, delta
    p = starts.shape[1]
    for _ in range(10):
        before = delta
        # Residuals' median is that of n − p errors: the p smallest belong to points that the law
        # passes by construction.
        size = np.sort(np.abs(solution.residuals[0]))[p - 1 :]
        delta = max(HUBER * 1.4826 * float(np.median(size)), 1e-12 * float(np.abs(z).max()))
        if before is not None and abs(delta / before - 1) < 1e-3:
            break
        solution = _least(
            solve(model, z[None], np.concatenate([solution.theta, starts]), delta=delta)
        )
    return solution, delta


def _least(solution: Solution) -> Solution:
    """The one fit of a batch with the smallest objective, one that converged if there is any."""
    best = np.lexsort((solution.objective, ~solution.converged))[:1]
    return Solution(*(getattr(solution, name)[best] for name in Solution.__dataclass_fields__))


def _noise(solution: Solution, delta: float | None, settings: Settings, scale: float) -> Array:
    """(replicates, n): errors of the replicates."""
    generator = np.random.default_rng(settings.seed)
    shape = (settings.replicates, solution.residuals.shape[1])
    if delta is None:
        return generator.normal(0.0, scale, shape)
    J = solution.jacobian[0]
    leverage = np.einsum("np,pq,nq->n", J, np.linalg.pinv(J.T @ J, hermitian=True, rcond=1e-15), J)
    errors = solution.residuals[0] / np.sqrt(np.maximum(1 - leverage, 1 / len(J)))
    return generator.choice(errors - errors.mean(), shape)


def _errors_without(
    model: Callable[[Array], tuple[Array, Array]],
    z: Array,
    u: Array,
    law: Law,
    solution: Solution,
    delta: float | None,
    left_out: Array,
) -> float | None:
    """Root mean square error of the points that each row of `left_out` (rows, n) leaves out,
    predicted from the others."""
    place = np.unique(u, axis=1, return_inverse=True)[1].ravel()  # numbers of the different x
    if any(len(np.unique(place[row == 0])) < law.parameters for row in left_out):
        return None
    start = np.repeat(solution.theta, len(left_out), 0)
    without = solve(model, z[None], start, delta=delta, weights=1.0 - left_out)
    errors = without.residuals[left_out == 1]
    if not without.converged.all() or not np.isfinite(errors).all():
        return None
    return float(np.sqrt((errors**2).mean()))


def _leave_one_out(
    model: Callable[[Array], tuple[Array, Array]],
    z: Array,
    u: Array,
    law: Law,
    solution: Solution,
    delta: float | None,
) -> float | None:
    return _errors_without(model, z, u, law, solution, delta, np.eye(len(z)))


def _extrapolation(
    model: Callable[[Array], tuple[Array, Array]],
    z: Array,
    u: Array,
    law: Law,
    solution: Solution,
    delta: float | None,
) -> float | None:
    if not law.extrapolates:
        return None
    size = u.sum(0)
    count = max(1, int(EXTRAPOLATED * len(z)))
    bound = np.sort(size)[-count]
    return _errors_without(
        model, z, u, law, solution, delta, (size >= bound - 1e-12).astype(float)[None]
    )
