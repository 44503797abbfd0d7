"""TensorBoard: the lines of metrics.jsonl as event files in the run directory, best effort.

torch's own writer, on the thread that all trackers have. Every start and every step back opens a
new event file that says from which step on the ones before it hold no longer, so that no step is
drawn twice.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from archscale.errors import ConfigError
from archscale.telemetry.tracking import BestEffort

FOLDER = "tensorboard"  # in the run directory
NO_CURVES = ("step", "time")


def check_tensorboard(wanted: bool) -> None:
    """Check that TensorBoard is there where it is wanted.

    Raises:
        ConfigError: it is not installed.
    """
    if wanted and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            "tensorboard is not installed",
            "telemetry.tensorboard",
            "pip install archscale[tensorboard], or set it to false",
        )


def tensorboard_tracker(
    config: Mapping[str, Any], run_dir: Path, step: int, own: bool
) -> BestEffort:
    """Writes into `run_dir`/tensorboard.

    Args:
        config: resolved, as plain data.
        step: that the run goes on after.
        own: whether the event files there are of this run; otherwise none of their steps is drawn.
    """
    return BestEffort("tensorboard", lambda: Board(config, run_dir / FOLDER, step, own))


class Board:
    """A `tracking.Tracker`. Vectors over experts are left to metrics.jsonl."""

    def __init__(self, config: Mapping[str, Any], folder: Path, step: int, own: bool = True):
        self._folder = folder
        self._writer = self._open(step if own else -1)  # the config is drawn at step 0
        text = "\n".join(f"    {line}" for line in json.dumps(config, indent=1).splitlines())
        self._writer.add_text("config", text, step)

    def log(self, line: dict[str, Any]) -> None:
        step, now = line["step"], line["time"]
        for key, value in line.items():
            if isinstance(value, int | float) and key not in NO_CURVES:
                self._writer.add_scalar(key, value, step, walltime=now)
        if "event" in line:
            self._writer.add_text("event", line["event"], step, walltime=now)

    def rewind(self, step: int) -> None:
        self._writer.close()
        self._writer = self._open(step)

    def _open(self, step: int) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(self._folder, purge_step=step + 1)

    def close(self) -> None:
        self._writer.close()
