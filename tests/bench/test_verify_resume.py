"""`archscale verify-resume`: what it finds, what it names, and that it leaves nothing behind."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from archscale.bench import verify_resume as module
from archscale.bench.curves import BFLOAT16_BOUND, compare_closely, compare_exactly
from archscale.bench.supervised import SupervisedRun
from archscale.bench.verify_resume import Request, verify_resume
from archscale.checkpoint.difference import Difference
from archscale.config import dump_config
from archscale.errors import ConfigError, TrainingError
from archscale.files import step_directory
from archscale.plan.devices import this_device
from tests.commands import launch
from tests.train.tiny import config, run, tiny_data

STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A config, `c.yaml`, and its run as `verify_resume` asks for it, in `run`."""
    folder = tmp_path_factory.mktemp("verify_resume")
    made = config(tiny_data(folder), "orscale_lm", 20)
    dump_config(made, folder / "c.yaml")
    every = {"checkpoint": {"every": 1, "keep": 99}, "telemetry": {"every": 1}}
    run(config(str(folder / "tokens"), "orscale_lm", STEPS, **every), str(folder / "run"))
    return folder


@pytest.fixture
def request_of(folder, tmp_path, monkeypatch):
    """A request whose runs are copies of `run`; `broken` names a case and what becomes of its run
    directory."""

    def make(broken=None, harm=lambda run_dir: None) -> Request:
        def train(self, step):
            shutil.copytree(folder / "run", self.run_dir)
            if self.name == broken:
                harm(self.run_dir)

        monkeypatch.setenv("COLUMNS", "300")  # a table, and not a block of lines for each case
        monkeypatch.setattr(SupervisedRun, "until_saved", train)
        monkeypatch.setattr(SupervisedRun, "until_killed", lambda self, step, delay, last: step)
        return Request(
            folder / "c.yaml", steps=STEPS, processes=1, directory=tmp_path / "new" / "runs"
        )

    return make


def change_metrics(run_dir: Path, step: int, **values) -> None:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    lines[step - 1] |= values
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_what_is_equal_is_one_trajectory(request_of, capsys):
    request = request_of()
    lines = verify_resume(request, print).splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["straight", "again", "killed", "more"]
    assert "3 kills: 4 steps bitwise equal; bitwise equal: " in lines[3]
    assert lines[-1].startswith("verdict: one trajectory in all ")
    assert not request.directory.exists()
    said = capsys.readouterr().out
    assert "each start of a run may take 900 s" in said
    assert "killed: kill 2 of 3 after step" in said


def test_every_case_computes_in_the_same_precision(request_of, monkeypatch):
    """That of this machine, given to each run: another could be started elsewhere."""
    asked = request_of()
    asked = replace(asked, overrides=["training.precision=auto"])
    given, make = [], SupervisedRun.__init__

    def seen(self, name, arguments, *others):
        given.append([word for word in arguments if word.startswith("training.precision")][-1])
        make(self, name, arguments, *others)

    monkeypatch.setattr(SupervisedRun, "__init__", seen)
    verify_resume(asked, lambda text: None)
    assert set(given) == {f"training.precision={this_device().precision}"}


def test_the_first_difference_is_named(request_of, capsys):
    request = request_of("killed", lambda run_dir: change_metrics(run_dir, 3, grad_norm=0.125))
    with pytest.raises(TrainingError) as error:
        verify_resume(request, print)
    assert "killed: differs first at step 3: grad_norm 0.125 instead of 1." in str(error.value)
    assert "1 of " in str(error.value)
    assert (request.directory / "killed").exists()
    assert (request.directory / "straight").exists()
    assert not (request.directory / "again").exists()
    assert "killed" in capsys.readouterr().out


def test_a_lost_state_is_named(request_of, folder):
    """Weights of another step, with the curve of the right ones."""

    def harm(run_dir):
        last, before = (step_directory(run_dir / "checkpoints", step) for step in (4, 3))
        shutil.rmtree(last)
        shutil.copytree(before, last)

    with pytest.raises(TrainingError, match=r"killed: curves agree.*step 4 do not: tensor model\."):
        verify_resume(request_of("killed", harm), print)


