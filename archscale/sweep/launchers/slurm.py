"""Runs of a sweep on a Slurm cluster, through submitit: one job array, a task for each run.

The queue is Slurm's, the memory is the sweep directory's, and the sweep only looks on.
`sweep.jsonl` has the task of each run, the tasks append start and end records in `slurm/`, and
every job has the sweep's own name: killed at any instant, a sweep that starts again knows what is
queued, what trains and what has ended meanwhile. Nothing here needs Slurm's accounting.
"""

from __future__ import annotations

import pickle
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archscale.errors import ConfigError
from archscale.files import write_atomically
from archscale.sweep.launchers.config import SlurmConfig
from archscale.sweep.launchers.local import Event, Job, events_of, next_attempt
from archscale.sweep.launchers.slurm_task import Again, Task, words

POLL = 0.5  # seconds between looks at what tasks have written
QUEUE = (2.0, 30.0)  # seconds between looks at the queue: after news, and after a long time without
# seconds that word of a task which has left the queue may take to get here through a shared file
# system
GONE = 10.0
COMMAND = 60.0  # seconds that a command of Slurm may take
MOST = 1000  # tasks of an array; Slurm's MaxArraySize is 1001 by default
ENDED = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "REVOKED",
    "TIMEOUT",
}


class LeftToSlurm(Exception):
    """The runs are queued, and what is left of the sweep will be done there; the message says
    so."""


@dataclass
class _Running:
    """A task in play: how often it is known to have started, whether it trains and since when that
    is known here, since when it is not in the queue."""

    job: Job
    attempt: int
    task: str
    starts: int = 0
    trains: bool = False
    since: float = 0.0
    gone: float | None = None


@dataclass(frozen=True)
class _History:
    """What sweep.jsonl tells of runs, by name.

    Attributes:
        tasks: all tasks that have been submitted.
        running: those whose end was not told.
        attempts: that a run which failed is to have next.
        failed: reasons of those that failed for good, since a person last gave the command.
    """

    tasks: set[str]
    running: dict[str, _Running]
    attempts: dict[str, int]
    failed: dict[str, str]


