"""The guard's judgement; what all ranks do with it is in tests/train/test_guard.py."""

import json
import math
import random

import pytest

from archscale.telemetry.guard import MIN_HISTORY, Guard


def guard(mode: str = "act", **options) -> Guard:
    return Guard(
        mode, **{"window": 32, "spike": 8.0, "max_skips": 3, "max_fallbacks": 2, **options}
    )


def step(loss: float, norm: float = 1.0) -> dict:
    return {"loss": loss, "grad_norm": norm}


def trained(mode: str = "act", steps: int = 40, seed: int = 0, **options) -> Guard:
    made, generator = guard(mode, **options), random.Random(seed)
    for i in range(steps):
        assert (
            made.judge(
                step(5 - 0.02 * i + generator.gauss(0, 0.05), math.exp(generator.gauss(0, 0.2)))
            )
            is None
        )
    return made


@pytest.mark.parametrize("seed", range(20))
def test_ordinary_training_is_left_alone(seed):
    """A falling noisy loss and a log-normal gradient norm: no false alarm in 2,000 steps."""
    trained(steps=100, seed=seed)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("key", ["loss", "grad_norm"])
def test_what_is_not_finite_is_found_from_the_first_step(key, bad):
    assert "non-finite" in guard().judge({**step(3.0), key: bad})


def test_a_spike_is_found_once_there_is_something_to_compare_with():
    early = guard()
    for _ in range(MIN_HISTORY):
        assert early.judge(step(5.0)) is None
        assert early.judge(step(5.0, 1.001)) is None
    made = trained()
    assert made.judge(step(4.2, 60.0)).startswith("gradient norm 60 is ")
    assert made.judge(step(9.0)).startswith("loss 9 is ")
    assert made.judge(step(1.0)) is None  # downwards is no spike


def test_a_bad_step_does_not_join_the_window_of_one_who_acts():
    """Otherwise the second of two spikes would look ordinary; who only warns must live with what
    was applied."""
    acting, warning = trained("act"), trained("warn")
    for made in (acting, warning):
        for _ in range(30):
            made.judge(step(20.0))
    assert acting.judge(step(20.0)) is not None
    assert warning.judge(step(20.0)) is None


def test_skips_are_counted_in_a_row():
    made = trained()
    for expected in (False, False, False, True):
        made.judge(step(float("nan")))
        assert made.exhausted == expected
    made.judge(step(4.2))
    assert (made.skipped, made.exhausted) == (0, False)
    warning = guard("warn")
    for _ in range(10):
        warning.judge(step(float("nan")))
    assert not warning.exhausted


def test_its_state_goes_through_json_and_judges_alike():
    one, other = trained(), guard()
    one.judge(step(float("nan")))
    one.watch({"optimizer/clip_fraction": 1.0})
    other.load(json.loads(json.dumps(one.state())))
    generator = random.Random(5)
    for _ in range(50):
        values = step(4.2 + generator.expovariate(1) ** 3, generator.expovariate(1) ** 3)
        assert one.judge(values) == other.judge(values)
        assert one.skipped == other.skipped
    assert other.watch({"optimizer/clip_fraction": 1.0}) is None


def test_saturation_and_runaway_are_told_once():
    made = guard("warn")
    assert made.watch({}) is None
    assert made.watch({"optimizer/clip_fraction": 0.95}) == "95% of the trust ratios are clipped"
    assert made.watch({"optimizer/clip_fraction": 0.97}) is None
    assert made.watch({"optimizer/clip_fraction": 0.2}) is None
    assert made.watch({"optimizer/clip_fraction": 0.95}) is not None
    assert "12.0 times its initial norm" in made.watch(
        {"optimizer/weight_norm_drift": 11.0, "optimizer/clip_fraction": 0.95}
    )
    assert "its initial norm" in guard().watch({"optimizer/weight_norm_drift": float("nan")})
