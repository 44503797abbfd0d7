"""Rows of runs: directories of runs, beside CSV files, as one table.

A run directory has config.yaml and metrics.jsonl. Its row has the columns

    run                      its path
    model.width, seed, …     the keys of the config, dotted
    val_loss, tokens, …      the last value of each metric
    eval/arc_easy/acc, …     what `archscale eval` has measured after the last step
    diverged                 where the loss is not finite at the end: since when
    parameters, active_parameters, published_parameters, flops_per_token, flops, published_flops
                             from the model's structure (`archscale.plan.counting`); flops of all
                             tokens trained
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from archscale.checkpoint.changes import Origins
from archscale.checkpoint.directory import read_state
from archscale.checkpoint.place import checkpoints_of, newest_step
from archscale.config import Config, load_config
from archscale.config.layers import flatten
from archscale.errors import CheckpointError, ConfigError, DataError
from archscale.files import CONFIG, EVALUATIONS, METRICS, step_directory
from archscale.fit.table import Cell, Table, plain, read_csv
from archscale.plan import counting
from archscale.plan.transfer import resolve
from archscale.telemetry.guard import not_finite_since


def read_table(paths: Sequence[str | os.PathLike[str]]) -> Table:
    """All rows of these files and directories. Rows of CSV files get a column `file` unless they
    have one.

    Raises:
        DataError: one of them is missing or cannot be read.
    """
    rows: list[dict[str, Cell]] = []
    names: list[str] = []
    left_out: list[tuple[str, str]] = []
    for path in map(Path, paths):
        if path.is_dir():
            new_rows = list(_runs(path, left_out))
            if not new_rows and not left_out:
                raise DataError(
                    "there is no run directory in it",
                    str(path),
                    "give a directory whose folders hold config.yaml and metrics.jsonl, or a CSV"
                    " file",
                )
        else:
            new_rows = list(read_csv(path))
        for name, row in new_rows:
            names.append(name)
            rows.append(row)
    return Table.from_rows(rows, names, " and ".join(map(str, paths)), left_out)


def _runs(folder: Path, left_out: list[tuple[str, str]]) -> Iterator[tuple[str, dict[str, Cell]]]:
    """Every finished run below `folder`, or `folder` itself, in the order of their names."""
    for path, inner, files in os.walk(folder):
        inner.sort()
        if CONFIG not in files:
            continue
        run = Path(path)
        if METRICS not in files:
            if not inner:  # a config beside folders belongs to the sweep
                left_out.append((path, "has no metrics.jsonl"))
            continue
        inner.clear()  # nothing below a run is a run
        config = load_config(run / CONFIG)
        metrics, diverged = _last_values(run / METRICS)
        row: dict[str, Cell] = {"run": path, **config_cells(config), **metrics}
        row |= _structure(config, metrics.get("tokens"))
        if diverged is not None:
            row["diverged"] = f"loss not finite since step {diverged}"
        step = metrics.get("step")
        for key, value in _evaluated(run / EVALUATIONS, step).items():
            row.setdefault(key, value)  # what training has written stays
        try:
            steps = _schedule_start(run) + resolve(config).steps
        except ConfigError:  # a budget that follows a vocabulary which only the data knows
            steps = None
        if not isinstance(step, float):
            left_out.append((path, "has no metrics yet"))
        elif steps is not None and step < steps:
            left_out.append((path, f"unfinished: step {step:.0f} of {steps}"))
        else:
            yield path, row


def _schedule_start(run: Path) -> int:
    """The step after which the schedule of the config begins: not 0 after a reset."""
    newest = step_directory(checkpoints_of(run), newest_step(run))
    try:
        return Origins.of_state(read_state(newest)).schedule.step
    except CheckpointError:  # none yet
        return 0


def _last_values(path: Path) -> tuple[dict[str, Cell], int | None]:
    """The last value of each metric, NaN where it was not finite; and the step since which the loss
    is not, if so. Lists, such as the loads of experts, make no column. A last line cut short by a
    crash is lost."""
    last: dict[str, Cell] = {}
    since: int | None = None
    for count, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), 1):
        try:
            values = json.loads(line)
            last |= {
                key: math.nan if value is None else plain(value)
                for key, value in values.items()
                if not isinstance(value, list)
            }
            since = not_finite_since(since, values)
        except (ValueError, TypeError, AttributeError):
            if line.endswith("\n"):
                raise DataError(
                    "not a flat JSON object",
                    f"line {count} of {path}",
                    "correct the line, or name the other runs only",
                ) from None
    return last, since


def _evaluated(path: Path, step: Cell) -> dict[str, Cell]:
    """The metrics `eval/…` in a run's list of evaluations that are of this step; of several results
    of one name the last counts. Its validation again, which may be by another order of sums, is no
    other column. Lines that a crash or a full disk has cut short are lost."""
    cells: dict[str, Cell] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            values = json.loads(line)
            if values["step"] == step:
                cells |= {
                    key: math.nan if value is None else plain(value)
                    for key, value in values["metrics"].items()
                    if key.startswith("eval/")
                }
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
    return cells


def config_cells(config: Config) -> dict[str, Cell]:
    """The config's dotted keys and values, lists as JSON."""
    return {
        key: json.dumps(value) if isinstance(value, list) else plain(value)
        for key, value in flatten(config.resolved()).items()
    }


def _structure(config: Config, tokens: Cell) -> dict[str, Cell]:
    """What follows from the model; nothing while its vocabulary is not known."""
    model = config.model
    if model.vocab_size is None:
        return {}
    count = counting.parameters(model)
    useful, published = counting.training_flops(model), counting.published_flops_per_token(model)
    columns: dict[str, Cell] = {
        "parameters": float(count.total),
        "active_parameters": float(count.active),
        "published_parameters": float(counting.published_parameters(model)),
        "flops_per_token": useful,
    }
    if isinstance(tokens, float):
        columns |= {"flops": useful * tokens, "published_flops": float(published) * tokens}
    return columns