def test_a_machine_that_does_not_repeat_itself(request_of):
    """Then nothing can be bitwise, and the bound of other layouts holds for the killed run."""
    request = request_of("again", lambda run_dir: change_metrics(run_dir, 2, loss=1.0))
    lines = verify_resume(request, print).splitlines()
    assert "this machine does not repeat itself: differs first at step 2: loss 1.0" in lines[2]
    assert "bound 1e-05" in lines[3]
    assert "does not repeat itself" in lines[-1]


def test_it_refuses_what_cannot_be_tested(request_of, folder):
    request = request_of()
    with pytest.raises(ConfigError, match="micro_batch 6 does not divide"):
        verify_resume(replace(request, processes=3), print)
    request.directory.mkdir(parents=True)
    with pytest.raises(ConfigError, match="something else stands there.*--dir"):
        verify_resume(request, print)


def test_a_run_that_takes_too_long_is_killed(folder, tmp_path):
    arguments = [str(folder / "c.yaml")]
    supervised = SupervisedRun("slow", arguments, tmp_path / "r", tmp_path / "r.log", 1, 0.05)
    with pytest.raises(TrainingError, match="did not come to step 4 within 0.05 s"):
        supervised.until_saved(4)


LINES = {
    step: {"loss": 5.0 / step, "grad_norm": 1.0, "lr": 0.1, "moe/layer_00/load": [0.5, 0.5]}
    for step in range(1, 7)
}


@pytest.mark.parametrize(
    ("step", "values", "exact", "close"),
    [
        (3, {}, None, None),
        (3, {"loss": 5 / 3 * (1 + 1e-7)}, "step 3: loss", None),
        (3, {"loss": 5 / 3 * (1 + 1e-4)}, "step 3: loss", "step 3: loss"),
        (3, {"loss": None}, "step 3: loss None", "step 3: loss None"),
        (3, {"grad_norm": 1.1}, "step 3: grad_norm 1.1 instead of 1.0", None),
        (3, {"lr": 0.1 + 1e-12}, "step 3: lr", "step 3: lr"),
        (3, None, "step 3 has no line", "step 3 has no line"),
        (3, {"moe/layer_00/load": [0.4, 0.6], "loss": 5 / 3 * (1 + 1e-3)}, "step 3: loss", None),
    ],
)
def test_curves(step, values, exact, close):
    changed = {**LINES, step: {**LINES[step], **(values or {})}}
    if values is None:
        del changed[step]
    for outcome, expected in (
        (compare_exactly(LINES, changed, range(1, 7)), exact),
        (compare_closely(LINES, changed, range(1, 7), bfloat16=False), close),
    ):
        assert outcome.problem is None if expected is None else expected in outcome.problem


def test_the_bound_of_bfloat16():
    for share, within in ((0.9 * BFLOAT16_BOUND, True), (1.1 * BFLOAT16_BOUND, False)):
        changed = {**LINES, 2: {**LINES[2], "loss": 2.5 * (1 + share)}}
        outcome = compare_closely(LINES, changed, range(1, 7), bfloat16=True)
        assert (outcome.problem is None) == within


def test_half_a_momentum_lost_is_seen_where_losses_are_bounded_widely():
    far = Difference("a", "b", {}, [], {}, 0, [], {"weights": 0.01, "momentum": 0.7}, {})
    assert module._far_apart(far)[0].startswith("momentum differs by 0.7 of its norm")
    near = replace(far, parts={"weights": 0.01, "momentum": 0.1})
    assert module._far_apart(near) == (None, "shares of norms: weights 0.01, momentum 0.1")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_command(folder, tmp_path):
    """A dense model on two processes: real kills, every layout, nothing left behind."""
    done = launch(
        ["verify-resume", str(folder / "c.yaml"), "--steps", "8", "--kills", "3"],
        cwd=tmp_path,
        timeout=1400,
    )
    lines = done.stdout.splitlines()
    assert lines[-1].startswith("verdict: one trajectory in all ")
    assert os.listdir(tmp_path / "runs") == []
    assert done.stdout.count("killed: kill ") == 3
    rows = {line.split()[0]: line for line in lines[-8:-1]}
    assert "bitwise equal" in rows["killed"]
    assert "bound 1e-05" in rows["replicated"]
