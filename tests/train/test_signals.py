"""A signal in any phase ends a run well: a checkpoint on all ranks, its exit status, and the curve
of the run that nobody touched."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from archscale.checkpoint.saving import Saver
from archscale.config import dump_config
from archscale.distributed import rank
from archscale.errors import ArchscaleError
from archscale.files import checkpoint_steps
from archscale.train import evaluate, stopping, trainer
from tests.commands import ROOT, start
from tests.train.tiny import config, run, tiny_data

STEPS = 8
SECTIONS = {
    "eval": {"every": 4, "batches": 2},
    "checkpoint": {"every": 4, "keep": 1},
    "telemetry": {"every": 1},
}
CLOCKS = ("time", "step_seconds", "tokens_per_second", "peak_memory_bytes")


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
    wait_for(lambda: stopping.current().asked)


@contextlib.contextmanager
def signal_in(phase: str, count: int, number: int, to: int) -> Iterator[None]:
    """Send the signal to rank `to` in the `count`-th call of what a phase calls."""
    owner, name = {
        "training": (trainer, "train_step"),
        "saving": (trainer.Saver, "save"),
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


def with_a_slow_last_save(data: str, run_dir: str) -> int:
    """Exit status of a run that is signalled while its last checkpoint takes longer to write than
    the grace."""
    original = Saver._write

    def slow(saver, job):
        if job.state["step"] == STEPS:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(2.5)
        original(saver, job)

    Saver._write = slow
    os.environ[stopping.GRACE] = "1"
    try:
        with stopping.listening():
            run(config(data, steps=STEPS, **SECTIONS), run_dir)
    except stopping.Stopped as end:
        return end.code
    finally:
        Saver._write = original
    return 0


def straight(data: str, run_dir: str) -> None:
    run(config(data, steps=STEPS, **SECTIONS), run_dir)


@pytest.fixture(scope="module")
def untouched(pool, data, tmp_path_factory) -> list[dict]:
    run_dir = tmp_path_factory.mktemp("untouched")
    pool(2).run(straight, data, str(run_dir), timeout=60)
    return curve(run_dir)


@pytest.mark.parametrize(
    ("where", "number", "step", "lines"),
    [
        (("training", 2), signal.SIGTERM, 3, 3),  # agreed on with the next step
        pytest.param(("training", 3), signal.SIGUSR1, 4, 3, marks=pytest.mark.slow),
        (("evaluating", 1), signal.SIGINT, 4, 3),
        pytest.param(("saving", 1), signal.SIGTERM, 4, 4, marks=pytest.mark.slow),
        # Nothing is left but an evaluation.
        pytest.param(("evaluating", 2), signal.SIGTERM, 8, 7, marks=pytest.mark.slow),
    ],
)
def test_one_rank_is_signalled(pool, data, untouched, tmp_path, where, number, step, lines):
    statuses = pool(2).run(stopped, data, str(tmp_path), *where, number, 1, timeout=60)
    assert statuses == [130 if number == signal.SIGINT else 75] * 2
    assert max(checkpoint_steps(tmp_path / "checkpoints")) == step
    assert len(curve(tmp_path)) == lines
    assert not (tmp_path / "owner.json").exists()
    pool(2).run(straight, data, str(tmp_path), timeout=60)
    assert curve(tmp_path) == untouched
    written = (tmp_path / "metrics.jsonl").read_text()
    pool(2).run(straight, data, str(tmp_path), timeout=60)
    assert (tmp_path / "metrics.jsonl").read_text() == written


@pytest.mark.slow
def test_after_the_last_checkpoint_a_run_finishes(pool, data, untouched, tmp_path):
    arguments = "saving", 2, signal.SIGTERM, 0
    assert pool(2).run(stopped, data, str(tmp_path), *arguments, timeout=60) == [0, 0]
    assert curve(tmp_path) == untouched


def test_a_save_is_not_cut_short(pool, data, tmp_path):
    pool(2).run(with_a_slow_last_save, data, str(tmp_path), timeout=60)
    assert checkpoint_steps(tmp_path / "checkpoints")[-1] == STEPS


def test_several_signals_and_a_second_ctrl_c(monkeypatch):
    """Two within a moment are one; torchrun and the terminal may both send Ctrl-C."""
    ended = []
    monkeypatch.setattr(stopping.Signals, "_end", lambda *arguments: ended.append(arguments[1:]))
    with stopping.listening() as signals:
        signals.trained()
        for _ in range(3):
            send(signal.SIGINT)
        send(signal.SIGTERM)
        assert signals.asked == signal.SIGINT
        time.sleep(0.05)
        assert not ended
        monkeypatch.setattr(stopping, "AGAIN", 0.0)
        os.kill(os.getpid(), signal.SIGINT)
        wait_for(lambda: ended)
    assert ended == [(signal.SIGINT, "stopped by a second Ctrl-C without saving")]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_run_that_is_stuck_ends_after_its_grace(monkeypatch):
    ended = []
    monkeypatch.setattr(stopping.Signals, "_end", lambda *arguments: ended.append(arguments[1:]))
    monkeypatch.setenv(stopping.GRACE, "0")
    with stopping.listening() as signals:
        signals.trained()
        with signals.unhurried():
            send(signal.SIGTERM)
            time.sleep(0.3)
            assert not ended
        wait_for(lambda: ended)
    assert "stopped by SIGTERM without saving, 0 s (ARCHSCALE_GRACE) after it" in ended[0][1]
    assert "still in wait_for" in ended[0][1]


def test_a_start_forgets_the_status_of_the_one_before(monkeypatch, tmp_path):
    """Or a run that torchrun has started again would end with it, however it ends."""
    (tmp_path / "status").write_text("75\n")
    monkeypatch.setenv(stopping.STATUS_FILE, str(tmp_path / "status"))
    with pytest.raises(ArchscaleError):
        trainer.train(config("nowhere"), tmp_path / "run")
    assert (tmp_path / "status").read_text() == ""


def test_a_child_does_not_report_its_signals_to_its_parent():
    with stopping.listening() as signals:
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        time.sleep(0.05)
        os.kill(child, signal.SIGTERM)
        assert os.waitpid(child, 0)[1] == signal.SIGTERM
        time.sleep(0.05)
        assert not signals.asked


@pytest.fixture
def yaml(data, tmp_path) -> Path:
    dump_config(config(data, steps=100_000, **SECTIONS), tmp_path / "tiny.yaml")
    return tmp_path / "tiny.yaml"


def test_before_the_first_step_there_is_nothing_to_save(yaml, tmp_path):
    """One line, the status that says try again, and a directory that anybody may have."""
    running = start(["train", str(yaml), "--run-dir", str(tmp_path / "run")])
    wait_for(lambda: (tmp_path / "run" / "owner.json").exists(), 200)
    running.signal(signal.SIGTERM)
    done = running.wait(200, check=False)
    assert done.returncode == 75
    assert done.stderr == (
        "archscale: stopped by SIGTERM with nothing to save: there is no checkpoint yet; the same"
        " command starts again\n"
    )
    assert not (tmp_path / "run" / "owner.json").exists()


def under_torchrun() -> list:
    """(whether steps are trained, signal, to whom, restarts that torchrun has left)."""
    usual = signal.SIGTERM, signal.SIGINT
    targets = "agent", 0, 1
    cases = [(False, number, target, 3) for target in targets for number in usual]
    cases += [(True, number, target, 3) for target in (*targets, "group") for number in usual]
    cases += [(True, signal.SIGTERM, target, 0) for target in ("agent", 1)]
    cases += [(True, signal.SIGUSR1, target, 3) for target in ("agent", 1)]
    return cases


@pytest.mark.slow
@pytest.mark.parametrize(("trained", "number", "target", "restarts"), under_torchrun())
def test_under_torchrun(yaml, tmp_path, trained, number, target, restarts):
    """No restart, one line, and its own exit status in the file."""
    run_dir, metrics = tmp_path / "run", tmp_path / "run" / "metrics.jsonl"
    env = {"PET_MAX_RESTARTS": str(restarts), "ARCHSCALE_STATUS_FILE": str(tmp_path / "status")}
    env |= {"PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "LOGLEVEL": "INFO"}
    running = start(["train", str(yaml), "--run-dir", str(run_dir)], processes=2, env=env)
    if trained:
        wait_for(lambda: metrics.exists() and len(curve(run_dir)) > 10, 200)
    else:
        wait_for(lambda: (run_dir / "owner.json").exists(), 200)
    ranks = {rank: pid for pid, rank in running.tree().items() if rank is not None}
    agent = running.process.pid
    groups = {"agent": [agent], "group": [agent, *ranks.values()]}
    running.signal(number, groups.get(target) or [ranks[target]])
    done = running.wait(200, check=False)
    assert done.returncode == 1  # torchrun's own
    status = 130 if number == signal.SIGINT else 75
    if target in (0, 1) and not trained:  # the agent passes on a signal of its own
        assert int((tmp_path / "status").read_text()) in (75, status)
    else:
        assert int((tmp_path / "status").read_text()) == status
    lines = [line for line in done.stderr.splitlines() if line.startswith("archscale:")]
    [line] = [line for line in lines if not line.startswith("archscale: warning:")]
    assert "stopped by" in line
    assert "attempts left" not in done.stderr
    assert bool(checkpoint_steps(run_dir / "checkpoints")) == trained
    assert not (run_dir / "owner.json").exists()


def wait_for(condition: Callable[[], object], limit: float = 10.0) -> None:
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


AGENT = """
import os, signal, subprocess, sys, time
heard = []
signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
child = subprocess.Popen([sys.executable, "-c", sys.argv[2]], stdout=subprocess.PIPE,
    env=os.environ | {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "LOCAL_RANK": "0"})
