"""Running many commands at once on this machine: each in a process of its own, tried again when it
crashes.

A job that is refused (it ends with an `archscale:` line) would be refused again and is not
repeated; one that crashes or is killed is, `retries` times, and resumes from its own checkpoints.
One that a signal has stopped at a checkpoint goes on without a try used up.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

POLL = 0.1  # seconds
GRACE = 30.0  # seconds between asking a job to end, which saves, and killing it
STOPPED = "stopped by "  # how the line of a run begins that a signal has ended
SAVED = re.compile(r"stopped by \S+ at step \d+: checkpoint ")  # and that has saved before
# In lines of runs that would get further if they were started again: the watchdog's, and of a rank
# that misses another one.
CRASHES = ("made no progress", "cannot reach another rank")
TAIL = 1 << 16  # bytes of a log in which the reason of a failure is looked for
# What torchrun or Slurm may have set around the sweep, and what would make a run believe that it is
# part of it.
FOREIGN = (
    "RANK",
    "LOCAL_RANK",
    "GROUP_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_RESTART_COUNT",
    "TORCHELASTIC_RUN_ID",
)


@dataclass(frozen=True)
class Job:
    """One `archscale` command.

    Attributes:
        name: unique.
        arguments: of archscale.
        log: its output, appended; also its lock.
        processes: above 1 under torchrun.
    """

    name: str
    arguments: Sequence[str]
    log: Path
    processes: int = 1

    def command(self, nodes: int = 1, rendezvous: Sequence[str] = ("--standalone",)) -> list[str]:
        """Its command line on one of `nodes`, which meet by these options of torchrun; all of its
        processes end when this one does."""
        child = ["-m", "archscale.sweep.launchers.child"]
        archscale = ["-m", "archscale", *self.arguments]
        if self.processes == 1:
            return [sys.executable, *child, str(self.log), str(os.getpid()), *archscale]
        torchrun = [
            "-m",
            "torch.distributed.run",
            *rendezvous,
            f"--nproc_per_node={self.processes // nodes}",
        ]
        ranks = [*torchrun, *child, str(self.log), "0", *archscale]
        return [sys.executable, *child, "-", str(os.getpid()), *ranks]


class Event(NamedTuple):
    """What happened to a job: `reason` of a failure, whether it is `again` tried; `task` of a
    cluster that it is."""

    what: Literal["submitted", "attached", "started", "requeued", "finished", "failed"]
    job: Job
    attempt: int  # from 1
    seconds: float = 0.0
    reason: str = ""
    again: bool = False
    task: str = ""


Launcher = Callable[[Sequence[Job], Callable[[Event], None], Callable[[], None]], dict[str, str]]
"""Runs jobs as `run_local` does: jobs, what is told of events, what is called all the time; reasons
of what failed, by name."""


def events_of(path: Path) -> Iterator[dict[str, Any]]:
    """What sweep.jsonl tells; lines that a crash cut short, and a file that is not there, tell
    nothing."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        with contextlib.suppress(ValueError):
            event = json.loads(line)
            if isinstance(event, dict) and isinstance(event.get("event"), str):
                yield event


@dataclass
class _Running:
    job: Job
    attempt: int
    slot: int
    offset: int  # of this attempt in the log
    started: float
    process: subprocess.Popen[bytes]


