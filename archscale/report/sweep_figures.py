"""The figures of a sweep, as panels: from an analysis, whatever its grid varied."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from archscale.fit.fit import Fit
from archscale.fit.table import Cell
from archscale.report.indicators import parse_key
from archscale.report.plot import INK, MARKERS, MOST_CURVES, Curve, Panel, intervals
from archscale.report.records import (
    Analysis,
    Combination,
    Drift,
    curve_names,
    label_in,
    name_of,
    value_of,
    with_ends,
)
from archscale.report.scale import number

MOST_PANELS = 24  # of a figure; more go into a second one
MOST_NAMES = 30  # in one plot of intervals
FAR = 8.0  # frame of a bowl: so many times as high as the median of its points above the lowest
STEPS = 40  # points of a drawn law
BEYOND = 4.0  # factor up to which a bowl is drawn beyond what was tried


@dataclass(frozen=True)
class SweepFigure:
    """A figure: file name without ending, section of the page, panels, how many of them in a row of
    the file."""

    name: str
    section: str
    panels: list[Panel]
    columns: int = 3


def make_figures(analysis: Analysis) -> list[SweepFigure]:
    """All that have something to show, in the order of the page."""
    figures: list[SweepFigure] = []
    if analysis.combinations:
        for make in (_flops, _bowls, _optima, _forest, _leverage, _stability, _others):
            figures += make(analysis)
    return [figure for figure in figures if any(panel.curves for panel in figure.panels)]


def _flops(analysis: Analysis) -> Iterator[SweepFigure]:
    fits = analysis.curves
    if fits is None:
        return
    y = name_of(str(analysis.axes.y))
    best = f" at each one's best {_tuned(analysis)}" if analysis.axes.tuned else ""
    panels = []
    for part in _chunks(curve_names(analysis, fits)):
        panel = Panel(f"{y[0].upper()}{y[1:]}{best}", "training FLOPs", y, log_y=True)
        words = []
        for arm, label, group in part:
            members = [
                member
                for member in analysis.combinations
                if analysis.curve_label(member.row) == label
            ]
            look = _look(analysis, arm, _place(analysis, members[0], analysis.axes.others))
            x = np.array([_float(member.row["flops"]) for member in members])
            losses = np.array([member.loss for member in members])
            law = ""
            if group.fit:
                law = f": exponent {with_ends(group.fit.estimates['exponent'])}"
                panel.curves.append(_law(group.fit, look, band=True))
            ends = intervals(member.minimum for member in members)
            panel.curves.append(Curve(label, x, losses, y_ends=ends, **look))
            words.append(f"{label}{law}, lowest {losses.min():.4f}")
        panel.finding = f"{panel.title} against training FLOPs. {'; '.join(words)}."
        panels.append(panel)
    yield SweepFigure("flops", "flops", panels, columns=2)


def _law(fit: Fit, look: dict[str, Any], band: bool = False) -> Curve:
    """A fitted law over the range of its points."""
    x = np.geomspace(fit.lows[0], fit.highs[0], STEPS)
    edges = intervals(fit.predict_interval(x)) if band else None
    return Curve("", x, fit.predict(x), "-", band=edges, **look | {"marker": ""})


def _bowls(analysis: Analysis) -> Iterator[SweepFigure]:
    if analysis.axes.tuned is None:
        return
    panels = []
    for key, members in _bowl_groups(analysis).items():
        numbers = analysis.axes.numbers[: 1 if key else 0]
        for part in _chunks(members):
            labels = [
                value_of(numbers[0], member.row[numbers[0]]) if numbers else member.arm
                for member in part
            ]
            places = [_place(analysis, member, numbers) for member in part]
            panels.append(_bowl(analysis, ", ".join(key), list(zip(labels, part, places))))
    for count, part in enumerate(_chunks(panels, MOST_PANELS), 1):
        yield SweepFigure(f"bowls{f'_{count}' if count > 1 else ''}", "bowls", part)


def _bowl_groups(analysis: Analysis) -> dict[tuple[str, ...], list[Combination]]:
    """Combinations that share a panel, by its title: those that differ in the first numeric key, or
    all, under an empty title, where there is none."""
    groups: dict[tuple[str, ...], list[Combination]] = {}
    for member in analysis.combinations:
        rest = [value_of(key, member.row[key]) for key in analysis.axes.numbers[1:]]
        key = (member.arm, *rest) if analysis.axes.numbers else ()
        groups.setdefault(key, []).append(member)
    return groups


def _bowl(
    analysis: Analysis, title: str, members: Sequence[tuple[str, Combination, int | None]]
) -> Panel:
    panel = Panel(title, _tuned(analysis), name_of(str(analysis.axes.y)))
    words = []
    for label, member, place in members:
        look = _look(analysis, member.arm, place, by_place=True)
        panel.curves += _points(label, member, look)
        if member.optimum:
            words.append(f"{label}: optimum {with_ends(member.optimum)}")
        else:
            tried = number(float(member.x[member.best]))
            words.append(f"{label}: no fitted optimum, best tried {tried}")
        words[-1] += "".join(f", {note}" for note in member.notes)
    panel.x_ticks = sorted({float(x) for _, member, _ in members for x in member.x})
    _frame(panel, [member for _, member, _ in members])
    panel.finding = (
        f"{panel.y} against {panel.x}{', ' + title if title else ''}. {'; '.join(words)}."
    )
    return panel


def _points(label: str, member: Combination, look: dict[str, Any]) -> Iterator[Curve]:
    """Seeds, their means, the parabola and its minimum."""
    plain = look | {"marker": ""}
    several = [values for values in member.points if len(values) > 1]
    if several:
        x = np.repeat(member.x, [len(v) if len(v) > 1 else 0 for v in member.points])
        yield Curve("", x, np.concatenate(several), **plain | {"marker": ".", "strength": 0.35})
    means, errors = member.means, member.errors
    ends = (means - errors, means + errors) if np.isfinite(errors).any() else None
    yield Curve(label, member.x, means, line="" if member.fit else ":", y_ends=ends, **look)
    if member.edge:
        best = slice(member.best, member.best + 1)
        ring = plain | {"marker": "o", "size": 10, "hollow": True}
        yield Curve("", member.x[best], means[best], **ring)
    if member.fit and member.optimum and member.minimum:
        yield _law(member.fit, look)
        low, high = member.fit.lows[0], member.fit.highs[0]
        # As far as the interval of the optimum reaches, so that the minimum is seen in the curve.
        for start, stop in (
            (max(member.optimum.low, low / BEYOND), low),
            (high, min(member.optimum.high, high * BEYOND)),
        ):
            if start < stop:
                x = np.geomspace(start, stop, STEPS // 2)
                yield Curve("", x, member.fit.predict(x), "--", **plain)
        star = look | {"marker": "*", "size": 9}
        x, y = np.array([member.optimum.value]), np.array([member.minimum.value])
        yield Curve("", x, y, x_ends=intervals([member.optimum]), **star)
    elif member.parabola is not None:
        yield Curve("", *member.parabola, "--", **plain | {"strength": 0.6})


def _frame(panel: Panel, members: Sequence[Combination]) -> None:
    """Runs that came apart would press the bowls flat: they lie above the frame."""
    lowest = [float(member.means.min()) for member in members]
    lows = lowest + [member.minimum.value for member in members if member.minimum]
    low, high = min(lows), max(float(member.means.max()) for member in members)
    rise = max(float(np.median(member.means) - member.means.min()) for member in members)
    frame = max(max(lowest) + FAR * rise - low, 1e-9)
    if high - low > 1.3 * frame:
        above = sum(int((member.means > low + frame).sum()) for member in members)
        panel.y_range = (low - 0.05 * frame, low + frame)
        panel.note = f"{above} above the frame"


def _optima(analysis: Analysis) -> Iterator[SweepFigure]:
    if analysis.axes.tuned is None:
        return
    for along in analysis.axes.numbers:
        rest = [key for key in analysis.axes.numbers if key != along]
        groups: dict[tuple[Cell, ...], list[Combination]] = {}
        for member in analysis.combinations:
            groups.setdefault(tuple(member.row[key] for key in rest), []).append(member)
        panels = [
            _optimum(analysis, along, ", ".join(map(value_of, rest, values)), arms, members)
            for values, members in groups.items()
            for arms in _chunks(analysis.arms)
        ]
        panels = [panel for panel in panels if panel.curves]
        for count, part in enumerate(_chunks(panels, MOST_PANELS), 1):
            yield SweepFigure(
                f"optimum_{_file(along)}{f'_{count}' if count > 1 else ''}", "optima", part
            )


def _optimum(
    analysis: Analysis, along: str, where: str, arms: Sequence[str], members: Sequence[Combination]
) -> Panel:
    x_name = name_of(along)
    panel = Panel(where or f"along {x_name}", x_name, f"optimal {_tuned(analysis)}", log_y=True)
    words = []
    for arm in arms:
        own = [member for member in members if member.arm == arm]
        if len({member.row[along] for member in own}) < 2:
            continue
        drift = _drift_of(analysis, along, arm, own)
        panel.curves += _arm_optima(arm, along, own, drift, _look(analysis, arm))
        known = drift.exponent if drift else None
        words.append(f"{arm}: exponent {with_ends(known)}" if known else f"{arm}: no law")
        if drift and drift.reference is not None and any(member.fit for member in own):
            words[-1] += f", expected {drift.reference:g}"
    panel.x_ticks = sorted({_float(member.row[along]) for member in members})
    panel.log_x = panel.x_ticks[0] > 0
    panel.finding = f"{panel.y} against {x_name}{', ' if where else ''}{where}. {'; '.join(words)}."
    return panel


def _arm_optima(
    arm: str, along: str, own: Sequence[Combination], drift: Drift | None, look: dict[str, Any]
) -> Iterator[Curve]:
    """Fitted optima, the best values tried where there is none, the law, the expected slope."""
    optima = [(_float(m.row[along]), m.optimum) for m in own if m.optimum]
    tried = [(_float(m.row[along]), m.x[m.best]) for m in own if not m.optimum and len(m.x) > 1]
    if optima:
        x, y = np.array([[t, optimum.value] for t, optimum in optima]).T
        ends = intervals(optimum for _, optimum in optima)
        yield Curve(arm, x, y, y_ends=ends, **look)
    if tried:
        x, y = np.array(tried).T
        yield Curve("" if optima else arm, x, y, **look | {"hollow": True, "strength": 0.7})
    if drift and drift.law.fit:
        yield _law(drift.law.fit, look, band=True)
    if drift and drift.reference is not None and optima:
        every = [_float(member.row[along]) for member in own]
        x = np.array([min(every), max(every)])
        middle = math.exp(np.mean([math.log(t) for t, _ in optima]))
        level = math.exp(np.mean([math.log(optimum.value) for _, optimum in optima]))
        line = look | {"marker": "", "strength": 0.6}
        yield Curve("", x, level * (x / middle) ** drift.reference, "--", **line)


def _drift_of(analysis: Analysis, along: str, arm: str, own: Sequence[Combination]) -> Drift | None:
    """The one that is of these combinations."""
    for drift in analysis.drifts:
        cell = dict(zip(drift.columns, drift.key))
        if (drift.along, drift.arm) == (along, arm) and any(
            all(member.row[key] == value for key, value in cell.items()) for member in own
        ):
            return drift
    return None


def _forest(analysis: Analysis) -> Iterator[SweepFigure]:
    panels = []
    for along in analysis.axes.numbers:
        known = [
            (drift, drift.exponent)
            for drift in analysis.drifts
            if drift.along == along and drift.exponent
        ]
        for part in _chunks(known, MOST_NAMES):
            title = f"along {name_of(along)}"
            panel = Panel(title, "exponent of the optimum", "", log_x=False, vertical=0.0)
            panel.y_names = [drift.label for drift, _ in part]
            for place, (drift, exponent) in enumerate(part):
                x, y = np.array([exponent.value]), np.array([float(place)])
                look = _look(analysis, drift.arm)
                panel.curves.append(Curve("", x, y, x_ends=intervals([exponent]), **look))
                if drift.reference:
                    bar = np.array([drift.reference])
                    panel.curves.append(Curve("", bar, y, marker="|", color=INK, size=9))
            words = [f"{drift.label}: {with_ends(exponent)}" for drift, exponent in part]
            panel.finding = f"Exponents {panel.title}: {'; '.join(words)}"
            panels.append(panel)
    if panels:
        yield SweepFigure("drift", "drift", panels, columns=2)


def _leverage(analysis: Analysis) -> Iterator[SweepFigure]:
    curves = [
        (name, base, usable)
        for name, base, points in analysis.leverage
        if not isinstance(points, str)
        and (usable := [point for point in points if math.isfinite(point.ratio.value)])
    ]
    panels = []
    for part in _chunks(curves):
        base = part[0][1]
        panel = Panel(
            f"over {base}", "training FLOPs", "times fewer FLOPs", log_y=True, horizontal=1.0
        )
        words = []
        for name, _, points in part:
            member = next(m for m in analysis.combinations if analysis.curve_label(m.row) == name)
            look = _look(analysis, member.arm, _place(analysis, member, analysis.axes.others))
            x, y = np.array([[point.x, point.ratio.value] for point in points]).T
            ends = intervals(point.ratio for point in points)
            panel.curves.append(Curve(name, x, y, "-", y_ends=ends, **look))
            words.append(
                f"{name}: {with_ends(points[0].ratio)} at {number(x[0])} FLOPs,"
                f" {with_ends(points[-1].ratio)} at {number(x[-1])}"
            )
        panel.finding = (
            f"How many times the FLOPs {base} needs for the same loss. {'; '.join(words)}."
        )
        panels.append(panel)
    if panels:
        yield SweepFigure("leverage", "leverage", panels, columns=2)


def _stability(analysis: Analysis) -> Iterator[SweepFigure]:
    if analysis.axes.scale:
        panels = [
            panel
            for name in analysis.indicators
            for panel in _against(analysis, name, "flops", analysis.axes.others)
        ]
        yield SweepFigure("stability", "stability", panels)


def _others(analysis: Analysis) -> Iterator[SweepFigure]:
    for along in analysis.axes.others:
        rest = [key for key in analysis.axes.numbers if key != along]
        names = [str(analysis.axes.y), *analysis.indicators]
        yield SweepFigure(
            f"by_{_file(along)}",
            "others",
            [panel for name in names for panel in _against(analysis, name, along, rest)],
        )


def _against(analysis: Analysis, name: str, along: str, rest: Sequence[str]) -> Iterator[Panel]:
    """Panels of the loss or of an indicator, a curve for each arm and value of `rest`."""
    is_loss = name == analysis.axes.y
    title = name_of(name) if is_loss else parse_key(name).title

    def value(member: Combination) -> float:
        return member.loss if is_loss else _float(member.row.get(name))

    groups: dict[str, list[Combination]] = {}
    for member in analysis.combinations:
        if math.isfinite(value(member)):
            groups.setdefault(label_in(analysis.axes, member.row, rest), []).append(member)
    for part in _chunks(list(groups.items())):
        panel = Panel(
            title[0].upper() + title[1:],
            name_of(along),
            title if is_loss else name.rpartition("/")[2],
        )
        words = []
        for label, members in part:
            members.sort(key=lambda member: _float(member.row[along]))
            x = np.array([_float(member.row[along]) for member in members])
            y = np.array([value(member) for member in members])
            several = along == "flops" and len(analysis.axes.scale) > 1
            sequence = len(x) == len(set(x)) and not several  # of sizes, along one key
            look = _look(analysis, members[0].arm, _place(analysis, members[0], rest))
            bars = intervals(member.minimum for member in members) if is_loss else None
            panel.curves.append(Curve(label, x, y, "-" if sequence else "", y_ends=bars, **look))
            words.append(f"{label}: {number(float(y.min()))} to {number(float(y.max()))}")
        _axes_of(panel, ticks=along != "flops", from_zero=not is_loss)
        panel.finding = f"{panel.title} against {name_of(along)}. {'; '.join(words)}."
        yield panel


def _axes_of(panel: Panel, ticks: bool, from_zero: bool) -> None:
    """Logarithms where values span decades; `from_zero`: whether it grows is seen from zero."""
    x, y = (np.concatenate([getattr(curve, axis) for curve in panel.curves]) for axis in "xy")
    panel.log_x = bool(x.min() > 0)
    panel.x_ticks = sorted(set(x.tolist())) if ticks else []
    panel.log_y = bool(y.min() > 0 and y.max() > 5 * y.min())
    if from_zero and not panel.log_y and y.min() >= 0:
        panel.y_range = (0.0, 1.08 * float(y.max()) or 1.0)


def _look(
    analysis: Analysis, arm: str, place: int | None = None, by_place: bool = False
) -> dict[str, Any]:
    """Color by arm, mark by the place among values where curves of an arm differ in one; color by
    place too where an arm is alone, in the sweep or (`by_place`) in the panel."""
    color = analysis.arms.index(arm)
    if place is None:
        return {"color": color, "marker": MARKERS[color % len(MARKERS)]}
    mark = MARKERS[place % len(MARKERS)]
    if by_place or len(analysis.arms) == 1:
        return {"color": place, "marker": mark}
    return {"color": color, "marker": mark, "strength": max(0.4, 1 - 0.12 * place)}


def _place(analysis: Analysis, member: Combination, keys: Sequence[str]) -> int | None:
    """Number of the values of `keys` among all, the largest first; None without keys."""
    if not keys:
        return None
    rows = (other.row for other in analysis.combinations)
    known = sorted({tuple(_float(row[key]) for key in keys) for row in rows}, reverse=True)
    return known.index(tuple(_float(member.row[key]) for key in keys))


def _chunks(items: Sequence[Any], size: int = MOST_CURVES) -> list[list[Any]]:
    """Parts of nearly equal length, of `size` at most."""
    count = -(-len(items) // size)
    ends = [len(items) * part // count for part in range(count + 1)] if count else [0]
    return [list(items[start:stop]) for start, stop in pairwise(ends)]


def _float(value: Cell) -> float:
    return value if isinstance(value, float) else math.nan


def _tuned(analysis: Analysis) -> str:
    return name_of(str(analysis.axes.tuned))


def _file(key: str) -> str:
    return key.rpartition(".")[2]
