"""A sweep: every run of a grid planned, trained, tabulated and fitted; killed and started again it
goes on where it was.

The sweep directory holds

    sweep.yaml        the grid, and the values of each run by name
    sweep.jsonl       what happened, a line each: sweep, started, finished, failed; on a cluster
                      also submitted, attached, requeued
    configs, logs     of each run, by name
    <run>/            run directories
    results.csv       a row for each run, written at the end
    fits.json         the grid's fits, written at the end
    slurm             on a cluster: what is submitted, what the tasks print, and word of how they
                      ended
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from archscale.config import Config, dump_config
from archscale.config.layers import write_yaml
from archscale.errors import ArchscaleError, ConfigError, TrainingError
from archscale.fit.table import number
from archscale.plan.devices import Device, this_device
from archscale.sweep.grid import Grid, read_grid
from archscale.sweep.launchers.choice import GENERATED, How, job_of, train_one
from archscale.sweep.launchers.local import Event, Launcher
from archscale.sweep.launchers.slurm import LeftToSlurm, unseen
from archscale.sweep.log import line_of, locked, open_log, write
from archscale.sweep.planning import SweepRun, newest_step, plan_runs, run_directories
from archscale.sweep.results import (
    check_fits,
    collect,
    fits_text,
    make_fits,
    write_fits,
    write_results,
)
from archscale.sweep.room import Slots, slots
from archscale.sweep.view import View, plan_text


def sweep(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    sweep_dir: Path | None = None,
    how: How | None = None,
    dry_run: bool = False,
    collect_only: bool = False,
    index: int | None = None,
) -> None:
    """Runs the grid in `path` to its end, prints its plan, its runs and its fits.

    Args:
        overrides: of the grid's base, `section.key=value`.
        sweep_dir: default runs/<name of the grid>.
        how: who trains the runs; None: this machine, as many at once as cores or accelerators, and
            memory, have room for.
        dry_run: print the plan, start nothing, write nothing.
        collect_only: train nothing; tabulate and fit the runs that are finished.
        index: train this run alone, here; the runs are in the order of the dry run, from 0.

    Raises:
        ConfigError, DataError: before any run starts: the grid, one of its configs, or its fits
            cannot work.
        TrainingError: some runs failed, or it was interrupted; all others are finished, tabulated
            and fitted.
    """
    how = how or How()
    grid = read_grid(path, overrides)
    how.check(grid)
    if (index is not None or collect_only) and (
        how != How() or dry_run or (index is not None and collect_only)
    ):
        what, option = (
            ("it trains nothing", "--collect")
            if collect_only
            else ("it trains one run, here and once", "--index")
        )
        raise ConfigError(what, option, "give it with --set and --sweep-dir only")
    if index is not None:
        return _train_one(grid, index, sweep_dir or Path("runs") / grid.content.name)
    directory = sweep_dir or Path("runs") / grid.content.name
    device = how.device(grid)
    needed = not dry_run and how.launcher not in GENERATED
    runs, more = _stages(grid, directory, device, data_needed=needed, partly=collect_only)
    check_fits(grid, [run.plan.config for run in [*runs, *more]])
    left = [run for run in runs if not run.finished]
    room = _room(grid, left or runs, how, device)
    if not collect_only:
        print(plan_text(grid, runs, more, directory, room, list_runs=dry_run), flush=True)
    if dry_run:
        return
    with locked(directory, wait=how.continued):
        _describe(grid, runs, directory)
        if how.launcher in GENERATED:
            print(how.write(grid, overrides, directory, runs, len(more)))
            return
        failed: dict[str, str] = {}
        if not collect_only:
            start = how.start(grid, overrides, directory, room)
            try:
                failed = _train(
                    runs, left, directory, room, start, grid.content.processes, how.continued
                )
                if more:
                    runs = _with_second_stage(grid, runs, directory, device, failed)
                    _describe(grid, runs, directory)
                    left = [run for run in runs if not run.finished and run.name not in failed]
                    room = _room(grid, left or runs, how, device)
                    print(
                        "\n" + plan_text(grid, runs, [], directory, room, list_runs=False),
                        flush=True,
                    )
                    start = how.start(grid, overrides, directory, room)
                    failed |= _train(
                        runs, left, directory, room, start, grid.content.processes, how.continued
                    )
            except LeftToSlurm as told:
                print(f"\n{told}")
                return
        _finish(grid, runs, directory, failed, whole=not collect_only)


def _room(grid: Grid, runs: Sequence[SweepRun], how: How, device: Device | None) -> Slots:
    if how.launcher == "local":
        return slots([run.plan for run in runs], grid.content.processes, how.jobs, this_device())
    return Slots(
        [{}] * min(how.jobs or len(runs), len(runs)), how.text(grid), here=False, device=device
    )


def _stages(
    grid: Grid,
    directory: Path,
    device: Device | None,
    *,
    data_needed: bool = True,
    partly: bool = False,
) -> tuple[list[SweepRun], list[SweepRun]]:
    """The runs that are known, and as many of their size as `refine` will add once these are
    finished.

    Args:
        partly: although some are not finished, take what `refine` has added to the others for
            known.
    """
    runs = plan_runs(grid, directory, device, data_needed=data_needed)
    there = run_directories(directory)
    if all(run.finished for run in runs):
        more = grid.refined(_losses(grid, runs, {}), there)
        return [*runs, *plan_runs(grid, directory, device, more, data_needed=data_needed)], []
    if partly:
        return [
            *runs,
            *plan_runs(grid, directory, device, grid.refined({}, there), data_needed=data_needed),
        ], []
    more = grid.refined({run.name: 0.0 for run in runs})
    return runs, plan_runs(grid, directory, device, more, data_needed=data_needed)


def _with_second_stage(
    grid: Grid,
    runs: Sequence[SweepRun],
    directory: Path,
    device: Device | None,
    failed: Mapping[str, str],
) -> list[SweepRun]:
    runs = [replace(run, step=newest_step(run.directory)) for run in runs]
    try:
        more = grid.refined(_losses(grid, runs, failed), run_directories(directory))
    except ConfigError:
        _finish(grid, runs, directory, failed)
        raise
    return [*runs, *plan_runs(grid, directory, device, more)]


def _train_one(grid: Grid, index: int, directory: Path) -> None:
    """Trains run `index` of the grid; the one that finishes last of all tabulates and fits them."""
    device = How().device(grid)
    runs, more = _stages(grid, directory, device)
    if index >= len(runs):
        later = f"; {len(more)} more of `refine` once these are finished" if more else ""
        raise ConfigError(
            f"there is no run {index}: the {len(runs)} runs of {grid.path} count from 0{later}",
            "--index",
            f"give at most {len(runs) - 1}",
        )
    run = runs[index]
    if run.finished:
        print(f"{run.name}: already finished")
    else:
        dump_config(run.grid.config, directory / "configs" / f"{run.name}.yaml")
        with _terminable():
            train_one(
                job_of(run, directory, grid.content.processes), cpu=not torch.cuda.is_available()
            )
    if not all(newest_step(other.directory) >= other.steps for other in runs):
        return
    with locked(directory, wait=True):
        runs, _ = _stages(grid, directory, device)
        if left := sum(not run.finished for run in runs):
            print(f"{left} more runs follow from `refine`: give the command of the sweep again")
            return
        _describe(grid, runs, directory)
        try:
            _finish(grid, runs, directory, {})
        except ArchscaleError as error:  # of a fit: this run is finished all the same
            print(f"archscale: warning: {error}", file=sys.stderr)


def _losses(grid: Grid, runs: Sequence[SweepRun], failed: Mapping[str, str]) -> dict[str, float]:
    """What `refine` chooses by, of each run that has it.

    Raises:
        ConfigError: none has it.
    """
    if grid.content.refine is None:
        return {}
    table = collect(Path(), {run.name: run.directory for run in runs}, failed)
    column = grid.content.refine.y
    if table.rows and column not in table.columns:
        raise ConfigError(
            f"no run has {column}", f"refine.y in {grid.path}", "give a column of results.csv"
        )
    return {
        name: number(cell, column, name)
        for name, cell in zip(table.rows, table.columns.get(column, []))
    }


def _describe(grid: Grid, runs: Sequence[SweepRun], directory: Path) -> None:
    """sweep.yaml, and the config of each run."""
    content = grid.content.model_dump(mode="json")
    write_yaml(
        content | {"runs": {run.name: run.grid.values for run in runs}}, directory / "sweep.yaml"
    )
    for run in runs:
        dump_config(run.grid.config, directory / "configs" / f"{run.name}.yaml")


def _train(
    runs: Sequence[SweepRun],
    left: Sequence[SweepRun],
    directory: Path,
    room: Slots,
    launch: Launcher,
    processes: int,
    continued: bool,
) -> dict[str, str]:
    """Trains the runs that are left, the longest first, so that none is alone at the end; returns
    why some failed."""
    with open_log(directory / "sweep.jsonl") as log:
        for event in unseen(directory, [run.name for run in runs if run.finished]):
            write(log, **line_of(event))
    if not left:
        return {}
    order = sorted(left, key=lambda run: -run.plan.figures["flops"]["executed"])
    jobs = [job_of(run, directory, processes) for run in order]
    done = sum(run.finished for run in runs)
    view = View({run.name: (run.directory, run.steps) for run in runs}, done)
    with open_log(directory / "sweep.jsonl") as log, view, _terminable():
        write(
            log,
            event="sweep",
            runs=len(runs),
            finished=done,
            at_once=len(room.variables),
            continued=continued,
        )

        def tell(event: Event) -> None:
            write(log, **line_of(event))
            view.tell(event)

        try:
            return launch(jobs, tell, view.tick)
        except KeyboardInterrupt:
            done = sum(replace(run, step=newest_step(run.directory)).finished for run in runs)
            raise TrainingError(
                f"interrupted with {done} of {len(runs)} runs finished",
                str(directory),
                (
                    "the same command continues"
                    if room.here
                    else "the jobs stay in the queue; the same command goes on with them"
                ),
            ) from None


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends as Ctrl-C does: with all runs ended."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _finish(
    grid: Grid,
    runs: Sequence[SweepRun],
    directory: Path,
    failed: Mapping[str, str],
    whole: bool = True,
) -> None:
    """results.csv, fits.json, the summary; then one error for all that failed, where all were to be
    trained (`whole`)."""
    configs: dict[str, Config] = {run.name: run.plan.config for run in runs}
    table = collect(directory, {run.name: run.directory for run in runs}, failed)
    write_results(table, grid.keys, configs, directory / "results.csv")
    fits = make_fits(table, [asked.request() for asked in grid.content.fit])
    write_fits(fits, directory / "fits.json")
    print(
        f"\n{grid.content.name}: {len(table.rows)} of {len(runs)} runs finished;"
        f" {directory}/results.csv, fits.json"
    )
    if fits:
        print("\n" + fits_text(fits), flush=True)
    _report(directory)
    if table.left_out and whole:
        (name, reason), more = table.left_out[0], len(table.left_out) - 1
        others = (
            f" (also failed: {', '.join(other for other, _ in table.left_out[1:])})" if more else ""
        )
        raise TrainingError(
            f"{len(table.left_out)} of {len(runs)} runs failed: {name}: {reason}",
            f"{directory}/logs/{name}.log",
            f"mend it and give the same command again{others}",
        )
    for fit in fits:
        if fit.refusal:
            raise fit.refusal


def _report(directory: Path) -> None:
    """A sweep that has trained is not lost to a figure that cannot be drawn."""
    from archscale.sweep.pages import write_sweep_report

    try:
        print(f"\nreport {write_sweep_report(directory)}", flush=True)
    except Exception as error:
        print(f"archscale: warning: no report: {type(error).__name__}: {error}", file=sys.stderr)
