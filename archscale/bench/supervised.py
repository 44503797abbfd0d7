"""One run of `archscale train` in processes of its own that is ended on purpose: at a random
instant, or once a step is saved."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from archscale.errors import TrainingError
from archscale.files import CHECKPOINTS, METRICS, checkpoint_steps
from archscale.sweep.launchers.local import Job, environment, threads, why
from archscale.telemetry.sinks import last_line, read_lines

POLL = 0.01  # seconds


@dataclass(frozen=True)
class SupervisedRun:
    """A run directory and the command that trains there.

    Attributes:
        arguments: of `archscale train`, without the run directory.
        log: what all its starts print, one after the other.
        limit: seconds after which a start is killed.
    """

    name: str
    arguments: Sequence[str]
    run_dir: Path
    log: Path
    processes: int
    limit: float

    def until_saved(self, step: int) -> None:
        """Train until the checkpoint of `step` is complete, then end all processes.

        Raises:
            TrainingError: it ended before, or did not come so far within the limit.
        """
        if not self._until(lambda started: self.saved(step), f"step {step}"):
            raise AssertionError("ended by itself without an error")

    def until_killed(self, step: int, delay: float, last: int) -> int | None:
        """Train, and kill all processes `delay` seconds after this start has written the metrics of
        `step` (0: after it began). Returns the newest step in the metrics then; None where the
        checkpoint of step `last` was complete before that.

        Raises:
            TrainingError: as `until_saved`.
        """
        due: list[float] = []

        def reached(started: float) -> bool:
            line = last_line(self.run_dir)
            fresh = line.get("step", 0) >= step and line.get("time", 0.0) >= started
            if not due and (step == 0 or fresh):
                due.append(time.monotonic() + delay)
            return (bool(due) and time.monotonic() >= due[0]) or self.saved(last)

        self._until(reached, f"step {step}")
        return None if self.saved(last) else int(last_line(self.run_dir).get("step", 0))

    def saved(self, step: int) -> bool:
        """Whether the checkpoint of `step` is complete, or one after it."""
        return max(checkpoint_steps(self.run_dir / CHECKPOINTS), default=0) >= step

    def lines(self) -> dict[int, dict[str, object]]:
        """By step its line of metrics."""
        return {line["step"]: line for line in read_lines(self.run_dir / METRICS)}

    def _until(self, reached: Callable[[float], bool], what: str) -> bool:
        """Start the command and end it once `reached`, which is asked all the time with the time of
        the start; whether it was before the command ended by itself, which is no error when it
        finished."""
        arguments = ("train", *self.arguments, "--run-dir", str(self.run_dir))
        job = Job(self.name, arguments, self.log, self.processes)
        cpu = {} if torch.cuda.is_available() else {"OMP_NUM_THREADS": threads()}
        with open(self.log, "ab") as log:
            offset, started = log.tell(), time.time()
            process = subprocess.Popen(
                job.command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(cpu),
                start_new_session=True,  # Ctrl-C reaches this command alone, which ends the run
            )
        try:
            end = time.monotonic() + self.limit
            while not reached(started):
                if process.poll() is not None:
                    if process.returncode == 0:
                        return reached(started)
                    reason = why(self.log, offset, process.returncode)[0]
                    raise TrainingError(reason, str(self.log), "see all that it printed there")
                if time.monotonic() > end:
                    raise TrainingError(
                        f"did not come to {what} within {self.limit:g} s",
                        str(self.log),
                        "give more time with --limit, or see there what it waits for",
                    )
                time.sleep(POLL)
            return True
        finally:
            kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL, as a crash of the machine would; ranks end with the torchrun that started them."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
