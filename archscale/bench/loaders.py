"""Ways to read the same shuffled windows of tokens: ours, and those of installed peers.

Each `Reader` writes a token array in its own format, then yields batches int64 [B, T + 1] in a
shuffled order, from a batch number on. torch's DataLoader gets one worker process, as ours has one
thread.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

SEED = 0
VOCAB = 1 << 16
_WORKERS = 1


@dataclass(frozen=True)
class Task:
    """What is read: `tokens` uint16 [N] as a .npy file, in windows of `context` + 1, `batch` at a
    time; `folder` holds the reader's own copy."""

    tokens: Path
    folder: Path
    context: int
    batch: int

    def array(self) -> np.ndarray:
        return np.load(self.tokens, mmap_mode="r")

    def blocks(self) -> Iterator[np.ndarray]:
        """Windows that do not overlap, [context + 1] each: how peers store them."""
        tokens, length = self.array(), self.context + 1
        for start in range(0, len(tokens) - length + 1, length):
            yield np.ascontiguousarray(tokens[start : start + length])


@dataclass(frozen=True)
class Reader:
    """A way to read, by the name of its package.

    Attributes:
        write: stores the tokens in the task's folder.
        batches: the shuffled batches from the given number on.
        first: the number that a late start is timed from; None: the middle of the data.
    """

    label: str
    package: str
    write: Callable[[Task], None]
    batches: Callable[[Task, int], Iterator[torch.Tensor]]
    first: int | None = None

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.package) is not None


# --- ours


def _write_ours(task: Task) -> None:
    from archscale.data.shards import (
        DATASET_VERSION,
        MANIFEST,
        Manifest,
        ShardEntry,
        ShardWriter,
        SplitEntry,
        TokenizerEntry,
    )

    fingerprint = hashlib.sha256(b"random ids").hexdigest()
    tokens = task.array()
    with ShardWriter(task.folder / "train_00000.bin", VOCAB, fingerprint) as shard:
        for start in range(0, len(tokens), 1 << 22):
            shard.write(np.asarray(tokens[start : start + (1 << 22)]))
    entry = SplitEntry(
        shards=[ShardEntry(file="train_00000.bin", tokens=len(tokens))],
        tokens=len(tokens),
        documents=1,
        bytes=1,
    )
    manifest = Manifest(
        format_version=DATASET_VERSION,
        name="random",
        tokenizer=TokenizerEntry(
            kind="none", file="none", fingerprint=fingerprint, vocab_size=VOCAB, eos_id=0
        ),
        splits={"train": entry, "validation": entry},
        recipe={},
        origin="",
        dropped={},
    )
    (task.folder / MANIFEST).write_text(manifest.model_dump_json())


def _read_ours(task: Task, first: int) -> Iterator[torch.Tensor]:
    from archscale.config.batch import BatchSchedule
    from archscale.config.sections import DataConfig
    from archscale.data.loader import Loader
    from archscale.data.training_data import open_training_data

    data = open_training_data(DataConfig(train=str(task.folder)), task.context, SEED)
    with Loader(data, BatchSchedule(task.batch), task.batch, start_step=first) as loader:
        for micro_batches in loader:
            yield micro_batches[0][0]


# --- torch's DataLoader over a data set of Hugging Face


def _write_datasets(task: Task) -> None:
    import datasets

    features = datasets.Features({"tokens": datasets.Sequence(datasets.Value("uint16"))})
    made = datasets.Dataset.from_generator(
        _rows,
        gen_kwargs={"task": task},
        features=features,
        cache_dir=str(task.folder / "cache"),
    )
    made.save_to_disk(str(task.folder / "rows"))


def _rows(task: Task) -> Iterator[dict[str, np.ndarray]]:
    for block in task.blocks():
        yield {"tokens": block}


def _read_datasets(task: Task, first: int) -> Iterator[torch.Tensor]:
    import datasets

    rows = datasets.load_from_disk(str(task.folder / "rows")).with_format("numpy")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(SEED))
    order = order[first * task.batch :]
    loader = torch.utils.data.DataLoader(
        torch.utils.data.Subset(rows, order.tolist()),
        batch_size=task.batch,
        num_workers=_WORKERS,
        collate_fn=_stack,
    )
    yield from loader


def _stack(rows: list[Any]) -> torch.Tensor:
    return torch.from_numpy(np.stack([row["tokens"] for row in rows]).astype(np.int64))


# --- mosaicml-streaming


def _write_mosaic(task: Task) -> None:
    import streaming

    columns = {"tokens": "ndarray:uint16"}
    with streaming.MDSWriter(out=str(task.folder / "mds"), columns=columns) as writer:
        for block in task.blocks():
            writer.write({"tokens": block})


def _read_mosaic(task: Task, first: int) -> Iterator[torch.Tensor]:
    import streaming

    streaming.base.util.clean_stale_shared_memory()
    rows = streaming.StreamingDataset(
        local=str(task.folder / "mds"), shuffle=True, shuffle_seed=SEED, batch_size=task.batch
    )
    loader = streaming.StreamingDataLoader(
        rows, batch_size=task.batch, num_workers=_WORKERS, collate_fn=_stack
    )
    if first:
        state = rows.state_dict(first * task.batch, from_beginning=False)
        rows.load_state_dict(state)
    yield from loader


# --- litdata


def _write_litdata(task: Task) -> None:
    import litdata

    length = task.context + 1
    starts = range(0, len(task.array()) - length + 1, length)
    litdata.optimize(
        fn=_LitdataBlocks(task),
        inputs=list(starts),
        output_dir=str(task.folder / "chunks"),
        chunk_size=length * (1 << 12),
        item_loader=litdata.TokensLoader(block_size=length),
        num_workers=1,
        verbose=False,
    )


@dataclass(frozen=True)
class _LitdataBlocks:
    task: Task

    def __call__(self, start: int) -> Any:
        block = self.task.array()[start : start + self.task.context + 1]
        return torch.from_numpy(block.astype(np.uint16))


def _read_litdata(task: Task, first: int) -> Iterator[torch.Tensor]:
    import litdata

    rows = litdata.StreamingDataset(
        str(task.folder / "chunks"),
        item_loader=litdata.TokensLoader(block_size=task.context + 1),
        shuffle=True,
        seed=SEED,
    )
    loader = litdata.StreamingDataLoader(rows, batch_size=task.batch, num_workers=_WORKERS)
    if first:
        # litdata has no public way to start late but the state of a loader that has read so far.
        yield from itertools.islice(loader, first, None)
    else:
        for batch in loader:
            yield batch.long()


READERS = [
    Reader("archscale", "archscale", _write_ours, _read_ours, first=10**12),
    Reader("DataLoader over datasets", "datasets", _write_datasets, _read_datasets),
    Reader("mosaicml-streaming", "streaming", _write_mosaic, _read_mosaic),
    Reader("litdata", "litdata", _write_litdata, _read_litdata),
]
