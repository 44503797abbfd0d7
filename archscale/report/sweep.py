"""One self-contained HTML file about a sweep, its figures as SVG and PNG, its tables as CSV."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

from archscale.files import REPORT, write_atomically
from archscale.fit.text import render as fits_as_text
from archscale.report.findings import findings, problems
from archscale.report.indicators import parse_key
from archscale.report.page import State, Tile, writing
from archscale.report.page import render as render_page
from archscale.report.plot import draw, inline, png_bytes, svg_text
from archscale.report.records import Analysis, GridFit, SweepRecord, end_text, label_in, name_of
from archscale.report.scale import compact, number
from archscale.report.sweep_figures import SweepFigure, make_figures
from archscale.report.sweep_tables import TableRow, csv_text, make_tables

OPEN_ROWS = 24  # of a table that is open at first
LONG = 44  # letters of a cell from which on it is broken into lines
NARROW = 118  # letters of a table that has room beside a figure


def write_sweep_page(sweep: SweepRecord, analysis: Analysis, path: Path) -> None:
    """Write the page of a sweep, finished or not, to `path`; figures and tables lie beside it, in a
    folder of its name. The same runs give the same files, byte for byte.

    Raises:
        ArchscaleError: it cannot be written.
    """
    tables, figures = make_tables(sweep, analysis), make_figures(analysis)
    contents: dict[str, str | bytes] = {
        f"{name}.csv": csv_text(rows) for name, rows in tables.items()
    }
    for figure in figures:
        whole = draw(figure.panels, min(figure.columns, len(figure.panels)))
        contents[f"{figure.name}.svg"] = svg_text(whole)
        contents[f"{figure.name}.png"] = png_bytes(whole)
    folder = path.parent / (path.stem if path.suffix else f"{path.name}_files")
    html = _render(sweep, analysis, figures, tables, path, folder.name)
    with writing(path):
        folder.mkdir(exist_ok=True)
        for name, content in contents.items():
            write_atomically(folder / name, content)
        write_atomically(path, html)


@dataclass(frozen=True)
class ShownCell:
    """A cell of a table on the page: text, the interval behind it, whether it is text in the data,
    and long text at that."""

    text: str
    interval: str = ""
    is_text: bool = False

    @property
    def is_long(self) -> bool:
        return self.is_text and len(self.text) > LONG


@dataclass(frozen=True)
class ShownTable:
    """A table on the page: names of columns and whether they hold text; rows with the address of
    the run's own report and whether the run went wrong; columns that have one value."""

    name: str
    columns: list[tuple[str, bool]]
    rows: list[tuple[list[ShownCell], str, bool]]
    constant: dict[str, str]

    @property
    def is_open(self) -> bool:
        return len(self.rows) <= OPEN_ROWS

    @property
    def is_narrow(self) -> bool:
        """Whether it fits beside a figure on a desktop."""
        letters = [len(name) for name, _ in self.columns]
        for cells, _, _ in self.rows:
            own = [min(LONG, len(cell.text) + len(cell.interval)) for cell in cells]
            letters = list(map(max, letters, own))
        return sum(letters) + 3 * len(letters) < NARROW


def _render(
    sweep: SweepRecord,
    analysis: Analysis,
    figures: Sequence[SweepFigure],
    tables: Mapping[str, list[TableRow]],
    page: Path,
    folder: str,
) -> str:
    """The whole file. `page` is where it will lie, for links; `folder` has its tables and
    figures."""
    done = f"{len(sweep.table.rows)} of {len(sweep.values)}"
    constant = {parse_key(key).title: number(value) for key, value in analysis.constant.items()}
    return render_page(
        "sweep.html",
        title=sweep.name,
        state=_state(sweep),
        lead="; ".join(filter(None, [f"{done} runs finished", _missing(sweep, analysis)])),
        tiles=_tiles(sweep, analysis),
        problems=problems(sweep, analysis),
        findings=findings(analysis),
        tuned=name_of(analysis.axes.tuned) if analysis.axes.tuned else "size",
        figures=[(figure, _panels(figure)) for figure in figures],
        tables={name: _table(name, rows, analysis.constant) for name, rows in tables.items()},
        constant=constant,
        folder=quote(folder),
        fits=[_fit(sweep, fit) for fit in analysis.fits],
        notes=analysis.notes,
        grid=yaml.safe_dump(
            {key: value for key, value in sweep.grid.items() if value not in (None, [], {})},
            sort_keys=False,
            allow_unicode=True,
        ),
        runs=_runs_table(sweep, tables.get("runs", []), page),
        environment=_environment(sweep),
    )


def _state(sweep: SweepRecord) -> State:
    done, planned = len(sweep.table.rows), len(sweep.values)
    word, kind = ("finished", "good") if done == planned else ("partly finished", "partial")
    return State(word, kind, done / max(1, planned))


