"""The figures of a sweep, as panels: from an analysis, whatever its grid varied."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from archscale.fit.fit import Estimate
from archscale.fit.table import Cell
from archscale.report.indicators import parse_key
from archscale.report.plot import INK, MARKERS, MOST_CURVES, Curve, Panel, intervals
from archscale.report.records import Analysis, Combination, Drift, curve_names, name_of, value_of
from archscale.report.scale import number

MOST_PANELS = 24  # of a figure; more go into a second one
FAR = 8.0  # frame of a bowl: so many times as high as the median of its points above the lowest
STEPS = 40  # points of a drawn law


@dataclass(frozen=True)
class FigureOf:
    """A figure: file name without ending, section of the page, caption, panels, how many of them in
    a row of the file."""

    name: str
    section: str
    caption: str
    panels: list[Panel]
    columns: int = 3


def make_figures(found: Analysis) -> list[FigureOf]:
    """All that have something to show, in the order of the page."""
    figures: list[FigureOf] = []
    if found.combinations:
        for make in (_flops, _bowls, _optima, _forest, _leverage, _stability, _others):
            figures += make(found)
    return [figure for figure in figures if any(panel.curves for panel in figure.panels)]


def with_ends(estimate: Estimate, digits: int = 3) -> str:
    """Such as `-0.31 [-0.35, -0.27]`."""
    return (
        f"{end_text(estimate.value, digits)} [{end_text(estimate.low, digits)},"
        f" {end_text(estimate.high, digits)}]"
    )


def end_text(value: float, digits: int) -> str:
    """A number; ∞ where the data set no bound."""
    if not math.isfinite(value):
        return "∞" if value > 0 else "−∞"
    return number(value, digits) if abs(value) < 1e5 else f"{value:.1e}"


def _flops(found: Analysis) -> Iterator[FigureOf]:
    fits = found.curves
    if fits is None:
        return
    y = name_of(str(found.axes.y))
    groups = curve_names(found, fits)
    panels = []
    for part in _chunks(groups):
        panel = Panel(
            f"{y[0].upper()}{y[1:]} at each one's best {_tuned(found)}" if found.axes.tuned else y,
            "training FLOPs",
            y,
            log_y=True,
        )
        words = []
        for arm, label, group in part:
            members = [one for one in found.combinations if found.curve_label(one.row) == label]
            look = _look(found, arm, _place(found, members[0], found.axes.others))
            x = np.array([_float(one.row["flops"]) for one in members])
            losses, ends = (
                np.array([one.loss for one in members]),
                intervals(one.minimum for one in members),
            )
            told = label
            if group.fit:
                told += f": exponent {with_ends(group.fit.estimates['exponent'])}"
                at = np.geomspace(group.fit.lows[0], group.fit.highs[0], STEPS)
                band = intervals(group.fit.predict_interval(at))
                panel.curves.append(
                    Curve("", at, group.fit.predict(at), "-", band=band, **look | {"marker": ""})
                )
            panel.curves.append(Curve(label, x, losses, y_ends=ends, **look))
            words.append(f"{told}, lowest {losses.min():.4f}")
        panel.finding = f"{panel.title} against training FLOPs. {'; '.join(words)}."
        panels.append(panel)
    yield FigureOf(
        "flops",
        "flops",
        "A point is a combination at its own best setting, with the interval of its bowl's minimum;"
        " lines are power laws with the interval of the law as a band.",
        panels,
        columns=2,
    )


def _bowls(found: Analysis) -> Iterator[FigureOf]:
    if found.axes.tuned is None:
        return
    numbers = found.axes.numbers
    panels = []
    if numbers:
        first, rest = numbers[0], numbers[1:]
        keys = dict.fromkeys(
            (one.arm, *(one.row[key] for key in rest)) for one in found.combinations
        )
        for key in keys:
            members = [
                one for one in found.combinations if (one.arm, *(one.row[k] for k in rest)) == key
            ]
            title = ", ".join([members[0].arm, *(value_of(k, members[0].row[k]) for k in rest)])
            for part in _chunks(members):
                panels.append(
                    _bowl(
                        found,
                        title,
                        [
                            (value_of(first, one.row[first]), one, _place(found, one, [first]))
                            for one in part
                        ],
                    )
                )
    else:
        for part in _chunks(found.combinations):
            panels.append(_bowl(found, "", [(one.arm, one, None) for one in part]))
    for count, part in enumerate(_chunks(panels, MOST_PANELS), 1):
        yield FigureOf(
            f"bowls{f'_{count}' if count > 1 else ''}",
            "bowls",
            "Small dots are seeds, marks their mean ± standard error, curves the fitted parabola in"
            " the logarithm, stars its minimum with the interval of the optimum. A ring around the"
            " best mark: it lies at the edge of the grid.",
            part,
        )


def _bowl(
    found: Analysis, title: str, members: Sequence[tuple[str, Combination, int | None]]
) -> Panel:
    panel = Panel(title, _tuned(found), name_of(str(found.axes.y)))
    words, lows, highs = [], [], []
    for label, one, place in members:
        look = _look(found, one.arm, place)
        plain = look | {"marker": ""}
        seeds = [(x, y) for x, values in zip(one.x, one.points) if len(values) > 1 for y in values]
        if seeds:
            xs, ys = np.array(seeds).T
            panel.curves.append(
                Curve("", xs, ys, **look | {"marker": ".", "size": 2.5, "strength": 0.45})
            )
        means, errors = one.means, one.errors
        ends = (means - errors, means + errors) if np.isfinite(errors).any() else None
        panel.curves.append(
            Curve(label, one.x, means, line="" if one.fit else ":", y_ends=ends, **look)
        )
        if one.edge:
            best = slice(one.best, one.best + 1)
            panel.curves.append(
                Curve(
                    "",
                    one.x[best],
                    means[best],
                    **plain | {"marker": "o", "size": 10, "hollow": True},
                )
            )
        lows += [float(means.min())]
        highs += [float(np.median(means) - means.min())]
        if one.fit and one.optimum and one.minimum:
            at = np.geomspace(one.fit.lows[0], one.fit.highs[0], STEPS)
            panel.curves.append(Curve("", at, one.fit.predict(at), "-", **plain))
            star, lowest = np.array([one.optimum.value]), np.array([one.minimum.value])
            panel.curves.append(
                Curve(
                    "",
                    star,
                    lowest,
                    x_ends=intervals([one.optimum]),
                    **look | {"marker": "*", "size": 9},
                )
            )
            lows += [one.minimum.value]
            words.append(f"{label}: optimum {with_ends(one.optimum)}")
        else:
            words.append(f"{label}: no fitted optimum, best tried {number(float(one.x[one.best]))}")
        words[-1] += "".join(f", {note}" for note in one.notes)
    panel.x_ticks = sorted({float(x) for _, one, _ in members for x in one.x})
    low, high = min(lows), max(float(one.means.max()) for _, one, _ in members)
    frame = max(max(one.means.min() for _, one, _ in members) + FAR * max(highs) - low, 1e-9)
    if high - low > 1.3 * frame:  # runs that came apart would press the bowls flat
        above = sum(int((one.means > low + frame).sum()) for _, one, _ in members)
        panel.y_range = (low - 0.05 * frame, low + frame)
        panel.note = f"{above} above the frame"
    panel.finding = (
        f"{panel.y} against {panel.x}{', ' + title if title else ''}. {'; '.join(words)}."
    )
    return panel


def _optima(found: Analysis) -> Iterator[FigureOf]:
    if found.axes.tuned is None:
        return
    for along in found.axes.numbers:
        rest = [key for key in found.axes.numbers if key != along]
        keys = dict.fromkeys(tuple(one.row[key] for key in rest) for one in found.combinations)
        panels = [
            _optimum(
                found,
                along,
                [value_of(k, v) for k, v in zip(rest, key)],
                part,
                _members(found, rest, key),
            )
            for key in keys
            for part in _chunks(found.arms)
        ]
        for count, part in enumerate(
            _chunks([panel for panel in panels if panel.curves], MOST_PANELS), 1
        ):
            yield FigureOf(
                f"optimum_{_file(along)}{f'_{count}' if count > 1 else ''}",
                "optima",
                f"Optimal {_tuned(found)} against {name_of(along)}: minima of the bowls with"
                " intervals, and the power law through them. Hollow: no bowl could be fitted, the"
                " best value tried. Dashed: the slope that the parameterization's own rules"
                " expect.",
                part,
            )


def _members(found: Analysis, rest: Sequence[str], key: tuple[Cell, ...]) -> list[Combination]:
    return [one for one in found.combinations if tuple(one.row[k] for k in rest) == key]


def _optimum(
    found: Analysis,
    along: str,
    told: list[str],
    arms: Sequence[str],
    members: Sequence[Combination],
) -> Panel:
    x_name = name_of(along)
    panel = Panel(
        ", ".join(told) or f"along {x_name}", x_name, f"optimal {_tuned(found)}", log_y=True
    )
    words = []
    for arm in arms:
        own = [one for one in members if one.arm == arm]
        drift = next(
            (
                d
                for d in found.drifts
                if d.along == along and d.arm == arm and _belongs(found, d, own)
            ),
            None,
        )
        look = _look(found, arm)
        fitted, rest = (
            [one for one in own if one.fit],
            [one for one in own if not one.fit and len(one.x) > 1],
        )
        if len({one.row[along] for one in own}) < 2:
            continue
        if fitted:
            x, y = np.array(
                [[_float(one.row[along]), one.optimum.value] for one in fitted if one.optimum]
            ).T
            panel.curves.append(
                Curve(arm, x, y, y_ends=intervals(one.optimum for one in fitted), **look)
            )
        if rest:
            x, y = np.array([[_float(one.row[along]), float(one.x[one.best])] for one in rest]).T
            panel.curves.append(
                Curve("" if fitted else arm, x, y, **look | {"hollow": True, "strength": 0.7})
            )
        law = drift.law.fit if drift else None
        if law and drift and drift.exponent:
            at = np.geomspace(law.lows[0], law.highs[0], STEPS)
            panel.curves.append(
                Curve(
                    "",
                    at,
                    law.predict(at),
                    "-",
                    band=intervals(law.predict_interval(at)),
                    **look | {"marker": ""},
                )
            )
            words.append(f"{arm}: exponent {with_ends(drift.exponent)}")
        else:
            words.append(f"{arm}: no law")
        if drift and drift.reference is not None and fitted:
            at = np.array(
                [
                    min(_float(one.row[along]) for one in own),
                    max(_float(one.row[along]) for one in own),
                ]
            )
            middle = math.exp(np.mean([math.log(_float(one.row[along])) for one in fitted]))
            level = math.exp(
                np.mean([math.log(one.optimum.value) for one in fitted if one.optimum])
            )
            line = level * (at / middle) ** drift.reference
            panel.curves.append(Curve("", at, line, "--", **look | {"marker": "", "strength": 0.6}))
            words[-1] += f", expected {drift.reference:g}"
    values = sorted({_float(one.row[along]) for one in members})
    panel.x_ticks, panel.log_x = values, bool(values) and values[0] > 0
    panel.finding = (
        f"{panel.y} against {x_name}{', ' if told else ''}{', '.join(told)}. {'; '.join(words)}."
    )
    return panel


def _belongs(found: Analysis, drift: Drift, own: Sequence[Combination]) -> bool:
    columns = drift.columns
    return any(all(one.row[key] == value for key, value in zip(columns, drift.key)) for one in own)


def _forest(found: Analysis) -> Iterator[FigureOf]:
    panels = []
    for along in found.axes.numbers:
        drifts = [drift for drift in found.drifts if drift.along == along and drift.exponent]
        for part in _chunks(drifts, 30):
            panel = Panel(
                f"along {name_of(along)}", "exponent of the optimum", "", log_x=False, vertical=0.0
            )
            panel.y_names = [drift.label for drift in part]
            for place, drift in enumerate(part):
                assert drift.exponent is not None
                at, look = np.array([float(place)]), _look(found, drift.arm)
                panel.curves.append(
                    Curve(
                        "",
                        np.array([drift.exponent.value]),
                        at,
                        x_ends=intervals([drift.exponent]),
                        **look,
                    )
                )
                if drift.reference:
                    panel.curves.append(
                        Curve("", np.array([drift.reference]), at, marker="|", color=INK, size=9)
                    )
            panel.finding = f"Exponents {panel.title}: " + "; ".join(
                f"{drift.label}: {with_ends(drift.exponent)}" for drift in part if drift.exponent
            )
            panels.append(panel)
    if panels:
        yield FigureOf(
            "drift",
            "drift",
            "Slope of log₂ of the optimum for each doubling, with intervals; 0 is transfer. A bar |"
            " marks what the parameterization's rules expect where that is not 0.",
            panels,
            columns=2,
        )


def _leverage(found: Analysis) -> Iterator[FigureOf]:
    curves = [
        (name, base, points) for name, base, points in found.leverage if not isinstance(points, str)
    ]
    panels = []
    for part in _chunks(curves):
        base = part[0][1]
        panel = Panel(
            f"over {base}", "training FLOPs", "times fewer FLOPs", log_y=True, horizontal=1.0
        )
        words = []
        for name, _, points in part:
            usable = [point for point in points if math.isfinite(point.ratio.value)]
            if not usable:
                continue
            member = next(one for one in found.combinations if found.curve_label(one.row) == name)
            look = _look(found, member.arm, _place(found, member, found.axes.others))
            x, y = np.array([[point.x, point.ratio.value] for point in usable]).T
            ends = intervals(point.ratio for point in usable)
            panel.curves.append(Curve(name, x, y, "-", y_ends=ends, **look))
            words.append(
                f"{name}: {with_ends(usable[0].ratio)} at {number(x[0])} FLOPs,"
                f" {with_ends(usable[-1].ratio)} at {number(x[-1])}"
            )
        panel.finding = (
            f"How many times the FLOPs {base} needs for the same loss. {'; '.join(words)}."
        )
        panels.append(panel)
    if panels:
        yield FigureOf(
            "leverage",
            "leverage",
            "How many times the FLOPs of the other curve are needed for the same loss, with"
            " intervals: the ratio of two fitted power laws over the FLOPs that both cover.",
            panels,
            columns=2,
        )


def _stability(found: Analysis) -> Iterator[FigureOf]:
    if found.axes.scale:
        panels = [
            panel
            for name in found.indicators
            for panel in _against(found, name, "flops", found.axes.others)
        ]
        yield FigureOf(
            "stability",
            "stability",
            "Last value of each run, at each combination's own best setting, mean over seeds."
            " Bounded indicators stay level.",
            panels,
        )


def _others(found: Analysis) -> Iterator[FigureOf]:
    for along in found.axes.others:
        rest = [key for key in found.axes.numbers if key != along]
        loss = list(
            _against(
                found, str(found.axes.y), along, rest, lambda one: one.loss, lambda one: one.minimum
            )
        )
        more = [panel for name in found.indicators for panel in _against(found, name, along, rest)]
        yield FigureOf(
            f"by_{_file(along)}",
            "others",
            f"Against {name_of(along)}, at each one's own best setting: the minimum of the bowl"
            " with its interval where there is one, indicators as means over seeds.",
            [*loss, *more],
        )


def _against(
    found: Analysis,
    name: str,
    along: str,
    rest: Sequence[str],
    value: Callable[[Combination], float] | None = None,
    ends: Callable[[Combination], Estimate | None] | None = None,
) -> Iterator[Panel]:
    """Panels of one quantity, a curve for each arm and value of `rest`."""
    key = parse_key(name)
    title = name_of(name) if value else key.title
    groups: dict[tuple[Cell, ...], list[Combination]] = {}
    for one in found.combinations:
        if math.isfinite(value(one) if value else _float(one.row.get(name))):
            groups.setdefault((one.arm, *(one.row[k] for k in rest)), []).append(one)
    for part in _chunks(list(groups.items())):
        panel = Panel(title[0].upper() + title[1:], name_of(along), name if not value else title)
        words = []
        for told, members in part:
            members = sorted(members, key=lambda one: _float(one.row[along]))
            x = np.array([_float(one.row[along]) for one in members])
            y = np.array([value(one) if value else _float(one.row[name]) for one in members])
            label = ", ".join([str(told[0]), *(value_of(k, v) for k, v in zip(rest, told[1:]))])
            look = _look(found, members[0].arm, _place(found, members[0], rest))
            several = len(x) > len(set(x)) or (
                along == "flops" and len(found.axes.scale) > 1
            )  # not one sequence of sizes
            bars = intervals(map(ends, members)) if ends else None
            panel.curves.append(Curve(label, x, y, "" if several else "-", y_ends=bars, **look))
            words.append(f"{label}: {number(float(y.min()))} to {number(float(y.max()))}")
        values = [x for curve in panel.curves for x in curve.x]
        panel.log_x = min(values) > 0
        panel.x_ticks = [] if along == "flops" else sorted(set(values))
        y_all = np.concatenate([curve.y for curve in panel.curves])
        panel.log_y = bool(y_all.min() > 0 and y_all.max() > 5 * y_all.min())
        if not panel.log_y and not value and y_all.min() >= 0:
            panel.y_range = (
                0.0,
                1.08 * float(y_all.max()) or 1.0,
            )  # whether it grows is seen from zero
        panel.finding = f"{panel.title} against {name_of(along)}. {'; '.join(words)}."
        yield panel


def _look(found: Analysis, arm: str, place: int | None = None) -> dict:
    """Color by arm; mark and strength by the place among values, where curves of an arm differ in
    one."""
    color = found.arms.index(arm)
    mark = MARKERS[(color if place is None else place) % len(MARKERS)]
    return {"color": color, "marker": mark, "strength": max(0.4, 1 - 0.12 * (place or 0))}


def _place(found: Analysis, one: Combination, keys: Sequence[str]) -> int | None:
    """Number of the values of `keys` among all, the largest first."""
    if not keys:
        return None
    known = sorted(
        {tuple(_float(other.row[key]) for key in keys) for other in found.combinations},
        reverse=True,
    )
    return known.index(tuple(_float(one.row[key]) for key in keys))


def _chunks(items: Sequence, size: int = MOST_CURVES) -> list:
    """Parts of nearly equal length, of `size` at most."""
    count = -(-len(items) // size)
    return [
        list(items[len(items) * i // count : len(items) * (i + 1) // count]) for i in range(count)
    ]


def _float(value: Cell) -> float:
    return value if isinstance(value, float) else math.nan


def _tuned(found: Analysis) -> str:
    return name_of(str(found.axes.tuned))


def _file(key: str) -> str:
    return key.rpartition(".")[2]