class SlurmLauncher:
    """Trains jobs on Slurm; may be called for one list of jobs after another.

    Args:
        settings: the grid's.
        directory: of the sweep.
        name: of the grid.
        at_once: runs at the same time at most; None: as many as Slurm has room for.
        retries: how often a run that crashed is submitted again.
        follow: None: wait here until all have ended. Otherwise arguments of archscale, with which a
            job that starts after them goes on with the sweep.

    Raises:
        ConfigError: no Slurm or no submitit here.
    """

    def __init__(
        self,
        settings: SlurmConfig,
        directory: Path,
        name: str,
        at_once: int | None,
        retries: int,
        follow: Sequence[str] | None = None,
    ):
        for program in ("sbatch", "squeue", "scancel", "srun"):
            if shutil.which(program) is None:
                raise ConfigError(
                    f"there is no {program} here",
                    "--launcher slurm",
                    "give the command on a login node of Slurm",
                )
        try:
            import submitit  # noqa: F401
        except ImportError:
            raise ConfigError(
                "submitit is not installed", "--launcher slurm", "pip install submitit"
            ) from None
        self.settings, self.directory = settings, directory
        self.folder = directory.absolute() / "slurm"
        self.at_once, self.retries, self.follow = at_once, retries, follow
        self._grid = name
        self._queued_at, self._pause, self._queue = float("-inf"), QUEUE[0], dict[str, str]()

    @property
    def name(self) -> str:
        """Name of all jobs of this sweep: that of the grid, and a suffix of its own."""
        path = self.folder / "name"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, f"{self._grid}-{uuid.uuid4().hex[:8]}\n")
        return path.read_text(encoding="utf-8").strip()

    def __call__(
        self, jobs: Sequence[Job], tell: Callable[[Event], None], tick: Callable[[], None]
    ) -> dict[str, str]:
        """Runs all jobs; returns the reason of each that failed for good, by name.

        Raises:
            ConfigError: Slurm refuses the jobs.
            LeftToSlurm: with `follow`, once all are queued.
        """
        by_name = {job.name: job for job in jobs}
        history = _history(self.directory, by_name)
        failed = {name: history.failed[name] for name in by_name if name in history.failed}
        self._adopt(history, by_name, tell)
        running = [history.running[name] for name in by_name if name in history.running]
        for active in running:
            if active.trains:
                tell(Event("attached", active.job, active.attempt, task=active.task))
        waiting = [
            (job, history.attempts.get(name, 1))
            for name, job in by_name.items()
            if name not in failed and name not in history.running
        ]
        while True:
            for active in list(running):
                if (ending := self._look(active, tell)) is None:
                    continue
                self._pause = QUEUE[0]
                running.remove(active)
                tell(ending)
                if ending.again:
                    waiting.append((active.job, next_attempt(active.attempt, ending.reason)))
                elif ending.what == "failed":
                    failed[active.job.name] = ending.reason
            while waiting and (self.at_once is None or len(running) < self.at_once):
                batch, waiting = waiting[:MOST], waiting[MOST:]
                running += self._submit(batch, (self.at_once or MOST) - len(running), tell)
            if not running:
                return failed
            if self.follow is not None and all(active.gone is None for active in running):
                self._go_on_later(running)
                raise LeftToSlurm(
                    f"{len(running)} runs are in Slurm's queue as {self.name}, and a job that goes"
                    " on after them; the same command tells how far they are"
                )
            tick()
            time.sleep(POLL)

    # --- what tasks do

    def _look(self, active: _Running, tell: Callable[[Event], None]) -> Event | None:
        """Tells what a task has begun since the last look; returns how it ended, if it did."""
        records = words(self.folder / f"{active.task}.jsonl")
        starts = [word for word in records if word["what"] == "started"]
        end = records[-1] if records and records[-1]["what"] == "ended" else None
        if len(starts) > active.starts:
            if active.trains:
                tell(Event("requeued", active.job, active.attempt, task=active.task))
            active.starts, active.trains, active.since = len(starts), True, time.monotonic()
            tell(Event("started", active.job, active.attempt, task=active.task))
            self._pause = QUEUE[0]
        if end and end["status"] == 0:
            return Event("finished", active.job, active.attempt, end["seconds"], task=active.task)
        if not self._refresh(at_once=end is not None):
            return None
        state = self._queue.get(active.task)
        if state is not None and state not in ENDED:
            if (
                active.trains
                and state == "PENDING"
                and end is None
                and self._queued_at > active.since
            ):
                active.trains = False
                tell(Event("requeued", active.job, active.attempt, task=active.task))
            active.gone = None
            return None
        now = time.monotonic()
        active.gone = active.gone or now
        if end is None and now - active.gone < GONE:
            return None
        reason, refused = (end["reason"], end["refused"]) if end else _silence(state)
        seconds = end["seconds"] if end else 0.0
        again = not refused and next_attempt(active.attempt, reason) <= self.retries + 1
        return Event("failed", active.job, active.attempt, seconds, reason, again, active.task)

    def _refresh(self, at_once: bool = False) -> bool:
        """Looks at the queue where it is time to; False while it cannot be seen."""
        now = time.monotonic()
        if now - self._queued_at < (QUEUE[0] if at_once else self._pause):
            return bool(self._queued_at > 0)
        states = self._squeue(self.name)
        if states is None:
            self._queued_at = float("-inf")
            return False
        self._queue, self._queued_at = states, now
        self._pause = min(QUEUE[1], self._pause * 1.2)
        return True

    @staticmethod
    def _squeue(name: str) -> dict[str, str] | None:
        """The state of each task under this name, also of those that ended in the last minutes;
        None where Slurm does not answer."""
        command = [
            "squeue",
            "--noheader",
            "--array",
            "--states=all",
            f"--name={name}",
            "--format=%i|%T",
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND)
        except subprocess.TimeoutExpired:
            return None
        if done.returncode:
            return None
        return dict(line.split("|") for line in done.stdout.split())  # type: ignore[misc]

    # --- what was before

    def _adopt(
        self, history: _History, jobs: dict[str, Job], tell: Callable[[Event], None]
    ) -> None:
        """Tasks that were submitted just before a crash, which kept their sweep from noting it:
        those that can start are noted, those that wait for a file which will never come are
        cancelled."""
        queue = self._squeue(self.name)
        if queue is None:
            raise ConfigError("Slurm does not answer", "squeue", "rerun when it does")
        orphans = []
        for task, state in queue.items():
            if task in history.tasks or state in ENDED:
                continue
            path = self.folder / f"{task}_submitted.pkl"
            if not path.exists():
                orphans.append(task)
                continue
            work = pickle.loads(path.read_bytes()).function
            if work.job.name in jobs and work.job.name not in history.running:
                tell(Event("submitted", work.job, work.attempt, task=task))
                history.running[work.job.name] = _Running(jobs[work.job.name], work.attempt, task)
        if orphans:
            subprocess.run(["scancel", *orphans], capture_output=True, timeout=COMMAND)

    # --- submitting

    def _submit(
        self, batch: Sequence[tuple[Job, int]], at_once: int, tell: Callable[[Event], None]
    ) -> list[_Running]:
        settings = self.settings
        tasks = [
            Task(
                job,
                attempt,
                self.folder,
                settings.nodes,
                settings.gpus_per_node == 0,
                60.0 * settings.minutes,
            )
            for job, attempt in batch
        ]
        ids = self._sbatch(
            tasks,
            self.name,
            array_parallelism=at_once,
            nodes=settings.nodes,
            ntasks_per_node=1,
            gpus_per_node=settings.gpus_per_node or None,
            cpus_per_task=settings.cpus_per_task,
            mem=self._mem(),
            srun_args=["--kill-on-bad-exit=1", f"--cpus-per-task={settings.cpus_per_task}"],
        )
        for (job, attempt), task in zip(batch, ids, strict=True):
            tell(Event("submitted", job, attempt, task=task))
        print(
            f"submitted {len(batch)} {'run' if len(batch) == 1 else 'runs'} as Slurm job"
            f" {ids[0].partition('_')[0]}",
            flush=True,
        )
        # The queue as seen before does not have them.
        self._queued_at, self._pause = (float("-inf"), QUEUE[0])
        return [
            _Running(job, attempt, task) for (job, attempt), task in zip(batch, ids, strict=True)
        ]

    def _go_on_later(self, running: Iterable[_Running]) -> None:
        """A job that gives the sweep's command again once these have ended; none where one is
        waiting already."""
        name = f"{self.name}-next"
        if "PENDING" in (self._squeue(name) or {}).values():
            return
        arrays = sorted({active.task.partition("_")[0] for active in running}, key=int)
        work = Again(list(self.follow or ()), self.directory.absolute() / "logs" / "sweep.log")
        self._sbatch([work], name, dependency=f"afterany:{':'.join(arrays)}", use_srun=False)

    def _mem(self) -> str | None:
        return None if self.settings.mem_gb is None else f"{round(self.settings.mem_gb * 1024)}M"

    def _sbatch(
        self, work: Sequence[Callable[[], None]], name: str, **parameters: Any
    ) -> list[str]:
        """Submits `work` as one array; returns the ids of its tasks."""
        import submitit
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        settings = self.settings
        executor = submitit.SlurmExecutor(self.folder, max_num_timeout=settings.requeues)
        executor.update_parameters(
            job_name=name,
            time=settings.minutes,
            partition=settings.partition,
            account=settings.account,
            qos=settings.qos,
            setup=settings.setup or None,
            stderr_to_stdout=True,
            wckey=None,
            additional_parameters={"requeue": True, **settings.extra},
            **parameters,
        )
        try:
            return [str(job.job_id) for job in executor.submit_array(list(work))]
        except (FailedJobError, FailedSubmissionError) as error:
            lines = [line for line in str(error).splitlines() if "error:" in line] or str(
                error
            ).splitlines()
            reason = "; ".join(line.partition("error: ")[2] or line for line in lines)[:300]
            raise ConfigError(
                f"Slurm refuses the jobs: {reason}", "slurm", "change that section of the grid"
            ) from None


