"""Jobs, done one after the other in this process or side by side in worker processes.

A job leaves its result in a file, which appears when it is whole. Nothing but small messages goes
between processes, so that memory is bounded and a job that is done stays done.
"""

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Protocol

from archscale.data.preparing.progress import Progress, Say
from archscale.errors import ArchscaleError, DataError

Report = Callable[[int], None]

# Before the libraries start: each worker has one core to itself.
_ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
_END_SECONDS = 5.0  # after which workers that are through are ended all the same


class Job(Protocol):
    """A piece of work that can be pickled.

    Attributes:
        name: what it works on, for messages.
        size: bytes, for progress; None where unknown.
        result: the file that is there when the job is done.
    """

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int | None: ...

    @property
    def result(self) -> Path: ...

    def run(self, report: Report) -> None:
        """Does the work; `report` receives bytes done since it was last called."""


@dataclass(frozen=True)
class _Ended:
    """A worker is through with its job.

    Attributes:
        refusal: an error that the user can do something about.
        crash: the traceback of any other.
    """

    refusal: ArchscaleError | OSError | None = None
    crash: str = ""


def run_jobs(verb: str, jobs: Sequence[Job], workers: int, say: Say) -> None:
    """Does the jobs whose results are not there yet.

    Args:
        verb: for the lines of progress.
        jobs: independent of each other; begun in order.
        workers: processes; 1 is this process.
        say: receives the lines of progress.

    Raises:
        DataError, OSError: of the first job that failed; no other is begun after it.
    """
    missing = [job for job in jobs if not job.result.exists()]
    if not missing:
        return
    if len(missing) < len(jobs):
        done = len(jobs) - len(missing)
        say(f"{verb.rstrip(':')} already: {done} of {len(jobs)} pieces")
    progress = Progress(verb, [job.size for job in missing], say)
    if min(workers, len(missing)) == 1:
        for number, job in enumerate(missing):
            job.run(lambda size, number=number: progress.add(number, size))  # type: ignore[misc]
            progress.finish(number)
    else:
        with _workers(min(workers, len(missing))) as pool:
            _distribute(missing, pool, progress)
    progress.end()


def _distribute(jobs: Sequence[Job], pool: dict[Connection, BaseProcess], progress: Progress):
    queue = iter(enumerate(jobs))
    current: dict[Connection, int] = {}
    _begin(list(pool), queue, current)
    while current:
        for connection in wait(list(current), timeout=1.0):
            assert isinstance(connection, Connection)
            number = current[connection]
            try:
                message = connection.recv()
            except (EOFError, ConnectionError) as error:
                pool[connection].join()
                raise _died(jobs[number], pool[connection].exitcode) from error
            if isinstance(message, int):
                progress.add(number, message)
                continue
            if message.refusal is not None:
                raise message.refusal
            if message.crash:
                raise RuntimeError(f"{jobs[number].name}: a worker failed\n{message.crash}")
            progress.finish(number)
            del current[connection]
            _begin([connection], queue, current)
        progress.tick()


def _begin(
    idle: list[Connection], queue: Iterator[tuple[int, Job]], current: dict[Connection, int]
) -> None:
    """Sends the next jobs, as many as there are, to idle workers."""
    for connection, (number, job) in zip(idle, queue):
        connection.send(job)
        current[connection] = number


def _died(job: Job, exitcode: int | None) -> DataError:
    killed = exitcode == -signal.SIGKILL
    cause = "killed, as the system does when memory runs out" if killed else f"ended ({exitcode})"
    return DataError(
        f"a worker process was {cause}" if killed else f"a worker process {cause}",
        job.name,
        "use fewer processes with --workers",
    )


@contextmanager
def _workers(count: int) -> Iterator[dict[Connection, BaseProcess]]:
    """Processes that wait for jobs, by the connection to each; they are gone after the block.

    Where all went well they end by themselves, so that libraries can clean up behind them.
    """
    # Not fork: a copy of a process with threads can wait for ever on a lock that one of them held.
    context = multiprocessing.get_context("spawn")
    pool: dict[Connection, BaseProcess] = {}
    try:
        for _ in range(count):
            ours, theirs = context.Pipe()
            process: BaseProcess = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            pool[ours] = process
        yield pool
        for connection in pool:
            with suppress(OSError):  # it may have been killed meanwhile
                connection.send(None)
        deadline = time.monotonic() + _END_SECONDS
        for process in pool.values():
            process.join(max(0.0, deadline - time.monotonic()))
    finally:
        for connection, process in pool.items():
            process.terminate()
            connection.close()
        for process in pool.values():
            process.join()


def _serve(connection: Connection) -> None:
    """The life of a worker: does jobs until None comes, or it is ended."""
    # Ctrl-C reaches every process of the terminal; the first of them ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(_ONE_THREAD)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while (job := connection.recv()) is not None:
        connection.send(_outcome(job, connection.send))


def _outcome(job: Job, report: Report) -> _Ended:
    try:
        job.run(report)
    except (ArchscaleError, OSError) as error:
        return _Ended(refusal=error)
    except MemoryError:
        remedy = "use fewer processes with --workers, or a machine with more memory"
        return _Ended(refusal=DataError("out of memory", job.name, remedy))
    except Exception:
        return _Ended(crash=traceback.format_exc())
    return _Ended()


def _end_with_parent() -> None:
    """Ends this process when the one that started it is gone, however it went."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
