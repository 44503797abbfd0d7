"""What a Slurm task of a sweep does on its node: trains one run, and appends start and end
records for the sweep, which may be long gone.

A record is a line of JSON in a file of the task's own: without accounting Slurm forgets jobs
within minutes.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from archscale.checkpoint.place import newest_step
from archscale.sweep.launchers.local import Job, environment, threads, why

PATIENCE = 600.0  # seconds that Slurm has to end a task which it has told to
PORTS = 20_000  # the rendezvous' port is one of the 10,000 from here on


@dataclass(frozen=True)
class Task:
    """Trains a run; pickled by submitit.

    Attributes:
        job: the run.
        attempt: from 1.
        folder: of the words.
        nodes: of the run.
        cpu: without GPUs.
        limit: seconds that Slurm gives it.
    """

    job: Job
    attempt: int
    folder: Path
    nodes: int
    cpu: bool
    limit: float

    def __call__(self) -> None:
        """Trains the run to its end.

        Raises:
            RuntimeError: it did not get there, so that Slurm too sees a failure.
        """
        import submitit

        here = submitit.JobEnvironment()
        word = self.folder / f"{here.job_id}.jsonl" if here.node == 0 else None
        log = self.job.log if here.node == 0 else self.job.log.with_suffix(f".node{here.node}.log")
        told_to_end: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, _: told_to_end.append(number))
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as stream:
            offset = stream.tell()
            started = time.time()
            _say(
                word,
                what="started",
                attempt=self.attempt,
                host=socket.gethostname(),
                step=self._newest(),
            )
            process = subprocess.Popen(
                self.job.command(self.nodes, self._rendezvous(here)),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=environment({"OMP_NUM_THREADS": threads()} if self.cpu else {}),
                preexec_fn=lambda: signal.signal(
                    signal.SIGUSR2, signal.SIG_IGN
                ),  # submitit's, for this process alone
            )
            try:
                status = process.wait()
            except Exception as error:  # submitit's signal handler: the task will not be requeued
                process.kill()
                process.wait()
                _say(
                    word,
                    what="ended",
                    status=1,
                    seconds=time.time() - started,
                    reason=str(error),
                    refused=True,
                )
                raise
        if status and told_to_end:
            _leave_it_to_slurm()  # preempted or cancelled: not a crash of the run
        reason, refused = why(log, offset, status) if status else ("", False)
        _say(
            word,
            what="ended",
            status=status,
            seconds=time.time() - started,
            reason=reason,
            refused=refused,
        )
        if status:
            raise RuntimeError(reason)

    def _rendezvous(self, here: Any) -> Sequence[str]:
        if self.nodes == 1:
            return ("--standalone",)
        port = PORTS + int(here.raw_job_id) % 10_000  # runs that share a node differ in it
        return (
            f"--nnodes={self.nodes}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={here.hostnames[0]}:{port}",
            f"--rdzv-id={here.raw_job_id}",
            f"--rdzv-conf=is_host={int(here.node == 0)}",
        )

    def checkpoint(self) -> Any:
        """What submitit requeues before the time limit: the same, which resumes from the run's
        newest checkpoint.

        Raises:
            RuntimeError: this time has brought no checkpoint, nor would the next one.
        """
        import submitit
        from submitit.helpers import DelayedSubmission

        records = words(self.folder / f"{submitit.JobEnvironment().job_id}.jsonl")
        began = next((word for word in reversed(records) if word["what"] == "started"), None)
        if (
            began
            and time.time() - began["time"] > self.limit / 2
            and self._newest() <= began["step"]
        ):
            raise RuntimeError(
                f"no checkpoint in {self.limit / 3600:.3g} h: raise slurm.hours, or lower"
                " checkpoint.every"
            )
        return DelayedSubmission(self)

    def _newest(self) -> int:
        """Step of the run's newest checkpoint; 0 without one."""
        arguments = list(self.job.arguments)
        if "--run-dir" not in arguments:
            return 0
        return newest_step(Path(arguments[arguments.index("--run-dir") + 1]))


@dataclass(frozen=True)
class Again:
    """Gives the sweep's command once more; pickled by submitit.

    Attributes:
        command: arguments of archscale.
        log: its output, appended.
    """

    command: Sequence[str]
    log: Path

    def __call__(self) -> None:
        """Raises RuntimeError where the command fails, so that Slurm too sees a failure."""
        keep = {"SLURM_CONF"}  # what describes this job would mislead the ones that it submits
        env = {
            key: value
            for key, value in os.environ.items()
            if key in keep or not key.startswith(("SLURM_", "SUBMITIT_"))
        }
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "ab") as log:
            command = [sys.executable, "-m", "archscale", *self.command]
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env
            )
        if done.returncode:
            raise RuntimeError(f"exit status {done.returncode}: see {self.log}")


def _leave_it_to_slurm() -> NoReturn:
    time.sleep(PATIENCE)
    sys.exit(1)


def _say(word: Path | None, **line: Any) -> None:
    if word is not None:
        text = json.dumps({"time": round(time.time(), 3), **line}) + "\n"
        handle = os.open(word, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            os.write(handle, text.encode())
            os.fsync(handle)
        finally:
            os.close(handle)


def words(word: Path) -> list[dict[str, Any]]:
    """What a task has left so far."""
    records = []
    with contextlib.suppress(OSError):
        for line in word.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                records.append(json.loads(line))
    return records