def unseen(directory: Path, finished: Iterable[str]) -> list[Event]:
    """The ends of these runs that no sweep was there to tell of."""
    events, running = [], _history(directory, {}).running
    for name in finished:
        active = running.get(name)
        # Its last may still be that it started.
        if active and (records := words(directory / "slurm" / f"{active.task}.jsonl")):
            seconds = records[-1].get("seconds", time.time() - records[-1]["time"])
            events.append(Event("finished", active.job, active.attempt, seconds, task=active.task))
    return events


def _history(directory: Path, jobs: Mapping[str, Job]) -> _History:
    history = _History(set(), {}, {}, {})
    for line in events_of(directory / "sweep.jsonl"):
        event, name = line["event"], line.get("run", "")
        if event == "sweep" and not line.get("continued"):
            history.attempts.clear()
            history.failed.clear()
        elif event == "submitted":
            history.tasks.add(line["task"])
            history.attempts.pop(name, None)
            history.failed.pop(name, None)
            job = jobs.get(name) or Job(name, (), Path())
            history.running[name] = _Running(job, line["attempt"], line["task"])
        elif event == "started" and name in history.running:
            history.running[name].starts += 1
            history.running[name].trains = True
        elif event == "requeued" and name in history.running:
            history.running[name].trains = False
        elif event in ("finished", "failed"):
            history.running.pop(name, None)
            if event == "failed" and line["again"]:
                history.attempts[name] = next_attempt(line["attempt"], line["reason"])
            elif event == "failed":
                history.failed[name] = line["reason"]
    return history


def _silence(state: str | None) -> tuple[str, bool]:
    """What it means that a task left the queue in this state without a word, and whether it would
    be the same again."""
    reasons = {
        "CANCELLED": "cancelled in Slurm",
        "OUT_OF_MEMORY": "out of main memory (slurm.mem_gb)",
        "NODE_FAIL": "its node failed",
        "PREEMPTED": "preempted",
        "TIMEOUT": "ended at its time limit (slurm.hours)",
    }
    if state in reasons:
        return reasons[state], state == "CANCELLED"
    return f"ended without a word{f' ({state})' if state else ''}: see slurm/*_log.out", False
