"""The order: a bijection per epoch, the same for every world, and constant-time anywhere."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from archscale.data.sampler import WindowOrder, rank_numbers, sample_index


@given(seed=st.integers(-(2**63), 2**64), epoch=st.integers(0, 10**9), n=st.integers(1, 3000))
@settings(max_examples=80, deadline=None)
def test_every_epoch_visits_every_window_once(seed: int, epoch: int, n: int) -> None:
    order = sample_index(seed, np.arange(epoch * n, (epoch + 1) * n), n)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(n))


@given(numbers=st.lists(st.integers(0, 2**60), max_size=30), n=st.integers(1, 2**40))
@settings(max_examples=60, deadline=None)
def test_vectorized_equals_one_at_a_time(numbers: list[int], n: int) -> None:
    together = sample_index(7, np.array(numbers, np.int64), n)
    assert together.tolist() == [int(sample_index(7, number, n)) for number in numbers]
    assert all(0 <= index < n for index in together.tolist())


def test_seeds_and_epochs_give_different_orders() -> None:
    n = 1000
    orders = [
        sample_index(seed, np.arange(n) + epoch * n, n) for seed in range(4) for epoch in range(4)
    ]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert np.mean(a == b) < 0.02  # two random permutations agree in about one place


def test_order_is_well_mixed() -> None:
    n = 10_000
    order = sample_index(0, np.arange(n), n)
    correlation = np.corrcoef(order, np.arange(n))[0, 1]
    neighbours = np.corrcoef(order[1:], order[:-1])[0, 1]
    assert abs(correlation) < 0.05
    assert abs(neighbours) < 0.05
    counts, _ = np.histogram(
        order[:1000], bins=20, range=(0, n)
    )  # the first tenth covers the whole split
    assert counts.min() > 20
    assert np.mean(np.diff(order) == 1) < 0.002


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_tiny_sets_reach_every_permutation_evenly(n: int) -> None:
    epochs = 3000
    orders = sample_index(0, np.arange(n * epochs), n).reshape(epochs, n)
    places = np.stack([np.bincount(orders[:, i], minlength=n) for i in range(n)]) / epochs
    assert np.abs(places - 1 / n).max() < 0.05
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == math.factorial(n)
    assert counts.min() * len(counts) / epochs > 0.4


def test_the_order_is_frozen() -> None:
    """Another order after an update would change every resumed run: these numbers must not
    change."""
    assert sample_index(0, np.arange(8), 100).tolist() == [31, 85, 76, 11, 15, 51, 57, 83]
    assert sample_index(1, 10**12, 10**9).item() == 427412247


def test_far_positions_cost_what_near_ones_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    import archscale.data.sampler as sampler

    work = []
    plain = sampler._permute

    def counted(values: np.ndarray, key: np.ndarray, half: int) -> np.ndarray:
        work.append(values.size)
        return plain(values, key, half)

    monkeypatch.setattr(sampler, "_permute", counted)
    sample_index(0, np.arange(10**12, 10**12 + 512), 10**9)
    assert sum(work) < 512 * 4


@given(
    world=st.integers(1, 6),
    accumulation=st.integers(1, 4),
    micro=st.integers(1, 5),
    first=st.integers(0, 10**12),
)
@settings(max_examples=100, deadline=None)
def test_ranks_and_micro_batches_partition_the_step(
    world: int, accumulation: int, micro: int, first: int
) -> None:
    size = world * accumulation * micro
    parts = [rank_numbers(first, size, rank, world, micro) for rank in range(world)]
    assert all(part.shape == (accumulation, micro) for part in parts)
    assert np.array_equal(np.sort(np.concatenate(parts, axis=None)), np.arange(first, first + size))


@pytest.mark.parametrize(
    ("batch", "rank", "world", "micro"),
    [(6, 0, 4, 1), (6, 0, 2, 2), (0, 0, 1, 1), (6, 2, 2, 1), (6, -1, 2, 1)],
)
def test_what_does_not_divide_is_refused(batch: int, rank: int, world: int, micro: int) -> None:
    with pytest.raises(ValueError):
        rank_numbers(0, batch, rank, world, micro)


def test_bad_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="num_samples"):
        sample_index(0, 0, 0)
    with pytest.raises(ValueError, match="start at 0"):
        sample_index(0, -1, 5)


@given(
    seed=st.integers(0, 2**64),
    num_samples=st.integers(1, 5_000),
    numbers=st.lists(st.integers(0, 10**13) | st.integers(0, 3_000), min_size=1, max_size=20),
)
@settings(max_examples=50, deadline=None)
def test_the_order_in_blocks_is_the_order(seed, num_samples, numbers):
    order = WindowOrder(seed, num_samples)
    asked = np.array(numbers, np.int64)
    assert (order.at(asked) == sample_index(seed, asked, num_samples)).all()
    assert (order.at(asked[::-1]) == sample_index(seed, asked[::-1], num_samples)).all()
