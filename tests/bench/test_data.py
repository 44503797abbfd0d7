"""`archscale bench data` reads what it wrote, and a peer that fails costs its own row only."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from archscale.bench import data
from archscale.bench.loaders import READERS, Reader, Task


def test_our_reader_yields_the_windows_that_were_written(tmp_path) -> None:
    tokens = np.arange(2_000, dtype=np.uint16)
    np.save(tmp_path / "tokens.npy", tokens)
    task = Task(tmp_path / "tokens.npy", tmp_path / "ours", context=16, batch=4)
    task.folder.mkdir()
    READERS[0].write(task)
    for first in (0, 10**10):
        for batch in itertools.islice(READERS[0].batches(task, first), 3):
            assert batch.shape == (4, 16)
            assert (batch.diff(dim=1) == 1).all()  # windows of consecutive tokens
            assert (batch[:, 0] % 16 == 0).all()


def broken(task: Task, first: int) -> Iterator[torch.Tensor]:
    raise RuntimeError("this peer\nis broken")
    yield


def cannot_write(task: Task) -> None:
    raise RuntimeError("this peer\nis broken")


@pytest.mark.parametrize("write", [READERS[0].write, cannot_write], ids=["reading", "writing"])
def test_a_peer_that_fails_leaves_the_others(write: Callable[[Task], None], capsys) -> None:
    peer = Reader("peer", "torch", write, broken)
    rows = data.bench_data(
        tokens=40_000, context=32, batch=4, rounds=1, step=0.001, readers=[READERS[0], peer]
    )
    assert rows[0]["tokens/s"] > 0
    assert 0 <= rows[0]["wait, % of a step"] < 100
    assert rows[1] == {"reader": "peer", "failed": "RuntimeError: this peer is broken"}
    assert "peer: RuntimeError: this peer is broken" in capsys.readouterr().err
