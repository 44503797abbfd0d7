"""What a study leaves in its directory: results.json, a CSV for each table, an SVG for each figure,
and summary.html with all of it."""

from __future__ import annotations

import csv
import io
import json
import math
import platform
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch

import archscale
from archscale.files import write_atomically
from archscale.report.plot import Curve, Panel, draw, svg_text

Row = dict[str, Any]
Tables = Mapping[str, Sequence[Row]]


@dataclass
class Results:
    """Tables and figures of one study, by file name.

    Attributes:
        shown: captions of the tables that the summary shows.
        figures: caption and panels, drawn side by side.
    """

    title: str
    settings: Row
    tables: Tables
    shown: dict[str, str] = field(default_factory=dict)
    figures: dict[str, tuple[str, list[Panel]]] = field(default_factory=dict)


def write(results: Results, directory: Path) -> None:
    """Deterministic: the same results give the same bytes."""
    environment = {
        "archscale": archscale.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }
    tables = {
        name: [{key: _plain(value) for key, value in row.items()} for row in rows]
        for name, rows in results.tables.items()
    }
    content = {"title": results.title, "settings": results.settings, "environment": environment}
    text = json.dumps({**content, "tables": tables}, indent=1, ensure_ascii=False)
    write_atomically(directory / "results.json", text + "\n")
    for name, rows in tables.items():
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(directory / f"{name}.csv", table.getvalue())
    drawings = {}
    for name, (caption, panels) in results.figures.items():
        drawing = svg_text(draw(panels, len(panels)))
        write_atomically(directory / f"{name}.svg", drawing)
        drawings[caption] = drawing[drawing.index("<svg") :]
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    template = jinja2.Environment(loader=loader, autoescape=True).get_template("summary.html")
    settings = json.dumps(results.settings, indent=1, ensure_ascii=False)
    page = template.render(results=results, drawings=drawings, settings=settings, show=show)
    write_atomically(directory / "summary.html", page + "\n")


def _plain(value: Any) -> Any:
    """JSON has no infinity and no NaN: text and null in their place."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def show(value: Any) -> str:
    """A cell of a table that people read."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table_text(rows: Sequence[Row]) -> str:
    """Aligned columns for a terminal."""
    lines = [list(rows[0]), *([show(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


# --- what the studies make tables and figures with


def groups(rows: Iterable[Row], *keys: str) -> dict[tuple, list[Row]]:
    """The rows by their values of these keys, in order of appearance."""
    parts: dict[tuple, list[Row]] = {}
    for row in rows:
        parts.setdefault(tuple(row[key] for key in keys), []).append(row)
    return parts


def column(rows: Iterable[Row], key: str) -> list[Any]:
    """The values that are there: neither null nor NaN."""
    values = (row.get(key) for row in rows)
    return [value for value in values if value is not None and value == value]


def median(values: Sequence[float]) -> float:
    """NaN of nothing."""
    return statistics.median(values) if values else math.nan


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (NaN of a single value)."""
    if len(values) < 2:
        return median(values), math.nan
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))


def curve(
    label: str, rows: Sequence[Row], x: str, y: str | Callable[[Row], float], **style: Any
) -> Curve:
    """The points of these rows; `y` is a column or a function of a row."""
    values = [row[y] if isinstance(y, str) else y(row) for row in rows]
    return Curve(label, np.array([row[x] for row in rows], float), np.array(values, float), **style)


def curves(
    rows: Iterable[Row],
    by: str,
    x: str,
    y: str | Callable[[Row], float],
    label: Callable[[Any], str] = str,
    **style: Any,
) -> list[Curve]:
    """A curve for each value of column `by`, in a color of its own."""
    parts = enumerate(groups(rows, by).items())
    return [curve(label(v), part, x, y, color=i, **style) for i, ((v,), part) in parts]
