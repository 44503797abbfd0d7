"""What the pages are made of: plain records of a sweep and of what its runs say together.

They are built elsewhere (`archscale.sweep.record`, `archscale.sweep.analysis`); here they are only
drawn. A run's record is in `archscale.report.read`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from archscale.errors import ArchscaleError
from archscale.fit.fit import Estimate, Fit
from archscale.fit.groups import FitRequest, Group, TableFits, text_of
from archscale.fit.leverage import Leverage
from archscale.fit.table import Cell, Table
from archscale.report.scale import number, tick_label

LR = "parameterization.base.lr"
NAMES = {
    LR: "base learning rate",
    "model.width": "width",
    "model.depth": "depth",
    "training.tokens": "tokens",
    "model.moe.balance_weight": "balance weight",
    "optimizer.weight_decay": "weight decay",
    "training.batch_tokens": "tokens a batch",
    "flops": "training FLOPs",
    "val_loss": "validation loss",
    "val_bits_per_byte": "validation bits per byte",
    "loss": "training loss",
}
POOR = 0.25  # leave-one-out error over the depth of a bowl from which on its parabola fits poorly
FAR_MINIMUM = 4.0  # factor beyond the grid up to which the minimum of a refused bowl is drawn
Key = tuple[Cell, ...]


@dataclass
class SweepRecord:
    """A sweep directory, read.

    Attributes:
        name: of the grid.
        grid: sweep.yaml without its runs.
        fits: that the grid asks for.
        values: of the grid's keys by name of run, planned runs too.
        table: a row for each finished run; `left_out` has all others with the reason.
        failed: reasons of runs that ended without success and are not tried again.
        environments: environment.json by name of run.
        warnings: what could not be read.
    """

    directory: Path
    name: str
    grid: dict[str, Any]
    fits: list[FitRequest]
    values: dict[str, dict[str, Any]]
    table: Table
    failed: dict[str, str]
    environments: dict[str, dict[str, Any]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def unfinished(self) -> dict[str, str]:
        """Reasons of runs that were not started, are still going on or were cut short."""
        return {name: reason for name, reason in self.table.left_out if name not in self.failed}


@dataclass(frozen=True)
class Axes:
    """The grid's keys, sorted; `labels` are those that name an arm, `y` is the loss that the report
    is about."""

    tuned: str | None
    arms: list[str]
    labels: list[str]
    scale: list[str]
    others: list[str]
    y: str | None

    @property
    def numbers(self) -> list[str]:
        return [*self.scale, *self.others]

    @property
    def cell(self) -> list[str]:
        """Keys that tell combinations apart, apart from the tuned one and the seed."""
        return [*self.arms, *self.numbers]

    def arm(self, row: Mapping[str, Cell]) -> str:
        """For people: values of text alone, others behind the end of their key."""
        values = [value_of(key, row.get(key)) for key in self.labels]
        return ", ".join(values) or str(row.get("optimizer.matrix.rule") or "all runs")


def name_of(key: str) -> str:
    """A key for people."""
    return NAMES.get(key) or key.rpartition(".")[2].replace("_", " ")


def value_of(key: str, value: Cell) -> str:
    """Such as `muonh`, `depth_mup true`, `width 64`."""
    if isinstance(value, str) and value not in ("true", "false"):
        return value
    text = tick_label(value) if isinstance(value, float) and abs(value) >= 1e5 else text_of(value)
    return f"{name_of(key) if isinstance(value, float) else key.rpartition('.')[2]} {text}"


def with_ends(estimate: Estimate, digits: int = 3) -> str:
    """Such as `-0.31 [-0.35, -0.27]`."""
    value, low, high = (
        end_text(end, digits) for end in (estimate.value, estimate.low, estimate.high)
    )
    return f"{value} [{low}, {high}]"


def end_text(value: float, digits: int) -> str:
    """A number; ∞ where the data set no bound."""
    if not math.isfinite(value):
        return "∞" if value > 0 else "−∞"
    return number(value, digits) if abs(value) < 1e5 else f"{value:.1e}"


@dataclass(frozen=True)
class GridFit:
    """One fit that a grid asks for, or why it was refused."""

    asked: FitRequest
    fits: TableFits | None
    refusal: ArchscaleError | None

    def as_dict(self) -> dict[str, Any]:
        """For fits.json."""
        asked = {"form": self.asked.form, "x": self.asked.x, "y": self.asked.y}
        fits = self.fits.as_dict() if self.fits else asked
        return fits | {"refused": self.refusal.as_dict() if self.refusal else None}


@dataclass
class Combination:
    """Runs that differ only in the tuned setting and in the seed.

    Attributes:
        key: values of `Axes.cell`.
        arm: its label.
        row: config and metrics at the best tuned value, means over seeds of numbers.
        x: tuned values, ascending; a single NaN where nothing is tuned.
        points: losses at each x, one for each seed; their number may differ.
        best: index into x of the lowest mean.
        bowl: the fit over the tuned setting; None where there is none to make.
    """

    key: Key
    arm: str
    row: dict[str, Cell]
    x: np.ndarray
    points: list[np.ndarray]
    best: int
    bowl: Group | None = None

    @property
    def means(self) -> np.ndarray:
        return np.array([values.mean() for values in self.points])

    @property
    def errors(self) -> np.ndarray:
        """Standard errors; NaN for a single seed."""
        return np.array(
            [v.std(ddof=1) / math.sqrt(len(v)) if len(v) > 1 else math.nan for v in self.points]
        )

    def has(self, group: Group) -> bool:
        """Whether all points of a fit are of this combination."""
        points = {(float(x), float(y)) for x, values in zip(self.x, self.points) for y in values}
        return points >= {(float(x), float(y)) for x, y in zip(group.x[0], group.y)}

    @property
    def fit(self) -> Fit | None:
        return self.bowl.fit if self.bowl else None

    @property
    def edge(self) -> str:
        """`lowest` or `highest` where the best value tried is at that end of several, else
        empty."""
        if len(self.x) < 2 or 0 < self.best < len(self.x) - 1:
            return ""
        return "highest" if self.best else "lowest"

    @property
    def optimum(self) -> Estimate | None:
        return self.fit.estimates["optimum"] if self.fit else None

    @property
    def notes(self) -> list[str]:
        """What to know of the optimum: at the edge of what was tried, uncertain, or not to be
        fitted."""
        notes = [f"the {self.edge} value tried is the best"] if self.edge else []
        if self.fit and self.optimum:
            low, high = self.fit.lows[0], self.fit.highs[0]
            beyond = not low <= self.optimum.low <= self.optimum.high <= high
            if beyond:
                notes.append("the interval reaches beyond the grid")
            error = self.fit.leave_one_out or 0.0  # relative in log space
            error *= self.loss if self.fit.space == "log" else 1.0
            poor = error > POOR * float(np.ptp(self.means))
            if poor:
                notes.append("the parabola fits poorly")
            near = min(5, len(self.x) - 1)  # with fewer than 4 values a parabola is not tested
            if (beyond or poor) and not self.edge and near > 3 and self.fit_to_all:
                notes.append(f"nearest: {near} in the grid's fit keeps to the values around it")
        return [*notes, self.bowl.refused.what] if self.bowl and self.bowl.refused else notes

    @property
    def fit_to_all(self) -> bool:
        """Whether the bowl was fitted to all values that were tried."""
        if self.fit is None:
            return False
        return (self.fit.lows[0], self.fit.highs[0]) == (self.x[0], self.x[-1])

    @property
    def parabola(self) -> tuple[np.ndarray, np.ndarray] | None:
        """(x, y) of a parabola through the means, out to its minimum, to show why a fit was
        refused; None where there is no such minimum within a factor of `FAR_MINIMUM`."""
        if self.fit or len(self.x) < 3:
            return None
        curvature, slope, _ = law = np.polyfit(np.log(self.x), self.means, 2)
        with np.errstate(over="ignore"):
            minimum = np.exp(-slope / (2 * curvature)) if curvature > 0 else math.nan
        low, high = min(self.x[0], minimum), max(self.x[-1], minimum)
        if not (self.x[0] <= FAR_MINIMUM * low and high <= FAR_MINIMUM * self.x[-1]):
            return None
        x = np.geomspace(low, high, 40)
        return x, np.polyval(law, np.log(x))

    @property
    def minimum(self) -> Estimate | None:
        return self.fit.estimates["minimum"] if self.fit else None

    @property
    def loss(self) -> float:
        """At its own best setting: the bowl's minimum, or the lowest mean of the seeds."""
        return self.minimum.value if self.minimum else float(self.means[self.best])


