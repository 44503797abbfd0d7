"""Numbers for people, and thinning: long curves in few points, wide tables in few columns. Pure
functions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

FLAT = 1e-6  # relative extent below which values count as one: labels could not tell them apart
SI = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def number(value: float | None, digits: int = 4) -> str:
    """A value for people: up to `digits` significant digits, `–` for none."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if 1e-3 <= abs(value) < 10**digits:
        return f"{value:.{digits}g}"
    if 10**digits <= abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:.{digits - 1}e}".replace("e+", "e").replace("e0", "e").replace("e-0", "e-")


def compact(value: float) -> str:
    """A large count in three digits: `2.3e11`."""
    return (
        number(value) if abs(value) < 1e9 else f"{value:.2e}".replace("e+", "e").replace("e0", "e")
    )


def tick_label(value: float, step: float = 0.0) -> str:
    """A tick: `20k`, `0.25`, `1e-5`, `2e18`. `step`, the distance of ticks, sets how many decimals
    are needed."""
    size = abs(value)
    if value == 0:
        return "0"
    if size >= 1e15 or size < 1e-3:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    for unit, letter in SI:
        if size >= unit:
            return f"{_decimals(value / unit, step / unit)}{letter}"
    return _decimals(value, step)


def _decimals(value: float, step: float) -> str:
    places = (
        max(0, -math.floor(math.log10(step) + 1e-9))
        if step
        else max(0, 2 - math.floor(math.log10(abs(value))))
    )
    text = f"{value:.{min(places, 6)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


@dataclass(frozen=True)
class Scale:
    """Values from `lo` to `hi` onto 0 … 1, linearly or by logarithm."""

    lo: float
    hi: float
    log: bool = False

    @classmethod
    def around(
        cls, values: np.ndarray, *, spread: float = 30.0, pad: float = 0.04, log: bool | None = None
    ) -> Scale:
        """Around all finite values. `log=None`: by logarithm if all are positive and span a factor
        of more than `spread`."""
        finite = values[np.isfinite(values)]
        if not len(finite):
            return cls(0.0, 1.0)
        lo, hi = float(finite.min()), float(finite.max())
        if log is None:
            log = lo > 0 and hi > spread * lo
        log = log and lo > 0
        flat = hi - lo <= FLAT * max(abs(lo), abs(hi))
        if log:
            margin = 1.1 if flat else (hi / lo) ** pad
            return cls(lo / margin, hi * margin, True)
        margin = (0.0 if not pad else abs(hi) * 0.1 or 1.0) if flat else (hi - lo) * pad
        return cls(lo - margin, hi + margin)

    def fraction(self, values: np.ndarray) -> np.ndarray:
        """Where values lie, 0 at `lo` and 1 at `hi`; one half on a scale without extent."""
        if self.hi <= self.lo:
            return np.where(np.isfinite(values), 0.5, np.nan)
        if self.log:
            return np.log(values / self.lo) / math.log(self.hi / self.lo)
        return (values - self.lo) / (self.hi - self.lo)


def thin(places: np.ndarray, values: np.ndarray, buckets: int) -> np.ndarray:
    """Indices of the finite points that draw a curve: the first, the last, and each bucket's lowest
    and highest.

    No spike is lost: the extremes of every bucket are among them, so are those of the curve.
    """
    finite = np.flatnonzero(np.isfinite(values))
    if len(finite) <= 2 * buckets:
        return finite
    bucket = _bucket(places[finite], buckets)
    order = np.lexsort((values[finite], bucket))
    edge = np.flatnonzero(np.diff(bucket[order]))
    lowest = order[np.concatenate([[0], edge + 1])]
    highest = order[np.concatenate([edge, [len(order) - 1]])]
    return finite[np.unique(np.concatenate([[0, len(finite) - 1], lowest, highest]))]


def bucket_means(
    places: np.ndarray, steps: np.ndarray, values: np.ndarray, buckets: int
) -> tuple[np.ndarray, np.ndarray]:
    """(mean step, mean value) of each bucket of `places` that has a finite value."""
    finite = np.isfinite(values)
    places, steps, values = places[finite], steps[finite], values[finite]
    if not len(steps):
        return steps.astype(float), values
    starts = np.flatnonzero(np.diff(_bucket(places, buckets), prepend=-1))
    counts = np.diff(np.append(starts, len(steps)))
    return np.add.reduceat(steps, starts) / counts, np.add.reduceat(values, starts) / counts


def _bucket(places: np.ndarray, buckets: int) -> np.ndarray:
    return (places - places[0]) * buckets // (places[-1] - places[0] + 1)


def columns(table: np.ndarray, steps: np.ndarray, count: int) -> np.ndarray:
    """A (rows, steps) table in at most `count` columns of equal width, from the first step to the
    last.

    A cell is its steps' value farthest from its row's median, so peaks and dips both survive; NaN
    where there is none. A column without a step repeats the one before: no reading was made since.
    """
    lo, hi = int(steps[0]), int(steps[-1])
    gap = int(np.median(np.diff(steps))) if len(steps) > 1 else 1
    count = max(1, min(count, (hi - lo) // gap + 1))
    place = (steps - lo) * count // (hi - lo + 1)
    median = np.array(
        [np.median(row[np.isfinite(row)]) if np.isfinite(row).any() else 0.0 for row in table]
    )
    distance = np.where(np.isfinite(table), np.abs(table - median[:, None]), -1.0)
    out = np.full((len(table), count), np.nan)
    filled = np.unique(place)
    for column, end in zip(filled, [*filled[1:], count]):
        inside = np.flatnonzero(place == column)
        best = inside[np.argmax(distance[:, inside], axis=1)]
        out[:, column:end] = table[np.arange(len(table)), best][:, None]
    return out


def merge_rows(table: np.ndarray, groups: list[list[int]]) -> np.ndarray:
    """One row for each group of rows: at every step the value farthest from the median of all."""
    finite = table[np.isfinite(table)]
    distance = np.where(
        np.isfinite(table), np.abs(table - (np.median(finite) if len(finite) else 0.0)), -1.0
    )
    at = np.arange(table.shape[1])
    return np.stack(
        [table[np.array(group)[np.argmax(distance[group], axis=0)], at] for group in groups]
    )


def knots(x: np.ndarray, y: np.ndarray, limit: int = 300) -> list[tuple[float, float]]:
    """A monotone piecewise linear curve by its corners, thinned to `limit` of them."""
    if len(x) <= 2:
        return list(zip(x.tolist(), y.tolist()))
    slope = np.diff(y) / np.diff(x)
    corner = np.flatnonzero(np.abs(np.diff(slope)) > 1e-9 * np.abs(slope[:-1])) + 1
    if len(corner) > limit:
        corner = corner[np.linspace(0, len(corner) - 1, limit).astype(int)]
    keep = np.unique(np.concatenate([[0], corner, [len(x) - 1]]))
    return list(zip(x[keep].tolist(), y[keep].tolist()))
