"""What goes wrong on one rank is everybody's business, and what goes wrong elsewhere
nobody's."""

import json
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest

from archscale.distributed import local_tensor, rank, world_size
from archscale.errors import ConfigError, TrainingError
from archscale.files import checkpoint_steps
from archscale.parallel import native
from archscale.telemetry.tracking import BestEffort, has_wandb_key, wandb_tracker
from archscale.train import trainer
from archscale.train.watchdog import Watchdog
from tests.pool import WorkerError, start
from tests.train.tiny import config, run, tiny_data

ACT = {"telemetry": {"every": 1, "guard": {"mode": "act", "max_skips": 2, "max_fallbacks": 2}}}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("data"))


def poisoned(
    data: str, folder: str, when: list[int], sections: dict, rule: str = "orscale_lm"
) -> tuple[list, list]:
    """A run whose gradient is NaN on the last rank in those of its optimizer steps, counted over
    fall-backs; its lines, and all weights and state (with a checksum of bits) after every step."""
    original, taken, states = native.clip_gradients, [0], []

    def clip(grads, max_norm, group):
        grads = list(grads)
        taken[0] += 1
        if taken[0] in when and rank() == world_size() - 1:
            local_tensor(grads[3]).view(-1)[0] = float("nan")
        return original(grads, max_norm, group)

    step = trainer.train_step

    def watched(engine, optimizer, *args, **kwargs):
        result = step(engine, optimizer, *args, **kwargs)
        content = [local_tensor(p).detach().clone() for p in engine.module.parameters()]
        content += [local_tensor(v).clone() for s in optimizer.state.values() for v in s.values()]
        states.append([t.view(-1).double().sum().item() for t in content if t.numel()])
        return result

    native.clip_gradients, trainer.train_step = clip, watched
    try:
        return run(config(data, rule, 8, **sections), folder), states
    finally:
        native.clip_gradients, trainer.train_step = original, step


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("rule", ["orscale_lm", "muonh", "adamw"])
def test_a_bad_step_is_skipped_on_all_ranks_with_state_untouched(pool, data, tmp_path, world, rule):
    args = (data, str(tmp_path), [4], ACT, rule)
    for lines, states in [poisoned(*args)] if world == 1 else pool(2).run(poisoned, *args):
        assert [line["step"] for line in lines] == list(range(1, 9))
        assert [line.get("event", "") for line in lines[:3]] == [""] * 3
        assert lines[3]["event"].startswith("skipped: non-finite grad_norm")
        assert states[3] == states[2]
        assert states[4] != states[3]
        assert all(np.isfinite(line["loss"]) for line in lines)


def test_too_many_skips_fall_back_to_a_checkpoint(pool, data, tmp_path):
    """Steps 6, 7, 8 are bad: the third skip in a row goes back to before them, and from there all
    is well."""
    sections = {**ACT, "checkpoint": {"every": 2, "keep": 9}}
    clean = run(config(data, "orscale_lm", 8, **sections), str(tmp_path / "clean"))
    for lines, _ in pool(2).run(poisoned, data, str(tmp_path / "r"), [6, 7, 8], sections):
        assert [line["step"] for line in lines] == list(range(1, 9))
        told = (
            "skipped steps 6 to 8 and fell back to the checkpoint of step 4 (non-finite grad_norm)"
        )
        assert told in lines[4]["event"]
        assert sum("event" in line for line in lines) == 1
        np.testing.assert_allclose(
            [line["loss"] for line in lines], [line["loss"] for line in clean], rtol=1e-5
        )


