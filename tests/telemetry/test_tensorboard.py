"""TensorBoard beside metrics.jsonl: the same numbers, and no step twice."""

from __future__ import annotations

import importlib.util

import pytest

from archscale.errors import ConfigError
from archscale.telemetry.tensorboard import Board, check_tensorboard
from tests.train.tiny import config, crash_after, run, tiny_data

WANTED = {
    "telemetry": {"every": 1, "tensorboard": True},
    "checkpoint": {"every": 2, "keep": 9},
    "eval": {"every": 2, "batches": 1},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    pytest.importorskip("tensorboard")
    return tiny_data(tmp_path_factory.mktemp("data"))


def curves(run_dir) -> dict[str, dict[int, float]]:
    """By name and step, as TensorBoard shows them; a step that comes twice is an error."""
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = module.EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    found = {}
    for name in events.Tags()["scalars"]:
        steps = [event.step for event in events.Scalars(name)]
        assert len(set(steps)) == len(steps), (name, steps)
        found[name] = {event.step: event.value for event in events.Scalars(name)}
    return found


def test_it_shows_what_metrics_say_and_no_step_twice(data, tmp_path):
    made = config(data, "orscale_lm", 6, **WANTED)
    crash_after(made, str(tmp_path), 5)  # the checkpoint is of step 4
    lines = run(made, str(tmp_path))
    found = curves(tmp_path)
    for key in ("loss", "grad_norm", "lr", "val_loss", "optimizer/trust_ratio_mean"):
        expected = {line["step"]: line[key] for line in lines if key in line}
        assert found[key].keys() == expected.keys()
        assert found[key] == pytest.approx(expected, rel=1e-6)  # of a float32
    assert not {"step", "time"} & found.keys()


def test_a_step_back_leaves_no_step_twice(data, tmp_path):
    board = Board({"name": "tiny"}, tmp_path / "tensorboard", 0)
    for step in (1, 2, 3, 4):
        board.log({"step": step, "time": 1.0, "loss": float(step), "gone": None, "load": [1, 2]})
    board.rewind(2)
    for step in (3, 4):
        board.log({"step": step, "time": 2.0, "loss": 10.0 * step, "event": "fell back"})
    board.close()
    assert curves(tmp_path) == {"loss": {1: 1.0, 2: 2.0, 3: 30.0, 4: 40.0}}


def test_the_run_that_another_one_takes_the_place_of_is_not_drawn(data, tmp_path):
    other, here = tmp_path / "other", tmp_path / "here"
    run(config(data, "orscale_lm", 4, **WANTED), str(other))
    run(config(data, "orscale_lm", 4, seed=3, **WANTED), str(here))
    first = str(other / "checkpoints" / "step_00000002")
    lines = run(config(data, "orscale_lm", 4, **WANTED), str(here), resume=first)
    assert [line["step"] for line in lines] == [3, 4]
    expected = {line["step"]: line["loss"] for line in lines}
    assert curves(here)["loss"] == pytest.approx(expected, rel=1e-6)


def test_a_missing_package_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_tensorboard(False)
    with pytest.raises(ConfigError, match=r"not installed \(telemetry\.tensorboard\): pip install"):
        check_tensorboard(True)
