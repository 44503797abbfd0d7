"""Kill it anywhere, run the same command again, get the same curve: SIGKILL at seeded random
instants until the run is finished, bitwise against the run nobody touched."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from archscale.config import Config
from tests.faults import kill
from tests.train.faulty import SAVING, last_contents, lines, remains, train
from tests.train.tiny import config, tiny_data

ENDED = 100.0  # seconds within which a run has ended, however busy the machine is
EXPERTS = {"moe": {"sparsity": 3, "top_k": 3}}
ZERO = {"parallel": {"engine": "deepspeed", "zero_stage": 1}}
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return tiny_data(tmp_path_factory.mktemp("data"))


def made(data: str, steps: int, asynchronous: bool, **sections) -> Config:
    """Saves every 2 steps, evaluates every 3."""
    return config(
        data,
        "orscale_lm",
        steps=steps,
        checkpoint={"every": 2, "keep": 2, "async": asynchronous},
        eval={"every": 3, "batches": 2},
        telemetry={"every": 1},
        **sections,
    )


def assert_same(run_dir: Path, straight: Path) -> None:
    """Every line of metrics, all weights, all optimizer state and the random state."""
    assert lines(run_dir) == lines(straight)
    assert last_contents(run_dir) == last_contents(straight)
    assert remains(run_dir) == []


def chaos(
    live: Callable[[Path], bool], straight: Path, folder: Path, kills: int, limit: float
) -> None:
    """Start the run again and again until it has been killed `kills` times, and to its end; one
    that is finished before begins anew elsewhere.

    Args:
        live: runs it for a while; whether it was killed.
        limit: seconds for all of this.
    """
    end = time.monotonic() + limit
    killed = 0
    for number in itertools.count():
        run_dir = folder / f"r{number}"
        while killed < kills and live(run_dir):
            killed += 1
            assert time.monotonic() < end, f"{killed} kills in {limit:g} s"
        if killed == kills:
            return run_dir
        assert_same(run_dir, straight)


@pytest.mark.parametrize("asynchronous", SAVING)
def test_killed_five_times(data, tmp_path, asynchronous):
    """Three times in place of a change in its directory, twice by the clock."""
    config8 = made(data, 8, asynchronous)
    rng = random.Random(5)
    log = tmp_path / "log.json"
    untouched = train(config8, tmp_path / "straight", log=str(log))[0].wait(ENDED)
    assert untouched.status == 0, untouched
    changes = log.read_text().count("[") - 1
    instants = iter(
        [rng.randrange(50, changes) for _ in range(3)]
        + [rng.uniform(0.1, 0.9) * untouched.seconds for _ in range(2)]
    )
    run_dir, died = tmp_path / "r", 0
    for number, instant in enumerate(instants):
        if number < 3:
            child = train(config8, run_dir, functools.partial(kill, at=instant))[0]
        else:
            child = train(config8, run_dir)[0]
            time.sleep(instant)
            child.kill()
        done = child.wait(ENDED)
        assert done.status in (-signal.SIGKILL, 0), done
        died += done.status != 0
    assert died >= 2
    done = train(config8, run_dir)[0].wait(ENDED)
    assert done.status == 0, done
    assert_same(run_dir, tmp_path / "straight")
