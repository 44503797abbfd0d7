"""Progress: a bar on a terminal, plain lines otherwise."""

from __future__ import annotations

import sys
import time
from typing import Any

from archscale.plan.text import size


class Progress:
    """Shows `loss`, speed and time left of `total` steps, `done` of which were finished before."""

    def __init__(self, total: int, done: int, name: str):
        self.total, self.first, self.started, self.shown = total, done, time.monotonic(), 0.0
        self.bar = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self.bar = Bar(
                TextColumn(name),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self.task = self.bar.add_task("starting", total=total, completed=done)
            self.bar.start()

    def update(self, line: dict[str, Any]) -> None:
        text = f"loss {line['loss']:.4f}"
        for name, key in (("val", "val_loss"), ("of the average", "val_loss_ema")):
            text += f"  {name} {line[key]:.4f}" if key in line else ""
        text += f"  {line['tokens_per_second']:,.0f} tokens/s"
        if line.get("mfu"):
            text += f"  {line['mfu']:.1%} MFU"
        if "peak_memory_bytes" in line:
            text += f"  {size(line['peak_memory_bytes'])} at most"
        if self.bar:
            self.bar.update(self.task, completed=line["step"], description=text)
        elif time.monotonic() - self.shown > 10 or line["step"] == self.total or "val_loss" in line:
            self.shown = time.monotonic()
            left = (
                (self.shown - self.started)
                / max(1, line["step"] - self.first)
                * (self.total - line["step"])
            )
            print(f"step {line['step']}/{self.total}  {text}  {left:,.0f} s left", flush=True)

    def close(self) -> None:
        if self.bar:
            self.bar.stop()
