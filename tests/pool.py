"""Resident pools of gloo ranks for distributed tests; `launch` (tests/commands.py) runs whole
commands.

    from tests.pool import pool

    def rank_sum(value):                              # top level of a test module: workers import
                                                      it by name
        tensor = torch.full((1,), value + dist.get_rank())
        dist.all_reduce(tensor)
        return tensor

    def test_rank_sum():
        assert [r.item() for r in pool(2).run(rank_sum, 1.0, timeout=30)] == [3.0, 3.0]

A pool of a world size starts on first use and stays until pytest ends, so a distributed test costs
milliseconds. Its workers are forked from one server that has imported torch and started no thread.
A run that hangs, a rank that raises and a rank that dies end in an exception in the test, with
stacks, never in a hung session. Every run starts with seed 0 and gets its changes of the
environment undone; modules and process groups stay, until the groups are so many that the pool
starts anew. Workers see no GPU, and of the environment only what was set before the first pool
started.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import importlib
import os
import pickle
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection, forkserver, get_context
from pathlib import Path
from typing import Any

from tests.commands import die_with_parent, kill_all, read_text
from tests.commands import launch as launch
from tests.commands import start as start

START_TIMEOUT = 180.0  # seconds for a pool to come up, with the server's import of torch
GROUP_TIMEOUT = 180.0  # seconds for one collective
MAX_OPEN_FILES = 500  # in one rank; the usual limit of a process is 1,024
GRACE = 1.0  # seconds the other ranks have to answer after the first one raised
# A real-time signal, because SIGUSR1, SIGUSR2 and SIGTERM belong to the code under test.
DUMP_SIGNAL = getattr(signal, "SIGRTMIN", signal.SIGQUIT)
PRELOAD = [
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "torch._dynamo",
    "pytest",
    "hypothesis",
]


class WorkerError(AssertionError):
    """A rank raised; `rank`, `type_name` and `traceback` describe the first one that did."""

    def __init__(self, message: str, rank: int, type_name: str, traceback: str = "") -> None:
        super().__init__(message)
        self.rank, self.type_name, self.traceback = rank, type_name, traceback


class WorkerDied(WorkerError):
    """A rank's process ended without an answer."""


class PoolTimeout(AssertionError):
    """Some ranks gave no answer in time; the message holds the Python stacks of all ranks."""


@dataclass(frozen=True)
class _Raised:
    type_name: str
    message: str
    traceback: str
    breaks_group: bool  # the collectives of this rank may be out of step with the others'


# --- worker side


def _worker(conn: connection.Connection, rank: int, env: dict[str, str], folder: str) -> None:
    parent = os.getppid()
    die_with_parent(signal.SIGKILL)
    # The server ends once no process holds this pipe: held here, the server and busy workers
    # outlive pytest.
    server: Any = vars(forkserver)["_forkserver"]
    os.close(server._forkserver_alive_fd)
    server._forkserver_alive_fd = None
    # a process group of its own, so that its children (data workers) are killed with it
    os.setsid()
    log = os.open(f"{folder}/log_{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    stacks = open(f"{folder}/stacks_{rank}", "w")  # noqa: SIM115 (faulthandler needs it open for good)
    faulthandler.enable(file=2)
    faulthandler.register(DUMP_SIGNAL, file=stacks, all_threads=True)
    os.environ.update(env)
    if os.getppid() != parent:
        os._exit(1)

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=GROUP_TIMEOUT))
    conn.send_bytes(pickle.dumps("ready"))
    while True:
        try:
            request = conn.recv_bytes()
        except (EOFError, OSError):
            os._exit(0)
        conn.send_bytes(_answer(request))


def _answer(request: bytes) -> bytes:
    """Calls the function of a request in a clean seed and environment; returns the pickled
    answer."""
    import numpy
    import torch

    before = dict(os.environ)
    try:
        module, qualname, arguments = pickle.loads(request)
        target: Any = importlib.import_module(module)
        for part in qualname.split("."):
            target = getattr(target, part)
        torch.manual_seed(0)
        numpy.random.seed(0)
        random.seed(0)
        args, kwargs = pickle.loads(arguments)
        return pickle.dumps(target(*args, **kwargs))
    except BaseException as error:
        group_error = isinstance(error, (torch.distributed.DistError, RuntimeError))
        text = "".join(traceback.format_exception(error))
        return pickle.dumps(_Raised(type(error).__name__, str(error), text, group_error))
    finally:
        os.environ.clear()
        os.environ.update(before)


