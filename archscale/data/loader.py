"""Batches for one rank, assembled ahead of the step that trains on them.

B is a micro-batch, T the context. Which windows a step gets is `sampler`'s pure function; the
thread here only fetches them early, so prefetching, restarting and closing cannot change the order.
"""

import queue
import threading
from collections.abc import Iterator
from typing import NamedTuple, Self

import torch

from archscale.config.batch import BatchSchedule
from archscale.data.sampler import rank_numbers
from archscale.data.training_data import TrainingData
from archscale.data.windows import Windows


class Batch(NamedTuple):
    """A micro-batch: what the model reads, and the token that follows each.

    Attributes:
        inputs, targets: int64 [B, T].
        documents: int32 [B, T], as of `Windows`.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    documents: torch.Tensor | None = None

    @classmethod
    def of_windows(cls, windows: Windows) -> Self:
        inputs, targets, documents = windows
        return cls(
            torch.from_numpy(inputs).contiguous(),
            torch.from_numpy(targets).contiguous(),
            None if documents is None else torch.from_numpy(documents).contiguous(),
        )


class Loader:
    """Iterates over the steps from `start_step` on, without end; each step is a list of
    micro-batches.

    Starting at step 10^9 costs what starting at 0 costs.

    Args:
        data: windows to train on, in their order.
        batches: sequences of every step, over all ranks.
        micro_batch: sequences per micro-batch and rank.
        rank, world: this process among those that see different data.
        start_step: the first step yielded, 0-based.
        ahead: steps prepared in advance.

    Attributes:
        step: the step that the next `next()` yields.

    Raises:
        ValueError: the batch does not divide over ranks and micro-batches.
        DataError: from `next()`, whatever went wrong in reading.
    """

    def __init__(
        self,
        data: TrainingData,
        batches: BatchSchedule,
        micro_batch: int,
        rank: int = 0,
        world: int = 1,
        start_step: int = 0,
        ahead: int = 2,
    ):
        for size in batches.sizes:
            rank_numbers(0, size, rank, world, micro_batch)  # refuse before a thread exists
        self.data, self._schedule = data, batches
        self.rank, self.world, self.micro_batch = rank, world, micro_batch
        self.step = start_step
        self._queue: queue.Queue[list[Batch] | BaseException] = queue.Queue(maxsize=ahead)
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._work, args=(start_step,), daemon=True, name="archscale-loader"
        )
        self._thread.start()

    def batches(self, step: int) -> list[Batch]:
        """What this rank trains on in `step`: a pure function."""
        numbers = rank_numbers(*self._schedule.at(step), self.rank, self.world, self.micro_batch)
        return [Batch.of_windows(self.data.windows(row)) for row in numbers]

    def _work(self, step: int) -> None:
        while not self._stop.is_set():
            try:
                item: list[Batch] | BaseException = self.batches(step)
            except BaseException as error:
                item = error
            while not self._stop.is_set():  # a plain put() would block for ever once nobody reads
                try:
                    self._queue.put(item, timeout=0.05)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return
            step += 1

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        if self._stop.is_set():
            raise StopIteration
        item = self._queue.get()
        if isinstance(item, BaseException):
            self.close()
            raise item
        self.step += 1
        return item

    def close(self) -> None:
        """Ends the thread; iteration is over. May be called twice."""
        self._stop.set()
        self._thread.join()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
