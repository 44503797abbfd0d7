"""A sweep: every run of a grid planned, trained, tabulated and fitted; killed and started again it goes on where it was.

The sweep directory holds

    sweep.yaml        the grid, and the values of each run by name
    sweep.jsonl       what happened, a line each: sweep, started, finished, failed
    configs, logs     of each run, by name
    <run>/            run directories
    results.csv       a row for each run, written at the end
    fits.json         the grid's fits, written at the end
    report.html       the report, and report/ with its figures and tables, written at the end
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch

from archscale.config import Config, dump_config, load_config
from archscale.config_io import write_yaml
from archscale.data.shards import read_manifest
from archscale.errors import ArchscaleError, ConfigError, DataError, TrainingError
from archscale.scaling.devices import Device
from archscale.scaling.fit_table import text_of
from archscale.scaling.grid import Grid, GridRun, read_grid
from archscale.scaling.launchers import Event, Job, run_local
from archscale.scaling.plan import Plan, make_plan
from archscale.scaling.plan_text import size
from archscale.scaling.sweep_results import check_fits, collect, fits_text, make_fits, write_fits, write_results
from archscale.scaling.table import flat
from archscale.train.checkpoint import checkpoint_steps
from archscale.train.preflight import this_device
from archscale.train.sweep_view import View, plan_text
from archscale.train.trainer import other_trajectory

PROCESS_BYTES = (
    400 * 10**6
)  # of main memory that Python and torch take in each process beside the plan (340 MB measured)
MINE = {"sweep.yaml", "sweep.jsonl", "configs", "logs", "results.csv", "fits.json", "report.html", "report"}


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
        return self.step >= self.steps and (self.directory / "metrics.jsonl").exists()


@dataclass(frozen=True)
class Slots:
    """Room for runs at the same time: environment variables of each, and a sentence on what bounds them."""

    variables: list[dict[str, str]]
    text: str


def sweep(path: Path, overrides: Sequence[str] = (), *, sweep_dir: Path | None = None, jobs: int | None = None,
          retries: int = 2, dry_run: bool = False) -> None:  # fmt: skip
    """Runs the grid in `path` to its end, prints its plan, its runs and its fits.

    Args:
        overrides: of the grid's base, `section.key=value`.
        sweep_dir: default runs/<name of the grid>.
        jobs: runs at once; None: as many as cores or accelerators, and memory, have room for.
        retries: how often a run that crashed is tried again.
        dry_run: print the plan, start nothing, write nothing.

    Raises:
        ConfigError, DataError: before any run starts: the grid, one of its configs, or its fits cannot work.
        TrainingError: some runs failed, or it was interrupted; all others are finished, tabulated and fitted.
    """
    grid = read_grid(path, overrides)
    directory = sweep_dir or Path("runs") / grid.content.name
    runs = plan_runs(grid, directory, data_needed=not dry_run)
    check_fits(grid, [run.plan.config for run in runs])
    left = [run for run in runs if not run.finished]
    room = slots([run.plan for run in left or runs], grid.content.processes, jobs, this_device())
    print(plan_text(grid, runs, directory, room, list_runs=dry_run), flush=True)
    if dry_run:
        return
    with _locked(directory):
        _describe(grid, runs, directory)
        failed = _train(runs, left, directory, room, grid.content.processes, retries)
        _finish(grid, runs, directory, failed)


def plan_runs(grid: Grid, directory: Path, *, data_needed: bool = True) -> list[SweepRun]:
    """Every run with its plan and how far it is.

    Raises:
        ConfigError: one cannot be planned, or its directory holds another run; the line names its values.
    """
    device, vocabularies = this_device(), dict[str, int | ArchscaleError]()
    if device.name == "cpu" and device.memory:
        device = replace(device, memory=device.memory // grid.content.processes)
    found, problems = [], []
    for run in grid.runs():
        config, data = run.config, run.config.data.train
        for part in filter(None, (data, run.config.data.val)):
            if part not in vocabularies:
                vocabularies[part] = _vocabulary(part)
            if isinstance(error := vocabularies[part], ArchscaleError) and (data_needed or not config.model.vocab_size):
                raise error
        try:
            if isinstance(vocabulary := vocabularies[data], int):
                config = config.with_vocab(vocabulary)
            plan = make_plan(config, world_size=grid.content.processes, device=device)
            if plan.problems:
                raise plan.problems[0]
            planned = SweepRun(run, plan, directory / run.name, _newest(directory / run.name))
            _check_same(planned)
        except ConfigError as error:
            problems.append(ConfigError(f"{error.what}, {error.where}", run.where, error.remedy))
            continue
        found.append(planned)
    if problems:
        raise ConfigError.several(problems)
    return found


def _vocabulary(data: str) -> int | ArchscaleError:
    try:
        return read_manifest(Path(data)).tokenizer.vocab_size
    except DataError as error:
        return error


def _check_same(run: SweepRun) -> None:
    """Refuses a run directory whose run has another config: its results would stand in the wrong row."""
    path = run.directory / "config.yaml"
    if not path.exists():
        return
    before, now = (dict(flat(config.resolved())) for config in (load_config(path), run.plan.config))
    for key in other_trajectory(before, now):
        raise ConfigError(
            f"{key} is {text_of(now.get(key))}, the run in {run.directory} has {text_of(before.get(key))}", key,
            "restore the value, give another --sweep-dir, or remove that directory",
        )  # fmt: skip


def slots(plans: Sequence[Plan], processes: int, jobs: int | None, device: Device, gpus: Sequence[str] | None = None,
          cores: int | None = None) -> Slots:  # fmt: skip
    """Room for `jobs` runs at once, or for as many as there is room for.

    Args:
        gpus: names of this machine's, as CUDA_VISIBLE_DEVICES has them; None: ask torch.
        cores: that this process may use; None: ask the system.

    Raises:
        ConfigError: there is no room for so many.
    """
    peak = max(plan.figures["memory"]["peak"] for plan in plans)
    if gpus is None:
        count = torch.cuda.device_count()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",")[:count] if visible else [str(number) for number in range(count)]
    ask = f"{processes} {'process' if processes == 1 else 'processes'} each"
    if gpus:
        if processes > len(gpus):
            raise ConfigError(f"{processes} processes of a run need as many GPUs, there are {len(gpus)}", "processes",
                              f"set it to {len(gpus)} or less")  # fmt: skip
        wanted = min(jobs or len(gpus) // processes, len(plans))
        shared = -(-wanted * processes // len(gpus))  # processes on the fullest GPU
        if device.room is not None and shared * peak > device.room:
            raise ConfigError(f"{shared} runs of {size(peak)} on a GPU do not fit into {size(device.room)}", "--jobs",
                              f"set it to {len(gpus) // processes * max(1, int(device.room // peak))} or less")  # fmt: skip
        variables = [
            {"CUDA_VISIBLE_DEVICES": ",".join(gpus[(job * processes + k) % len(gpus)] for k in range(processes))}
            for job in range(wanted)
        ]
        return Slots(variables, f"{wanted} at once on {len(gpus)} GPUs, {ask}")
    cores = cores or len(os.sched_getaffinity(0))
    told = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(told) if told.isdigit() and int(told) else 1  # one unless told, as torchrun does: sums stay the same
    each = (peak + PROCESS_BYTES) * processes
    fit = len(plans) if device.room is None else int(device.room // each)
    if jobs and jobs > max(1, fit):
        raise ConfigError(f"{jobs} runs of {size(each)} at once do not fit into {size(device.room or 0)}", "--jobs",
                          f"set it to {max(1, fit)} or less")  # fmt: skip
    wanted = min(jobs or max(1, min(cores // (processes * threads), fit)), len(plans))
    text = f"{wanted} at once on {cores} cores, {ask} of {threads} {'thread' if threads == 1 else 'threads'} and {size(peak + PROCESS_BYTES)} at most"
    return Slots([{"OMP_NUM_THREADS": str(threads)}] * wanted, text)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Holds the sweep directory against another sweep; freed by the system whatever ends this process."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle = os.open(directory / "sweep.jsonl", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise ConfigError(f"cannot write the sweep directory: {error.strerror}", str(directory),
                          "give another with --sweep-dir") from None  # fmt: skip
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ConfigError("another sweep works in this directory", str(directory),
                          "wait for it, or give another with --sweep-dir") from None  # fmt: skip
    finally:
        os.close(handle)


def _describe(grid: Grid, runs: Sequence[SweepRun], directory: Path) -> None:
    """sweep.yaml, and the config of each run."""
    content = grid.content.model_dump(mode="json")
    write_yaml(content | {"runs": {run.name: run.grid.values for run in runs}}, directory / "sweep.yaml")
    for run in runs:
        dump_config(run.grid.config, directory / "configs" / f"{run.name}.yaml")


def _train(runs: Sequence[SweepRun], left: Sequence[SweepRun], directory: Path, room: Slots, processes: int,
           retries: int) -> dict[str, str]:  # fmt: skip
    """Trains the runs that are left, the longest first, so that none is alone at the end; returns why some failed."""
    if not left:
        return {}
    order = sorted(left, key=lambda run: -run.plan.figures["flops"]["executed"])
    jobs = [
        Job(run.name, ("train", str(directory / "configs" / f"{run.name}.yaml"), "--run-dir", str(run.directory)),
            directory / "logs" / f"{run.name}.log", processes)
        for run in order
    ]  # fmt: skip
    by_name = {run.name: run for run in runs}
    view = View({run.name: (run.directory, run.steps) for run in runs}, len(runs) - len(left))
    with _log(directory / "sweep.jsonl") as log, view, _terminable():
        _write(log, event="sweep", runs=len(runs), finished=len(runs) - len(left), at_once=len(room.variables))

        def tell(event: Event) -> None:
            line: dict[str, Any] = {"event": event.what, "run": event.job.name, "attempt": event.attempt}
            if event.what != "started":
                line["seconds"] = round(event.seconds, 3)
            if event.reason:
                line |= {"reason": event.reason, "again": event.again}
            _write(log, **line)
            view.tell(event)

        try:
            return run_local(jobs, room.variables, retries, tell, view.tick)
        except KeyboardInterrupt:
            done = sum(replace(run, step=_newest(run.directory)).finished for run in by_name.values())
            raise TrainingError(f"interrupted with {done} of {len(runs)} runs finished", str(directory),
                                "the same command continues") from None  # fmt: skip


def _newest(run_dir: Path) -> int:
    """Step of a run's newest checkpoint; 0 without one."""
    return (checkpoint_steps(run_dir / "checkpoints") or [0])[-1]


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