def _missing(sweep: SweepRecord, analysis: Analysis) -> str:
    """How many runs failed, are missing or have no result."""
    counts = {
        "failed": len(sweep.failed),
        "not finished or not started": len(sweep.unfinished),
        "without a finite loss": len(analysis.diverged),
    }
    return "; ".join(f"{count} {state}" for state, count in counts.items() if count)


def _tiles(sweep: SweepRecord, analysis: Analysis) -> list[Tile]:
    done = f"{len(sweep.table.rows)} / {len(sweep.values)}"
    tiles = [
        Tile("runs", done, _missing(sweep, analysis)),
        Tile("groups", str(len(analysis.arms)), ", ".join(analysis.arms)[:120]),
    ]
    column = sweep.table.columns.get("flops", [])
    if flops := [value for value in column if isinstance(value, float)]:
        note = f"{compact(min(flops))} to {compact(max(flops))} a run"
        tiles.append(Tile("training FLOPs of finished runs", compact(sum(flops)), note))
    if analysis.combinations:
        best = min(analysis.combinations, key=lambda member: float(member.means[member.best]))
        where = label_in(analysis.axes, best.row, analysis.axes.numbers)
        if analysis.axes.tuned:
            where += f", {name_of(analysis.axes.tuned)} {number(float(best.x[best.best]))}"
        loss = f"{best.means[best.best]:.4f}"
        tiles.append(Tile(f"lowest {name_of(str(analysis.axes.y))}", loss, where))
    return tiles


def _panels(figure: SweepFigure) -> list[str]:
    return [
        inline(svg_text(draw([panel])), panel.finding, f"{figure.name}{place}")
        for place, panel in enumerate(figure.panels)
    ]


def _table(name: str, rows: Sequence[TableRow], without: Mapping[str, Any]) -> ShownTable:
    """Estimates with their ends in one cell; the CSV file has all digits."""
    columns: list[tuple[str, bool]] = []
    constant: dict[str, str] = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        values = [row.get(key) for row in rows]
        is_text = all(isinstance(value or "", str) for value in values)
        if key.endswith((" low", " high")) or key in ("coefficient", *without):
            continue
        if len(rows) > 1 and not is_text and len({repr(value) for value in values}) == 1:
            constant[key] = _cell(rows[0], key).text
        elif any(value not in (None, "") for value in values):
            columns.append((key, is_text))
    cells = [([_cell(row, key) for key, _ in columns], "", False) for row in rows]
    return ShownTable(name, columns, cells, constant)


def _cell(row: TableRow, key: str) -> ShownCell:
    value = row.get(key)
    if value is None or isinstance(value, str):
        return ShownCell(value or "", is_text=True)
    if not isinstance(value, float):
        return ShownCell(_text(value))
    large = math.isfinite(value) and abs(value) >= 1e9
    text = compact(value) if large else number(value)
    if f"{key} low" not in row:
        return ShownCell(text)
    low, high = (end_text(row[f"{key} {end}"], 4) for end in ("low", "high"))
    return ShownCell(text, f"[{low}, {high}]")


def _runs_table(sweep: SweepRecord, rows: Sequence[TableRow], page: Path) -> ShownTable:
    """With links to the reports that runs have."""
    table = _table("runs", rows, {})
    linked = []
    for row, (cells, _, _) in zip(rows, table.rows):
        report = sweep.directory / str(row["run"]) / REPORT
        link = quote(os.path.relpath(report, page.parent)) if report.is_file() else ""
        linked.append((cells, link, row["status"] == "failed" or bool(row["reason"])))
    return replace(table, rows=linked)


def _fit(sweep: SweepRecord, fit: GridFit) -> tuple[str, str, str]:
    """(what was fitted, as the command prints it, why it was refused)."""
    title = f"{fit.asked.form} of {fit.asked.y} over {', '.join(fit.asked.x)}"
    if fit.fits is None:
        return title, "", str(fit.refusal) if fit.refusal else ""
    listed = set(sweep.table.left_out)  # in the table of runs
    excluded = [pair for pair in fit.fits.excluded if pair not in listed]
    return title, fits_as_text(replace(fit.fits, excluded=excluded)), ""


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    return value if isinstance(value, str) else json.dumps(value)


def _environment(sweep: SweepRecord) -> dict[str, str]:
    """What all runs share, and what differs with how many values."""
    values: dict[str, dict[str, None]] = {}
    for environment in sweep.environments.values():
        for key, value in environment.items():
            values.setdefault(key, {})[_text(value)] = None
    shown = {}
    for key, different in values.items():
        first = ", ".join(list(different)[:3]) + (" …" if len(different) > 3 else "")
        shown[key] = first if len(different) == 1 else f"{len(different)} different: {first}"
    return {key: text for key, text in shown.items() if text != "null"}
