"""Panels drawn with matplotlib: inline SVG whose colors follow the page, and SVG and PNG files. The
same panels give the same bytes."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from archscale.report.scale import Scale, tick_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# After Okabe and Ito (2008), told apart with any color vision; yellow, too pale for lines on white,
# is left out.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#b5589a", "#8c6d00", "#3a9bd6", "#5b5b5b", "#7f3b08")
INK, SOFT, LINE = "#1b1f24", "#59636e", "#d8dde3"
VARIABLES = {INK: "--fg", SOFT: "--soft", LINE: "--line"} | {
    color: f"--g{i}" for i, color in enumerate(PALETTE)
}
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
MOST_CURVES = 8  # in a panel
SIZE = (4.4, 2.9)  # inches
FARTHEST = 5.0  # an interval that reaches so many times as far as all points is cut at the frame
LEGEND_LETTERS = 66  # in a row of a legend
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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = -(-len(panels) // columns)
    with _style():
        heights = [
            max(_height(panel) for panel in panels[row * columns : (row + 1) * columns])
            for row in range(rows)
        ]
        figure = Figure(figsize=(SIZE[0] * columns, sum(heights)), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(rows, columns, squeeze=False, height_ratios=heights).ravel()
        for axes, panel in zip(grid, panels):
            _panel(axes, panel)
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
    return figure


def _height(panel: Panel) -> float:
    if panel.y_names:
        return max(1.6, 0.9 + 0.21 * len(panel.y_names))
    named = sum(bool(curve.label) for curve in panel.curves)
    return SIZE[1] + (0.15 * -(-named // _legend_columns(panel)) + 0.05 if named > 1 else 0)


def _legend_columns(panel: Panel) -> int:
    longest = max((len(curve.label) for curve in panel.curves), default=0)
    return max(1, min(4, int(LEGEND_LETTERS // (longest + 5))))


def _style() -> AbstractContextManager[None]:
    import matplotlib

    style: dict[Any, Any] = {
        "svg.hashsalt": "archscale",
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.edgecolor": SOFT,
        "axes.labelcolor": INK,
        "axes.titlecolor": INK,
        "text.color": INK,
        "xtick.color": SOFT,
        "ytick.color": SOFT,
        "grid.color": LINE,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "path.simplify_threshold": 0.2,
    }
    return matplotlib.rc_context(style)


def _panel(axes: Axes, panel: Panel) -> None:
    if panel.log_x:
        axes.set_xscale("log")
    if panel.log_y:
        axes.set_yscale("log")
    for value, line in ((panel.vertical, axes.axvline), (panel.horizontal, axes.axhline)):
        if value is not None:
            line(value, color=SOFT, linestyle=":", linewidth=1)
    x_scale = _scale(
        [curve.x for curve in panel.curves],
        [curve.x_ends for curve in panel.curves],
        panel.log_x,
        panel.vertical,
    )
    if panel.y_range:
        y_scale = Scale(*panel.y_range, panel.log_y)
    elif panel.y_names:
        y_scale = Scale(-0.6, len(panel.y_names) - 0.4)
    else:
        bands = [curve.band or curve.y_ends for curve in panel.curves]
        y_scale = _scale([curve.y for curve in panel.curves], bands, panel.log_y, panel.horizontal)
    for curve in panel.curves:
        _curve(axes, curve, x_scale, y_scale)
    if panel.note:
        axes.text(
            0.99,
            0.99,
            panel.note,
            fontsize=7,
            color=SOFT,
            ha="right",
            va="top",
            transform=axes.transAxes,
        )
    axes.set_xlim(x_scale.lo, x_scale.hi)
    axes.set_ylim(*((y_scale.lo, y_scale.hi) if not panel.y_names else (y_scale.hi, y_scale.lo)))
    x_ticks = (
        [(v, tick_label(v)) for v in panel.x_ticks]
        if 1 < len(panel.x_ticks) <= 8
        else x_scale.ticks(5)
    )
    y_ticks = list(enumerate(panel.y_names)) if panel.y_names else y_scale.ticks(5)
    for axis, ticks in ((axes.xaxis, x_ticks), (axes.yaxis, y_ticks)):
        axis.set_ticks([value for value, _ in ticks], [text for _, text in ticks])
        axis.set_ticks([], minor=True)
    axes.tick_params(labelsize=8)
    axes.set_title(panel.title, fontsize=9.5, loc="left")
    axes.set_xlabel(panel.x, fontsize=8.5)
    axes.set_ylabel(panel.y, fontsize=8.5)
    axes.grid(linewidth=0.6)
    named = [curve for curve in panel.curves if curve.label]
    if len(named) > 1:  # below the plot: inside it would lie on points
        axes.legend(
            fontsize=7.5,
            frameon=False,
            loc="upper left",
            bbox_to_anchor=(-0.02, -0.17),
            ncols=_legend_columns(panel),
            columnspacing=1.2,
            handletextpad=0.4,
            borderpad=0,
            labelspacing=0.3,
        )


def _curve(axes: Axes, curve: Curve, x_scale: Scale, y_scale: Scale) -> None:
    color, alpha = curve.ink, curve.strength
    if curve.band is not None:
        # What lies far outside of the frame would only make the file longer, or overflow.
        edges = (
            np.clip(curve.band, y_scale.lo / 10, y_scale.hi * 10)
            if y_scale.log
            else np.asarray(curve.band)
        )
        axes.fill_between(curve.x, *edges, color=color, alpha=0.16 * alpha, linewidth=0)
    error: dict[str, Any] = {}
    bars = (("xerr", curve.x, curve.x_ends, x_scale), ("yerr", curve.y, curve.y_ends, y_scale))
    for name, values, ends, scale in bars:
        if ends is not None:  # an end without bound lies beyond the frame, where it is cut
            span = scale.hi - scale.lo
            reach = (
                (scale.lo / 2, scale.hi * 2) if scale.log else (scale.lo - span, scale.hi + span)
            )
            low, high = np.clip(ends, *reach)
            error[name] = np.nan_to_num(np.maximum([values - low, high - values], 0), nan=0.0)
    face = {"markerfacecolor": "none"} if curve.hollow else {}
    looks: dict[str, Any] = {
        "color": color,
        "alpha": alpha,
        "linestyle": curve.line or "none",
        "marker": curve.marker or None,
        "markersize": curve.size,
        "linewidth": 1.4,
        "label": curve.label or "_",
        **face,
    }
    if error:
        axes.errorbar(curve.x, curve.y, **error, elinewidth=1, capsize=2, **looks)
    else:
        axes.plot(curve.x, curve.y, **looks)


def _scale(
    values: Sequence[np.ndarray], ends: Sequence[Ends | None], log: bool, more: float | None
) -> Scale:
    """Around all points, and around ends of intervals as far as they do not press the points
    together."""
    points = np.concatenate([np.empty(0), *values, [] if more is None else [more]])
    points = points[np.isfinite(points) & ((points > 0) | (not log))]
    if not len(points):
        return Scale(0.1, 1.0, log)
    scale = Scale.around(points, pad=0.06, log=log)
    outer = np.concatenate(
        [np.empty(0), *(np.concatenate(pair) for pair in ends if pair is not None)]
    )
    outer = outer[np.isfinite(outer) & ((outer > 0) | (not log))]
    if log:
        outer = outer[(outer > scale.lo / FARTHEST) & (outer < scale.hi * FARTHEST)]
    return Scale.around(np.concatenate([points, outer]), pad=0.06, log=log)


def svg_text(figure: Figure) -> str:
    """The file."""
    with _style():
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": "archscale"})
    text = re.sub(r"\n\s*<metadata>.*?</metadata>", "", stream.getvalue(), flags=re.DOTALL)
    text = re.sub(r' id="(?!m|p)[A-Za-z]+[\w.]*_\d+"', "", text)  # of groups that nothing refers to
    text = re.sub(
        r"<!--.*?-->|\n\s*", lambda found: " " if found[0][0] == "\n" else "", text, flags=re.DOTALL
    )
    return re.sub(
        r"<[^>]*>", lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag[0]), text
    )  # a hundredth of a point is enough


def png_bytes(figure: Figure) -> bytes:
    with _style():
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


def intervals(found: Iterable[Any]) -> Ends:
    """Ends of estimates; NaN where there is none."""
    pairs = [(math.nan, math.nan) if one is None else (one.low, one.high) for one in found]
    return np.array([low for low, _ in pairs]), np.array([high for _, high in pairs])
