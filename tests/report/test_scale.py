"""Thinning loses no extreme; scales, ticks and columns are what they say."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from archscale.report.plot import ticks
from archscale.report.scale import (
    Scale,
    bucket_means,
    columns,
    compact,
    knots,
    merge_rows,
    number,
    thin,
)

VALUES = arrays.arrays(
    float, st.integers(1, 3000), elements=st.one_of(st.floats(-1e6, 1e6), st.just(float("nan")))
)


@settings(max_examples=60, deadline=None)
@given(VALUES, st.integers(1, 300))
def test_thinning_keeps_the_ends_and_every_extreme(values, buckets):
    steps = np.arange(5, 5 + len(values))
    kept = thin(steps, values, buckets)
    finite = np.flatnonzero(np.isfinite(values))
    assert len(kept) <= 2 * buckets + 2
    assert np.all(np.diff(kept) > 0)
    assert np.isfinite(values[kept]).all()
    if len(finite):
        assert {finite[0], finite[-1]} <= set(kept.tolist())
        assert values[kept].max() == values[finite].max()
        assert values[kept].min() == values[finite].min()


def test_one_spike_in_a_million_steps_survives():
    values = np.zeros(1_000_000)
    values[[123_456, 654_321]] = 9.0, -7.0
    kept = thin(np.arange(len(values)), values, 100)
    assert {123_456, 654_321} <= set(kept.tolist())


def test_every_bucket_keeps_its_own_extremes():
    rng = np.random.default_rng(0)
    values, steps = rng.standard_normal(10_000), np.arange(10_000)
    kept = thin(steps, values, 100)
    for part in range(100):
        inside = slice(100 * part, 100 * part + 100)
        seen = values[kept[(kept >= inside.start) & (kept < inside.stop)]]
        assert seen.max() == values[inside].max()
        assert seen.min() == values[inside].min()


def test_means_of_buckets():
    steps, values = (
        np.arange(1000),
        np.where(np.arange(1000) % 7 == 3, np.nan, np.arange(1000) / 10),
    )
    at, mean = bucket_means(steps, steps, values, 10)
    assert np.allclose(mean, at / 10)
    assert len(at) == 10


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 6).flatmap(
        lambda rows: arrays.arrays(
            float,
            st.tuples(st.just(rows), st.integers(1, 200)),
            elements=st.one_of(st.floats(-1e3, 1e3), st.just(float("nan"))),
        )
    ),
    st.integers(1, 50),
)
def test_columns_keep_what_is_farthest_from_the_median(table, count):
    steps = np.arange(10, 10 + 10 * table.shape[1], 10)
    cells = columns(table, steps, count)
    assert cells.shape[0] == len(table)
    assert cells.shape[1] <= count
    for row, made in zip(table, cells):
        finite = row[np.isfinite(row)]
        if len(finite):
            distance = np.abs(finite - np.median(finite))
            assert np.nanmax(np.abs(made - np.median(finite))) == distance.max()


def test_columns_without_a_reading_repeat_the_one_before():
    steps = np.array([1, 2, 3, 4, 100, 101])
    cells = columns(np.array([[1.0, 2, 3, 4, 5, 6]]), steps, 101)
    assert cells.shape[1] == 101
    assert np.all(cells[0, 3:99] == 4)
    assert cells[0, -1] == 6


def test_columns_keep_the_order_and_the_gaps_of_rows():
    table = np.array([[1.0, np.nan, 3.0], [np.nan, np.nan, 6.0]])
    cells = columns(table, np.array([10, 20, 30]), 10)
    assert np.array_equal(cells, table, equal_nan=True)


def test_merged_rows_keep_what_is_farthest():
    table = np.array([[1.0, 1, 1], [1, 9, 1], [1, 1, 1], [1, 1, -5]])
    assert merge_rows(table, [[0, 1], [2, 3]]).tolist() == [[1, 9, 1], [1, 1, -5]]


@settings(max_examples=200, deadline=None)
@given(st.floats(-1e12, 1e12), st.floats(1e-9, 1e12), st.booleans(), st.integers(3, 8))
def test_ticks_lie_inside_ascend_and_differ(lo, extent, log, count):
    lo = abs(lo) + 1e-9 if log else lo
    scale = Scale(lo, lo + extent, log)
    if extent < 1e-6 * abs(lo):
        return  # labels of six digits cannot tell such ticks apart
    marks = ticks(scale, count)
    values = [value for value, _ in marks]
    slack = 1e-6 * extent
    assert all(scale.lo - slack <= value <= scale.hi + slack for value in values)
    assert values == sorted(set(values))
    assert len(values) <= 4 * count


def test_tick_labels():
    assert [text for _, text in ticks(Scale(0, 10_000))] == ["0", "2k", "4k", "6k", "8k", "10k"]
    assert [text for _, text in ticks(Scale(2.9, 3.35), 4)] == ["2.9", "3", "3.1", "3.2", "3.3"]
    assert [text for _, text in ticks(Scale(1e-5, 1e-1, True))] == [
        "1e-5",
        "1e-4",
        "0.001",
        "0.01",
        "0.1",
    ]
    assert [text for _, text in ticks(Scale(3e17, 9e20, True))] == ["1e18", "1e19", "1e20"]


def test_a_scale_chooses_logarithms_where_values_span_decades():
    assert Scale.around(np.array([1e-3, np.nan, 5.0])).log
    assert not Scale.around(np.array([1.0, 5.0])).log
    assert not Scale.around(np.array([-1.0, 1e6])).log
    for values in ([], [np.nan], [3.0], [0.0, 0.0]):
        scale = Scale.around(np.array(values, dtype=float))
        assert scale.lo < scale.hi


def test_corners_of_a_batch_ramp():
    steps = np.arange(1, 1001)
    tokens = np.cumsum(np.where(steps < 300, 1024, 4096)).astype(float)
    corners = knots(steps, tokens)
    assert len(corners) <= 4
    assert np.allclose(np.interp(steps, *zip(*corners)), tokens)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.0, "0"),
        (3.6221692, "3.622"),
        (98.0, "98"),
        (1234567.8, "1,234,568"),
        (1.19e-7, "1.190e-7"),
    ],
)
def test_numbers_for_people(value, text):
    assert number(value) == text


def test_large_counts():
    assert compact(229_977_882_624) == "2.30e11"
    assert compact(200_704) == "200,704"
