"""Which figures a run's page has: every key of metrics.jsonl ends in one of them, or in the list of
those that have one value everywhere."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from archscale.report.curves import Chart, Line
from archscale.report.indicators import BY_NAME, SECTIONS, Key, family, parse_key, short
from archscale.report.maps import HeatMap
from archscale.report.read import RunRecord, Series
from archscale.report.scale import Scale, merge_rows

CURVE_POINTS = 25_000  # of all small charts together; a point takes about 13 bytes
CELLS = 600_000  # of all maps together; a cell takes at most 4/3 bytes
MOST_COLUMNS, FEWEST_COLUMNS = 160, 24
TALLEST_OF_MANY = 200  # pixels, of one of a series of maps
MOST_ROWS = 400  # of a map; with more, the experts of a layer or neighbours share a row
WIDE_BUCKETS, MOST_BUCKETS, FEWEST_BUCKETS = 400, 180, 30

Elements = dict[str, Series]  # by name of layer or matrix


@dataclass
class Constant:
    """A metric that has one value everywhere, `values` with the names of runs where they differ."""

    title: str
    definition: str
    key: str
    values: str
    names: Sequence[str] = ()  # what stands in place of `*` in `key`


@dataclass
class Section:
    """Figures that stand together."""

    name: str
    charts: list[Chart] = field(default_factory=list)
    maps: list[HeatMap] = field(default_factory=list)
    constants: list[Constant] = field(default_factory=list)

    @property
    def title(self) -> str:
        return SECTIONS[self.name]


@dataclass
class _Metrics:
    """The runs' metrics by how they are drawn; lists have one entry for each run."""

    lines: dict[str, list[Series | None]] = field(default_factory=dict)  # by key
    maps: dict[str, list[Elements]] = field(default_factory=dict)  # by pattern
    tables: dict[str, list[Series | None]] = field(default_factory=dict)  # by key, values are lists
    keys: dict[str, Key] = field(default_factory=dict)  # by key or pattern


