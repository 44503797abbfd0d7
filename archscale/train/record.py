"""Where a run's lines go: metrics.jsonl always and first, then the terminal, then a tracking
service if there is one."""

from __future__ import annotations

import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from archscale import distributed
from archscale.config import Config
from archscale.files import METRICS
from archscale.telemetry.sinks import MetricsFile
from archscale.telemetry.tracking import wandb_tracker
from archscale.train.progress import Progress


class Recorder:
    """Writes on rank 0; on the other ranks it does nothing.

    Args:
        step: lines of later steps belong to a lost part of the run.
    """

    def __init__(self, config: Config, run_dir: Path, step: int):
        self._here = distributed.rank() == 0
        self._event = ""
        if self._here:
            self._path, self._metrics = (
                run_dir / METRICS,
                MetricsFile(run_dir / METRICS, step),
            )
            self._progress = Progress(config.steps, step, config.name)
            of = config.telemetry.wandb
            self._tracker = wandb_tracker(
                of.mode, of.project, config.name, config.resolved(), run_dir
            )

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._here:
            self._progress.close()
            self._metrics.close()
            if self._tracker:
                self._tracker.close()

    def event(self, text: str) -> None:
        """To the terminal now, and to the next line."""
        self._event = "; ".join(filter(None, [self._event, text]))
        if self._here:
            print(f"archscale: warning: {text}", file=sys.stderr, flush=True)

    def write(self, lines: list[dict[str, Any]]) -> None:
        if not self._here:
            return
        for line in lines:
            if self._event:
                line["event"] = "; ".join(filter(None, [self._event, line.get("event")]))
                self._event = ""
            written = self._metrics.write(**line)
            if self._tracker:
                self._tracker.log(written)
        self._metrics.flush()
        self._progress.update(lines[-1])

    def rewind(self, step: int) -> None:
        """Drop the lines of later steps."""
        if self._here:
            self._metrics.close()
            self._metrics = MetricsFile(self._path, step)
