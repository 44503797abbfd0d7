"""Panels drawn with matplotlib: inline SVG whose colors follow the page, and SVG and PNG files. The
same panels give the same bytes."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from archscale.report.scale import Scale, tick_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# After Okabe and Ito (2008), told apart with any color vision; yellow, too pale for lines on white,
# is left out. `page.css` has them as --c0, --c1, …, and brighter ones for the dark.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#b5589a", "#8c6d00", "#3a9bd6", "#5b5b5b", "#7f3b08")
INK, SOFT, LINE = "#1b1f24", "#59636e", "#d8dde3"
VARIABLES = {INK: "--fg", SOFT: "--soft", LINE: "--line"} | {
    color: f"--c{number}" for number, color in enumerate(PALETTE)
}
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
MOST_CURVES = 8  # in a panel
SIZE = (4.9, 3.1)  # inches
FARTHEST = 5.0  # an interval that reaches so many times as far as all points is cut at the frame
LEGEND_LETTERS = 66  # in a row of a legend
STYLE: Any = {
    "svg.hashsalt": "archscale",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.labelsize": 8.5,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "legend.borderpad": 0,
    "legend.columnspacing": 1.2,
    "legend.handletextpad": 0.4,
    "legend.labelspacing": 0.3,
    "text.color": INK,
    "xtick.color": SOFT,
    "xtick.labelsize": 8,
    "ytick.color": SOFT,
    "ytick.labelsize": 8,
    "path.simplify_threshold": 0.2,
}
Ends = tuple[np.ndarray, np.ndarray]


@dataclass
class Curve:
    """Points (x, y), all (n,).

    Attributes:
        line: of matplotlib, empty for none. marker: likewise.
        color: number in PALETTE, or one of INK, SOFT. strength: opacity.
        x_ends, y_ends: lower and upper ends of error bars; NaN for none, infinite ends reach the
            frame.
        band: lower and upper edge of an area.
    """

    label: str
    x: np.ndarray
    y: np.ndarray
    line: str = ""
    marker: str = ""
    color: int | str = 0
    strength: float = 1.0
    hollow: bool = False
    size: float = 4.5
    x_ends: Ends | None = None
    y_ends: Ends | None = None
    band: Ends | None = None

    @property
    def ink(self) -> str:
        return self.color if isinstance(self.color, str) else PALETTE[self.color % len(PALETTE)]


@dataclass
class Panel:
    """One plot.

    Attributes:
        finding: what it shows in words, for those who do not see it.
        x_ticks: values to mark on the x axis, where there are few. y_names: names of y = 0, 1, …,
            from above.
        y_range: of the axis; None: around all points. note: in the corner.
        vertical: x of a reference line. horizontal: y of one.
    """

    title: str
    x: str
    y: str
    curves: list[Curve] = field(default_factory=list)
    finding: str = ""
    log_x: bool = True
    log_y: bool = False
    x_ticks: Sequence[float] = ()
    y_names: Sequence[str] = ()
    y_range: tuple[float, float] | None = None
    note: str = ""
    vertical: float | None = None
    horizontal: float | None = None


def draw(panels: Sequence[Panel], columns: int = 1) -> Figure:
    """Panels in rows of `columns`."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    heights = [max(map(_height, row)) for row in rows]
    with rc_context(STYLE):
        figure = Figure(figsize=(SIZE[0] * columns, sum(heights)), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights).ravel()
        for axes, panel in zip(grid, panels):
            _panel(axes, panel)
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
    return figure