def run_local(
    jobs: Sequence[Job],
    slots: Sequence[Mapping[str, str]],
    retries: int,
    tell: Callable[[Event], None],
    tick: Callable[[], None],
) -> dict[str, str]:
    """Runs all jobs, as many at once as there are slots; returns the reason of each that failed for
    good, by name.

    Args:
        slots: environment variables of the job that takes it, such as CUDA_VISIBLE_DEVICES.
        retries: how often a job that crashed is tried again.
        tell: called for everything that happens.
        tick: called every `POLL` seconds.
    """
    waiting = [(job, 1) for job in jobs]
    free, running, failed = list(range(len(slots))), list[_Running](), dict[str, str]()
    try:
        while waiting or running:
            while waiting and free:
                job, attempt = waiting.pop(0)
                running.append(_start(job, attempt, free[0], slots[free.pop(0)]))
                tell(Event("started", job, attempt))
            for ended in [ended for ended in running if ended.process.poll() is not None]:
                running.remove(ended)
                free.append(ended.slot)
                seconds = time.monotonic() - ended.started
                if ended.process.returncode == 0:
                    tell(Event("finished", ended.job, ended.attempt, seconds))
                    continue
                reason, refused = why(ended.job.log, ended.offset, ended.process.returncode)
                following = next_attempt(ended.attempt, reason)
                again = not refused and following <= retries + 1
                tell(Event("failed", ended.job, ended.attempt, seconds, reason, again))
                if again:
                    # Behind the others, who need not wait for it.
                    waiting.append((ended.job, following))
                else:
                    failed[ended.job.name] = reason
            tick()
            time.sleep(POLL)
    finally:
        end([ended.process for ended in running])
    return failed


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """A job's environment: this process's, without the traces of a torchrun around it, and
    `variables`."""
    here = {key: value for key, value in os.environ.items() if key not in FOREIGN}
    # Unbuffered: what a job prints stands in its log before the error that ends it.
    return here | {"PYTHONUNBUFFERED": "1"} | dict(variables)


def threads() -> str:
    """OMP_NUM_THREADS of a run on CPUs: one unless told, as torchrun does, so that sums are the
    same wherever it trains."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return given if given.isdigit() and int(given) else "1"


def _start(job: Job, attempt: int, slot: int, variables: Mapping[str, str]) -> _Running:
    env = environment(variables)
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with open(job.log, "ab") as log:
        offset = log.tell()
        process = subprocess.Popen(
            job.command(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,  # Ctrl-C reaches the sweep alone, which then ends its jobs
        )
    return _Running(job, attempt, slot, offset, time.monotonic(), process)


def end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ends the processes and all that they have started: SIGTERM, after `GRACE` seconds SIGKILL."""
    for sig, grace in ((signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
        left = [process for process in processes if process.poll() is None]
        for process in left:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, sig)
        limit = time.monotonic() + grace
        for process in left:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, limit - time.monotonic()))


def saved(reason: str) -> bool:
    """Whether this reason is that a signal has stopped the run at a checkpoint."""
    return SAVED.match(reason) is not None


def next_attempt(attempt: int, reason: str) -> int:
    """Number of the attempt after one that has ended for this reason: a run that was stopped at a
    checkpoint has used up none."""
    return attempt if saved(reason) else attempt + 1


def why(log: Path, offset: int, status: int) -> tuple[str, bool]:
    """The reason why a job ended with `status`, from what it wrote after `offset`, and whether it
    was refused."""
    with open(log, "rb") as stream:
        stream.seek(max(offset, os.fstat(stream.fileno()).st_size - TAIL))
        lines = [
            line.strip()
            for line in stream.read().decode(errors="replace").splitlines()
            if line.strip()
        ]
    messages = [
        line.removeprefix("archscale: ")
        for line in lines
        if line.startswith("archscale: ") and not line.startswith("archscale: warning")
    ]
    crashes = [line for line in messages if any(words in line for words in CRASHES)]
    stops = [line for line in messages if line.startswith(STOPPED)]
    refusals = [line for line in messages if line not in crashes and line not in stops]
    stuck = [line for line in crashes if CRASHES[0] in line]
    if refusals and not stuck:
        return refusals[-1], True
    # Ranks that torchrun stops because another has crashed have no agreed step to save.
    for reasons in (stuck, [line for line in stops if saved(line)], crashes, stops):
        if reasons:
            return reasons[-1], False
    if status < 0:
        with contextlib.suppress(ValueError):
            return f"ended by {signal.Signals(-status).name}", False
        return f"ended by signal {-status}", False
    return f"exit status {status}" + (f": {lines[-1][:200]}" if lines else ""), False
