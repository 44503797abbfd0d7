"""`training.precision: auto`: what the first process finds holds for the run, wherever it goes
on."""

import dataclasses
import json

import pytest

from archscale import distributed
from archscale.config import load_config
from archscale.errors import ConfigError
from archscale.files import step_directory
from archscale.plan.devices import this_device
from archscale.train import trainer
from archscale.train.precision import refuse_other_precision
from tests.train.tiny import config, tiny_data

UNITS = {"bf16": True, "fp32": False}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def train_on(monkeypatch, data):
    """Trains on a processor on which `auto` is the given precision; returns the metrics."""

    def train(units, run_dir, steps, precision="auto", resume="auto", **options):
        here = dataclasses.replace(this_device(), bf16=UNITS[units])
        monkeypatch.setattr(trainer, "this_device", lambda: here)
        options |= {"training": {"precision": precision}, "schedule": {"kind": "constant"}}
        made = config(data, checkpoint={"every": 2}, **options)
        tokens = steps * made.batch_tokens
        training = made.training.model_copy(update={"tokens": tokens})
        trainer.train(made.model_copy(update={"training": training}), run_dir, resume)
        return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]

    return train


def losses(lines) -> list[float]:
    return [line["loss"] for line in lines]


@pytest.mark.parametrize(("first", "then"), [("fp32", "bf16"), ("bf16", "fp32")])
def test_a_run_keeps_the_precision_of_its_first_processor(train_on, tmp_path, first, then, capsys):
    train_on(first, tmp_path / "auto", 2)
    assert load_config(tmp_path / "auto" / "config.yaml").training.precision == first
    assert f"in {first}, run directory" in capsys.readouterr().out
    plan = json.loads((tmp_path / "auto" / "plan.json").read_text())
    assert plan["training"]["precision"] == first
    resumed = train_on(then, tmp_path / "auto", 4)
    assert load_config(tmp_path / "auto" / "config.yaml").training.precision == first
    given = train_on(then, tmp_path / "given", 4, precision=first)
    assert losses(resumed) == losses(given)
    other = train_on(then, tmp_path / "other", 4)
    assert losses(other) != losses(given)


def test_a_run_from_a_checkpoint_keeps_its_precision(train_on, tmp_path):
    train_on("fp32", tmp_path / "first", 2)
    checkpoint = step_directory(tmp_path / "first" / "checkpoints", 2)
    train_on("bf16", tmp_path / "second", 4, resume=str(checkpoint))
    assert load_config(tmp_path / "second" / "config.yaml").training.precision == "fp32"


def test_another_precision_than_the_runs_is_refused(train_on, tmp_path):
    train_on("fp32", tmp_path / "first", 2)
    with pytest.raises(ConfigError, match="training.precision is bf16, .* has fp32"):
        train_on("fp32", tmp_path / "first", 4, precision="bf16")


def other_precision(same: bool) -> str:
    found = "bf16" if same or distributed.rank() == 0 else "fp32"
    try:
        refuse_other_precision(found)
    except ConfigError as error:
        return str(error)
    return ""


def test_ranks_whose_devices_differ_are_refused(pool):
    assert pool(2).run(other_precision, True) == ["", ""]
    expected = (
        "auto is bf16 on the device of rank 0 and fp32 on that of rank 1 (training.precision): set"
        " it to fp32 or bf16"
    )
    assert pool(2).run(other_precision, False) == [expected] * 2
