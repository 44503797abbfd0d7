"""Ranks that hold others up: who arrives last, and what everybody does when nobody gets any
further."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from archscale import distributed
from archscale.checkpoint.place import Place, StoreError, StorePath, checkpoints_of
from archscale.checkpoint.writer import Sent
from archscale.telemetry.memory import peak_memory

NOTABLE = 0.05  # of a step
GRACE = 10.0  # seconds after which the interpreter itself is taken for stuck


class Watchdog:
    """Ends this process when for `seconds` `pat` is not called and no checkpoint grows, after
    writing the stacks of all threads to `folder`/stacks_rank_<n>.txt. Every rank has one, so that
    all of them tell where they wait.

    Args:
        seconds: 0: never.
    """

    def __init__(self, folder: Path, seconds: float):
        self.seconds, self._checkpoints = seconds, checkpoints_of(folder)
        self._file: TextIO | None = None
        if seconds:
            self._path = folder / f"stacks_rank_{distributed.rank()}.txt"
            self._file = self._path.open("w")
            self._last, self._stopped = time.monotonic(), threading.Event()
            self.pat()
            # Apart from each other: storage that hangs holds up whoever looks at it.
            for watch in (self._watch, self._watch_checkpoints):
                threading.Thread(target=watch, daemon=True, name="watchdog").start()

    def pat(self) -> None:
        """There is progress."""
        if self._file:
            self._last = time.monotonic()
            # In C, for a thread that holds the interpreter's lock for good.
            faulthandler.dump_traceback_later(self.seconds + GRACE, exit=True, file=self._file)

    def close(self) -> None:
        if self._file:
            self._stopped.set()
            faulthandler.cancel_dump_traceback_later()
            self._file.close()
            self._path.unlink(missing_ok=True)

    def _watch_checkpoints(self) -> None:
        """A checkpoint that grows is progress, however long slow storage takes for it."""
        before = None
        while not self._stopped.wait(self.seconds / 8):
            if time.monotonic() - self._last < self.seconds / 2:
                before = None
                continue
            size = _bytes_below(self._checkpoints)
            if before is not None and size > before:
                self.pat()
            before = size

    def _watch(self) -> None:
        often = min(1.0, self.seconds / 4)
        while not self._stopped.wait(often):
            waited = time.monotonic() - self._last
            if waited > self.seconds:
                text = (
                    f"rank {distributed.rank()} made no progress for {waited:.0f} s"
                    " (telemetry.stuck_after)"
                )
                written = self._write_stacks()
                print(
                    f"archscale: {text}: its stacks"
                    f" {'are in' if written else 'cannot be written to'} {self._path}",
                    file=sys.stderr,
                    flush=True,
                )
                # The launcher ends all ranks with the first one: let the others write theirs.
                time.sleep(3 * often)
                os._exit(3)

    def _write_stacks(self) -> bool:
        """Whether the stacks of all threads could be written; storage that hangs is given up."""
        stacks = _stacks()
        written = threading.Event()

        def write() -> None:
            assert self._file is not None
            self._file.write(stacks)
            self._file.flush()
            written.set()

        threading.Thread(target=write, daemon=True).start()
        return written.wait(GRACE / 2)


def _stacks() -> str:
    """The stacks of all threads, innermost call last. Without their source, which may lie on
    storage that hangs; faulthandler would write to a file, and hold the interpreter's lock until
    it is written."""
    frames, names = sys._current_frames(), {t.ident: t.name for t in threading.enumerate()}
    text = ""
    for thread, frame in frames.items():
        text += f"Thread {names.get(thread, thread)}:\n"
        for below, line in reversed(list(traceback.walk_stack(frame))):
            code = below.f_code
            text += f'  File "{code.co_filename}", line {line}, in {code.co_qualname}\n'
    return text


def _bytes_below(folder: Place) -> int:
    """Size of all files, and of what this process has sent to a store; files that vanish meanwhile
    count for nothing."""
    if isinstance(folder, StorePath):
        with contextlib.suppress(StoreError):
            return Sent.bytes + sum(path.stat().st_size for path in folder.rglob("*"))
        return Sent.bytes
    size = 0
    for parent, _, names in os.walk(folder):  # which passes over directories that vanish
        for name in names:
            with contextlib.suppress(OSError):
                size += os.stat(os.path.join(parent, name)).st_size
    return size


class Arrivals:
    """How long this rank waits for the others in the first collective of each step, where the last
    one to arrive waits least; and what each holds of memory."""

    def __init__(self, device: torch.device):
        self._device = device
        self._waits: list[float] = []
        self._events: list[Any] = []

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks, in place, timed without waiting for the device."""
        if self._device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            distributed.all_reduce(tensor)
            end.record()
            self._events.append((start, end))
        else:
            began = time.perf_counter()
            distributed.all_reduce(tensor)
            self._waits.append(time.perf_counter() - began)
        return tensor

    def read(self, step_seconds: float) -> dict[str, Any]:
        """`peak_memory_bytes`, that of the rank that has held most. And since the last reading
        `straggler/wait_seconds`, the mean wait a step of the rank that waited most over that of the
        one that waited least, and `straggler/rank`, who that is; left out on one process, and where
        it is less than `NOTABLE` of `step_seconds`. A collective."""
        waits = self._waits + [start.elapsed_time(end) / 1e3 for start, end in self._events]
        self._waits, self._events = [], []
        mean = sum(waits) / max(len(waits), 1)
        gathered = distributed.gather_objects((mean, peak_memory(self._device)))
        everyone = [wait for wait, _ in gathered]
        memory = {"peak_memory_bytes": max(held for _, held in gathered)}
        if max(everyone) - min(everyone) < NOTABLE * step_seconds or len(everyone) == 1:
            return memory
        return memory | {
            "straggler/wait_seconds": max(everyone) - min(everyone),
            "straggler/rank": everyone.index(min(everyone)),
        }
