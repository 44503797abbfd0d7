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
    report.html       the page, with its figures and tables in `report`
    slurm             on a cluster: what is submitted, what the tasks print, and records of how they
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

from archscale.checkpoint.place import newest_step
from archscale.config import Config, dump_config
from archscale.config.layers import write_yaml
from archscale.errors import ArchscaleError, ConfigError, TrainingError
from archscale.fit.table import number
from archscale.plan.devices import this_device
from archscale.sweep.grid import Grid, read_grid
from archscale.sweep.launchers.choice import GENERATED, How, job_of, train_one
from archscale.sweep.launchers.local import Event
from archscale.sweep.launchers.slurm import LeftToSlurm, unseen
from archscale.sweep.log import line_of, locked, open_log, write
from archscale.sweep.pages import report_if_possible
from archscale.sweep.planning import SweepRun, plan_runs, run_directories
from archscale.sweep.results import (
    check_fits,
    collect,
    diverged,
    fits_text,
    make_fits,
    write_fits,
    write_results,
)
from archscale.sweep.room import Slots, slots
from archscale.sweep.view import View, plan_text
from archscale.train.stopping import STATUS


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
        ConfigError, DataError: before any run starts, the grid, one of its configs, or its fits
            cannot work; after them, a fit was refused, or no run has what `refine` goes by.
        TrainingError: some runs failed, or it was interrupted; all others are finished, tabulated
            and fitted.
    """
    how = how or How()
    grid = read_grid(path, overrides)
    how.check(grid)
    no_options = how == How() and not dry_run
    if collect_only and (not no_options or index is not None):
        raise ConfigError(
            "it trains nothing", "--collect", "give it with --set and --sweep-dir only"
        )
    if index is not None and not no_options:
        raise ConfigError(
            "it trains one run, here and once", "--index", "give it with --set and --sweep-dir only"
        )
    whole = Sweep(grid, overrides, sweep_dir or Path("runs") / grid.content.name, how)
    if index is not None:
        whole.train_one(index)
    elif collect_only:
        whole.collect()
    else:
        whole.train(dry_run)


class Sweep:
    """A grid, where its runs lie, and who trains them.

    The grid's first runs are known; `refine` adds more once these are finished.
    """

    def __init__(self, grid: Grid, overrides: Sequence[str], directory: Path, how: How):
        self.grid, self.overrides, self.directory, self.how = grid, overrides, directory, how
        self.device = how.device(grid)

    # --- what a user asks for

    def train(self, dry_run: bool) -> None:
        """All runs that are left, then tables and fits."""
        generated = self.how.launcher in GENERATED
        runs, refined = self._plan(data_needed=not dry_run and not generated)
        check_fits(self.grid, [run.plan.config for run in [*runs, *refined]])
        room = self._print_plan(runs, refined, list_runs=dry_run)
        if dry_run:
            return
        with locked(self.directory, wait=self.how.continued):
            self._describe(runs)
            if generated:
                print(self.how.write(self.grid, self.overrides, self.directory, runs, len(refined)))
                return
            try:
                failed = self._launch(runs, room)
                if refined:
                    runs = self._refine(runs, failed)
                    self._describe(runs)
                    print()
                    room = self._print_plan(runs, [], failed=failed)
                    failed |= self._launch(runs, room, failed)
            except LeftToSlurm as message:
                print(f"\n{message}")
                return
            self._finish(runs, failed)

    def collect(self) -> None:
        """Tables and fits of the runs that are finished."""
        runs, refined = self._plan(with_existing_refined=True)
        check_fits(self.grid, [run.plan.config for run in [*runs, *refined]])
        with locked(self.directory):
            self._describe(runs)
            self._finish(runs, {}, all_were_to_finish=False)

    def train_one(self, index: int) -> None:
        """Run `index` of the grid; the one that finishes last of all tabulates and fits them."""
        runs, refined = self._plan()
        if index >= len(runs):
            later = f"; {len(refined)} more of `refine` once these are finished" if refined else ""
            raise ConfigError(
                f"there is no run {index}: the {len(runs)} runs of {self.grid.path} count from"
                f" 0{later}",
                "--index",
                f"give at most {len(runs) - 1}",
            )
        run = runs[index]
        if run.finished:
            print(f"{run.name}: already finished")
        else:
            dump_config(run.grid.config, self.directory / "configs" / f"{run.name}.yaml")
            job = job_of(run, self.directory, self.grid.content.processes)
            try:
                with _terminable():
                    train_one(job, cpu=not torch.cuda.is_available())
            except KeyboardInterrupt as signalled:
                raise _interrupted(
                    signalled,
                    f"run {run.name} was interrupted",
                    run.directory,
                    "the same command resumes it",
                ) from None
        if not all(newest_step(other.directory) >= other.steps for other in runs):
            return
        with locked(self.directory, wait=True):
            runs, _ = self._plan()
            if left := sum(not run.finished for run in runs):
                print(f"{left} more runs follow from `refine`: give the command of the sweep again")
                return
            self._describe(runs)
            try:
                self._finish(runs, {})
            except ArchscaleError as error:  # of a fit: this run is finished all the same
                print(f"archscale: warning: {error}", file=sys.stderr)

    # --- which runs

    def _plan(
        self, *, data_needed: bool = True, with_existing_refined: bool = False
    ) -> tuple[list[SweepRun], list[SweepRun]]:
        """The runs that are known, and as many of their size as `refine` will add once these are
        finished.

        Args:
            data_needed: whether each run's data have to be there.
            with_existing_refined: also count the runs that `refine` has added so far, though the
                first ones are not all finished.
        """

        def planned(runs: Sequence[Any] | None = None) -> list[SweepRun]:
            return plan_runs(self.grid, self.directory, self.device, runs, data_needed=data_needed)

        runs, existing = planned(), run_directories(self.directory)
        if all(run.finished for run in runs):
            return [*runs, *planned(self.grid.refined(self._losses(runs, {}), existing))], []
        if with_existing_refined:
            return [*runs, *planned(self.grid.refined({}, existing))], []
        # Equal losses: only the number and the size of the refined runs matter here.
        return runs, planned(self.grid.refined({run.name: 0.0 for run in runs}))

    def _refine(self, runs: Sequence[SweepRun], failed: Mapping[str, str]) -> list[SweepRun]:
        """The runs, now that the first ones have ended, and those that `refine` adds to them."""
        runs = [replace(run, step=newest_step(run.directory)) for run in runs]
        try:
            refined = self.grid.refined(self._losses(runs, failed), run_directories(self.directory))
        except ConfigError:  # what is finished has its tables all the same
            self._finish(runs, failed)
            raise
        return [*runs, *plan_runs(self.grid, self.directory, self.device, refined)]

    def _losses(self, runs: Sequence[SweepRun], failed: Mapping[str, str]) -> dict[str, float]:
        """What `refine` chooses by, of each run that has it.

        Raises:
            ConfigError: none has it.
        """
        refine = self.grid.content.refine
        if refine is None:
            return {}
        table = collect(Path(), {run.name: run.directory for run in runs}, failed)
        if table.rows and refine.y not in table.columns:
            raise ConfigError(
                f"no run has {refine.y}",
                f"refine.y in {self.grid.path}",
                "give a column of results.csv",
            )
        cells = table.columns.get(refine.y, [])
        return {name: number(cell, refine.y, name) for name, cell in zip(table.rows, cells)}

    def _print_plan(
        self,
        runs: Sequence[SweepRun],
        refined: Sequence[SweepRun],
        *,
        list_runs: bool = False,
        failed: Mapping[str, str] | None = None,
    ) -> Slots:
        """What will be trained and cost; returns the room that there is for it."""
        left = [run for run in runs if not run.finished and run.name not in (failed or {})]
        room = self._room(left or runs)
        text = plan_text(self.grid, runs, refined, self.directory, room, list_runs=list_runs)
        print(text, flush=True)
        return room

    def _room(self, runs: Sequence[SweepRun]) -> Slots:
        how = self.how
        if how.launcher == "local":
            plans = [run.plan for run in runs]
            return slots(plans, self.grid.content.processes, how.jobs, this_device())
        at_once = min(how.jobs or len(runs), len(runs))
        return Slots([{}] * at_once, how.text(self.grid), here=False, device=self.device)

    # --- training and what comes of it

    def _describe(self, runs: Sequence[SweepRun]) -> None:
        """sweep.yaml, and the config of each run."""
        content = self.grid.content.model_dump(mode="json")
        values = {run.name: run.grid.values for run in runs}
        write_yaml(content | {"runs": values}, self.directory / "sweep.yaml")
        for run in runs:
            dump_config(run.grid.config, self.directory / "configs" / f"{run.name}.yaml")

    def _launch(
        self, runs: Sequence[SweepRun], room: Slots, failed: Mapping[str, str] | None = None
    ) -> dict[str, str]:
        """Trains the runs that are left, the longest first, so that none is alone at the end.

        Args:
            failed: runs that are not tried again.

        Returns:
            Why some failed, by name.
        """
        log_path = self.directory / "sweep.jsonl"
        with open_log(log_path) as log:
            for event in unseen(self.directory, [run.name for run in runs if run.finished]):
                write(log, **line_of(event))
        left = [run for run in runs if not run.finished and run.name not in (failed or {})]
        if not left:
            return {}
        launch = self.how.start(self.grid, self.overrides, self.directory, room)
        longest_first = sorted(left, key=lambda run: -run.plan.figures["flops"]["executed"])
        jobs = [job_of(run, self.directory, self.grid.content.processes) for run in longest_first]
        finished = sum(run.finished for run in runs)
        view = View({run.name: (run.directory, run.steps) for run in runs}, finished)
        with open_log(log_path) as log, view, _terminable():
            write(
                log,
                event="sweep",
                runs=len(runs),
                finished=finished,
                at_once=len(room.variables),
                continued=self.how.continued,
            )

            def tell(event: Event) -> None:
                write(log, **line_of(event))
                view.tell(event)

            try:
                return launch(jobs, tell, view.tick)
            except KeyboardInterrupt as signalled:
                now = [replace(run, step=newest_step(run.directory)) for run in runs]
                raise _interrupted(
                    signalled,
                    f"interrupted with {sum(run.finished for run in now)} of {len(runs)} runs"
                    " finished",
                    self.directory,
                    (
                        "the same command continues"
                        if room.here
                        else "the jobs stay in the queue; the same command goes on with them"
                    ),
                ) from None

    def _finish(
        self, runs: Sequence[SweepRun], failed: Mapping[str, str], all_were_to_finish: bool = True
    ) -> None:
        """results.csv, fits.json, the summary and the report.

        Raises:
            TrainingError: one for all that failed, where all were to finish.
            DataError: a fit was refused.
        """
        directory, content = self.directory, self.grid.content
        configs: dict[str, Config] = {run.name: run.plan.config for run in runs}
        table = collect(directory, {run.name: run.directory for run in runs}, failed)
        write_results(table, self.grid.keys, configs, directory / "results.csv")
        fits = make_fits(table, [fit.request() for fit in content.fit])
        write_fits(fits, directory / "fits.json")
        print(
            f"\n{content.name}: {len(table.rows)} of {len(runs)} runs finished;"
            f" {directory}/results.csv, fits.json"
        )
        for name, reason in diverged(table):
            print(f"{name}: diverged, left out of all fits: {reason}")
        if fits:
            print("\n" + fits_text(fits), flush=True)
        if page := report_if_possible(directory):
            print(f"\nreport {page}", flush=True)
        if table.left_out and all_were_to_finish:
            (name, reason), *others = table.left_out
            also = f" (also failed: {', '.join(other for other, _ in others)})" if others else ""
            raise TrainingError(
                f"{len(table.left_out)} of {len(runs)} runs failed: {name}: {reason}",
                f"{directory}/logs/{name}.log",
                f"fix the cause and rerun{also}",
            )
        for fit in fits:
            if fit.refusal:
                raise fit.refusal


def _interrupted(
    signalled: KeyboardInterrupt, what: str, where: Path, remedy: str
) -> TrainingError:
    """What ends a command after a signal, with the exit status of a run that it stops."""
    error = TrainingError(what, str(where), remedy)
    error.status = STATUS[signalled.args[0] if signalled.args else signal.SIGINT]
    return error


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM and SIGUSR1 end as Ctrl-C does: with all runs ended."""

    def interrupt(number: int, _: Any) -> None:
        raise KeyboardInterrupt(signal.Signals(number))

    numbers = signal.SIGTERM, signal.SIGUSR1
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
