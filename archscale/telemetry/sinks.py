"""metrics.jsonl: one flat JSON object a line, each with `step`, `tokens` and `time`."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from archscale.files import METRICS, write_atomically

TAIL = 1 << 16  # bytes of metrics.jsonl in which the last whole line is looked for at first


class MetricsFile:
    """Appends lines; non-finite numbers become null beside an `event` that names them.

    Args:
        path: metrics.jsonl of a run directory.
        resume_step: lines of later steps belong to a part of the run that was lost, and are
            dropped.

    Raises:
        OSError: it cannot be written, by the name of `path`; by all methods.
    """

    def __init__(self, path: Path, resume_step: int = 0):
        self.path = path
        if path.exists():
            write_atomically(path, "".join(lines_until(path, resume_step)[0]))
        self._file = path.open("a")

    def write(self, step: int, tokens: int, **values: Any) -> dict[str, Any]:
        """Append a line; returns it as it was written."""
        # JSON has no NaN, and readers that take it all the same differ in what they make of it.
        non_finite = [
            key
            for key, value in values.items()
            if isinstance(value, float) and not math.isfinite(value)
        ]
        line: dict[str, Any] = {"step": step, "tokens": tokens, "time": round(time.time(), 3)}
        line |= {key: None if key in non_finite else value for key, value in values.items()}
        event = line.get("event", "")
        if unnamed := [key for key in non_finite if key not in event]:
            line["event"] = "; ".join(filter(None, [event, f"non-finite {', '.join(unnamed)}"]))
        with self._naming():
            self._file.write(json.dumps(line) + "\n")
        return line

    def flush(self) -> None:
        with self._naming():
            self._file.flush()

    def close(self) -> None:
        with self._naming():
            self._file.close()

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        """A write that fails names no file."""
        try:
            yield
        except OSError as error:
            error.filename = str(self.path)
            raise


def last_line(run_dir: Path) -> dict[str, Any]:
    """The last whole line of a run's metrics.jsonl, empty while there is none."""
    with contextlib.suppress(OSError), open(run_dir / METRICS, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        for tail in (TAIL, size):
            stream.seek(max(0, size - tail))
            lines = stream.read().decode(errors="replace").splitlines(keepends=True)
            for line in reversed(lines):
                if (values := _values(line)) is not None:
                    return values
    return {}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Every whole line; a crash may have cut the last one short."""
    return [values for line in _lines(path) if (values := _values(line)) is not None]


def lines_until(path: Path, step: int) -> tuple[list[str], list[str]]:
    """(lines of steps up to `step`, lines of later steps), as they stand in the file; what is not
    whole belongs to neither. Both are empty without the file."""
    kept: list[str] = []
    later: list[str] = []
    for line in _lines(path):
        if (values := _values(line)) is not None:
            (kept if values["step"] <= step else later).append(line)
    return kept, later


def _lines(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []


def _values(line: str) -> dict[str, Any] | None:
    """None where the line is not whole."""
    try:
        values = json.loads(line) if line.endswith("\n") else None
    except ValueError:
        return None
    return values if isinstance(values, dict) and isinstance(values.get("step"), int) else None
