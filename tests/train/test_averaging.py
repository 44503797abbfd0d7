"""`archscale checkpoint average`: the mean of weights, and what it refuses."""

from __future__ import annotations

import shutil
import weakref
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from archscale.checkpoint.directory import read_state
from archscale.checkpoint.integrity import problems_of
from archscale.checkpoint.reading import StoredWeights
from archscale.checkpoint.target import find_target
from archscale.cli import app
from archscale.errors import ArchscaleError
from archscale.files import CHECKPOINTS, step_directory
from archscale.train.averaging import mean
from archscale.train.continuing import Wishes
from tests.export.runs import make_run
from tests.train.tiny import config, run, tiny_data

SECTIONS = {
    "checkpoint": {"every": 2, "keep": 9},
    "telemetry": {"every": 2},
    "schedule": {"kind": "constant"},
    "parameterization": {"base": {"lr": 0.05}},  # so that the steps lie apart
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def made(data, tmp_path_factory) -> Path:
    """A run with checkpoints of steps 2, 4, 6 and 8, under a rule on spheres."""
    folder = tmp_path_factory.mktemp("made") / "run"
    run(config(data, "muonh", 8, **SECTIONS), str(folder))
    return folder


def step(run_dir: Path, number: int) -> Path:
    return step_directory(run_dir / CHECKPOINTS, number)


def command(*arguments: object) -> str:
    """Standard output."""
    done = CliRunner().invoke(app, ["checkpoint", "average", *map(str, arguments)])
    if done.exception is not None:
        raise done.exception
    return done.stdout


def refusal(out: Path, *arguments: object) -> str:
    """The error's line, after checking that nothing is left of it."""
    before = sorted(path.name for path in out.parent.iterdir())
    with pytest.raises(ArchscaleError) as caught:
        command(*arguments, "--out", out)
    assert sorted(path.name for path in out.parent.iterdir()) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def weights(path: Path) -> dict[str, torch.Tensor]:
    stored = StoredWeights(path)
    return {name: stored.read(name) for name in stored.shapes}


def test_the_mean_is_that_of_float64(made, tmp_path):
    said = command(made, "--steps", "4,8,6", "--out", tmp_path / "out")
    target = find_target(tmp_path / "out")  # as export, eval and generate find it
    assert (target.step, target.config.model) == (8, find_target(made).config.model)
    assert problems_of(target.checkpoint) == ([], True)
    average, parts = weights(target.checkpoint), [weights(step(made, n)) for n in (4, 6, 8)]
    assert average.keys() == parts[0].keys()
    for name, weight in average.items():
        stacked = torch.stack([part[name].double() for part in parts])
        assert torch.equal(weight, (stacked.sum(0) / 3).float())
    # The mean of points on a sphere lies inside it, by as much as is said.
    matrix = "blocks.0.mlp.down.weight"
    norms = [float(part[matrix].norm()) for part in parts]
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-5)
    assert 0.5 < float(average[matrix].norm()) / norms[0] < 0.9999
    assert "muonh keeps matrices on spheres" in said
    state = read_state(target.checkpoint)
    assert [entry["step"] for entry in state["averaged"]] == [4, 8, 6]
    assert state["parent"]["id"] == read_state(step(made, 8))["id"]


def test_the_newest_of_a_run_and_checkpoints_by_name_are_the_same(made, tmp_path):
    command(made, "--last", "2", "--out", tmp_path / "a")
    (tmp_path / "b").mkdir()  # an empty directory will do
    command(made, step(made, 6), "--out", tmp_path / "b")
    first, second = (weights(step(tmp_path / name, 8)) for name in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_memory_is_that_of_a_few_tensors(made, tmp_path, monkeypatch):
    """A mean is gone before the one after the next is computed, and so are the weights."""
    means: list[weakref.ref] = []
    read: list[weakref.ref] = []
    most = [0, 0]

    def alive(refs: list[weakref.ref]) -> int:
        return sum(each() is not None for each in refs)

    def watched(weights):
        average, norms = mean(weights)
        memory = average.numpy().copy()  # lives as long as a tensor that is a view of it
        most[0] = max(most[0], alive(means))
        means.append(weakref.ref(memory))
        return torch.from_numpy(memory), norms

    def reading(self, name, original=StoredWeights.read):
        weight = original(self, name)
        most[1] = max(most[1], alive(read))
        read.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr("archscale.train.averaging.mean", watched)
    monkeypatch.setattr(StoredWeights, "read", reading)
    command(made, "--last", "4", "--out", tmp_path / "out")
    assert len(read) == 4 * len(means) > 40
    assert max(most) <= 1


def test_training_goes_on_from_it_with_a_new_optimizer(made, data, tmp_path):
    command(made, "--last", "2", "--out", tmp_path / "average")
    longer = config(data, "muonh", 10, **SECTIONS)
    average = step(tmp_path / "average", 8)
    with pytest.raises(ArchscaleError, match=r"no optimizer state.*--reset optimizer"):
        run(longer, str(tmp_path / "average"))
    lines = run(longer, str(tmp_path / "new"), str(average), Wishes(reset=("optimizer",)))
    assert [line["step"] for line in lines] == [9, 10]


def test_what_has_no_mean_is_refused(made, data, tmp_path):
    out = tmp_path / "out"
    other = make_run(data, tmp_path / "deeper", model={"depth": 3})
    damaged = shutil.copytree(step(made, 4), tmp_path / "run" / CHECKPOINTS / "step_00000004")
    shutil.copy(made / "config.yaml", tmp_path / "run")
    next(damaged.glob("*.distcp")).write_bytes(b"")
    cases = [
        ([step(made, 4)], "one checkpoint has no mean"),
        ([step(made, 4), step(made, 4)], "it is named twice"),
        ([made, other], "another model: model.depth is 3, and 2 in"),
        ([step(made, 8), damaged], "truncated"),
        ([made, "--steps", "4,5"], "no checkpoint of step 5"),
        ([made, "--steps", "4,x"], "no list of steps"),
        ([made, "--last", "5"], "4 checkpoints are there, 5 were asked for"),
        ([made, "--last", "2", "--steps", "4,8"], "--last and --steps both choose"),
        ([step(made, 8), "--last", "2"], "--last chooses among the checkpoints of one run"),
        ([tmp_path / "nothing", made], "no run with a whole checkpoint"),
        ([made, "--last", "2", "--ema"], "no running average of the weights"),
    ]
    for arguments, text in cases:
        assert text in refusal(out, *arguments), arguments
    out.mkdir()
    (out / "mine").touch()
    assert "new or an empty directory" in refusal(out, made, "--last", "2")


def test_a_weight_that_is_not_finite_leaves_nothing(made, tmp_path, monkeypatch):
    read = StoredWeights.read

    def broken(self, name):
        weight = read(self, name)
        return weight.fill_(torch.nan) if name == "head.norm.weight" else weight

    monkeypatch.setattr(StoredWeights, "read", broken)
    assert "head.norm.weight is not finite" in refusal(tmp_path / "out", made, "--last", "2")


def test_a_full_disk_leaves_nothing(made, tmp_path, monkeypatch):
    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("archscale.checkpoint.writer.SummedFile._put", full)
    text = refusal(tmp_path / "out", made, "--last", "2")
    assert "cannot write the average: No space left on device" in text


def test_a_mean_of_equal_tensors_is_the_tensor():
    """Summed in float32, seven times 0.1 would be another number."""
    weight = torch.rand(50, generator=torch.Generator().manual_seed(0))
    average, norms = mean([weight] * 7)
    assert torch.equal(average, weight)
    assert norms == pytest.approx([float(weight.norm())] * 7)