def test_fall_backs_are_bounded_and_the_end_has_a_cause(pool, data, tmp_path):
    sections = {**ACT, "checkpoint": {"every": 2, "keep": 9}}
    with pytest.raises(WorkerError) as caught:
        pool(2).run(poisoned, data, str(tmp_path / "r"), list(range(6, 100)), sections)
    assert caught.value.type_name == "TrainingError"
    assert "3 steps in a row were skipped at step 5" in str(
        caught.value
    )  # after going back to 4 and to 2
    assert "2 fall-backs did not help" in str(caught.value)
    told = [
        json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in told] == [
        1,
        2,
        3,
        4,
        5,
    ]  # all skips of the last attempt are there
    assert [line.get("event", "")[:7] for line in told] == [""] * 2 + ["skipped"] * 3
    sections = {"telemetry": {**ACT["telemetry"], "every": 10}}
    with pytest.raises(TrainingError, match="there is no older checkpoint"):
        poisoned(data, str(tmp_path / "none"), list(range(3, 100)), sections)
    told = [
        json.loads(line) for line in (tmp_path / "none" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [("event" in line) for line in told] == [False] * 2 + [True] * 3


def test_a_crash_after_a_fall_back_resumes_on_the_curve(data, tmp_path):
    """No checkpoint of the way that was given up is left, and none was saved among bad steps."""
    sections = {**ACT, "checkpoint": {"every": 2, "keep": 1}}
    clean = run(config(data, "orscale_lm", 8, **sections), str(tmp_path / "clean"))
    original, taken = trainer.Run._fall_back, []

    def stop(self, cause, recorder):
        taken.append(original(self, cause, recorder))
        raise KeyboardInterrupt

    trainer.Run._fall_back = stop
    try:
        with pytest.raises(KeyboardInterrupt):
            poisoned(data, str(tmp_path / "r"), [6, 7, 8], sections)
    finally:
        trainer.Run._fall_back = original
    assert taken == [4]
    assert checkpoint_steps(tmp_path / "r" / "checkpoints") == [2, 4]
    lines = run(config(data, "orscale_lm", 8, **sections), str(tmp_path / "r"))
    assert [line["loss"] for line in lines] == [line["loss"] for line in clean]


def test_a_guard_that_acts_may_not_be_changed_on_the_way(data, tmp_path):
    run(config(data, "orscale_lm", 4, **ACT), str(tmp_path))
    with pytest.raises(
        ConfigError, match=r"telemetry.guard.spike is 3.0, the checkpoint's run has 12.0"
    ):
        run(
            config(
                data,
                "orscale_lm",
                4,
                telemetry={"guard": {**ACT["telemetry"]["guard"], "spike": 3.0}},
            ),
            str(tmp_path),
        )


def test_a_resumed_guard_judges_as_before(data, tmp_path):
    """Its window and its count of skips come back with the checkpoint."""
    sections = {**ACT, "checkpoint": {"every": 4}}
    run(config(data, "orscale_lm", 8, **sections), str(tmp_path))
    state = json.loads((tmp_path / "checkpoints" / "step_00000004" / "state.json").read_text())
    losses = [
        json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    assert state["guard"]["history"]["loss"] == pytest.approx(losses[:4], rel=1e-6)


def test_warning_changes_nothing_but_says_so(data, tmp_path):
    """The default; also with the guard off the same losses."""
    curves = []
    for mode in ("warn", "off", "act"):
        guard = {"telemetry": {"every": 3, "guard": {"mode": mode}}}
        lines, _ = poisoned(data, str(tmp_path / mode), [4] if mode != "act" else [], guard)
        curves.append([line["loss"] for line in lines])
        if mode == "warn":
            assert "non-finite grad_norm" in lines[3]["event"]
    assert curves[0] == curves[1]
    assert curves[0][:4] == curves[2][:4]


# --- tracking service


def fake_wandb(behaviour: str) -> types.ModuleType:
    module = types.ModuleType("wandb")
    module.logged, module.options = [], {}  # type: ignore[attr-defined]

    class Run:
        def define_metric(self, name, step_metric=None):
            pass

        def log(self, line):
            if behaviour == "raises later":
                raise ConnectionError("no route to host")
            module.logged.append((line["step"], line))

        def finish(self):
            module.logged.append("finished")

    def init(**options):
        module.options = options
        if behaviour == "blocks":
            time.sleep(1000)
        if behaviour == "raises":
            raise ConnectionError("no route to host")
        return Run()

    module.init, module.Settings = init, lambda **_: None  # type: ignore[attr-defined]
    return module


@pytest.mark.parametrize("behaviour", ["works", "raises", "raises later", "blocks"])
def test_a_service_that_is_down_costs_a_warning(monkeypatch, capfd, data, tmp_path, behaviour):
    """Training goes on, metrics.jsonl is complete, and the curve is the same."""
    fake = fake_wandb(behaviour)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr("archscale.telemetry.tracking.PATIENCE", 0.5)
    monkeypatch.setattr(BestEffort.__init__, "__defaults__", (10_000, 0.5))
    plain = run(config(data, steps=6), str(tmp_path / "plain"))
    lines = run(
        config(data, steps=6, telemetry={"every": 2, "wandb": {"mode": "auto"}}),
        str(tmp_path / "r"),
    )
    assert [line["loss"] for line in lines] == [line["loss"] for line in plain]
    errors = capfd.readouterr().err
    if behaviour == "works":
        assert [step for step, _ in fake.logged[:-1]] == list(range(1, 7))
        assert fake.logged[-1] == "finished"
        assert fake.options["mode"] == "offline"
        assert fake.options["id"] == (tmp_path / "r" / "wandb_id").read_text()
        assert {"muonh", "standard", "d2w24", "dense"} == set(fake.options["tags"])
        assert fake.options["config"]["model"]["width"] == 24
        assert "warning" not in errors
    else:
        expected = "did not take everything" if behaviour == "blocks" else "no route to host"
        assert errors.count("warning: wandb") == 1
        assert expected in errors


def test_lines_wait_in_bounded_memory(capfd):
    sink = BestEffort("service", lambda: time.sleep(1000), waiting=5, patience=0.1)
    for i in range(1000):
        sink.log({"step": i})
    assert len(sink._calls) <= 5
    sink.close()
    assert capfd.readouterr().err.count("too slow") == 1


def test_a_step_back_is_never_dropped(capfd):
    done, ready = [], threading.Event()

    class Service:
        def log(self, line):
            done.append(line["step"])

        def rewind(self, step):
            done.append(f"back to {step}")

        def close(self):
            done.append("closed")

    def connect():
        ready.wait()
        return Service()

    sink = BestEffort("service", connect, waiting=4)
    sink.log({"step": 1})
    sink.rewind(0)
    for step in range(1, 8):
        sink.log({"step": step})
    ready.set()
    sink.close()
    # The end too takes a place.
    assert done[0] == "back to 0"
    assert done[-2:] == [7, "closed"]
    assert len(done) <= 5
    assert capfd.readouterr().err.count("too slow") == 1


def test_a_resumed_run_keeps_its_id(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", fake := fake_wandb("works"))
    of = config("d").resolved()
    ids = []
    for _ in range(2):
        tracker = wandb_tracker("offline", "p", "n", of, tmp_path)
        tracker.close()
        ids.append(fake.options["id"])
    assert ids[0] == ids[1]
    assert wandb_tracker("disabled", "p", "n", of, tmp_path) is None


def test_a_key_is_found(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert not has_wandb_key()
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert has_wandb_key()
    (tmp_path / ".netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert has_wandb_key()


# --- stragglers


def slow_run(data: str, folder: str) -> list[dict]:
    original = trainer.train_step

    def slow(*args, **kwargs):
        if rank() == 1:
            time.sleep(0.1)
        return original(*args, **kwargs)

    trainer.train_step = slow
    try:
        return run(config(data, steps=4, telemetry={"every": 2}), folder)
    finally:
        trainer.train_step = original


def test_the_rank_that_arrives_last_is_named(pool, data, tmp_path):
    for lines in pool(2).run(slow_run, data, str(tmp_path)):
        for line in (lines[1], lines[3]):
            assert line["straggler/rank"] == 1
            assert 0.05 < line["straggler/wait_seconds"] < 1
    assert (
        "straggler/rank"
        not in run(config(data, steps=2, telemetry={"every": 1}), str(tmp_path / "one"))[0]
    )


STUCK = """
import sys, time, torch
from pathlib import Path
from archscale import distributed
from archscale.train.watchdog import Watchdog
distributed.start()
dog = Watchdog(Path(sys.argv[1]), 2.0)
def stuck_here():
    time.sleep(1000)
if distributed.rank() == 1:
    stuck_here()
distributed.all_reduce(torch.ones(1))
"""


def test_a_stuck_rank_ends_all_with_their_stacks(tmp_path):
    (tmp_path / "stuck.py").write_text(STUCK)
    result = start([str(tmp_path)], processes=2, module="stuck", cwd=tmp_path).wait(check=False)
    assert result.returncode != 0
    assert "stuck_here" in (tmp_path / "stacks_rank_1.txt").read_text()
    assert "all_reduce" in (tmp_path / "stacks_rank_0.txt").read_text()
    assert "rank 1 made no progress for" in result.stderr


def test_a_patted_watchdog_stays_calm(tmp_path):
    dog = Watchdog(tmp_path, 0.6)
    for _ in range(6):
        time.sleep(0.2)
        dog.pat()
    dog.close()
    assert not list(Path(tmp_path).iterdir())
