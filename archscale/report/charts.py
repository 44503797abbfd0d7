"""Line charts as inline SVG with HTML labels, which keep their size however wide the chart is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from archscale.report.scale import Scale, bucket_means, number, thin

HEIGHT = 10_000  # of a plot, in SVG units: the resolution with which values are kept
AXES = {"step": "steps", "tokens": "tokens", "flops": "training FLOPs"}
FEW = 12  # readings up to which each is marked
MOST_EVENTS = 60  # lines on one chart; more are thinned
MANY = 2  # times as many points as buckets: a curve is then drawn with its running mean


@dataclass(frozen=True)
class Curve:
    """One curve of a chart.

    `x` is what the axis shows, one for each value. `color` 0 or 1 and up; `dash` 0 is solid; `dots`
    for sparse readings.
    """

    name: str
    run: int
    x: np.ndarray
    values: np.ndarray
    color: int = 0
    dash: int = 0
    dots: bool = False


@dataclass(frozen=True)
class Axis:
    """A horizontal axis: what it shows, over which values, and where events lie on it (run,
    position)."""

    kind: str  # of AXES
    scale: Scale
    events: tuple[tuple[int, float], ...] = ()

    def to_units(self, x: np.ndarray) -> np.ndarray:
        """Into SVG units: steps stay what they are, anything else is a share of `HEIGHT`."""
        return np.rint(x if self.kind == "step" else self.scale.fraction(x) * HEIGHT).astype(int)

    @property
    def box(self) -> tuple[int, int]:
        """Start and width in SVG units."""
        if self.kind != "step":
            return 0, HEIGHT
        return int(self.scale.lo), max(1, int(self.scale.hi - self.scale.lo))


def line_chart(
    title: str,
    definition: str,
    key: str,
    curves: Sequence[Curve],
    axis: Axis,
    *,
    buckets: int,
    wide: bool = False,
    scale: Scale | None = None,
    top: float | None = None,
) -> str:
    """A figure. `key` is the metrics key, or several separated by spaces. `buckets` bounds the
    points of each curve. `top`: where the frame ends; what lies higher is cut off."""
    values = np.concatenate([curve.values for curve in curves])
    scale = scale or Scale.around(values if top is None else np.minimum(values, top))
    start, width = axis.box
    bottom, left = scale.ticks(5 if wide else 4), _x_ticks(axis, wide)
    marks = [f"M{start} {_y(scale, value)}h{width}" for value, _ in bottom]
    lines = [f'<path class="grid" d="{"".join(marks)}"/>', event_marks(axis, HEIGHT)]
    for curve in curves:
        lines.append(_curve(curve, axis, scale, buckets))
    lasts = [(curve, curve.values[np.isfinite(curve.values)]) for curve in curves]
    legend = "".join(
        f'<span class="k c{curve.color} d{curve.dash}{" dots" if curve.dots else ""}">'
        f"{escape(curve.name) + ' ' if len(curves) > 1 else ''}"
        f"{number(float(last[-1])) if len(last) else 'none'}</span>"
        for curve, last in lasts
    )
    labels = "".join(
        f'<span style="top:{100 - 100 * float(scale.fraction(np.array(value))):.4g}%">{text}</span>'
        for value, text in bottom
    )
    data = f'data-x="{axis.kind}" data-lo="{scale.lo!r}" data-hi="{scale.hi!r}"' + (
        " data-log" if scale.log else ""
    )
    if axis.kind != "step":
        data += f' data-xlo="{axis.scale.lo!r}" data-xhi="{axis.scale.hi!r}"' + (
            " data-xlog" if axis.scale.log else ""
        )
    svg = (
        f'<svg class="line{"" if top is None else " clip"}" {data} viewBox="{start} 0 {width}'
        f' {HEIGHT}" preserveAspectRatio="none" role="img" aria-label="{escape(title)} by'
        f' {AXES[axis.kind]}">{"".join(lines)}</svg>'
    )
    notes = " (log)" if scale.log else ""
    return figure(
        title + notes,
        definition,
        key,
        legend,
        f'<div class="ys">{labels}</div>{svg}{left}',
        "wide" if wide else "",
    )


def figure(
    title: str, definition: str, key: str, legend: str, plot: str, classes: str = "", data: str = ""
) -> str:
    keys = " ".join(f"<code>{escape(part)}</code>" for part in key.split())
    about = f"{escape(definition)}{' ' if definition else ''}{keys}"
    return (
        f'<figure class="{classes}" data-key="{escape(key)}"{data}>'
        f"<figcaption><b>{escape(title)}</b>{legend}<small>{about}</small></figcaption>"
        f'<div class="plot">{plot}</div></figure>\n'
    )


def _x_ticks(axis: Axis, wide: bool) -> str:
    return x_labels(axis.scale.ticks(7 if wide else 4), axis.scale, AXES[axis.kind])


def x_labels(ticks: Iterable[tuple[float, str]], scale: Scale, name: str) -> str:
    """Labels under a plot; what lies at its ends stays inside."""
    spans = []
    for value, text in ticks:
        at = 100 * float(scale.fraction(np.array(float(value))))
        side = ' class="l"' if at < 4 else ' class="r"' if at > 96 else ""
        spans.append(f'<span{side} style="left:{at:.4g}%">{text}</span>')
    return f'<div class="xs">{"".join(spans)}<i>{name}</i></div>'


def event_marks(axis: Axis, height: int) -> str:
    """A vertical line at every event, or at `MOST_EVENTS` of many."""
    out = []
    for run in sorted({run for run, _ in axis.events}):
        places = np.unique(
            axis.to_units(np.array([x for r, x in axis.events if r == run], dtype=float))
        )
        if len(places) > MOST_EVENTS:
            places = places[np.linspace(0, len(places) - 1, MOST_EVENTS).astype(int)]
        out.append(
            f'<path class="event" data-run="{run}"'
            f' d="{"".join(f"M{x} 0V{height}" for x in places)}"/>'
        )
    return "".join(out)


def _y(scale: Scale, value: float) -> int:
    return round(HEIGHT * (1 - float(scale.fraction(np.array(float(value))))))


def _curve(curve: Curve, axis: Axis, scale: Scale, buckets: int) -> str:
    label = f'data-run="{curve.run}" data-name="{escape(curve.name)}"'
    look = f"c{curve.color} d{curve.dash}"
    places = axis.scale.fraction(curve.x) if axis.kind != "step" else curve.x
    order = np.rint(places * 1e6).astype(
        np.int64
    )  # what buckets are cut from: positions on the axis
    chosen = thin(order, curve.values, buckets)
    missing = np.cumsum(~np.isfinite(curve.values))
    y = np.rint(HEIGHT * (1 - scale.fraction(curve.values[chosen]))).astype(int)
    x = axis.to_units(curve.x[chosen])
    if curve.dots:
        return (
            f'<path class="dot {look}" {label} d="{"".join(f"M{a} {b}h0" for a, b in zip(x, y))}"/>'
        )
    raw = path(x, y, missing[chosen])
    if np.isfinite(curve.values).sum() <= FEW:
        points = "".join(f"M{a} {b}h0" for a, b in zip(x, y))
        return (
            f'<path class="{look}" {label} d="{raw}"/><path class="dot {look}"'
            f' data-run="{curve.run}" d="{points}"/>'
        )
    if np.isfinite(curve.values).sum() <= MANY * buckets:
        return f'<path class="{look}" {label} d="{raw}"/>'
    at, mean = bucket_means(order, curve.values, buckets // 2)
    mean_x = at / 1e6 if axis.kind == "step" else at / 1e6 * HEIGHT
    mean_y = np.rint(HEIGHT * (1 - scale.fraction(mean))).astype(int)
    smooth = path(np.rint(mean_x).astype(int), mean_y, np.zeros(len(mean)))
    return (
        f'<path class="raw {look}" {label} d="{raw}"/><path class="mean {look}"'
        f' data-run="{curve.run}" d="{smooth}"/>'
    )


def path(x: np.ndarray, y: np.ndarray, gap: np.ndarray) -> str:
    """A path of relative lines, which are short to write; a new piece wherever `gap` changes."""
    out, previous = [], (0, 0, None)
    for a, b, g in zip(x.tolist(), y.tolist(), gap.tolist()):
        if g != previous[2]:
            out.append(f"M{a} {b}l0 0")  # the line without length shows a point that stands alone
        else:
            dy = b - previous[1]
            out.append(f" {a - previous[0]}{'' if dy < 0 else ' '}{dy}")
        previous = (a, b, g)
    return "".join(out)
