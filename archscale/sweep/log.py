"""A sweep directory is one sweep's at a time, and sweep.jsonl tells what happened there."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from archscale.errors import ConfigError, explain_os_error
from archscale.sweep.launchers.local import Event


@contextlib.contextmanager
def locked(directory: Path, wait: bool = False) -> Iterator[None]:
    """Holds the sweep directory against another sweep, or waits for that; freed by the system
    whatever ends this process."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle = os.open(directory / "sweep.jsonl", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        cause, remedy = explain_os_error(error, "give another with --sweep-dir")
        raise ConfigError(
            f"cannot write the sweep directory: {cause}", str(directory), remedy
        ) from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    except BlockingIOError:
        raise ConfigError(
            "another sweep works in this directory",
            str(directory),
            "wait for it, or give another with --sweep-dir",
        ) from None
    finally:
        os.close(handle)


@contextlib.contextmanager
def open_log(path: Path) -> Iterator[IO[str]]:
    """For appending; a line that a crash cut short is ended first."""
    with open(path, "r+b") as stream:
        content = stream.read()
        if content and not content.endswith(b"\n"):
            stream.write(b"\n")
    with open(path, "a", encoding="utf-8") as log:
        yield log


def line_of(event: Event) -> dict[str, Any]:
    """An event as a line of sweep.jsonl."""
    line: dict[str, Any] = {"event": event.what, "run": event.job.name, "attempt": event.attempt}
    if event.what in ("finished", "failed"):
        line["seconds"] = round(event.seconds, 3)
    if event.what == "failed":
        line |= {"reason": event.reason, "again": event.again}
    if event.task:
        line["task"] = event.task
    return line


def write(log: IO[str], **line: Any) -> None:
    log.write(json.dumps({"time": round(time.time(), 3), **line}) + "\n")
    log.flush()
