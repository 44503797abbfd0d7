"""Batches: what the pure function says, whatever threads, ranks and restarts do."""

import itertools
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from archscale.config.batch import BatchSchedule
from archscale.data.loader import Batch, Loader
from archscale.data.sampler import sample_index
from archscale.data.split import TokenSplit
from archscale.data.training_data import Source, TrainingData
from archscale.data.validation import IGNORE, validation_batches
from archscale.errors import DataError

from .conftest import VOCAB, write_dataset

CONTEXT = 9


@pytest.fixture
def split(dataset: Path) -> TokenSplit:
    return TokenSplit(dataset, "train", CONTEXT)


def alone(split: TokenSplit, seed: int = 0) -> TrainingData:
    """A split as `data.train` reads it."""
    return TrainingData([Source("", str(split.path), 1)], [split], seed)


def _rows(steps: list[list[Batch]]) -> list[torch.Tensor]:
    return [torch.cat([batch.inputs for batch in step]) for step in steps]


def test_batches_are_the_pure_function(split: TokenSplit) -> None:
    with Loader(alone(split, 3), BatchSchedule(8), 4, start_step=5) as loader:
        for step in range(5, 40):  # over the end of an epoch: 111 windows
            assert loader.step == step
            batches = next(loader)
            assert len(batches) == 2
            indices = sample_index(3, np.arange(8 * step, 8 * step + 8), split.num_samples)
            expected = torch.from_numpy(np.stack([split.sample(i) for i in indices]))
            assert all(
                inputs.shape == (4, CONTEXT) and inputs.dtype == torch.int64 and documents is None
                for inputs, _, documents in batches
            )
            assert torch.equal(torch.cat([batch.inputs for batch in batches]), expected[:, :-1])
            assert torch.equal(torch.cat([batch.targets for batch in batches]), expected[:, 1:])


@pytest.mark.parametrize(
    ("world", "accumulation"), [(1, 1), (1, 4), (2, 1), (2, 2), (4, 3), (3, 4)]
)
def test_the_batch_does_not_depend_on_world_or_accumulation(
    split: TokenSplit, world: int, accumulation: int
) -> None:
    def steps(rank: int, world: int, accumulation: int) -> list[torch.Tensor]:
        with Loader(
            alone(split), BatchSchedule(24), 24 // (world * accumulation), rank, world
        ) as loader:
            return _rows([next(loader) for _ in range(6)])

    whole = steps(0, 1, 1)
    parts = [steps(rank, world, accumulation) for rank in range(world)]
    for step, rows in enumerate(whole):
        together = torch.cat([part[step] for part in parts])
        assert sorted(together.tolist()) == sorted(rows.tolist())