# --- parent side


class Pool:
    """`world_size` resident gloo ranks. Use `pool(world_size)`, which keeps one for the session."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.pids: list[int] = []
        self.starts = 0
        self._owner = os.getpid()
        self._folder: Path | None = None
        self._processes: list[Any] = []
        self._conns: list[connection.Connection] = []

    def run(
        self,
        fn: Callable[..., Any],
        *args: Any,
        timeout: float = 300.0,
        expect_error: bool = False,
        **kwargs: Any,
    ) -> list[Any]:
        """Calls `fn(*args, **kwargs)` on every rank and returns the results in rank order.

        Raises WorkerError soon after any rank raises, WorkerDied when one dies, PoolTimeout when a
        rank has not answered after `timeout` seconds. With `expect_error` every rank has to answer,
        and the result is, per rank, (type name, message) of what it raised, or None where it
        returned.
        """
        if fn.__module__ == "__main__" or "<" in fn.__qualname__:
            raise TypeError(
                f"{fn.__qualname__} is not importable in a worker: move it to the top of its module"
            )
        # Plain pickle: multiprocessing's own would send tensors as shared-memory file descriptors.
        request = pickle.dumps((fn.__module__, fn.__qualname__, pickle.dumps((args, kwargs))))
        self._make_ready()
        try:
            for conn in self._conns:
                with contextlib.suppress(OSError):  # a dead worker: the collection reports it
                    conn.send_bytes(request)
            answers = self._collect(timeout, fn.__qualname__, fail_fast=not expect_error)
            raised = [a for a in answers if isinstance(a, _Raised)]
            alike = len(raised) == self.world_size and len({r.type_name for r in raised}) == 1
            if raised and (not alike or any(r.breaks_group for r in raised)):
                self.close()
        except BaseException:
            self.close()  # also on the per-test alarm: a late answer must not meet the next request
            raise
        if expect_error:
            return [(a.type_name, a.message) if isinstance(a, _Raised) else None for a in answers]
        for rank, answer in enumerate(answers):
            if isinstance(answer, _Raised):
                raise self._error(rank, answer, f"{len(raised)} of {self.world_size} ranks raised")
        return answers

    def _make_ready(self) -> None:
        """Workers that listen, with empty logs."""
        if self._is_worn():
            self.close()
        for attempt in range(3):
            if self._conns:
                break
            try:
                self._start()
            except WorkerDied:  # another program may have taken the free port meanwhile
                if attempt == 2:
                    raise
        assert self._folder is not None
        for path in self._folder.glob("log_*"):
            os.truncate(path, 0)

    def close(self) -> None:
        """Kills the workers and what they started; the next run starts new ones."""
        if os.getpid() != self._owner:  # a forked child of the test process
            return
        for process in self._processes:
            for kill in (lambda p: os.killpg(p.pid, signal.SIGKILL), lambda p: p.kill()):
                with contextlib.suppress(ProcessLookupError):
                    kill(process)
        for process in self._processes:
            process.join(5)
        for conn in self._conns:
            conn.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._processes, self._conns, self.pids, self._folder = [], [], [], None

    def _is_worn(self) -> bool:
        """Every process group keeps 5 file descriptors and 3 threads in each rank, and tests make
        many."""
        folder = Path(f"/proc/{self.pids[0] if self.pids else 0}/fd")
        return folder.exists() and len(list(folder.iterdir())) > MAX_OPEN_FILES

    def _start(self) -> None:
        context = _server()
        self.starts += 1
        self._folder = Path(tempfile.mkdtemp(prefix="archscale-pool-"))
        env = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.world_size),
            "OMP_NUM_THREADS": "1",
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        if sys.platform == "linux":
            env["GLOO_SOCKET_IFNAME"] = "lo"
        try:
            for rank in range(self.world_size):
                mine, theirs = context.Pipe()
                ranked = env | {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"}
                process = context.Process(
                    target=_worker, args=(theirs, rank, ranked, str(self._folder))
                )
                with _no_main():
                    process.start()
                theirs.close()
                self._processes.append(process)
                self._conns.append(mine)
            self.pids = [process.pid for process in self._processes]
            self._collect(START_TIMEOUT, "start-up", fail_fast=False)
        except BaseException:
            self.close()
            raise

    def _collect(self, timeout: float, what: str, fail_fast: bool) -> list[Any]:
        """One answer per rank, in rank order, or an exception; the caller closes the pool then."""
        deadline = time.monotonic() + timeout
        cut = deadline
        answers: dict[int, Any] = {}
        first: tuple[int, _Raised] | None = None
        while len(answers) < self.world_size:
            pending = [rank for rank in range(self.world_size) if rank not in answers]
            sources: dict[Any, int] = {self._conns[rank]: rank for rank in pending}
            sources |= {self._processes[rank].sentinel: rank for rank in pending}
            ready = connection.wait(list(sources), max(0.0, cut - time.monotonic()))
            if not ready and first is not None:
                rank, raised = first
                raise self._error(rank, raised, f"{pending} gave no answer {GRACE:g} s later")
            if not ready:
                missing = (
                    f"{what}: ranks {pending} of {self.world_size} gave no answer in {timeout:g} s"
                )
                raise PoolTimeout(f"{missing}\n{self._stacks()}")
            for rank in sorted({sources[source] for source in ready}):
                answers[rank] = answer = self._receive(rank, what)
                if fail_fast and first is None and isinstance(answer, _Raised):
                    first, cut = (rank, answer), min(deadline, time.monotonic() + GRACE)
        return [answers[rank] for rank in range(self.world_size)]

    def _receive(self, rank: int, what: str) -> Any:
        try:
            if self._conns[rank].poll(0):
                return pickle.loads(self._conns[rank].recv_bytes())
        except (EOFError, ConnectionError):
            pass
        process = self._processes[rank]
        process.join(2)
        died = f"{what}: rank {rank} of {self.world_size} died (exit code {process.exitcode})"
        raise WorkerDied(died + self._log(rank), rank, "WorkerDied")

    def _error(self, rank: int, raised: _Raised, others: str) -> WorkerError:
        head = (
            f"rank {rank} of {self.world_size} raised {raised.type_name}: {raised.message}"
            f" ({others})"
        )
        message = f"{head}\n{raised.traceback}{self._log(rank)}"
        return WorkerError(message, rank, raised.type_name, raised.traceback)

    def _log(self, rank: int) -> str:
        text = read_text(self._folder / f"log_{rank}") if self._folder else ""
        return f"\n--- output of rank {rank}\n{text[-4000:]}" if text.strip() else ""

    def _stacks(self) -> str:
        assert self._folder is not None
        paths = [self._folder / f"stacks_{rank}" for rank in range(self.world_size)]
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, DUMP_SIGNAL)
        until = time.monotonic() + 2.0
        while time.monotonic() < until and not all(
            path.exists() and path.stat().st_size for path in paths
        ):
            time.sleep(0.02)
        time.sleep(0.05)  # the last dump may still be half written
        return "\n".join(
            f"--- stacks of rank {r}\n{read_text(p)}{self._log(r)}" for r, p in enumerate(paths)
        )


_POOLS: dict[int, Pool] = {}


def pool(world_size: int) -> Pool:
    """The session's pool of this world size."""
    return _POOLS.setdefault(world_size, Pool(world_size))


def close_all() -> None:
    """Kills every worker and every launched command of this process."""
    for each in _POOLS.values():
        each.close()
    kill_all()


atexit.register(close_all)  # before multiprocessing's own handler, which would wait for the workers


@contextlib.contextmanager
def _no_main() -> Iterator[None]:
    """Hides the main module, which every worker would otherwise import again: pytest, or a whole
    script."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _server() -> Any:
    """The fork server's context. One thread, set before torch is imported in it."""
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        with _no_main():
            forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
    return context


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
