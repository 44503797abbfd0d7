"""A sweep for people: its plan before it starts, and its runs while they train."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from archscale.fit.text import aligned
from archscale.plan.devices import Device, find_device, this_device
from archscale.plan.text import duration, size
from archscale.sweep.grid import Grid
from archscale.sweep.launchers.local import Event, events_of
from archscale.telemetry.sinks import last_line

if TYPE_CHECKING:
    from archscale.sweep.planning import SweepRun
    from archscale.sweep.room import Slots

MFU = 0.4  # share of the peak that estimates assume
START = 5.0  # seconds until the first step of a run, most of them imports (measured)
OFTEN = 60.0  # seconds between lines about running runs where there is no terminal


def plan_text(
    grid: Grid,
    runs: Sequence[SweepRun],
    refined: Sequence[SweepRun],
    directory: Path,
    room: Slots,
    *,
    list_runs: bool,
) -> str:
    """What the sweep will train and cost; with `list_runs` a row for each run. `refined`: as many
    as `refine` will choose."""
    finished = sum(run.finished for run in runs)
    lines = [
        (
            f"{grid.content.name}: {len(runs)} runs of {grid.base} in {directory}, {finished} of"
            " them finished"
        ),
        "",
    ]
    if list_runs:
        rows = [["", "run", "parameters", "tokens", "steps", "matrix lr", "FLOPs", "memory", ""]]
        for index, run in enumerate(runs):
            f = run.plan.figures
            rows.append(
                [
                    str(index),
                    run.name,
                    f"{f['model']['parameters']['total']:,}",
                    f"{f['training']['tokens']:,}",
                    f"{run.steps:,}",
                    f"{f['parameterization']['roles']['matrix']['lr']:.4g}",
                    f"{f['flops']['executed']:.3g}",
                    size(f["memory"]["peak"]),
                    "finished" if run.finished else f"at step {run.step}" if run.step else "",
                ]
            )
        lines += [*aligned(rows), ""]
    totals = [run.plan.figures for run in runs]
    flops = sum(
        run.plan.figures["flops"]["executed"] * (1 - min(1.0, run.step / run.steps)) for run in runs
    )
    lines += [
        (
            f"  in all {sum(f['flops']['executed'] for f in totals):.3g} FLOPs ({flops:.3g} of them"
            f" left), {sum(f['training']['tokens'] for f in totals):,} tokens, up to"
            f" {size(sum(f['checkpoint']['disk'] for f in totals))} of checkpoints"
        ),
        f"  {room.text}{_estimate(runs, directory, room, grid.content.processes)}",
    ]
    if refined and (refine := grid.content.refine):
        seeds = sorted({run.grid.config.seed for run in refined})
        lines.append(
            f"  then {'seeds' if len(seeds) > 1 else 'seed'} {', '.join(map(str, seeds))} at the"
            f" {refine.points} best {refine.x} by {refine.y}: {len(refined)} more runs, about"
            f" {sum(run.plan.figures['flops']['executed'] for run in refined):.3g} FLOPs"
        )
    for asked in grid.content.fit:
        by = f" for each {', '.join(asked.group)}" if asked.group else ""
        lines.append(f"  then {asked.form} of {asked.y} over {', '.join(asked.x)}{by}")
    return "\n".join(lines)


def _estimate(runs: Sequence[SweepRun], directory: Path, room: Slots, processes: int) -> str:
    """Time for what is left; nothing where neither finished runs nor the device tell how fast that
    is."""
    flops = sum(
        run.plan.figures["flops"]["executed"] * (1 - min(1.0, run.step / run.steps)) for run in runs
    )
    left, jobs = sum(not run.finished for run in runs), len(room.variables)
    speed, source = _measured(runs, directory)
    if not speed:
        if not room.here:
            return _device_hours(flops, room.device)
        device = this_device()
        if device.name == "cpu":
            device = find_device("cpu")  # measured, on the threads that one process takes
        if device.peak is None:
            return ""
        speed = device.peak * MFU * processes
        source = f"{MFU:.0%} of {device.peak / 1e12:.3g} TFLOP/s a process ({device.source})"
    seconds = flops / (speed * jobs) + START * -(-left // jobs)
    return (
        f"; about {duration(seconds)} at {source} and {START:g} s until a run's first step"
        if left
        else ""
    )


def _device_hours(flops: float, device: Device | None) -> str:
    if device is None or device.peak is None:
        return ""
    hours = flops / (device.peak * MFU) / 3600
    return (
        f"; about {hours:,.0f} hours of {device.name} at {MFU:.0%} of {device.peak / 1e12:.4g}"
        " TFLOP/s"
    )


def _measured(runs: Sequence[SweepRun], directory: Path) -> tuple[float, str]:
    """FLOP/s of the runs that this sweep has finished, and how to call that; 0 without any."""
    flops, seconds, count = 0.0, 0.0, 0
    by_name = {run.name: run.plan.figures["flops"]["executed"] for run in runs}
    for event in events_of(directory / "sweep.jsonl"):
        if (
            event["event"] == "finished"
            and event.get("attempt") == 1
            and event.get("run") in by_name
        ):
            flops += by_name[event["run"]]
            seconds += max(1.0, event["seconds"] - START)
            count += 1
    speed = flops / seconds if count else 0.0
    return speed, f"the {speed / 1e12:.3g} TFLOP/s of the {count} runs it has finished"


class View:
    """Runs while they train: a table on a terminal, lines otherwise.

    Args:
        runs: directory and steps, by name.
        finished: of them, before.
    """

    def __init__(self, runs: Mapping[str, tuple[Path, int]], finished: int):
        self._runs, self._finished = dict(runs), finished
        self._running: dict[str, float] = {}  # when each was started
        self._failed: dict[str, str] = {}
        self._printed = time.monotonic()
        self._live: Any = None
        if sys.stdout.isatty():
            from rich.live import Live

            self._live = Live(refresh_per_second=2, transient=True, auto_refresh=False)

    def __enter__(self) -> View:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.stop()

    def tell(self, event: Event) -> None:
        name, again = event.job.name, f" (attempt {event.attempt})" if event.attempt > 1 else ""
        if event.what == "submitted":
            return
        if event.what in ("started", "attached"):
            self._running[name] = time.monotonic()
            return
        self._running.pop(name, None)
        if event.what == "requeued":
            text = (
                f"{name}: requeued{again} at step {last_line(self._runs[name][0]).get('step', 0)}"
            )
        elif event.what == "finished":
            self._finished += 1
            diverged = last_line(self._runs[name][0]).get("loss", 0.0) is None
            text = (
                f"{name}: finished in {duration(event.seconds)}{again}"
                f"{self._metrics(name, 'loss', 'val_loss')}"
                f"{', diverged: loss not finite' if diverged else ''}"
            )
        else:
            if not event.again:
                self._failed[name] = event.reason
            text = f"{name}: failed{again}: {event.reason}" + (
                "; will be tried again" if event.again else ""
            )
        self._print(f"{self._finished}/{len(self._runs)}  {text}")

    def tick(self) -> None:
        now = time.monotonic()
        if now - self._printed < (0.5 if self._live else OFTEN):
            return
        self._printed = now
        if self._live:
            self._live.update(self._table(), refresh=True)
        else:
            steps = (
                f"{name} at step"
                f" {last_line(self._runs[name][0]).get('step', 0)}/{self._runs[name][1]}"
                for name in self._running
            )
            print(f"{self._finished}/{len(self._runs)}  running: {', '.join(steps)}", flush=True)

    def _print(self, text: str) -> None:
        if self._live:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)

    def _metrics(self, name: str, *keys: str) -> str:
        last = last_line(self._runs[name][0])
        return "".join(
            f", {key} {last[key]:.4f}" for key in keys if isinstance(last.get(key), float)
        )

    def _table(self) -> Any:
        from rich.table import Table

        waiting = len(self._runs) - self._finished - len(self._failed) - len(self._running)
        counts = (
            f"{self._finished} finished, {len(self._running)} running, {waiting} waiting,"
            f" {len(self._failed)} failed"
        )
        table = Table(
            "run", "step", "loss", "val_loss", "left", title=counts, title_justify="left", box=None
        )
        for name, started in self._running.items():
            directory, steps = self._runs[name]
            last = last_line(directory)
            step, speed = last.get("step", 0), last.get("step_seconds")
            numbers = (
                f"{last[key]:.4f}" if isinstance(last.get(key), float) else ""
                for key in ("loss", "val_loss")
            )
            left = (
                duration((steps - step) * speed)
                if speed
                else f"starting, {duration(time.monotonic() - started)}"
            )
            table.add_row(name, f"{step}/{steps}", *numbers, left)
        return table
