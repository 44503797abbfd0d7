"""Batches for one rank, assembled ahead of the step that trains on them.

B is a micro-batch, T the context. Which windows a step gets is `sampler`'s pure function; the
thread here only fetches them early, so prefetching, restarting and closing cannot change the order.
"""

import queue
import threading
from collections.abc import Iterator

import numpy as np
import torch

from archscale.config.batch import BatchSchedule
from archscale.data.sampler import rank_numbers, sample_index
from archscale.data.split import TokenSplit
from archscale.errors import DataError

IGNORE = -100  # the target that `cross_entropy` ignores by default

Batch = tuple[torch.Tensor, torch.Tensor]  # inputs, targets: int64 [B, T] each


def _windows(split: TokenSplit, indices: np.ndarray) -> Batch:
    """inputs, targets int64 [len(indices), T]. An id outside the vocabulary would index past the
    embedding: DataError."""
    block = split.samples(indices.tolist())
    highest = int(block.max())
    if highest >= split.vocab_size:
        raise DataError(
            f"token id {highest} in split {split.split!r} is outside the vocabulary of"
            f" {split.vocab_size}",
            str(split.path),
            "run `archscale data verify` on it; the dataset changed or is damaged",
        )
    tokens = torch.from_numpy(block)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


class Loader:
    """Iterates over the steps from `start_step` on, without end; each step is a list of
    micro-batches.

    Starting at step 10^9 costs what starting at 0 costs.

    Args:
        split: windows to train on.
        seed: of the order.
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
        split: TokenSplit,
        seed: int,
        batches: BatchSchedule,
        micro_batch: int,
        rank: int = 0,
        world: int = 1,
        start_step: int = 0,
        ahead: int = 2,
    ):
        for size in batches.sizes:
            rank_numbers(0, size, rank, world, micro_batch)  # refuse before a thread exists
        self.split, self.seed, self._schedule = split, seed, batches
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
        indices = sample_index(self.seed, numbers, self.split.num_samples)
        return [_windows(self.split, row) for row in indices]

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


def validation_batches(
    split: TokenSplit, batches: int, batch_size: int, rank: int = 0, world: int = 1
) -> Iterator[Batch]:
    """The first `batches * batch_size` windows of the split, or all if there are fewer, in order,
    over the ranks.

    Every window is yielded by exactly one rank. Every rank yields the same number of batches of the
    same shape, so that collectives line up; rows without a window have all targets -100, so sum the
    loss and divide by the number of targets that are not, over all ranks.

    Args:
        batches, batch_size: how many windows, and how many of them (B) make a batch.

    Yields:
        inputs, targets: int64 [B, T].
    """
    total = min(batches * batch_size, split.num_samples)
    for first in range(0, total, batch_size * world):
        # may lie past the end: then this rank pads the whole batch
        begin = first + rank * batch_size
        indices = np.arange(begin, min(begin + batch_size, total))
        inputs = torch.full((batch_size, split.context), split.eos_id or 0, dtype=torch.int64)
        targets = torch.full((batch_size, split.context), IGNORE, dtype=torch.int64)
        if len(indices):
            inputs[: len(indices)], targets[: len(indices)] = _windows(split, indices)
        yield inputs, targets
