"""What comes of a sweep: a row for each run, results.csv, and the fits that the grid asks for."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from archscale.config import Config
from archscale.errors import ArchscaleError, ConfigError, DataError
from archscale.files import CONFIG, METRICS, write_atomically
from archscale.fit.fit import Settings, needed
from archscale.fit.groups import FitRequest, TableFits, fit_table, label_of
from archscale.fit.laws import LAWS
from archscale.fit.table import Cell, Table
from archscale.fit.text import render
from archscale.report.records import GridFit
from archscale.sweep.expressions import Expression
from archscale.sweep.grid import Grid
from archscale.sweep.table import config_cells, read_table

# Columns that every run has beside its config keys; those with a slash, such as
# optimizer/clip_fraction, depend on the run.
KNOWN_COLUMNS = (
    "step",
    "tokens",
    "loss",
    "aux_loss",
    "grad_norm",
    "lr",
    "val_loss",
    "val_bits_per_byte",
    "mfu",
    "step_seconds",
    "tokens_per_second",
    "parameters",
    "active_parameters",
    "published_parameters",
    "flops_per_token",
    "flops",
    "published_flops",
)
# No metrics in results.csv: time and memory, which no two sweeps share, figures of single layers
# and matrices, and what stands under `status`.
UNSHARED = re.compile(
    r"diverged|time|mfu|step_seconds|tokens_per_second|peak_memory_bytes|run"
    r"|straggler/.*|stability/layer_.*|moe/layer_.*|.*/matrix/.*"
)


def _condition(asked: FitRequest, rows: Sequence[Mapping[str, Cell]], where: str) -> Expression:
    known = {*KNOWN_COLUMNS, *(key for row in rows for key in row)}
    return Expression(str(asked.where), f"where of {where}", known)


def _rows_of(asked: FitRequest, rows: Sequence[Mapping[str, Cell]], where: str) -> list[bool]:
    """Which rows a fit is made of.

    Raises:
        ConfigError: its `where` cannot be read, or has no value for one of them.
    """
    if asked.where is None:
        return [True] * len(rows)
    condition = _condition(asked, rows, where)
    words: dict[Cell, Any] = {"true": True, "false": False}

    def keep(row: Mapping[str, Cell]) -> bool:
        return bool(condition(lambda key: words.get(row.get(key), row.get(key))))

    return [keep(row) for row in rows]


def check_fits(grid: Grid, configs: Sequence[Config]) -> None:
    """Refuses, before any run, fits that these runs could not be enough for.

    Raises:
        ConfigError: a column that no run will have, arguments that do not go together, or a group
            of too few runs.
    """
    rows = [config_cells(config) for config in configs]
    if refine := grid.content.refine:
        where = f"refine.y in {grid.path}"
        if "/" not in refine.y and refine.y not in KNOWN_COLUMNS:
            raise ConfigError(
                f"no run has {refine.y}", where, f"give one of {', '.join(KNOWN_COLUMNS[:8])}, …"
            )
        _check_validation(refine.y, rows, where)
    for number, asked in enumerate(fit.request() for fit in grid.content.fit):
        where = f"fit.{number} in {grid.path}"
        try:
            asked.check()
            columns = Table(
                where,
                {
                    name: []
                    for name in dict.fromkeys(
                        [*KNOWN_COLUMNS, *(key for row in rows for key in row)]
                    )
                },
                [],
            )
            names = {
                name: name if "/" in name else columns.find(name)
                for name in (
                    *asked.x,
                    asked.y,
                    *asked.group,
                    *([asked.against] if asked.against else []),
                    *([asked.block] if asked.block else []),
                )
            }
            _check_validation(names[asked.y], rows, where)
            if asked.where and _condition(asked, rows, where).names - rows[0].keys():
                continue  # of metrics, which are known only after the runs
            chosen = _rows_of(asked, rows, where)
            if not any(chosen):
                raise ConfigError("`where` drops all runs", "", "loosen it, or remove the fit")
            _check_counts(
                asked,
                [names[x] for x in asked.x],
                [names[g] for g in asked.group],
                names[asked.against] if asked.against else None,
                [row for row, keep in zip(rows, chosen) if keep],
            )
        except ArchscaleError as error:
            raise ConfigError(
                error.what.replace("--", ""), where, error.remedy.replace("--", "")
            ) from None


def _check_validation(y: str, rows: Sequence[Mapping[str, Cell]], where: str) -> None:
    """Whether every run could have this metric. Which sources of a mixture have a validation split,
    their data tell."""
    if not y.startswith("val_"):
        return
    for row in rows:
        mixture = row["data.mixture"]
        names = [entry["name"] for entry in json.loads(str(mixture))] if mixture else []
        _, _, name = y.partition("/")
        if name and name not in names:
            remedy = f"give one of {', '.join(names)}" if names else "give data.mixture in the base"
            raise ConfigError(f"no {y} without a source {name} of data.mixture", where, remedy)
        if not name and row["data.val"] is None and not names:
            raise ConfigError(
                f"no {y} without data.val", where, "give data.val in the base, or use the loss"
            )


def _check_counts(
    asked: FitRequest,
    x: list[str],
    group: list[str],
    against: str | None,
    rows: Sequence[Mapping[str, Cell]],
) -> None:
    """Points of each group, as far as configs tell: a column of metrics is known only after the
    runs."""
    keys = [*group, *([against] if against else [])]
    if not all(key in rows[0] for key in keys):
        return
    groups: dict[tuple[Cell, ...], list[tuple[Cell, ...]]] = {}
    blocks: dict[tuple[Cell, ...], set[Cell]] = {}
    for row in rows:
        blocks.setdefault(tuple(row.get(key) for key in keys), set()).add(
            row.get(asked.block or "")
        )
        groups.setdefault(tuple(row.get(key) for key in keys), []).append(
            tuple(row.get(name) for name in x)
        )
    least, parameters = needed(asked.form, asked.settings), LAWS[asked.form].parameters
    for key, points in groups.items():
        # Wherever the best one is, no more than the fullest of them count.
        if asked.settings.nearest:
            most = sorted(set(points), key=points.count)[-asked.settings.nearest :]
            points = [point for point in points if point in most]
        of_group = f" of {label_of(keys, key)}" if keys else ""
        distinct = len(set(points)) if all(name in rows[0] for name in x) else len(points)
        if asked.block:  # each but one has a shift to be found
            least = needed(asked.form, asked.settings) + len(blocks[key]) - 1
        if len(points) < least or distinct < parameters:
            raise ConfigError(
                f"{len(points)} runs{of_group} at {distinct} different {' and '.join(x)} are"
                f" too few for {asked.form}, which needs {least} at {parameters} different ones",
                "",
                "add values or seeds to the grid, or remove the fit",
            )
    if against:
        for key in {key[:-1] for key in groups}:
            values = len({other[-1] for other in groups if other[:-1] == key})
            if values < needed("power", Settings()):
                raise ConfigError(
                    f"{values} different {against} are too few for a law of the optima, which needs"
                    f" {needed('power', Settings())}",
                    "",
                    "add values to the grid, or remove `against`",
                )


def collect(directory: Path, runs: Mapping[str, Path], failed: Mapping[str, str]) -> Table:
    """A row for each finished run, named by the run; the others are left out with the reason.

    Args:
        runs: directories by name, in the order of the rows.
        failed: reasons by name.
    """
    names, rows, left_out = [], [], []
    for name, run in runs.items():
        reasons, table = [], Table("", {}, [])
        if any((run / file).exists() for file in (CONFIG, METRICS)):
            try:
                table = read_table([run])
                reasons = [reason for _, reason in table.left_out]
            except (
                ArchscaleError
            ) as error:  # one damaged file must not cost the results of all other runs
                reasons = [str(error)]
        if table.rows and name not in failed:
            names.append(name)
            rows.append(
                {column: cells[0] for column, cells in table.columns.items()} | {"run": name}
            )
        else:
            left_out.append((name, failed.get(name) or (reasons or ["was not started"])[0]))
    return Table.from_rows(rows, names, str(directory), left_out)


def write_results(
    table: Table, keys: Sequence[str], configs: Mapping[str, Config], path: Path
) -> None:
    """results.csv: runs, whether they finished, the config keys that tell them apart, and their
    last metrics.

    The same for the same runs, however often they were interrupted: nothing in it depends on the
    clock.
    """
    rows = {name: config_cells(config) for name, config in configs.items()}
    all_keys = dict.fromkeys(key for row in rows.values() for key in row)
    differing = [
        key
        for key in all_keys
        if len({repr(row.get(key)) for row in rows.values()}) > 1 and key != "name"
    ]
    keys_shown = list(dict.fromkeys([*(key for key in keys if key in all_keys), *differing]))
    metrics = [c for c in table.columns if c not in all_keys and not UNSHARED.fullmatch(c)]
    status = dict.fromkeys(table.rows, "finished")
    status |= {name: f"diverged: {reason}" for name, reason in diverged(table)}
    status |= {name: f"failed: {reason}" for name, reason in table.left_out}
    at = {name: number for number, name in enumerate(table.rows)}
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["run", "status", *keys_shown, *metrics])
    for name, config in rows.items():
        last = [table.columns[c][at[name]] if name in at else None for c in metrics]
        writer.writerow(
            [name, status[name], *map(_text, [*(config.get(key) for key in keys_shown), *last])]
        )
    write_atomically(path, stream.getvalue())


def _text(cell: Cell) -> str:
    if isinstance(cell, float):
        return str(int(cell)) if cell.is_integer() and abs(cell) < 1e15 else repr(cell)
    return "" if cell is None else cell


def make_fits(table: Table, fits: Sequence[FitRequest]) -> list[GridFit]:
    """Each of the fits, or why it was refused."""
    results = []
    for asked in fits:
        fitted: TableFits | None = None
        refusal: ArchscaleError | None = None
        try:
            if not table.rows:
                raise DataError("no run has finished", table.source, "see why they failed")
            rows = [
                {key: cells[i] for key, cells in table.columns.items()}
                for i in range(len(table.rows))
            ]
            chosen = table.only(_rows_of(asked, rows, f"a fit of {asked.y}"))
            fitted = fit_table(_converged(chosen, asked.y), asked)
            refusal = fitted.refusal
        except ArchscaleError as error:
            refusal = error
        results.append(GridFit(asked, fitted, refusal))
    return results


def diverged(table: Table) -> list[tuple[str, str]]:
    """(name, reason) of the runs that ended with a loss that is not finite."""
    reasons = table.columns.get("diverged", [])
    return [(name, str(reason)) for name, reason in zip(table.rows, reasons) if reason is not None]


def _converged(table: Table, y: str) -> Table:
    """The table without runs that have diverged though their `y` is finite; a fit leaves out the
    others by itself, and says so."""
    reasons = dict(diverged(table))
    left_out = {
        name: reasons[name]
        for name, value in zip(table.rows, table.numbers(table.find(y)))
        if name in reasons and math.isfinite(value)
    }
    if not left_out:
        return table
    rest = table.only([name not in left_out for name in table.rows])
    return replace(rest, left_out=[*table.left_out, *left_out.items()])


def write_fits(fits: Sequence[GridFit], path: Path) -> None:
    write_atomically(path, json.dumps([fit.as_dict() for fit in fits], indent=1) + "\n")


def fits_text(fits: Sequence[GridFit]) -> str:
    """All of them for people, with intervals."""
    parts = []
    for fit in fits:
        if fit.fits is None:
            parts.append(f"{fit.asked.form} of {fit.asked.y}: refused: {fit.refusal}")
        else:
            parts.append(render(fit.fits))
    return "\n\n".join(parts)
