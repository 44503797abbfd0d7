"""Every test has a time limit, and no process outlives the session."""

from __future__ import annotations

import faulthandler
import io
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from archscale import cli
from tests import pool as processes

# seconds, also `@pytest.mark.timeout(seconds)`; it ends hangs, and a busy machine is no hang
LIMIT = 400.0
SLOW_LIMIT = 1800.0  # for tests marked slow
LAST_RESORT = (
    15.0  # seconds after the limit until a test stuck outside Python ends the whole session
)

_stderr = pytest.StashKey[Any]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "timeout(seconds): time limit of this test, instead of 400 s"
    )
    # The real standard error, which pytest captures during tests but not in this hook.
    config.stash[_stderr] = os.fdopen(os.dup(2), "w")


def pytest_unconfigure(config: pytest.Config) -> None:
    faulthandler.cancel_dump_traceback_later()
    processes.close_all()
    config.stash[_stderr].close()


def _limit(item: pytest.Item) -> float:
    marker = item.get_closest_marker("timeout")
    if marker is not None:
        return float(marker.args[0] if marker.args else marker.kwargs["seconds"])
    return SLOW_LIMIT if item.get_closest_marker("slow") else LIMIT


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Two limits: an alarm fails the test; a thread ends pytest where no Python code can run."""
    if item.config.getoption("usepdb"):
        return (yield)
    limit, stderr = _limit(item), item.config.stash[_stderr]

    def expire(*_: Any) -> None:
        stderr.write(f"\n{item.nodeid}: over its limit of {limit:g} s\n")
        stderr.flush()
        faulthandler.dump_traceback(file=stderr, all_threads=True)
        pytest.fail(f"over its limit of {limit:g} s (see `timeout` in tests/conftest.py)")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, limit)
    faulthandler.dump_traceback_later(limit + LAST_RESORT, exit=True, file=stderr)
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


class Exit(Exception):
    """In place of `os._exit`."""


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """`command("plan", "c.yaml", typed=b"…")` → exit status, standard output, standard error. In
    this process: each start of one takes seconds."""

    def leave(status: int) -> None:
        raise Exit(status)

    def call(*arguments: object, typed: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["archscale", *map(str, arguments)])
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(typed)))
        monkeypatch.setattr(os, "_exit", leave)
        try:
            cli.main()
        except (SystemExit, Exit) as end:
            status = end.args[0] if end.args else 0
        return (status or 0, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def pool() -> Callable[[int], processes.Pool]:
    """`pool(world_size).run(fn, *args)`: see tests/pool.py."""
    return processes.pool