@dataclass(frozen=True)
class Drift:
    """How the optimum of one arm moves along one key.

    Attributes:
        along: the key.
        columns, key: the cell's other keys and their values.
        law: optimum = coefficient · t^exponent, or why not.
        reference: the exponent that the framework's own transfer rules leave to be seen; None where
            they say nothing.
    """

    along: str
    columns: list[str]
    key: Key
    arm: str
    label: str
    law: Group
    reference: float | None

    @property
    def exponent(self) -> Estimate | None:
        return self.law.fit.estimates["exponent"] if self.law.fit else None


@dataclass
class Analysis:
    """All that the page and the figures show.

    Attributes:
        combinations: with at least one finite loss.
        diverged: (run, reason) of finished runs without a usable loss.
        curves: power law of the loss over FLOPs for each arm and value of `Axes.others`; None where
            FLOPs hardly vary.
        leverage: (label, base label, points or the refusal).
        growth: power law over FLOPs of each indicator, by its key.
        unfitted: why nothing is known of the growth of further indicators, by their keys.
        constant: indicators that have one value everywhere, and that value.
        notes: what was refused altogether.
    """

    axes: Axes
    combinations: list[Combination]
    diverged: list[tuple[str, str]]
    fits: list[GridFit]
    drifts: list[Drift] = field(default_factory=list)
    curves: TableFits | None = None
    leverage: list[tuple[str, str, list[Leverage] | str]] = field(default_factory=list)
    indicators: list[str] = field(default_factory=list)
    growth: dict[str, TableFits] = field(default_factory=dict)
    unfitted: dict[str, str] = field(default_factory=dict)
    constant: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def arms(self) -> list[str]:
        return list(dict.fromkeys(member.arm for member in self.combinations))

    def curve_label(self, row: Mapping[str, Cell]) -> str:
        return label_in(self.axes, row, self.axes.others)

    def at_edge(self, *labels: str) -> str:
        """How many points of these curves lie at the edge of what was tried, so that a better
        setting may lie beyond."""
        points = [m for m in self.combinations if m.edge and self.curve_label(m.row) in labels]
        if not points:
            return ""
        are = "is" if len(points) == 1 else "are"
        return f"{len(points)} of the points {are} at the edge of what was tried"


def label_in(axes: Axes, row: Mapping[str, Cell], numbers: Sequence[str]) -> str:
    """An arm and the values of some numeric keys."""
    return ", ".join([axes.arm(row), *(value_of(key, row.get(key)) for key in numbers)])


def curve_names(analysis: Analysis, fits: TableFits) -> list[tuple[str, str, Group]]:
    """(arm, label, group) of each curve over FLOPs, in the order of arms that is everywhere."""
    named = []
    for group in fits.groups:
        key = dict(zip(fits.group, group.key))
        row = next(
            member.row
            for member in analysis.combinations
            if all(member.row[column] == value for column, value in key.items())
        )
        named.append((analysis.axes.arm(row), analysis.curve_label(row), group))
    return sorted(named, key=lambda name: analysis.arms.index(name[0]))
