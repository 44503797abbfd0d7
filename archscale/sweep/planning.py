"""The runs of a grid, each with its plan, its directory and how far it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from archscale.checkpoint.history import other_trajectory
from archscale.checkpoint.place import newest_step
from archscale.config import load_config
from archscale.data.stored import describe
from archscale.errors import ArchscaleError, ConfigError, DataError
from archscale.files import CONFIG, METRICS
from archscale.fit.groups import text_of
from archscale.plan.devices import Device
from archscale.plan.plan import Plan, make_plan
from archscale.sweep.grid import Grid, GridRun
from archscale.sweep.table import config_cells


@dataclass(frozen=True)
class SweepRun:
    """A run of the grid, planned.

    Attributes:
        grid: its name, values and config.
        plan: its plan on this machine.
        directory: of the run.
        step: of its newest checkpoint.
    """

    grid: GridRun
    plan: Plan
    directory: Path
    step: int

    @property
    def name(self) -> str:
        return self.grid.name

    @property
    def steps(self) -> int:
        return self.plan.config.steps

    @property
    def finished(self) -> bool:
        return self.step >= self.steps and (self.directory / METRICS).exists()


def run_directories(directory: Path) -> set[str]:
    """Names of the run directories that are there."""
    return (
        {path.name for path in directory.iterdir() if path.is_dir()}
        if directory.is_dir()
        else set()
    )


def plan_runs(
    grid: Grid,
    directory: Path,
    device: Device | None = None,
    runs: Sequence[GridRun] | None = None,
    *,
    data_needed: bool = True,
) -> list[SweepRun]:
    """Runs of the grid, by default `grid.runs()`, each with its plan and how far it is.

    Args:
        device: that each process trains on, whose memory bounds it, and which decides
            `training.precision: auto` for all runs, unless one has been begun; None: not known.
        data_needed: whether each run's data have to be there.

    Raises:
        ConfigError: one cannot be planned, or its directory holds another run; the line names its
            values.
    """
    runs = _with_one_precision(grid, directory, device, grid.runs() if runs is None else runs)
    vocabularies: dict[tuple[str, str | None, int | None], int | ArchscaleError] = {}
    planned_runs, problems = [], []
    for run in runs:
        config, data = run.config, run.config.data
        given = data.tokenizer, config.model.vocab_size
        for path in filter(None, (*data.training_paths, data.val)):
            if (path, *given) not in vocabularies:
                vocabularies[path, *given] = _vocabulary(path, *given)
            if isinstance(error := vocabularies[path, *given], ArchscaleError) and (
                data_needed or not config.model.vocab_size
            ):
                raise error
        try:
            for path in data.training_paths:
                if isinstance(vocabulary := vocabularies[path, *given], int):
                    config = config.with_vocab(vocabulary)
            plan = make_plan(config, world_size=grid.content.processes, device=device)
            if plan.problems:
                raise plan.problems[0]
            planned = SweepRun(run, plan, directory / run.name, newest_step(directory / run.name))
            _check_same(planned)
        except ConfigError as error:
            problems.append(ConfigError(f"{error.what}, {error.where}", run.where, error.remedy))
            continue
        planned_runs.append(planned)
    if problems:
        raise ConfigError.several(problems)
    return planned_runs


def _with_one_precision(
    grid: Grid, directory: Path, device: Device | None, runs: Sequence[GridRun]
) -> list[GridRun]:
    """`runs` with one value in place of `training.precision: auto`, or a sweep that goes on
    elsewhere would compare curves of different arithmetic: that of the first run that has been
    begun, otherwise what the device has. Where neither is known, each run finds its own."""
    if all(run.config.training.precision != "auto" for run in runs):
        return list(runs)
    chosen = None if device is None else device.precision
    for run in (*grid.runs(), *runs):
        path = directory / run.name / CONFIG
        if run.config.training.precision == "auto" and path.exists():
            chosen = load_config(path).precision
            break
    if chosen is None:
        return list(runs)
    return [replace(run, config=run.config.with_precision(chosen)) for run in runs]


def _vocabulary(path: str, tokenizer: str | None, vocab_size: int | None) -> int | ArchscaleError:
    try:
        return describe(path, tokenizer, vocab_size).vocab_size
    except DataError as error:
        return error


def _check_same(run: SweepRun) -> None:
    """Refuses a run directory whose run has another config: its results would stand in the wrong
    row."""
    path = run.directory / CONFIG
    if not path.exists():
        return
    before, now = (config_cells(config) for config in (load_config(path), run.plan.config))
    for key in other_trajectory(before, now):
        raise ConfigError(
            f"{key} is {text_of(now.get(key))}, the run in {run.directory} has"
            f" {text_of(before.get(key))}",
            key,
            "restore the value, or give another --sweep-dir",
        )
