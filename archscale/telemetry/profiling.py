"""What a step spends its time on, and what filled the memory: `archscale train --profile` writes a
Chrome trace of a few steps, and a run that ends for want of device memory a snapshot of it.

Both lie in `profile/` of the run directory. No loss depends on either.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from archscale.errors import ConfigError, one_line
from archscale.files import write_atomically

PROFILE = "profile"  # folder in the run directory
WARM_UP = 10  # steps of a process that compile, tune and allocate, and show nothing typical
COUNT = 3  # steps of a trace, unless they are named
OPTION = "--profile-steps"
HISTORY = 100_000  # allocations that a snapshot of the memory knows the stacks of

Item = TypeVar("Item")


@dataclass(frozen=True)
class ProfiledSteps:
    """The steps whose trace is wanted.

    Attributes:
        first, last: both included, from 1; None: a few after the warm-up.
    """

    first: int | None = None
    last: int | None = None

    @classmethod
    def parse(cls, text: str) -> ProfiledSteps:
        """`10:13` → steps 10, 11, 12 and 13.

        Raises:
            ConfigError: it is something else.
        """
        match = re.fullmatch(r"(\d+):(\d+)", text.strip())
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise ConfigError(
                f"{text!r} names no steps", OPTION, "give the first and the last, such as 10:13"
            )
        return cls(int(match[1]), int(match[2]))

    def after(self, done: int, end: int) -> range:
        """Those among the steps after `done` and up to `end`; empty where they are all done.

        Raises:
            ConfigError: the run has no such steps.
        """
        if self.first is None or self.last is None:
            first = min(done + WARM_UP + 1, max(done, end - COUNT) + 1)
            return range(first, min(first + COUNT - 1, end) + 1)
        if self.last > end:
            raise ConfigError(
                f"steps {self.first} to {self.last}, and the run ends with step {end}",
                OPTION,
                f"name steps up to {end}",
            )
        return range(max(self.first, done + 1), self.last + 1)


def phase(name: str) -> AbstractContextManager[Any]:
    """Labels what is inside, while a profiler runs; otherwise it does nothing."""
    if torch.autograd._profiler_enabled():
        return torch.profiler.record_function(name)
    return contextlib.nullcontext()


class Profiler:
    """Writes the trace of some steps of a loop.

    Args:
        steps: consecutive; none without the other arguments.
        path: of the trace, `….json.gz`.
        device: that computes.
    """

    def __init__(
        self,
        steps: range = range(0),
        path: Path = Path(),
        device: torch.device | None = None,
    ):
        self._steps, self._path, self._device = steps, path, device
        self._running: Any = None
        self._written = False

    def around(self, batches: Iterable[Item], done: int) -> Iterator[Item]:
        """`batches`, of which each is one step's, after `done` steps. What the loop does with a
        batch is labelled as its step."""
        step, source = done, iter(batches)
        while True:
            step += 1
            if step in self._steps and self._running is None and not self._written:
                self._begin()
            with phase(f"step {step}"):
                with phase("data"):
                    try:
                        batch = next(source)
                    except StopIteration:
                        return
                yield batch
            if self._running is not None and step == self._steps[-1]:
                self.close()

    def _begin(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._device is not None and self._device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._running = torch.profiler.profile(activities=activities, record_shapes=True)
        self._running.start()

    def close(self) -> None:
        """Write what there is, at the latest when training ends; a warning where that fails."""
        running, self._running = self._running, None
        if running is None:
            return
        running.stop()
        self._written = True
        partial = self._path.with_name(f".{self._path.name}")  # whose ending torch compresses by
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            running.export_chrome_trace(str(partial))
            os.replace(partial, self._path)
        except (OSError, RuntimeError) as error:
            text = f"the trace {self._path} cannot be written: {one_line(str(error))}"
            print(f"archscale: warning: {text}", file=sys.stderr, flush=True)
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


def record_memory(device: torch.device) -> None:
    """From now on a snapshot of the device's memory knows who has allocated what."""
    if device.type == "cuda":
        torch.cuda.memory._record_memory_history(max_entries=HISTORY)


def write_memory_snapshot(path: Path) -> bool:
    """Write what the device's memory holds, for pytorch.org/memory_viz; returns whether that could
    be done: it is called when memory has run out."""
    try:
        snapshot = pickle.dumps(torch.cuda.memory._snapshot())
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, snapshot)
    except (RuntimeError, OSError, MemoryError):
        return False
    return True
