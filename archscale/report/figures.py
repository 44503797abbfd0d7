"""Which figures a report has: every key of metrics.jsonl ends in one of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from archscale.report.charts import Axis, Curve, line_chart
from archscale.report.heat import heat_map
from archscale.report.indicators import INDICATORS, SECTIONS, Key, family, order, parse_key, short
from archscale.report.read import RunRecord, Series
from archscale.report.scale import Scale, columns, merge_rows

CURVE_POINTS = 25_000  # of all small charts together; a point takes about 7 bytes twice
CELLS = 600_000  # of all maps together; a cell takes at most 4/3 bytes
MOST_COLUMNS, FEWEST_COLUMNS = 160, 24
TALLEST, TALLEST_OF_MANY = 480, 200  # pixels, of a map and of one of a series of maps
MOST_ROWS = 400  # of a map; with more, the experts of a layer share a row
WIDE_BUCKETS, MOST_BUCKETS, FEWEST_BUCKETS = 400, 180, 30

Figures = tuple[list[str], list[str]]  # HTML of curves, of maps
Elements = dict[str, Series]  # by name of layer or matrix


@dataclass
class _Sorted:
    """The runs' metrics, sorted by how they are drawn; lists have one entry for each run."""

    lines: dict[str, list[Series | None]] = field(default_factory=dict)  # by key
    maps: dict[str, list[Elements]] = field(default_factory=dict)  # by pattern
    tables: dict[str, list[Series | None]] = field(default_factory=dict)  # by key, values are lists
    keys: dict[str, Key] = field(default_factory=dict)  # by key or pattern


