"""What a study leaves in its directory: results.json, one CSV per table, one SVG per figure,
summary.html with all of it."""

from __future__ import annotations

import csv
import html
import io
import json
import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import archscale
from archscale.errors import ConfigError, explain_os_error
from archscale.files import write_atomically

Row = dict[str, Any]


@dataclass
class Series:
    """Points (x, y) under one label."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    style: str = "o"  # of matplotlib: "o" points, "-" line, "--" dashed
    color: int | str = 0  # number in matplotlib's cycle, or a name


@dataclass
class Panel:
    title: str
    x: str
    y: str
    series: list[Series]
    log_x: bool = False
    log_y: bool = True


@dataclass
class Results:
    """Of one study.

    Attributes:
        title: of the summary. settings: resolved.
        tables: rows by file name. figures: panels by file name. shown: tables that the summary
            shows, with a caption each.
    """

    title: str
    settings: Row
    tables: dict[str, list[Row]] = field(default_factory=dict)
    figures: dict[str, tuple[str, list[Panel]]] = field(default_factory=dict)
    shown: dict[str, str] = field(default_factory=dict)


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (NaN of a single value)."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))


def prepare(directory: Path) -> None:
    """Make the directory before anything is computed. Raises ConfigError."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "results.json").touch()
    except OSError as error:
        cause, remedy = explain_os_error(error, "give another with --out")
        raise ConfigError(f"cannot write the results: {cause}", str(directory), remedy) from error


def write(results: Results, directory: Path) -> None:
    """Deterministic: the same results give the same bytes."""
    content = {
        "title": results.title,
        "settings": results.settings,
        "environment": {
            "archscale": archscale.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
        },
        "tables": _plain(results.tables),
    }
    write_atomically(
        directory / "results.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    )
    for name, rows in results.tables.items():
        with open(directory / f"{name}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
            writer.writeheader()
            writer.writerows(_plain(rows))
    drawings = {}
    for name, (caption, panels) in results.figures.items():
        drawing = draw(panels)
        write_atomically(directory / f"{name}.svg", drawing)
        drawings[caption] = drawing[drawing.index("<svg") :]
    write_atomically(directory / "summary.html", _page(results, drawings))


def draw(panels: Sequence[Panel]) -> str:
    """Panels side by side, as SVG."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    with matplotlib.rc_context(
        {"svg.hashsalt": "archscale", "svg.fonttype": "none", "font.size": 9}
    ):
        figure = Figure(figsize=(4.6 * len(panels), 3.6), layout="constrained")
        FigureCanvasSVG(figure)
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
            for series in panel.series:
                points = [
                    (x, y)
                    for x, y in zip(series.x, series.y)
                    if math.isfinite(x) and math.isfinite(y)
                ]
                color = f"C{series.color}" if isinstance(series.color, int) else series.color
                axes.plot(
                    *(zip(*points) if points else ([], [])),
                    series.style,
                    label=series.label,
                    color=color,
                    markersize=4,
                )
            drawn = [(float(x), float(y)) for line in axes.lines for x, y in zip(*line.get_data())]
            sides = [
                (axes.xaxis, axes.set_xscale, panel.log_x),
                (axes.yaxis, axes.set_yscale, panel.log_y),
            ]
            for (axis, scale, log), values in zip(sides, zip(*drawn)):
                positive = [value for value in values if value > 0]
                if log and positive:  # a logarithmic axis without a point cannot be drawn
                    scale("log")
                    if max(positive) > 10 * min(positive):
                        axis.set_minor_locator(NullLocator())  # slow to lay out
            axes.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
            axes.grid(alpha=0.3)
            axes.legend(fontsize=7)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": "archscale"})
    return buffer.getvalue()


def _plain(value: Any) -> Any:
    """JSON has no infinity and no NaN: text and null in their place."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "inf" if value > 0 else "-inf"
    return value


def show(value: Any) -> str:
    """A cell of a table that people read."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table_text(rows: Sequence[Row]) -> str:
    """Aligned columns for a terminal."""
    cells = [list(rows[0]), *([show(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells
    )


def _page(results: Results, drawings: dict[str, str]) -> str:
    parts = [f"<h1>{html.escape(results.title)}</h1>"]
    for name, caption in results.shown.items():
        rows = results.tables[name]
        head = "".join(f"<th>{html.escape(key)}</th>" for key in rows[0])
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(show(v))}</td>" for v in row.values()) + "</tr>"
            for row in rows
        )
        parts.append(
            f"<h2>{html.escape(caption)}</h2><table><tr>{head}</tr>{body}</table><p>{name}.csv</p>"
        )
    parts += [
        f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"
        for caption, svg in drawings.items()
    ]
    settings = html.escape(json.dumps(results.settings, indent=1, ensure_ascii=False))
    style = (
        "body{font:15px sans-serif;max-width:75em;margin:2em auto;padding:0"
        " 1em}table{border-collapse:collapse}td,th{padding:.15em .6em;border-bottom:1px solid"
        " #ccc;text-align:right}svg{max-width:100%;height:auto}"
    )
    return (
        '<!doctype html><html lang="en"><meta'
        f' charset="utf-8"><title>{html.escape(results.title)}</title>'
        f"<style>{style}</style><body>{''.join(parts)}<details><summary>Settings</summary><pre>{settings}</pre></details></body></html>\n"
    )