child.stdout.readline()
if sys.argv[1] == "torchrun":
    child.send_signal(signal.SIGTERM)
else:
    subprocess.run(["kill", "-TERM", str(child.pid)], check=True)
status = child.wait(20)
time.sleep(0.2)
print(status, len(heard))
"""
RANK = """
import time
from archscale.train import stopping
with stopping.listening():
    print("ready", flush=True)
    time.sleep(20)
"""


@pytest.mark.parametrize(
    ("sender", "processes", "heard", "status"),
    [("torchrun", 1, 0, "75\n"), ("torchrun", 2, 0, ""), ("somebody else", 1, 1, "75\n")],
)
def test_torchrun_is_told_only_by_ranks_that_it_has_not_signalled(
    tmp_path, sender, processes, heard, status
):
    """It ends its processes also when one of them has failed, to start them again; then a second
    signal would end itself, and the status would be that of no crash. Of two processes, one has."""
    left = tmp_path / "status"
    left.touch()
    environment = os.environ | {"ARCHSCALE_STATUS_FILE": str(left), "PYTHONPATH": str(ROOT)}
    environment["LOCAL_WORLD_SIZE"] = str(processes)
    command = [sys.executable, "-c", AGENT, sender, RANK]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["75", str(heard)], done.stderr
    assert left.read_text() == status