def make_figures(runs: Sequence[RunRecord]) -> dict[str, Figures]:
    """HTML of all figures by section, in the order of `SECTIONS`; a section without figures is left
    out."""
    runs_with_lines = [run for run in runs if len(run.steps)]
    if not runs_with_lines:
        return {}
    found = _sort(runs)
    lo, hi = (
        min(int(run.steps[0]) for run in runs_with_lines),
        max(int(run.steps[-1]) for run in runs_with_lines),
    )
    places = tuple(
        (number, float(step)) for number, run in enumerate(runs) for step, _ in run.events
    )
    axis = Axis("step", Scale(lo, max(hi, lo + 1)), places)
    charts: list[tuple[Key, str]] = []
    maps = _maps(found, runs, axis)
    groups = list(_groups(found))
    curves = sum(len(group) for group, _ in groups) * len(runs)
    buckets = min(MOST_BUCKETS, max(FEWEST_BUCKETS, CURVE_POINTS // 2 // max(1, curves)))
    for group, key in groups:
        together = _curves(found, group, [run.name for run in runs])
        charts.append(
            (
                key,
                line_chart(*_titles(group, key), " ".join(group), together, axis, buckets=buckets),
            )
        )
    sections: dict[str, Figures] = {name: ([], []) for name in SECTIONS}
    sections["loss"][0].extend(_loss(found, runs, axis))
    for place, drawn in enumerate((charts, maps)):
        for key, html in sorted(drawn, key=lambda chart: order(chart[0])):
            sections[key.section][place].append(html)
    return {name: figures for name, figures in sections.items() if any(figures)}


def _sort(runs: Sequence[RunRecord]) -> _Sorted:
    found = _Sorted()
    for number, run in enumerate(runs):
        for name, series in run.series.items():
            key = parse_key(name)
            if series.values.ndim == 2:
                found.keys[name] = key
                found.tables.setdefault(name, [None] * len(runs))[number] = series
            elif key.element is None:
                found.keys[name] = key
                found.lines.setdefault(name, [None] * len(runs))[number] = series
            else:
                found.keys[key.pattern] = key
                found.maps.setdefault(key.pattern, [{} for _ in runs])[number][key.element] = series
    for pattern in [pattern for pattern in found.maps if pattern.endswith("/sigma_max")]:
        _add_flattening(found, pattern.removesuffix("sigma_max"))
    return found


def _add_flattening(found: _Sorted, stem: str) -> None:
    """σ_max / σ̄ of every matrix, which follows from what was written."""
    means, pattern = found.maps.get(f"{stem}sigma_mean"), f"{stem}flattening_gain"
    if means is None or pattern in found.maps:
        return
    gains: list[Elements] = []
    for largest, mean in zip(found.maps[f"{stem}sigma_max"], means):
        shared = [
            name
            for name in largest
            if name in mean and np.array_equal(largest[name].steps, mean[name].steps)
        ]
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = {name: largest[name].values / mean[name].values for name in shared}
        gains.append(
            {
                name: Series(largest[name].steps, np.where(np.isfinite(ratio), ratio, np.nan))
                for name, ratio in ratios.items()
            }
        )
    if any(gains):
        found.maps[pattern] = gains
        found.keys[pattern] = parse_key(pattern.replace("*", "derived"))


def _groups(found: _Sorted) -> Iterator[tuple[list[str], Key]]:
    """Keys that share a chart: mean, smallest and largest of one quantity; the losses have figures
    of their own."""
    rest = [name for name in found.lines if name not in ("loss", "val_loss")]
    while rest:
        name = rest.pop(0)
        stem, _, statistic = name.rpartition("_")
        if statistic in ("mean", "min", "max") and stem.rpartition("/")[2] in INDICATORS:
            together = [
                f"{stem}_{s}" for s in ("mean", "min", "max") if f"{stem}_{s}" in (name, *rest)
            ]
            rest = [other for other in rest if other not in together]
            yield together, found.keys[together[0]]
        else:
            yield [name], found.keys[name]


def _titles(group: Sequence[str], key: Key) -> tuple[str, str]:
    """(title, definition)."""
    if len(group) == 1:
        return key.title, key.definition
    title, definition = INDICATORS[key.metric.rpartition("_")[0]]
    return title, f"{definition}; mean and extremes over matrices"


def _curves(found: _Sorted, group: Sequence[str], runs: Sequence[str]) -> list[Curve]:
    """One color a run; a single run's further curves have colors of their own."""
    out = []
    for number, name in enumerate(group):
        statistic = name.rpartition("_")[2] if len(group) > 1 else ""
        for run, series in enumerate(found.lines[name]):
            if series is not None:
                label = " ".join(filter(None, [runs[run] if len(runs) > 1 else "", statistic]))
                color = run if len(runs) > 1 else number
                out.append(
                    Curve(
                        label or name,
                        run,
                        series.steps,
                        series.values,
                        color,
                        number if len(runs) > 1 else 0,
                    )
                )
    return out


def _loss(found: _Sorted, runs: Sequence[RunRecord], axis: Axis) -> list[str]:
    """The loss on steps, on tokens and on FLOPs; the validation loss as dots beside it."""
    keys = [key for key in ("loss", "val_loss") if key in found.lines]
    figures = []
    for kind in ("step", "tokens", "flops"):
        curves = []
        for key in keys:
            for number, (run, series) in enumerate(zip(runs, found.lines[key])):
                x = None if series is None else _position(run, kind, series.steps)
                if series is not None and x is not None:
                    word = "training" if key == "loss" else "validation"
                    name = f"{run.name}, {word}" if len(runs) > 1 else word
                    dots, color = key == "val_loss", number if len(runs) > 1 else keys.index(key)
                    curves.append(Curve(name, number, x, series.values, color, 0, dots))
        if not curves:
            continue
        title, definition = "Loss", "cross-entropy, nats per token"
        if kind == "step":
            top, until = _frame(curves)
            note = f"; higher until step {until:,}, see the other axes" if until else ""
            figures.append(
                line_chart(
                    title,
                    definition + note,
                    " ".join(keys),
                    curves,
                    axis,
                    buckets=WIDE_BUCKETS,
                    wide=True,
                    top=top,
                )
            )
            continue
        scale = Scale.around(np.concatenate([curve.x for curve in curves]), pad=0, log=True)
        events = [
            (n, float(x[0]))
            for n, run in enumerate(runs)
            for step, _ in run.events
            if (x := _position(run, kind, np.array([step]))) is not None
        ]
        y = Scale.around(np.concatenate([curve.values for curve in curves]), log=kind == "flops")
        name = "by tokens" if kind == "tokens" else "by training FLOPs"
        note = (
            ""
            if kind == "tokens"
            else (
                "useful FLOPs: tokens × the plan's training FLOPs of a token; a power law is a"
                " straight line here"
            )
        )
        figures.append(
            line_chart(
                f"{title} {name}",
                note,
                " ".join(keys),
                curves,
                Axis(kind, scale, tuple(events)),
                buckets=MOST_BUCKETS,
                scale=y,
            )
        )
    return figures


def _frame(curves: Sequence[Curve]) -> tuple[float | None, int]:
    """(where the frame of the loss ends, last step above it): the fall of the first 1 % would take
    most of the height.

    No later step is cut off. (None, 0) where there is little to cut.
    """
    later = [
        curve.values[curve.x > curve.x[0] + (curve.x[-1] - curve.x[0]) / 100] for curve in curves
    ]
    finite = [values[np.isfinite(values)] for values in later]
    if not any(len(values) for values in finite):
        return None, 0
    top = max(float(values.max()) for values in finite if len(values))
    bottom = min(float(values.min()) for values in finite if len(values))
    top += 0.04 * (top - bottom)
    above = [int(curve.x[curve.values > top].max(initial=0)) for curve in curves]
    highest = max(float(np.nanmax(curve.values, initial=-np.inf)) for curve in curves)
    return (top, max(above)) if highest - bottom > 1.3 * (top - bottom) else (None, 0)


def _position(run: RunRecord, kind: str, steps: np.ndarray) -> np.ndarray | None:
    """Steps on an axis; None where the run does not say."""
    if kind == "step":
        return steps
    tokens = np.interp(steps, run.steps, run.tokens)
    if kind == "tokens":
        return tokens
    return None if run.flops_per_token is None else tokens * run.flops_per_token


@dataclass
class _Map:
    """One map before it is drawn: (rows, steps) of one run."""

    key: Key
    title: str
    data_key: str
    run: int
    names: list[str]
    bands: list[tuple[str, int]]
    table: np.ndarray
    steps: np.ndarray
    share: str  # maps with the same one have the same color scale
    definition: str = ""  # where it says more than the key's
    tallest: int = TALLEST


def _maps(found: _Sorted, runs: Sequence[RunRecord], axis: Axis) -> list[tuple[Key, str]]:
    made = [*_element_maps(found), *_list_maps(found)]
    rows = sum(len(one.table) for one in made)
    width = min(MOST_COLUMNS, max(FEWEST_COLUMNS, CELLS // max(1, rows)))
    values: dict[str, list[np.ndarray]] = {}
    for one in made:
        values.setdefault(one.share, []).append(one.table[np.isfinite(one.table)])
    scales = {
        share: Scale.around(np.concatenate(parts), spread=10, pad=0)
        for share, parts in values.items()
    }
    out = []
    for one in made:
        cells = columns(one.table, one.steps, width)
        own = Axis("step", axis.scale, tuple(event for event in axis.events if event[0] == one.run))
        name = f"{one.title} · {runs[one.run].name}" if len(runs) > 1 else one.title
        html = heat_map(
            name,
            one.definition or one.key.definition,
            one.data_key,
            one.names,
            one.bands,
            cells,
            own,
            scales[one.share],
            steps=(int(one.steps[0]), int(one.steps[-1])),
            run=one.run,
            tallest=one.tallest,
        )
        out.append((one.key, html))
    return out


def _element_maps(found: _Sorted) -> Iterator[_Map]:
    """Layers or matrices as rows; matrices of one kind lie together, layer under layer."""
    for pattern, by_run in found.maps.items():
        key = found.keys[pattern]
        for run, elements in enumerate(by_run):
            if not elements:
                continue
            families: dict[str, list[tuple[tuple[int, ...], str]]] = {}
            for name in elements:
                kind, numbers = family(name)
                families.setdefault(kind, []).append((numbers, name))
            names = [name for rows in families.values() for _, name in sorted(rows)]
            steps = np.unique(np.concatenate([series.steps for series in elements.values()]))
            table = np.full((len(names), len(steps)), np.nan)
            for row, name in zip(table, names):
                row[np.searchsorted(steps, elements[name].steps)] = elements[name].values
            layers = all(re.fullmatch(r"layer_\d+", name) for name in names)
            title = f"{key.title}, every {'layer' if layers else 'matrix'}"
            if len(names) > MOST_ROWS:
                names, table = _fewer_rows(names, table)
            yield _Map(key, title, pattern, run, names, _bands(names), table, steps, pattern)


def _fewer_rows(names: list[str], table: np.ndarray) -> tuple[list[str], np.ndarray]:
    """The matrices of a family that only their later numbers tell apart, which are a layer's
    experts, in one row."""
    groups: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        kind, numbers = family(name)
        groups.setdefault(kind.replace("*", str(numbers[0]), 1) if numbers else name, []).append(
            row
        )
    return list(groups), merge_rows(table, list(groups.values()))


def _bands(names: Sequence[str]) -> list[tuple[str, int]]:
    kinds = [family(name)[0] for name in names]
    if all(
        re.fullmatch(r"layer_\d+", name) for name in names
    ):  # label some of the layers themselves
        every = 1 if len(names) <= 12 else -(-len(names) // 8)
        return [
            (str(int(name[6:])) if row % every == 0 else "", 1) for row, name in enumerate(names)
        ]
    bands: list[tuple[str, int]] = []
    for kind in kinds:
        if bands and bands[-1][0] == short(kind):
            bands[-1] = (bands[-1][0], bands[-1][1] + 1)
        else:
            bands.append((short(kind), 1))
    return bands


def _list_maps(found: _Sorted) -> Iterator[_Map]:
    """Entries of a list, such as experts, as rows."""
    for name, by_run in found.tables.items():
        key = found.keys[name]
        for run, series in enumerate(by_run):
            if series is None:
                continue
            count = series.values.shape[1]
            every = 1 if count <= 8 else -(-count // 4)
            bands = [(str(row) if row % every == 0 else "", 1) for row in range(count)]
            element = re.sub(r"_0*(\d)", r" \1", key.element or "")
            title = f"{key.title}, {element}" if element else key.title
            names, table = [str(row) for row in range(count)], series.values.T
            more = f"{key.definition}; even is 1/{count}" if key.metric == "load" else ""
            yield _Map(
                key,
                title,
                name,
                run,
                names,
                bands,
                table,
                series.steps,
                key.pattern,
                more,
                TALLEST_OF_MANY,
            )
