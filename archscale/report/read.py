"""What a run directory says, whether the run is finished, running or cut short."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from archscale.checkpoint.place import Place, StoreError, checkpoints_of
from archscale.errors import ArchscaleError, ConfigError, DataError, explain_os_error
from archscale.files import CONFIG, ENVIRONMENT, EVALUATIONS, MANIFEST, METRICS, PLAN, SAMPLES

_REMEDY = "name a directory, such as runs/<name>, that train or sweep has filled"
_AXES = ("step", "tokens", "time")
SHOWN_WARNINGS = 3  # bad lines that are named one by one


@dataclass(frozen=True)
class Series:
    """One metric. `steps` ascend strictly; `values` has NaN where the run wrote a non-finite value.

    `values` is (lines,) for a number and (lines, entries) for a list, padded with NaN.
    """

    steps: np.ndarray
    values: np.ndarray

    @property
    def last(self) -> float | None:
        """The last finite value of a number."""
        finite = self.values[np.isfinite(self.values)]
        return float(finite[-1]) if len(finite) else None


@dataclass
class RunRecord:
    """A run directory, read. Parts that are missing are empty."""

    directory: Path
    name: str
    steps: np.ndarray  # of every line of metrics.jsonl
    tokens: np.ndarray  # tokens seen after each of these steps
    times: np.ndarray  # Unix seconds at which these lines were written
    series: dict[str, Series] = field(default_factory=dict)
    # Keys that hold neither numbers nor lists of them: the last value.
    texts: dict[str, str] = field(default_factory=dict)
    events: list[tuple[int, str]] = field(default_factory=list)  # (step, what happened)
    warnings: list[str] = field(default_factory=list)  # what could not be read
    config: str = ""
    plan: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    manifest: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)  # as `archscale eval` wrote
    samples: list[dict[str, Any]] = field(default_factory=list)  # texts generated in training
    checkpoint: tuple[int, int] | None = None  # step of the newest checkpoint and its bytes on disk

    def planned(self, *path: str) -> float | None:
        """A positive number of plan.json, under these keys; None where an older or foreign plan has
        none."""
        value = lookup(self.plan, *path)
        return float(value) if is_number(value) and value > 0 else None

    @property
    def flops_per_token(self) -> float | None:
        """Useful training FLOPs of one token, by the plan."""
        return self.planned("flops", "training_per_token")

    @property
    def seconds(self) -> float | None:
        """Training time: the sum of all steps' seconds, which leaves out evaluation, checkpoints
        and pauses."""
        series = self.series.get("step_seconds")
        return None if series is None else float(np.nansum(series.values))


def read_run(directory: Path) -> RunRecord:
    """Read a run directory; what is unreadable in it becomes a warning.

    Raises:
        DataError: there is no such directory, it holds no run, or its metrics.jsonl is no metrics
            file.
    """
    if not directory.is_dir():
        raise DataError("no such directory", str(directory), _REMEDY)
    metrics = directory / METRICS
    if not metrics.is_file() and not (directory / PLAN).is_file():
        runs = sorted(path.parent.name for path in directory.glob("*/metrics.jsonl"))
        inside = f"it holds runs, name one or more of them: {', '.join(runs[:3])}" + (
            " …" if len(runs) > 3 else ""
        )
        empty = not any(directory.iterdir())
        problem = "an empty directory" if empty else "not a run or sweep directory"
        raise DataError(problem, str(directory), inside if runs else _REMEDY)
    run = RunRecord(
        directory, directory.resolve().name, np.zeros(0, dtype=int), np.zeros(0), np.zeros(0)
    )
    plan = _read_json(run, PLAN, dict)
    run.plan = plan
    run.environment = _read_json(run, ENVIRONMENT, dict)
    run.manifest = _read_json(run, MANIFEST, list)
    if (directory / CONFIG).is_file():
        run.config = (directory / CONFIG).read_text(errors="replace")
    run.name = str(run.plan.get("name") or run.name)
    try:
        lines = metrics.read_bytes().splitlines() if metrics.is_file() else []
    except OSError as error:
        cause, remedy = explain_os_error(error, _REMEDY)
        raise DataError(f"cannot read the metrics: {cause}", str(metrics), remedy) from error
    _parse(run, lines)
    if any(line.strip() for line in lines) and not len(run.steps):
        raise DataError("no line is a JSON object with step and tokens", str(metrics), _REMEDY)
    run.evaluations = _read_lines(run, EVALUATIONS, {"kind": str, "name": str, "figures": dict})
    run.samples = _read_lines(run, SAMPLES, {"prompt": str, "text": str})
    try:
        run.checkpoint = _newest_checkpoint(checkpoints_of(directory))
    except (StoreError, ConfigError) as error:
        run.warnings.append(f"the newest checkpoint is left out: {error.what} ({error.where})")
    return run


def _read_json(run: RunRecord, name: str, kind: type) -> Any:
    path = run.directory / name
    if not path.is_file():
        return kind()
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        content = None
    if isinstance(content, kind):
        return content
    run.warnings.append(f"{name} is not readable: left out")
    return kind()


def _read_lines(run: RunRecord, name: str, kinds: dict[str, type]) -> list[dict[str, Any]]:
    """The lines of a file beside the metrics that are JSON objects with a step and these keys; of
    others there is a warning."""
    path = run.directory / name
    if not path.is_file():
        return []
    rows, bad = [], 0
    for raw in path.read_bytes().splitlines():
        try:
            row = json.loads(raw)
            whole = isinstance(row["step"], int)
            whole = whole and all(isinstance(row[key], kind) for key, kind in kinds.items())
        except (ValueError, KeyError, TypeError):
            whole = False
        if whole:
            rows.append(row)
        else:
            bad += 1
    if bad:
        lines = "1 line" if bad == 1 else f"{bad} lines"
        run.warnings.append(f"{name}: {lines} cut short, damaged or foreign: skipped")
    return rows


def _parse(run: RunRecord, lines: list[bytes]) -> None:
    rows = {number: _line(raw) for number, raw in enumerate(lines, 1) if raw.strip()}
    bad = [number for number, row in rows.items() if row is None]
    for number in bad[:SHOWN_WARNINGS]:
        state = "cut short" if number == len(lines) else "damaged or foreign"
        run.warnings.append(f"metrics.jsonl: line {number} is {state}: skipped")
    if len(bad) > SHOWN_WARNINGS:
        run.warnings.append(f"metrics.jsonl: {len(bad) - SHOWN_WARNINGS} more such lines skipped")
    columns: dict[str, dict[int, Any]] = {}
    axes: dict[int, tuple[int, float, float]] = {}
    # Stable: of two lines of one step the later one counts.
    for row in sorted(filter(None, rows.values()), key=lambda row: row["step"]):
        step = int(row["step"])
        time = float(row["time"]) if is_number(row.get("time")) else math.nan
        axes[step] = (step, float(row["tokens"]), time)
        values = {key: value for key, value in row.items() if key not in _AXES}
        for key, value in values.items():
            if key != "event":
                columns.setdefault(key, {})[step] = value
        missing = [key for key, value in values.items() if value is None]
        if isinstance(event := row.get("event"), str):
            run.events.append((step, event))
        elif missing:
            run.events.append((step, f"non-finite {', '.join(missing)}"))
    table = np.array(list(axes.values()), dtype=float).reshape(-1, 3)
    run.steps, run.tokens, run.times = table[:, 0].astype(int), table[:, 1], table[:, 2]
    for key, column in columns.items():
        _add(run, key, column)


def _line(raw: bytes) -> dict[str, Any] | None:
    """A line of metrics.jsonl, if it is one."""
    try:
        row = json.loads(raw)
        step, tokens = row["step"], row["tokens"]
    except (ValueError, KeyError, TypeError, IndexError):
        return None
    return row if is_number(step) and is_number(tokens) and step >= 0 else None


def _add(run: RunRecord, key: str, column: dict[int, Any]) -> None:
    """One key's values by step, as a series or as text."""
    steps = np.fromiter(column, dtype=int, count=len(column))
    values = list(column.values())
    if all(value is None or isinstance(value, (int, float)) for value in values):
        numbers = np.array([math.nan if value is None else float(value) for value in values])
        run.series[key] = Series(steps, np.where(np.isfinite(numbers), numbers, math.nan))
    elif all(
        isinstance(value, list) and all(v is None or is_number(v) for v in value)
        for value in values
    ):
        table = np.full((len(values), max(1, *map(len, values))), math.nan)
        for row, value in zip(table, values):
            row[: len(value)] = [math.nan if v is None else v for v in value]
        run.series[key] = Series(steps, np.where(np.isfinite(table), table, math.nan))
    else:
        run.texts[key] = values[-1] if isinstance(values[-1], str) else json.dumps(values[-1])


def lookup(tree: Any, *path: str) -> Any:
    """What lies under these keys, None where there is nothing."""
    for key in path:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _newest_checkpoint(directory: Place) -> tuple[int, int] | None:
    paths = [path for path in directory.glob("step_*") if path.name[5:].isdigit()]
    if not paths:
        return None
    newest = max(paths, key=lambda path: int(path.name[5:]))
    try:
        size = sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())
    except OSError:  # pruned while it was looked at
        return None
    return int(newest.name[5:]), size


def read_runs(directories: list[Path]) -> list[RunRecord]:
    """Runs, under names that tell them apart.

    Raises:
        ArchscaleError: as `read_run`, or the same directory twice.
    """
    if len({directory.resolve() for directory in directories}) < len(directories):
        raise ArchscaleError(
            "the same run twice", str(directories[0]), "name different run directories"
        )
    runs = [read_run(directory) for directory in directories]
    if len({run.name for run in runs}) < len(runs):
        for run in runs:
            run.name += f" ({run.directory.resolve().name})"
    if len({run.name for run in runs}) < len(runs):
        for number, run in enumerate(runs, 1):
            run.name += f" #{number}"
    return runs
