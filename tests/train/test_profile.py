"""`archscale train --profile`: the trace of some steps, and a snapshot of memory that ran out."""

from __future__ import annotations

import gzip
import json
import pickle
from collections import Counter
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from archscale.cli import app
from archscale.errors import ArchscaleError, ConfigError, TrainingError
from archscale.telemetry.profiling import ProfiledSteps
from archscale.train import trainer
from tests.train.tiny import config, run, tiny_data

TRACE = Path("profile") / "trace_rank0.json.gz"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return tiny_data(tmp_path_factory.mktemp("data"))


def events(run_dir: Path) -> Counter[str]:
    """How often each name stands in the trace."""
    content = json.loads(gzip.decompress((run_dir / TRACE).read_bytes()))
    return Counter(event.get("name", "") for event in content["traceEvents"])


def numbers(lines: list[dict]) -> list[tuple]:
    return [(line["loss"], line["grad_norm"], line.get("val_loss")) for line in lines]


def test_the_trace_has_the_steps_and_their_phases_and_changes_no_loss(data, tmp_path):
    made = config(data, steps=4)
    plain = run(made, str(tmp_path / "plain"))
    seen = run(made, str(tmp_path / "seen"), profiled=ProfiledSteps(3, 3))
    assert numbers(seen) == numbers(plain)
    assert not (tmp_path / "plain" / "profile").exists()
    assert [path.name for path in (tmp_path / "seen" / "profile").iterdir()] == [TRACE.name]
    names = events(tmp_path / "seen")
    assert [names[f"step {n}"] for n in (1, 2, 3, 4)] == [0, 0, 1, 0]
    # A step of 24 sequences in micro-batches of 6.
    assert (names["data"], names["forward"], names["backward"], names["update"]) == (1, 4, 4, 1)
    assert names["Optimizer.step#MatrixOptimizer.step"] == 1
    assert names["aten::mm"] > 8


def test_a_run_that_ends_earlier_writes_what_there_is(data, tmp_path, monkeypatch):
    original, taken = trainer.train_step, [0]

    def failing(*args, **kwargs):
        taken[0] += 1
        if taken[0] == 3:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(trainer, "train_step", failing)
    with pytest.raises(KeyboardInterrupt):
        run(config(data, steps=4), str(tmp_path), profiled=ProfiledSteps(2, 4))
    assert events(tmp_path)["update"] == 1


@pytest.mark.parametrize("text", ["", "5", "0:3", "4:3", "a:b", "1:2:3", "-1:4"])
def test_what_names_no_steps_is_refused(text, data, tmp_path):
    from archscale.config import dump_config

    dump_config(config(data), tmp_path / "c.yaml")
    arguments = ["train", str(tmp_path / "c.yaml"), "--run-dir", str(tmp_path / "r")]
    done = CliRunner().invoke(app, [*arguments, f"--profile-steps={text}"])
    assert isinstance(done.exception, ConfigError)
    assert "names no steps (--profile-steps)" in str(done.exception)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("wanted", "done", "end", "steps"),
    [
        (ProfiledSteps(), 0, 1000, (11, 12, 13)),
        (ProfiledSteps(), 500, 1000, (511, 512, 513)),
        (ProfiledSteps(), 0, 12, (10, 11, 12)),
        (ProfiledSteps(), 0, 2, (1, 2)),
        (ProfiledSteps(10, 13), 0, 13, (10, 11, 12, 13)),
        (ProfiledSteps(10, 13), 11, 20, (12, 13)),
        (ProfiledSteps(10, 13), 13, 20, ()),
    ],
)
def test_which_steps(wanted, done, end, steps):
    assert tuple(wanted.after(done, end)) == steps


def test_steps_that_the_run_has_not_are_refused(data, tmp_path):
    with pytest.raises(ConfigError, match="steps 5 to 9, and the run ends with step 6"):
        run(config(data, steps=6), str(tmp_path), profiled=ProfiledSteps(5, 9))


@pytest.mark.parametrize("works", [True, False])
def test_memory_that_ran_out_leaves_a_snapshot_and_one_line(data, tmp_path, monkeypatch, works):
    """With a stand-in for CUDA's error and snapshot."""

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB"
        )

    def snapshot():
        if not works:
            raise RuntimeError("no CUDA")
        return {"segments": [1, 2]}

    monkeypatch.setattr(trainer, "train_step", full)
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", snapshot)
    with pytest.raises(ArchscaleError) as caught:
        run(config(data), str(tmp_path))
    assert isinstance(caught.value, TrainingError)
    assert "Tried to allocate 2.00 GiB" in str(caught.value)
    assert "training.micro_batch" in str(caught.value)
    assert "\n" not in str(caught.value)
    written = tmp_path / "profile" / "memory_rank0.pickle"
    assert written.exists() == works == (str(written) in str(caught.value))
    if works:
        assert pickle.loads(written.read_bytes()) == {"segments": [1, 2]}
