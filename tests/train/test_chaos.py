"""Kill it anywhere, run the same command again, get the same curve: SIGKILL at seeded random
instants until the run is finished, bitwise against the run nobody touched."""

from __future__ import annotations

import functools
import importlib.util
import json
import random
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from archscale.config import Config, dump_config
from tests.commands import Launched, start
from tests.data.conftest import write_dataset
from tests.faults import kill
from tests.golden.curves import FOLDER as golden
from tests.train.faulty import SAVING, last_contents, lines, recorded, records, remains, train
from tests.train.marked import MARK
from tests.train.tiny import config, tiny_data

ENDED = 100.0  # seconds within which a run has ended, however busy the machine is
LONG_ENDED = 400.0  # a whole command under a launcher
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


@pytest.fixture(scope="module")
def data_257(tmp_path_factory) -> str:
    """Tokens of a vocabulary that neither 2 nor 3 processes divide evenly."""
    ids = np.array(json.loads((golden / "tokens.json").read_text())) % 257
    folder = tmp_path_factory.mktemp("data_257") / "tokens"
    return str(write_dataset(folder, [ids[:-200]], [ids[-200:]], 257))


@pytest.mark.parametrize("asynchronous", SAVING)
@pytest.mark.parametrize("rule", ["orscale_lm", pytest.param("adamw", marks=pytest.mark.slow)])
@pytest.mark.parametrize("processes", [2, 3])
def test_all_state_is_there_before_the_first_update(
    data_257, tmp_path, processes, rule, asynchronous
):
    """10 steps straight against 5, SIGKILL and the rest: weights, optimizer state, random state and
    tokens of every rank before each update, and then every line of metrics."""
    config10 = config(
        data_257,
        rule,
        checkpoint={"every": 5, "async": asynchronous},
        telemetry={"every": 1},
        training={"micro_batch": 4},
    )
    straight, run_dir = tmp_path / "straight", tmp_path / "r"
    for child in train(config10, straight, processes=processes, call=recorded):
        assert child.wait(ENDED).status == 0
    dies = functools.partial(kill, at=2, after="step_00000005")
    children = train(config10, run_dir, dies, processes=processes, call=recorded)
    assert children[0].wait(ENDED).status == -signal.SIGKILL
    for child in children[1:]:
        child.kill()
        child.wait(ENDED)
    first_life = records(run_dir, processes)
    for child in train(config10, run_dir, processes=processes, call=recorded):
        assert child.wait(ENDED).status == 0
    for expected, before, rows in zip(
        records(straight, processes), first_life, records(run_dir, processes)
    ):
        assert len(expected) == 10
        assert any(key.endswith("momentum") or key.endswith("exp_avg") for key in expected[5])
        assert rows[len(before) :] == expected[5:]
    assert lines(run_dir) == lines(straight)
    assert last_contents(run_dir) == last_contents(straight)


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
        [rng.randrange(10, changes // 3) for _ in range(3)]
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


# --- through the real command


def kinds() -> list:
    """(sections of the config, processes, kills, seed): together 100 kills, half of them with
    asynchronous saves."""
    dense, experts = {}, {"model": EXPERTS}
    cases = [
        ("dense", dense, 1, 10),
        ("dense_on_two", dense, 2, 10),
        ("experts", experts, 1, 8),
        ("experts_on_two", experts, 2, 8),
    ]
    native = [
        pytest.param(sections, processes, kills, seed, id=name)
        for seed, (name, sections, processes, kills) in enumerate(cases)
    ]
    zero = [
        pytest.param(sections | ZERO, 2, 7, seed, id=f"zero_{name}", marks=needs_deepspeed)
        for seed, (name, sections) in enumerate([("dense", dense), ("experts", experts)], 10)
    ]
    return native + zero


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("asynchronous", SAVING)
@pytest.mark.parametrize(("sections", "processes", "kills", "seed"), kinds())
def test_a_hundred_kills(data, tmp_path, sections, processes, kills, seed, asynchronous):
    """SIGKILL to all processes of a job by the clock, one in five while it starts, which takes most
    of its time; a run that is finished before it is killed has to be right too, and another one
    begins."""
    path, mark, rng, phases = tmp_path / "c.yaml", tmp_path / "mark", random.Random(seed), Counter()
    dump_config(made(data, 12, asynchronous, **sections), path)

    def job(run_dir: Path) -> Launched:
        mark.write_text("start")
        argv = ["train", str(path), "--run-dir", str(run_dir)]
        return start(argv, processes, env={MARK: str(mark)}, module="tests.train.marked")

    def ends(running: Launched, seconds: float, trains: bool = False) -> bool:
        """Whether it does within that time, or, with `trains`, that time after its start."""
        end = time.monotonic() + (LONG_ENDED if trains else seconds)
        while time.monotonic() < end and running.process.poll() is None:
            if trains and mark.read_text() not in ("start", ""):
                return ends(running, seconds)
            time.sleep(0.005)
        return running.process.poll() is not None

    straight = tmp_path / "straight"
    began, running = time.monotonic(), job(straight)
    assert not ends(running, 0, trains=True), running.output
    starting = time.monotonic() - began
    running.wait(LONG_ENDED)
    training = time.monotonic() - began - starting
    killed = finished = 0
    run_dir = tmp_path / "r0"
    while killed < kills:
        trains, share = rng.random() < 0.8, rng.uniform(0.1, 0.9)
        running = job(run_dir)
        if ends(running, share * (training if trains else starting), trains):
            assert running.wait(LONG_ENDED).returncode == 0
            assert_same(run_dir, straight)
            finished += 1
            run_dir = tmp_path / f"r{finished}"
            continue
        phases[_phase(run_dir, mark)] += 1
        running.signal(signal.SIGKILL)
        running.kill()
        killed += 1
        print(f"kill {killed} of {kills}: {dict(phases)}", flush=True)
    job(run_dir).wait(LONG_ENDED)
    assert_same(run_dir, straight)
    print(f"{killed} kills: {dict(phases)}; {finished} runs were finished before theirs")


def _phase(run_dir: Path, mark: Path) -> str:
    """What the run is doing: start, step, evaluation or save, which may be in the background."""
    checkpoints = run_dir / "checkpoints"
    saving = checkpoints.is_dir() and any(path.name[0] == "." for path in checkpoints.iterdir())
    doing = mark.read_text() or "step"  # while it is written
    return "save" if saving and doing != "start" else doing