@contextlib.contextmanager
def _log(path: Path) -> Iterator[IO[str]]:
    """For appending; a line that a crash cut short is ended first."""
    with open(path, "r+b") as stream:
        content = stream.read()
        if content and not content.endswith(b"\n"):
            stream.write(b"\n")
    with open(path, "a", encoding="utf-8") as log:
        yield log


def _write(log: IO[str], **line: Any) -> None:
    log.write(json.dumps({"time": round(time.time(), 3), **line}) + "\n")
    log.flush()


def _finish(grid: Grid, runs: Sequence[SweepRun], directory: Path, failed: Mapping[str, str]) -> None:
    """results.csv, fits.json, the summary; then one error for all that failed."""
    configs: dict[str, Config] = {run.name: run.plan.config for run in runs}
    table = collect(directory, {run.name: run.directory for run in runs}, failed)
    write_results(table, grid.keys, configs, directory / "results.csv")
    fits = make_fits(table, grid.content.fit)
    write_fits(fits, directory / "fits.json")
    print(f"\n{grid.content.name}: {len(table.rows)} of {len(runs)} runs finished; {directory}/results.csv, fits.json")
    if fits:
        print("\n" + fits_text(fits), flush=True)
    _report(directory)
    if table.left_out:
        (name, reason), more = table.left_out[0], len(table.left_out) - 1
        others = f" (also failed: {', '.join(other for other, _ in table.left_out[1:])})" if more else ""
        raise TrainingError(
            f"{len(table.left_out)} of {len(runs)} runs failed: {name}: {reason}",
            f"{directory}/logs/{name}.log", f"mend it and give the same command again{others}",
        )  # fmt: skip
    for fit in fits:
        if fit.refusal:
            raise fit.refusal


def _report(directory: Path) -> None:
    """A sweep that has trained is not lost to a figure that cannot be drawn."""
    from archscale.report.sweep import write_sweep_report

    try:
        print(f"\nreport {write_sweep_report(directory)}", flush=True)
    except Exception as error:
        print(f"archscale: warning: no report: {type(error).__name__}: {error}", file=sys.stderr)
