"""Where a run's lines go: metrics.jsonl always and first, then the terminal, then trackers if there
are any."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from archscale import distributed
from archscale.config import TelemetryConfig
from archscale.files import METRICS, SAMPLES
from archscale.telemetry.sinks import MetricsFile
from archscale.telemetry.tensorboard import tensorboard_tracker
from archscale.telemetry.tracking import wandb_tracker
from archscale.train.progress import Progress


class Recorder:
    """Writes on rank 0; on the other ranks it does nothing.

    Args:
        resolved: the run's config as plain data.
        telemetry: with the trackers.
        steps: of the whole run.
        step: lines of later steps belong to a lost part of the run.
        own: whether what the run directory had up to `step` belongs to this run.
    """

    def __init__(
        self,
        resolved: Mapping[str, Any],
        telemetry: TelemetryConfig,
        steps: int,
        run_dir: Path,
        step: int,
        own: bool,
    ):
        self._here = distributed.rank() == 0
        self._event = ""
        if self._here:
            name = resolved["name"]
            self._path = run_dir / METRICS
            self._metrics = MetricsFile(self._path, step)
            self._samples = run_dir / SAMPLES
            self._drop_samples(step)
            self._progress = Progress(steps, step, name)
            wandb = telemetry.wandb
            service = wandb_tracker(wandb.mode, wandb.project, name, dict(resolved), run_dir)
            self._trackers = [] if service is None else [service]
            if telemetry.tensorboard:
                self._trackers.append(tensorboard_tracker(resolved, run_dir, step, own))

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
            for tracker in self._trackers:
                tracker.close()

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
            for tracker in self._trackers:
                tracker.log(written)
        self._metrics.flush()
        if lines:
            self._progress.update(lines[-1])

    def write_samples(self, line: Mapping[str, Any], samples: Sequence[Mapping[str, str]]) -> None:
        """Append texts that the model of a line of metrics has written."""
        if self._here and samples:
            with contextlib.closing(MetricsFile(self._samples, line["step"] - 1)) as file:
                for sample in samples:
                    file.write(line["step"], line["tokens"], **sample)

    def rewind(self, step: int) -> None:
        """Drop the lines of later steps."""
        if self._here:
            self._metrics.close()
            self._metrics = MetricsFile(self._path, step)
            for tracker in self._trackers:
                tracker.rewind(step)
            self._drop_samples(step)

    def _drop_samples(self, step: int) -> None:
        if self._samples.exists():
            MetricsFile(self._samples, step).close()
