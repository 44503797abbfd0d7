"""A sweep elsewhere than in this process: who trains its runs, one of them alone, and files for
clusters that start them."""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING

from archscale.errors import RETRY, ConfigError, TrainingError
from archscale.plan.devices import Device, find_device, this_device
from archscale.sweep.grid import Grid
from archscale.sweep.launchers.config import needs_section
from archscale.sweep.launchers.files import write_kubernetes, write_skypilot
from archscale.sweep.launchers.local import (
    GRACE,
    Job,
    Launcher,
    end,
    environment,
    run_local,
    saved,
    threads,
    why,
)
from archscale.sweep.launchers.slurm import SlurmLauncher

if TYPE_CHECKING:
    from archscale.sweep.planning import SweepRun
    from archscale.sweep.room import Slots

GENERATED = ("kubernetes", "skypilot")


@dataclass(frozen=True)
class How:
    """How a sweep's runs are started: the options of `archscale sweep`.

    Attributes:
        launcher: local, slurm, kubernetes or skypilot.
        jobs: runs at once; None: as many as there is room for.
        retries: how often a run that crashed is tried again.
        wait: with slurm: for the runs to end.
        continued: with slurm: by the job that goes on with a sweep, so that what failed for good is
            left alone.
    """

    launcher: str = "local"
    jobs: int | None = None
    retries: int = 2
    wait: bool = True
    continued: bool = False

    def check(self, grid: Grid) -> None:
        """Refuses what does not go together.

        Raises:
            ConfigError: so it is.
        """
        if not self.wait and self.launcher != "slurm":
            raise ConfigError(
                "only Slurm can go on with a sweep by itself",
                "--no-wait",
                "leave it out, or add --launcher slurm",
            )
        if self.jobs and self.launcher == "skypilot":
            raise ConfigError(
                "SkyPilot decides how many managed jobs run at once", "--jobs", "leave it out"
            )
        needs_section(grid.content, self.launcher, str(grid.path))

    def device(self, grid: Grid) -> Device | None:
        """What each process of a run trains on, with the memory that it has there; None where
        nobody says."""
        content = grid.content
        if self.launcher == "local":
            here = this_device()
            shared = here.name == "cpu" and here.memory
            return (
                replace(here, memory=here.memory // content.processes)
                if shared and here.memory
                else here
            )
        section = {"slurm": content.slurm, "kubernetes": content.kubernetes}.get(self.launcher)
        return find_device(section.device) if section and section.device else None

    def text(self, grid: Grid) -> str:
        """Where the runs will train, for the plan."""
        content, most = grid.content, f", {self.jobs} at once" if self.jobs else ""
        processes = _count(content.processes, "process", "processes")
        if self.launcher == "slurm" and (slurm := content.slurm):
            part = f" of partition {slurm.partition}" if slurm.partition else ""
            return (
                f"a task of a Slurm array each{most}: {processes} on"
                f" {_count(slurm.nodes, 'node')}{part}, {_count(slurm.gpus_per_node, 'GPU')} and"
                f" {_count(slurm.cpus_per_task, 'core')} a node, requeued after {slurm.hours:g} h"
            )
        if self.launcher == "kubernetes" and (pods := content.kubernetes):
            return f"a pod of an indexed Job each{most}: {processes}, {_count(pods.gpus, 'GPU')}"
        accelerators = content.skypilot.accelerators if content.skypilot else None
        return f"a managed job of SkyPilot each: {processes}, {accelerators or 'no GPU'}"

    def start(self, grid: Grid, overrides: Sequence[str], directory: Path, room: Slots) -> Launcher:
        """What trains the runs, here or on Slurm."""
        if self.launcher == "slurm":
            assert grid.content.slurm is not None
            again = [
                *_command(grid, overrides),
                "--sweep-dir",
                str(directory),
                "--launcher",
                "slurm",
                "--retries",
                str(self.retries),
                *(["--jobs", str(self.jobs)] if self.jobs else []),
                "--no-wait",
                "--continued",
            ]
            return SlurmLauncher(
                grid.content.slurm,
                directory,
                grid.content.name,
                self.jobs,
                self.retries,
                None if self.wait else again,
            )

        def local(jobs, tell, tick):  # type: ignore[no-untyped-def]
            return run_local(jobs, room.variables, self.retries, tell, tick)

        return local

    def write(
        self,
        grid: Grid,
        overrides: Sequence[str],
        directory: Path,
        runs: Sequence[SweepRun],
        refined: int,
    ) -> str:
        """Writes the files of a generated launcher; returns what to do next. `refined`: how
        many runs `refine` will add."""
        content, name = grid.content, grid.content.name
        if self.launcher == "kubernetes":
            assert content.kubernetes is not None
            command = ["archscale", *_command(grid, overrides), "--sweep-dir", str(directory)]
            submit = write_kubernetes(
                directory,
                content.kubernetes,
                name,
                command,
                len(runs),
                self.jobs,
                self.retries,
                content.processes,
            )
        else:
            assert content.skypilot is not None
            command = [*_command(grid, overrides), "--sweep-dir", content.skypilot.sweep_dir]
            left = {index: run.name for index, run in enumerate(runs) if not run.finished}
            submit = write_skypilot(directory, content.skypilot, name, command, left, self.retries)
        last = "the run that finishes last writes results.csv and the fits"
        if refined:
            last = (
                f"{refined} more runs follow from `refine`: once these are finished, give this"
                " command again where it sees them"
            )
        return (
            f"\nnothing is started yet: {submit}\n{last}; --collect tabulates whatever is finished"
        )


def _count(number: int, singular: str, plural: str = "") -> str:
    return f"{number} {singular if number == 1 else plural or singular + 's'}"


def _command(grid: Grid, overrides: Sequence[str]) -> list[str]:
    """Arguments of archscale that name the grid."""
    return [
        "sweep",
        str(grid.path),
        *(part for override in overrides for part in ("--set", override)),
    ]


def job_of(run: SweepRun, directory: Path, processes: int) -> Job:
    """The command that trains a run, whose config is in the sweep directory."""
    config = str(directory / "configs" / f"{run.name}.yaml")
    return Job(
        run.name,
        ("train", config, "--run-dir", str(run.directory)),
        directory / "logs" / f"{run.name}.log",
        processes,
    )


def train_one(job: Job, cpu: bool) -> None:
    """Trains one run here, with its output both in its log and on standard output.

    Raises:
        TrainingError: it was refused, and would be again.
        SystemExit: it crashed, with status 1, or a signal has stopped it at a checkpoint, with
            status 75.
    """
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with open(job.log, "ab") as log:
        offset = log.tell()
        process = subprocess.Popen(
            job.command(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment({"OMP_NUM_THREADS": threads()} if cpu else {}),
            start_new_session=True,
        )
        assert process.stdout is not None
        output = process.stdout.fileno()
        try:
            _copy(output, log)
            status = process.wait()
        finally:
            # What it says while it ends; it would wait for a reader of a full pipe.
            rest = threading.Thread(target=_copy_if_possible, args=(output, log), daemon=True)
            rest.start()
            end([process])
            rest.join(GRACE)
    if status:
        reason, refused = why(job.log, offset, status)
        if refused:
            raise TrainingError(
                f"run {job.name} failed: {reason}", str(job.log), "fix the cause and rerun"
            )
        what = "was" if saved(reason) else "crashed:"
        print(
            f"run {job.name} {what} {reason}: the same command resumes it",
            file=sys.stderr,
            flush=True,
        )
        raise SystemExit(RETRY if saved(reason) else 1)


def _copy(output: int, log: IO[bytes]) -> None:
    """Copies what comes through a pipe to a log and to standard output, to its end."""
    for part in iter(functools.partial(os.read, output, 1 << 16), b""):
        log.write(part)
        log.flush()
        sys.stdout.buffer.write(part)
        sys.stdout.buffer.flush()


def _copy_if_possible(output: int, log: IO[bytes]) -> None:
    with contextlib.suppress(OSError):
        _copy(output, log)
