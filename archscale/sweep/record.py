"""What a sweep directory says, whether all of its runs are finished or only some."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from archscale.errors import ConfigError, DataError
from archscale.files import ENVIRONMENT
from archscale.fit.groups import FitRequest
from archscale.fit.table import Cell, Table
from archscale.report.records import SweepRecord
from archscale.sweep.config import GridConfig
from archscale.sweep.launchers.local import events_of
from archscale.sweep.results import collect
from archscale.yaml_reader import parse_yaml

_REMEDY = "name a sweep directory, such as runs/<name>, that archscale sweep has filled"


def read_sweep(directory: Path) -> SweepRecord:
    """Read a sweep directory; a run that cannot be read is left out with the reason.

    Raises:
        DataError: sweep.yaml is not one.
    """
    path = directory / "sweep.yaml"
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError, ConfigError) as error:
        raise DataError(
            f"cannot be read: {' '.join(str(error).split())[:200]}", str(path), _REMEDY
        ) from None
    runs = content.pop("runs", None) if isinstance(content, dict) else None
    if not isinstance(runs, dict) or not all(isinstance(values, dict) for values in runs.values()):
        raise DataError("it lists no runs with their values", str(path), _REMEDY)
    warnings: list[str] = []
    fits: list[FitRequest] = []
    try:
        fits = [fit.request() for fit in GridConfig.model_validate(content).fit]
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        warnings.append(f"sweep.yaml: {where}: {first['msg']}: the grid's own fits are left out")
    failed = _failed(directory / "sweep.jsonl", runs)
    table = _with_grid_keys(collect(directory, {name: directory / name for name in runs}, {}), runs)
    reasons = [(name, failed.get(name, reason)) for name, reason in table.left_out]
    table = replace(table, left_out=reasons)
    # A run may have been finished since, by other hands.
    failed = {name: failed[name] for name, _ in reasons if name in failed}
    environments = {
        name: environment
        for name in runs
        if (environment := _environment(directory / name, warnings))
    }
    name = str(content.get("name") or directory.resolve().name)
    return SweepRecord(directory, name, content, fits, runs, table, failed, environments, warnings)


def _failed(path: Path, runs: Mapping[str, Any]) -> dict[str, str]:
    """Runs whose last event is a failure that is not tried again."""
    reasons: dict[str, str] = {}
    for event in events_of(path):
        if (run := event.get("run", "")) not in runs:
            continue
        reasons.pop(run, None)
        if event["event"] == "failed" and not event.get("again"):
            reasons[run] = str(event.get("reason") or "ended without success")
    return reasons


def _with_grid_keys(table: Table, runs: Mapping[str, Mapping[str, Any]]) -> Table:
    """A column for each key of the grid; a section, which configs have only as single keys, as
    JSON."""
    columns = dict(table.columns)
    for key in dict.fromkeys(key for values in runs.values() for key in values):
        if key in columns and not any(
            isinstance(values.get(key), dict) for values in runs.values()
        ):
            continue
        columns[key] = [_cell(runs[name].get(key)) for name in table.rows]
    return Table(table.source, columns, table.rows, table.left_out)


def _cell(value: Any) -> Cell:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return json.dumps(value, sort_keys=True)


def _environment(run: Path, warnings: list[str]) -> dict[str, Any]:
    try:
        content = json.loads((run / ENVIRONMENT).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError):
        warnings.append(f"{run.name}: environment.json is not readable: left out")
        return {}
    return content if isinstance(content, dict) else {}