def test_resuming_on_another_world_continues_the_order(split: TokenSplit) -> None:
    """2 → 1 → 4 processes."""
    with Loader(alone(split), BatchSchedule(8), 8) as straight:
        expected = _rows([next(straight) for _ in range(9)])
    for start, world in ((0, 2), (3, 1), (6, 4)):
        loaders = [
            Loader(alone(split), BatchSchedule(8), 8 // world, rank, world, start_step=start)
            for rank in range(world)
        ]
        for step in range(start, start + 3):
            rows = torch.cat([_rows([next(loader)])[0] for loader in loaders])
            assert sorted(rows.tolist()) == sorted(expected[step].tolist())
        for loader in loaders:
            loader.close()


def test_a_growing_batch_takes_every_window_once(split: TokenSplit) -> None:
    batches = BatchSchedule(12, ramp=40, stages=3)
    with (
        Loader(alone(split), batches, 2, 0, 2) as even,
        Loader(alone(split), batches, 2, 1, 2) as odd,
    ):
        sizes, seen = [], []
        for _ in range(9):
            micro = next(even) + next(odd)
            sizes.append(sum(len(batch.inputs) for batch in micro))
            seen += torch.cat(_rows([micro])).tolist()
    assert sizes == [4, 4, 4, 4, 4, 8, 8, 8, 12]
    order = sample_index(0, np.arange(len(seen)), split.num_samples)
    assert sorted(seen) == sorted(split.sample(i)[:-1].tolist() for i in order)


def test_every_window_once_an_epoch(split: TokenSplit) -> None:
    n = split.num_samples  # 111 = 37 * 3
    with Loader(alone(split), BatchSchedule(3), 3) as loader:
        for _ in range(2):
            rows = torch.cat(_rows([next(loader) for _ in range(n // 3)]))
            assert sorted(rows.tolist()) == sorted(split.sample(i)[:-1].tolist() for i in range(n))


def test_close_ends_the_thread_and_the_iteration(split: TokenSplit) -> None:
    before = threading.active_count()
    loader = Loader(alone(split), BatchSchedule(4), 4)
    next(loader)
    loader.close()
    loader.close()
    assert threading.active_count() == before
    with pytest.raises(StopIteration):
        next(loader)


def test_prefetching_is_bounded(split: TokenSplit, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    plain = Loader.batches

    def counted(self: Loader, step: int) -> list:
        made.append(step)
        return plain(self, step)

    monkeypatch.setattr(Loader, "batches", counted)
    with Loader(alone(split), BatchSchedule(4), 4, ahead=2) as loader:
        next(loader)
        end = time.monotonic() + 10
        while len(made) < 4 and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.1)  # time enough to run away in
    assert made == [0, 1, 2, 3]  # one used, two waiting, one in the thread's hands


def test_an_error_in_the_thread_reaches_the_consumer(dataset: Path, split: TokenSplit) -> None:
    (dataset / "train_00002.bin").write_bytes(b"gone")
    loader = Loader(alone(split), BatchSchedule(64), 64)
    with pytest.raises(DataError, match=r"train_00002\.bin"):
        list(itertools.islice(loader, 4))
    assert not loader._thread.is_alive()


def test_an_id_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    """The manifest claims a smaller vocabulary: training must not index past the embedding."""
    path = write_dataset(tmp_path / "set", [np.arange(100)], [np.arange(20)], vocab=100)
    manifest = path / "dataset.json"
    manifest.write_text(manifest.read_text().replace('"vocab_size":100', '"vocab_size":99'))
    split = TokenSplit(path, "train", 33)
    with (
        Loader(alone(split), BatchSchedule(3), 3) as loader,
        pytest.raises(DataError, match=r"token id 99 .*vocabulary of 99 .*set"),
    ):
        next(loader)


def test_an_indivisible_batch_is_refused_before_a_thread_starts(split: TokenSplit) -> None:
    before = threading.active_count()
    with pytest.raises(ValueError, match="6 sequences do not divide over 4 ranks"):
        Loader(alone(split), BatchSchedule(6), 1, 0, 4)
    assert threading.active_count() == before


@given(
    batches=st.integers(1, 12),
    size=st.integers(1, 7),
    world=st.integers(1, 5),
    context=st.sampled_from([9, 40, 200]),
)
@settings(max_examples=60, deadline=None)
def test_validation_uses_every_window_once(
    tmp_path_factory: pytest.TempPathFactory, batches: int, size: int, world: int, context: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "validation"
    if not path.exists():
        write_dataset(path, [np.arange(20)], [np.arange(205) % VOCAB])
    split = TokenSplit(path, "validation", context)
    ranks = [list(validation_batches(split, batches, size, rank, world)) for rank in range(world)]
    assert len({len(rank) for rank in ranks}) == 1
    total = min(batches * size, split.num_samples)
    assert len(ranks[0]) == -(-total // (size * world))
    seen = []
    for rank in ranks:
        for inputs, targets, _ in rank:
            assert inputs.shape == targets.shape == (size, context)
            for row, target in zip(inputs.tolist(), targets.tolist()):
                if target != [IGNORE] * context:
                    seen.append([*row, target[-1]])
                    assert row[1:] == target[:-1]
    assert sorted(seen) == sorted(split.sample(i).tolist() for i in range(total))