def make_figures(runs: Sequence[RunRecord]) -> list[Section]:
    """All figures; a section without any is left out."""
    if not any(len(run.steps) for run in runs):
        return []
    metrics = _sort(runs)
    sections = {name: Section(name) for name in SECTIONS}
    sections["loss"].charts += _losses(metrics, runs)
    names = [run.name for run in runs]
    groups = [
        (key, keys, _lines(metrics, keys, names))
        for keys, key in sorted(_groups(metrics), key=lambda group: group[1].order)
    ]
    changing = sum(len(lines) for *_, lines in groups if not all(line.constant for line in lines))
    buckets = min(MOST_BUCKETS, max(FEWEST_BUCKETS, CURVE_POINTS // 2 // max(1, changing)))
    for key, keys, lines in groups:
        title, definition = _titles(keys, key)
        if all(line.constant for line in lines):
            values = _values([(line.name, line.last) for line in lines])
            constant = Constant(title, definition, " ".join(keys), values)
            sections[key.section].constants.append(constant)
        else:
            chart = Chart(title, definition, keys, lines, buckets)
            sections[key.section].charts.append(chart)
    for key, figure in _maps(metrics, names):
        if isinstance(figure, HeatMap):
            sections[key.section].maps.append(figure)
        else:
            sections[key.section].constants.append(figure)
    return [s for s in sections.values() if s.charts or s.maps or s.constants]


def _values(named: Sequence[tuple[str, str]]) -> str:
    """One value where all are the same."""
    if len({value for _, value in named}) == 1:
        return named[0][1]
    return "; ".join(f"{name} {value}" for name, value in named)


def _sort(runs: Sequence[RunRecord]) -> _Metrics:
    metrics = _Metrics()
    for index, run in enumerate(runs):
        for name, series in run.series.items():
            key = parse_key(name)
            if series.values.ndim == 2:
                metrics.keys[name] = key
                metrics.tables.setdefault(name, [None] * len(runs))[index] = series
            elif key.element is None:
                metrics.keys[name] = key
                metrics.lines.setdefault(name, [None] * len(runs))[index] = series
            else:
                metrics.keys[key.pattern] = key
                by_run = metrics.maps.setdefault(key.pattern, [{} for _ in runs])
                by_run[index][key.element] = series
    for pattern in [pattern for pattern in metrics.maps if pattern.endswith("/sigma_max")]:
        _add_flattening(metrics, pattern.removesuffix("sigma_max"))
    return metrics


def _add_flattening(metrics: _Metrics, stem: str) -> None:
    """σ_max / σ̄ of every matrix, which follows from what was written."""
    means, pattern = metrics.maps.get(f"{stem}sigma_mean"), f"{stem}flattening_gain"
    if means is None or pattern in metrics.maps:
        return
    gains: list[Elements] = []
    for largest, mean in zip(metrics.maps[f"{stem}sigma_max"], means):
        gains.append({})
        for name in largest.keys() & mean.keys():
            if np.array_equal(largest[name].steps, mean[name].steps):
                with np.errstate(divide="ignore", invalid="ignore"):
                    ratio = largest[name].values / mean[name].values
                ratio[~np.isfinite(ratio)] = np.nan
                gains[-1][name] = Series(largest[name].steps, ratio)
    if any(gains):
        metrics.maps[pattern] = gains
        metrics.keys[pattern] = parse_key(pattern.replace("*", "derived"))


def _groups(metrics: _Metrics) -> Iterator[tuple[list[str], Key]]:
    """Keys that share a chart: mean, smallest and largest of one quantity, a loss of all sources;
    the losses of the run have figures of their own."""
    grouped: dict[str, list[str]] = {}
    for name in metrics.lines:
        if name not in ("loss", "val_loss"):
            key = metrics.keys[name]
            metric, statistic = key.known
            stem = name.removesuffix(f"_{statistic}") if metric and statistic else name
            stem = f"{key.metric}/" if key.source else stem
            grouped.setdefault(stem, []).append(name)
    for keys in grouped.values():
        keys.sort(key=lambda name: ("mean", "min", "max", "").index(metrics.keys[name].known[1]))
        yield keys, metrics.keys[keys[0]]


def _titles(keys: Sequence[str], key: Key) -> tuple[str, str]:
    """(title, definition)."""
    metric, _ = key.known
    if len(keys) == 1 or metric is None or key.source:
        return key.title, key.definition
    return metric.title, f"{metric.definition}; mean and extremes over matrices"


def _lines(metrics: _Metrics, keys: Sequence[str], runs: Sequence[str]) -> list[Line]:
    """One color a run; a single run's further curves have colors of their own."""
    lines = []
    for place, key in enumerate(keys):
        statistic = key.rpartition("_")[2] if len(keys) > 1 else ""
        curve = metrics.keys[key].source or statistic
        for run, series in enumerate(metrics.lines[key]):
            if series is None:
                continue
            name, color, dash = curve or key, place, 0
            if len(runs) > 1:
                name, color, dash = f"{runs[run]} {curve}".strip(), run, place
            lines.append(Line(name, run, series.steps, series.values, color=color, dash=dash))
    return lines


def _losses(metrics: _Metrics, runs: Sequence[RunRecord]) -> Iterator[Chart]:
    """The loss on steps, on tokens and on FLOPs; the validation loss as dots beside it."""
    keys = [key for key in ("loss", "val_loss") if key in metrics.lines]
    unit = f"cross-entropy, {BY_NAME['loss'].unit}"
    for axis in ("", "tokens", "flops"):
        lines = []
        for place, key in enumerate(keys):
            word = "training" if key == "loss" else "validation"
            for index, (run, series) in enumerate(zip(runs, metrics.lines[key])):
                if series is None or (axis == "flops" and not run.flops_per_token):
                    continue
                name = f"{run.name}, {word}" if len(runs) > 1 else word
                tokens = np.interp(series.steps, run.steps, run.tokens)
                places = np.log(np.maximum(tokens, 1)) if axis else None
                color = index if len(runs) > 1 else place
                dots = key == "val_loss"
                lines.append(
                    Line(name, index, series.steps, series.values, places, color, dots=dots)
                )
        if not lines:
            continue
        if axis == "tokens":
            yield Chart("Loss by tokens", unit, keys, lines, MOST_BUCKETS, axis)
        elif axis == "flops":
            note = "useful FLOPs: tokens × the plan's training FLOPs of a token; a power law is a"
            note += " straight line here"
            yield Chart("Loss by training FLOPs", note, keys, lines, MOST_BUCKETS, axis, True)
        else:
            top, until = _frame(lines)
            note = f"; higher until step {until:,}, see the other axes" if until else ""
            yield Chart("Loss", unit + note, keys, lines, WIDE_BUCKETS, top=top, wide=True)


def _frame(lines: Sequence[Line]) -> tuple[float | None, int]:
    """(where the frame of the loss ends, last step above it): the fall of the first 1 % would take
    most of the height.

    No later step is cut off. (None, 0) where there is little to cut.
    """
    later = [
        line.values[line.steps > line.steps[0] + (line.steps[-1] - line.steps[0]) / 100]
        for line in lines
    ]
    finite = np.concatenate(later)
    finite = finite[np.isfinite(finite)]
    if not len(finite):
        return None, 0
    bottom, top = float(finite.min()), float(finite.max())
    top += 0.04 * (top - bottom)
    above = max(int(line.steps[line.values > top].max(initial=0)) for line in lines)
    highest = max(float(np.nanmax(line.values, initial=-np.inf)) for line in lines)
    return (top, above) if highest - bottom > 1.3 * (top - bottom) else (None, 0)


def _maps(metrics: _Metrics, runs: Sequence[str]) -> Iterator[tuple[Key, HeatMap | Constant]]:
    """Maps of one pattern have the same color scale."""
    maps = sorted([*_element_maps(metrics), *_list_maps(metrics)], key=lambda pair: pair[0].order)
    rows = sum(len(heat.table) for _, heat in maps if not heat.constant)
    width = min(MOST_COLUMNS, max(FEWEST_COLUMNS, CELLS // max(1, rows)))
    values: dict[str, list[np.ndarray]] = {}
    for key, heat in maps:
        values.setdefault(key.pattern, []).append(heat.table.ravel())
    scales = {
        pattern: Scale.around(np.concatenate(tables), spread=10, pad=0)
        for pattern, tables in values.items()
    }
    for key, heat in maps:
        title = f"{heat.title} · {runs[heat.run]}" if len(runs) > 1 else heat.title
        if value := heat.constant:
            yield key, Constant(title, heat.definition, heat.key, value, heat.names)
        else:
            yield key, replace(heat.drawn(width, scales[key.pattern]), title=title)


def _element_maps(metrics: _Metrics) -> Iterator[tuple[Key, HeatMap]]:
    """Layers or matrices as rows; matrices of one kind lie together, layer under layer."""
    for pattern, by_run in metrics.maps.items():
        key = metrics.keys[pattern]
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
            kind = "layer" if all(re.fullmatch(r"layer_\d+", name) for name in names) else "matrix"
            if len(names) > MOST_ROWS:
                names, table = _fewer_rows(names, table)
            title, bands = f"{key.title}, every {kind}", _bands(names, kind == "layer")
            yield key, HeatMap(pattern, run, title, key.definition, names, bands, table, steps)


def _fewer_rows(names: list[str], table: np.ndarray) -> tuple[list[str], np.ndarray]:
    """The matrices of a family that only their later numbers tell apart, which are a layer's
    experts, in one row."""
    groups: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        kind, numbers = family(name)
        kind = kind.replace("*", str(numbers[0]), 1) if numbers else name
        groups.setdefault(kind, []).append(row)
    return list(groups), merge_rows(table, list(groups.values()))


def _bands(names: Sequence[str], layers: bool) -> list[tuple[str, int]]:
    if layers:  # label some of the layers themselves
        return _some_labels([str(int(name[6:])) for name in names], 12, 8)
    bands: list[tuple[str, int]] = []
    for name in names:
        label = short(family(name)[0])
        if bands and bands[-1][0] == label:
            bands[-1] = (label, bands[-1][1] + 1)
        else:
            bands.append((label, 1))
    return bands


def _some_labels(labels: Sequence[str], all_of: int, about: int) -> list[tuple[str, int]]:
    """A band for each row; all labels up to `all_of` rows, `about` so many of more."""
    every = 1 if len(labels) <= all_of else -(-len(labels) // about)
    return [(label if row % every == 0 else "", 1) for row, label in enumerate(labels)]


def _list_maps(metrics: _Metrics) -> Iterator[tuple[Key, HeatMap]]:
    """Entries of a list, such as experts, as rows."""
    for name, by_run in metrics.tables.items():
        key = metrics.keys[name]
        for run, series in enumerate(by_run):
            if series is None:
                continue
            names, table = _some_rows(series.values.T)
            element = re.sub(r"_0*(\d)", r" \1", key.element or "")
            title = f"{key.title}, {element}" if element else key.title
            about = key.definition + (
                f"; even is 1/{series.values.shape[1]}" if key.metric == "load" else ""
            )
            bands, tallest = _some_labels(names, 8, 4), TALLEST_OF_MANY
            yield key, HeatMap(name, run, title, about, names, bands, table, series.steps, tallest)


def _some_rows(table: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Neighbours in one row where there are more than `MOST_ROWS`."""
    every = -(-len(table) // MOST_ROWS)
    if every <= 1:
        return [str(row) for row in range(len(table))], table
    parts = [
        list(range(len(table)))[start : start + every] for start in range(0, len(table), every)
    ]
    return [f"{part[0]}-{part[-1]}" for part in parts], merge_rows(table, parts)
