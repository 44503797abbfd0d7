"""Charts of curves over training, as data: `page.js` draws them, on whichever axes the reader
wants."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from archscale.report.scale import FLAT, bucket_means, number, thin

AXES = {"step": "steps", "tokens": "tokens", "flops": "training FLOPs"}
MANY = 2  # times as many points as buckets: a curve is then drawn with its running mean


@dataclass(frozen=True)
class Line:
    """One curve of a chart.

    Attributes:
        run: its number. steps, values: (n,), NaN where the run wrote a non-finite value.
        places: (n,), what the points are thinned by; None: the steps.
        color: number of a color. dash: 0 is solid. dots: for sparse readings.
    """

    name: str
    run: int
    steps: np.ndarray
    values: np.ndarray
    places: np.ndarray | None = None
    color: int = 0
    dash: int = 0
    dots: bool = False

    @property
    def last(self) -> str:
        finite = self.values[np.isfinite(self.values)]
        return number(float(finite[-1])) if len(finite) else "none"

    @property
    def constant(self) -> bool:
        """Whether it has one value everywhere, or none."""
        finite = self.values[np.isfinite(self.values)]
        return not len(finite) or bool(np.ptp(finite) <= FLAT * np.abs(finite).max())


@dataclass(frozen=True)
class Chart:
    """A figure of curves.

    Attributes:
        keys: of metrics.jsonl. axis: one of AXES, empty: the one that the reader chose.
        log: whether y is by logarithm; None: where the values span decades.
        top: where the frame ends; what lies higher is cut off. buckets: bound the points of a line.
    """

    title: str
    definition: str
    keys: Sequence[str]
    lines: Sequence[Line]
    buckets: int
    axis: str = ""
    log: bool | None = None
    top: float | None = None
    wide: bool = False

    def as_dict(self) -> dict[str, Any]:
        """For the script of the page."""
        return {
            "axis": self.axis,
            "log": self.log,
            "top": self.top,
            "curves": [_curve(line, self.buckets) for line in self.lines],
        }


def _curve(line: Line, buckets: int) -> dict[str, Any]:
    """Its extremes, the mean of every few steps beside them, `null` where it breaks."""
    places = line.steps if line.places is None else np.rint(line.places * 1e6).astype(np.int64)
    chosen = thin(places, line.values, buckets)
    missing = np.cumsum(~np.isfinite(line.values))[chosen]
    breaks = np.flatnonzero(np.diff(missing)) + 1
    digits = _digits(line.values[chosen])
    curve = {
        "run": line.run,
        "name": line.name,
        "look": f"c{line.color} d{line.dash}",
        "dots": line.dots,
        "x": np.insert(line.steps[chosen], breaks, line.steps[chosen][breaks]).tolist(),
        "y": [
            _rounded(y, digits) for y in np.insert(line.values[chosen], breaks, math.nan).tolist()
        ],
    }
    if not line.dots and np.isfinite(line.values).sum() > MANY * buckets:
        at, mean = bucket_means(places, line.steps, line.values, buckets // 2)
        curve["mean"] = {
            "x": np.rint(at).astype(int).tolist(),
            "y": [_rounded(y, digits) for y in mean.tolist()],
        }
    return curve


def _digits(values: np.ndarray) -> int:
    """Significant digits that resolve a ten-thousandth of the range of finite values."""
    if not len(values) or (size := float(np.abs(values).max())) == 0:
        return 1
    extent = float(values.max() / size - values.min() / size)
    return 5 if extent == 0 else min(16, 5 + max(0, math.ceil(-math.log10(extent))))


def _rounded(value: float, digits: int) -> float | None:
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None