def _height(panel: Panel) -> float:
    """In inches."""
    if panel.y_names:
        return max(1.6, 0.9 + 0.21 * len(panel.y_names))
    named = sum(bool(curve.label) for curve in panel.curves)
    return SIZE[1] + (0.15 * -(-named // _legend_columns(panel)) + 0.05 if named > 1 else 0)


def _legend_columns(panel: Panel) -> int:
    longest = max((len(curve.label) for curve in panel.curves), default=0)
    return max(1, min(4, LEGEND_LETTERS // (longest + 5)))


def _panel(axes: Axes, panel: Panel) -> None:
    x_scale, y_scale = _scales(panel)
    axes.set(
        title=panel.title,
        xlabel=panel.x,
        ylabel=panel.y,
        xscale="log" if x_scale.log else "linear",
        yscale="log" if y_scale.log else "linear",
        xlim=(x_scale.lo, x_scale.hi),
        ylim=(y_scale.hi, y_scale.lo) if panel.y_names else (y_scale.lo, y_scale.hi),
    )
    if panel.vertical is not None:
        axes.axvline(panel.vertical, color=SOFT, linestyle=":", linewidth=1)
    if panel.horizontal is not None:
        axes.axhline(panel.horizontal, color=SOFT, linestyle=":", linewidth=1)
    for curve in panel.curves:
        _curve(axes, curve, x_scale, y_scale)
    corner: dict[str, Any] = {"ha": "right", "va": "top", "transform": axes.transAxes}
    axes.text(0.99, 0.99, panel.note, fontsize=7, color=SOFT, **corner)
    few = [(x, tick_label(x)) for x in panel.x_ticks] if 1 < len(panel.x_ticks) <= 8 else []
    for axis, marks in (
        (axes.xaxis, few or ticks(x_scale)),
        (axes.yaxis, list(enumerate(panel.y_names)) or ticks(y_scale)),
    ):
        axis.set_ticks([], minor=True)
        axis.set_ticks([place for place, _ in marks], [text for _, text in marks])
    if sum(bool(curve.label) for curve in panel.curves) > 1:
        # Below the plot: inside it would lie on points.
        below: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (-0.02, -0.17)}
        axes.legend(ncols=_legend_columns(panel), **below)


def _scales(panel: Panel) -> tuple[Scale, Scale]:
    curves = panel.curves
    x_scale = _around(
        [curve.x for curve in curves],
        [curve.x_ends for curve in curves],
        panel.log_x,
        panel.vertical,
    )
    if panel.y_range:
        return x_scale, Scale(*panel.y_range, panel.log_y)
    if panel.y_names:
        return x_scale, Scale(-0.6, len(panel.y_names) - 0.4)
    ends = [curve.band or curve.y_ends for curve in curves]
    return x_scale, _around([curve.y for curve in curves], ends, panel.log_y, panel.horizontal)


def _around(
    values: Sequence[np.ndarray], ends: Sequence[Ends | None], log: bool, reference: float | None
) -> Scale:
    """Around all points, and around ends of intervals as far as they do not press the points
    together."""
    points = np.concatenate([[], *values, [] if reference is None else [reference]])
    points = points[np.isfinite(points) & ((points > 0) | (not log))]
    if not len(points):
        return Scale(0.1, 1.0, log)
    scale = Scale.around(points, pad=0.06, log=log)
    outer = np.concatenate([[], *(part for pair in ends if pair is not None for part in pair)])
    outer = outer[np.isfinite(outer) & ((outer > 0) | (not log))]
    if log:
        outer = outer[(outer > scale.lo / FARTHEST) & (outer < scale.hi * FARTHEST)]
    return Scale.around(np.concatenate([points, outer]), pad=0.06, log=log)


def ticks(scale: Scale, count: int = 5) -> list[tuple[float, str]]:
    """About `count` round values inside the scale, with labels."""
    from matplotlib.ticker import Locator, LogLocator, MaxNLocator

    decades = math.log10(scale.hi / scale.lo) if scale.log else 0.0
    if decades >= 0.9:
        digits = (1,) if decades > count / 1.5 else (1, 3) if decades > 1.5 else (1, 2, 5)
        locator: Locator = LogLocator(subs=digits, numticks=count + 2)
    else:
        locator = MaxNLocator(count + 2, steps=[1, 2, 5, 10])
    marks = np.asarray(locator.tick_values(scale.lo, scale.hi))
    marks = marks[(marks > 0) | (not scale.log)]
    places = marks[np.abs(scale.fraction(marks) - 0.5) <= 0.5 + 1e-9]
    step = places[1] - places[0] if decades < 0.9 and len(places) > 1 else 0.0
    return [(float(place), tick_label(float(place), float(step))) for place in places]


def _curve(axes: Axes, curve: Curve, x_scale: Scale, y_scale: Scale) -> None:
    looks: dict[str, Any] = {
        "color": curve.ink,
        "alpha": curve.strength,
        "linestyle": curve.line or "none",
        "marker": curve.marker or None,
        "markersize": curve.size,
        "linewidth": 1.4,
        "label": curve.label or "_",
        **({"markerfacecolor": "none"} if curve.hollow else {}),
    }
    if curve.band is not None:
        edges = np.clip(curve.band, *_reach(y_scale))
        axes.fill_between(
            curve.x, *edges, color=curve.ink, alpha=0.16 * curve.strength, linewidth=0
        )
    bars: dict[str, Any] = {
        "xerr": _bars(curve.x, curve.x_ends, x_scale),
        "yerr": _bars(curve.y, curve.y_ends, y_scale),
    }
    if any(lengths is not None for lengths in bars.values()):
        axes.errorbar(curve.x, curve.y, **bars, elinewidth=1, capsize=2, **looks)
    else:
        axes.plot(curve.x, curve.y, **looks)


def _bars(values: np.ndarray, ends: Ends | None, scale: Scale) -> np.ndarray | None:
    """Lengths of error bars (2, n), downwards and upwards."""
    if ends is None:
        return None
    low, high = np.clip(ends, *_reach(scale))
    return np.nan_to_num(np.maximum([values - low, high - values], 0), nan=0.0)


def _reach(scale: Scale) -> tuple[float, float]:
    """Beyond the frame, which cuts there: what lies far outside would make the file longer, or
    overflow."""
    if scale.log:
        return scale.lo / 10, scale.hi * 10
    span = scale.hi - scale.lo
    return scale.lo - span, scale.hi + span


def svg_text(figure: Figure) -> str:
    """The file."""
    from matplotlib import rc_context

    with rc_context(STYLE):
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": "archscale"})
    text = re.sub(r"\n\s*<metadata>.*?</metadata>", "", stream.getvalue(), flags=re.DOTALL)
    text = re.sub(r' id="(?!m|p)[A-Za-z]+[\w.]*_\d+"', "", text)  # of groups that nothing refers to
    text = re.sub(
        r"<!--.*?-->|\n\s*", lambda match: " " if match[0][0] == "\n" else "", text, flags=re.DOTALL
    )
    # A hundredth of a point is enough.
    return re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag[0]), text)


def png_bytes(figure: Figure) -> bytes:
    from matplotlib import rc_context

    with rc_context(STYLE):
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=130, metadata={"Software": None})
    return stream.getvalue()


def inline(svg: str, label: str, prefix: str) -> str:
    """For a page: colors as its variables, fonts as its own, ids that no other figure has."""
    from html import escape

    body = svg[svg.index("<svg") :]
    body = body.replace("fill: #ffffff", "fill: none")
    for color, variable in VARIABLES.items():
        body = body.replace(color, f"var({variable})")
    body = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", body)
    body = re.sub(r'((?:id="|href="#|url\(#))', rf"\1{prefix}", body)
    head = f'<svg class="figure" role="img" aria-label="{escape(label)}"'
    size = re.search(r'viewBox="[^"]*"', body)
    return re.sub(r"^<svg [^>]*>", f"{head} {size[0] if size else ''}>", body, count=1)


def intervals(estimates: Iterable[Any]) -> Ends:
    """Ends of estimates; NaN where there is none."""
    pairs = [(math.nan, math.nan) if e is None else (e.low, e.high) for e in estimates]
    return np.array([low for low, _ in pairs]), np.array([high for _, high in pairs])
