"""metrics.jsonl: one flat JSON object a line, each with `step`, `tokens` and `time`."""

from __future__ import annotations

import json
import math
import os
import time
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
    """

    def __init__(self, path: Path, resume_step: int = 0):
        self.path = path
        if path.exists():
            kept = [
                line
                for line in path.read_text().splitlines(keepends=True)
                if _step(line, resume_step) <= resume_step
            ]
            write_atomically(path, "".join(kept))
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
        self._file.write(json.dumps(line) + "\n")
        return line

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def last_line(run_dir: Path) -> dict[str, Any]:
    """The last whole line of a run's metrics.jsonl, empty while there is none."""
    try:
        with open(run_dir / METRICS, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            for tail in (TAIL, size):
                stream.seek(max(0, size - tail))
                for line in reversed(stream.read().splitlines(keepends=True)):
                    if line.endswith(b"\n") and line.startswith(b"{"):
                        return json.loads(line)
    except (OSError, ValueError):
        pass
    return {}


def _step(line: str, resume_step: int) -> int:
    """Step of a line; one that a crash cut short counts as later than `resume_step`."""
    try:
        return int(json.loads(line)["step"]) if line.endswith("\n") else resume_step + 1
    except (ValueError, KeyError, TypeError):
        return resume_step + 1
