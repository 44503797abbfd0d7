"""Sequences per step: the whole run is one order, however the batch grows."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from archscale.config.batch import BatchSchedule

schedules = st.builds(
    lambda stages, unit, ramp: BatchSchedule(stages * unit, ramp, stages),
    st.integers(1, 8),
    st.integers(1, 50),
    st.integers(0, 5000),
)


@given(schedules, st.integers(0, 300))
def test_steps_follow_each_other_and_never_shrink(batches, step):
    first, size = batches.at(step)
    assert batches.at(0)[0] == 0
    following, next_size = batches.at(step + 1)
    assert following == first + size
    assert size <= next_size <= batches.size
    assert size in batches.sizes
    assert size * batches.stages % batches.size == 0


@given(schedules, st.integers(0, 300), st.integers(0, 50), st.integers(-500, 500))
def test_a_schedule_may_begin_later(batches, step, first_step, first_sample):
    later = replace(batches, first_step=first_step, first_sample=first_sample)
    number, size = batches.at(step)
    assert later.at(first_step + step) == (first_sample + number, size)


@given(schedules)
def test_the_ramp_ends_where_it_should(batches):
    """The whole batch comes once the ramp's sequences are seen, and no more than one step later
    than that."""
    whole = next(step for step in range(10**5) if batches.at(step)[1] == batches.size)
    first, _ = batches.at(whole)
    ramp = batches.ramp if batches.stages > 1 else 0
    assert ramp <= first < ramp + batches.size or first == 0


@given(schedules, st.floats(0, 1e5))
def test_steps_come_closest_to_a_number_of_sequences(batches, samples):
    steps = batches.steps(samples)
    end = lambda n: batches.at(n)[0]  # noqa: E731
    assert steps >= 1
    if steps > 1:
        assert abs(end(steps) - samples) <= abs(end(steps - 1) - samples)
    assert abs(end(steps) - samples) <= abs(end(steps + 1) - samples)


def test_by_hand():
    """12 sequences in 3 stages over 40: 4 a step until 20, 8 until 40, then 12."""
    batches = BatchSchedule(12, ramp=40, stages=3)
    assert [batches.at(step) for step in range(10)] == [
        (0, 4),
        (4, 4),
        (8, 4),
        (12, 4),
        (16, 4),
        (20, 8),
        (28, 8),
        (36, 8),
        (44, 12),
        (56, 12),
    ]
    assert [batches.steps(n) for n in (0, 3, 20, 44, 49, 50, 56)] == [1, 1, 5, 8, 8, 9, 9]


@pytest.mark.parametrize("step", [0, 1, 10**9])
def test_without_a_ramp(step):
    assert BatchSchedule(7).at(step) == (7 * step, 7)
