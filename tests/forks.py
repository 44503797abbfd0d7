"""Processes that tests start by the dozen and kill: forked from one that has imported everything,
so that each costs milliseconds, where a command of its own costs seconds.

    child = fork(fn, *args, folder=tmp_path, env={"RANK": "1"})   # fn at the top of a module
    done = child.wait(timeout=30)
    assert done.status == -signal.SIGKILL and "Traceback" not in done.err

A child is a process group of its own, ends as Python does (an uncaught exception in a traceback and
status 1, threads that are no daemons waited for), and dies with the pytest that started it.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import os
import pickle
import signal
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

from tests.commands import MASTER_VARIABLES, RANK_VARIABLES, die_with_parent, read_text
from tests.pool import _no_main, _server

WARM = ("tests.train.tiny", "archscale.cli", "archscale.sweep.pages")
START_TIMEOUT = 180.0  # seconds for the first child, with all imports


@dataclass(frozen=True)
class Done:
    """How a child ended.

    Attributes:
        status: exit status, or minus the signal that killed it.
        seconds: from its start.
    """

    status: int
    out: str
    err: str
    seconds: float


class Child:
    """A process forked by `fork`."""

    def __init__(self, pid: int, files: Path):
        self.pid, self._files, self._began = pid, files, time.monotonic()
        self._status: int | None = None

    def poll(self) -> int | None:
        """Its status as in `Done`, None while it runs."""
        if self._status is None:
            self._status = _ask("poll", self.pid)
        return self._status

    def kill(self) -> None:
        """SIGKILL to it and what it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def wait(self, timeout: float) -> Done:
        """Wait for its end; one that has not ended after `timeout` seconds is killed, and an
        error."""
        while (status := self.poll()) is None:
            if time.monotonic() - self._began > timeout:
                self.kill()
                raise AssertionError(f"a child ran for more than {timeout:g} s\n{self._output()}")
            time.sleep(0.003)
        out, err = self._output()
        return Done(status, out, err, time.monotonic() - self._began)

    def _output(self) -> tuple[str, str]:
        return read_text(self._files / "out"), read_text(self._files / "err")


def fork(
    fn: Callable[..., Any],
    *args: Any,
    folder: Path,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Child:
    """Start `fn(*args)` in a new process, with its output in a new directory under `folder`."""
    files = folder / f"child_{uuid.uuid4().hex[:8]}"
    files.mkdir(parents=True)
    arguments = pickle.dumps(args)
    request = (fn.__module__, fn.__qualname__, arguments, str(files), dict(env or {}), cwd)
    return Child(_ask("fork", request), files)


# --- the process that forks

_SERVER: list[tuple[Any, connection.Connection]] = []


def _ask(what: str, value: Any) -> Any:
    if not _SERVER:
        context = _server()
        mine, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs,))
        with _no_main():
            process.start()
        theirs.close()
        _SERVER.append((process, mine))
        atexit.register(close)
    conn = _SERVER[0][1]
    conn.send((what, value))
    if not conn.poll(START_TIMEOUT):
        raise AssertionError("the process that forks does not answer")
    return conn.recv()


def close() -> None:
    """End the process that forks, and with it all children."""
    for process, conn in _SERVER:
        conn.close()
        process.kill()
        process.join(5)
    _SERVER.clear()


def _serve(conn: connection.Connection) -> None:
    die_with_parent(signal.SIGKILL)
    for name in WARM:
        importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads cannot be forked"
    while True:
        try:
            what, value = conn.recv()
        except EOFError:
            os._exit(0)
        if what == "poll":
            pid, status = os.waitpid(value, os.WNOHANG)
            conn.send(os.waitstatus_to_exitcode(status) if pid else None)
        elif pid := os.fork():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.setpgid(pid, pid)
            conn.send(pid)
        else:
            conn.close()
            _child(*value)


def _child(
    module: str, qualname: str, arguments: bytes, files: str, env: dict[str, str], cwd: Path | None
) -> None:
    status = 1
    try:
        die_with_parent(signal.SIGKILL)
        with contextlib.suppress(PermissionError):
            os.setpgid(0, 0)
        for name, descriptor in (("out", 1), ("err", 2)):
            file = os.open(f"{files}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, descriptor)
            os.close(file)
        for name in RANK_VARIABLES | MASTER_VARIABLES:
            os.environ.pop(name, None)
        os.environ.update({"CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo", **env})
        if cwd is not None:
            os.chdir(cwd)
        status = _call(module, qualname, arguments)
        threading._shutdown()  # type: ignore[attr-defined]  # as the interpreter does at its end
        sys.stdout.flush()
    finally:
        os._exit(status)


def _call(module: str, qualname: str, arguments: bytes) -> int:
    try:
        target: Any = importlib.import_module(module)
        for part in qualname.split("."):
            target = getattr(target, part)
        target(*pickle.loads(arguments))
    except SystemExit as end:
        if not isinstance(end.code, int | None):
            print(end.code, file=sys.stderr, flush=True)
            return 1
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        return 1
    return 0
