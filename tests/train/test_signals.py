"""A signal in any phase ends a run well: a checkpoint on all ranks, its exit status, and the curve
of the run that nobody touched."""

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from archscale.distributed import rank
from archscale.files import checkpoint_steps
from archscale.train import evaluate, stopping, trainer
from tests.train.tiny import config, run, tiny_data

STEPS = 8
SECTIONS = {"eval": {"every": 4, "batches": 2}, "checkpoint": {"every": 4, "keep": 1}}
CLOCKS = ("time", "step_seconds", "tokens_per_second")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return tiny_data(tmp_path_factory.mktemp("signals"))


def curve(run_dir: Path) -> list[dict]:
    """metrics.jsonl but for clocks and who was slow."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        {
            key: value
            for key, value in line.items()
            if key not in CLOCKS and not key.startswith("straggler")
        }
        for line in lines
    ]


def send(number: int) -> None:
    """A signal to this process, which has heard it afterwards."""
    os.kill(os.getpid(), number)
    limit = time.monotonic() + 10
    while not stopping.current().asked:
        assert time.monotonic() < limit
        time.sleep(0.005)


@contextlib.contextmanager
def signal_in(phase: str, count: int, number: int, to: int) -> Iterator[None]:
    """Send the signal to rank `to` in the `count`-th call of what a phase calls."""
    owner, name = {
        "training": (trainer, "train_step"),
        "saving": (trainer, "save_checkpoint"),
        "evaluating": (evaluate, "validation_batches"),
    }[phase]
    original, calls = getattr(owner, name), [0]

    def signalling(*args, **kwargs):
        calls[0] += 1
        if calls[0] == count and rank() == to:
            send(number)
        return original(*args, **kwargs)

    setattr(owner, name, signalling)
    try:
        yield
    finally:
        setattr(owner, name, original)


def stopped(data: str, run_dir: str, phase: str, count: int, number: int, to: int) -> int:
    """Exit status with which a signal ends a run."""
    with stopping.listening(), signal_in(phase, count, number, to):
        try:
            run(config(data, steps=STEPS, **SECTIONS), run_dir)
        except stopping.Stopped as end:
            return end.code
    return 0


def straight(data: str, run_dir: str) -> None:
    run(config(data, steps=STEPS, **SECTIONS), run_dir)


@pytest.fixture(scope="module")
def untouched(pool, data, tmp_path_factory) -> list[dict]:
    run_dir = tmp_path_factory.mktemp("untouched")
    pool(2).run(straight, data, str(run_dir), timeout=60)
    return curve(run_dir)


@pytest.mark.parametrize(
    ("phase", "count", "number", "step", "lines"),
    [
        ("training", 2, signal.SIGTERM, 3, 3),  # agreed on with the next step
        ("training", 3, signal.SIGUSR1, 4, 3),  # of which evaluation is due, and is left
        ("evaluating", 1, signal.SIGINT, 4, 3),
        ("saving", 1, signal.SIGTERM, 4, 4),
        ("evaluating", 2, signal.SIGTERM, 8, 7),  # nothing is left but an evaluation
    ],
)
def test_one_rank_is_signalled(pool, data, untouched, tmp_path, phase, count, number, step, lines):
    statuses = pool(2).run(stopped, data, str(tmp_path), phase, count, number, 1, timeout=60)
    assert statuses == [130 if number == signal.SIGINT else 75] * 2
    assert checkpoint_steps(tmp_path / "checkpoints") == [step]
    assert len(curve(tmp_path)) == lines
    assert not (tmp_path / "owner.json").exists()
    pool(2).run(straight, data, str(tmp_path), timeout=60)
    assert curve(tmp_path) == untouched
    written = (tmp_path / "metrics.jsonl").read_text()
    pool(2).run(straight, data, str(tmp_path), timeout=60)
    assert (tmp_path / "metrics.jsonl").read_text() == written


def test_after_the_last_checkpoint_a_run_finishes(pool, data, untouched, tmp_path):
    arguments = "saving", 2, signal.SIGTERM, 0
    assert pool(2).run(stopped, data, str(tmp_path), *arguments, timeout=60) == [0, 0]
    assert curve(tmp_path) == untouched
