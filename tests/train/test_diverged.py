"""A run whose loss is not finite is a result: it ends as others do, says so, and keeps what was
there before."""

import json

import pytest

from archscale import cli
from archscale.checkpoint.directory import prune
from archscale.config import dump_config
from archscale.errors import CheckpointError
from archscale.files import checkpoint_steps
from archscale.telemetry.guard import not_finite_since
from archscale.telemetry.sinks import TAIL, last_line
from tests.train.texts import continued
from tests.train.tiny import config, tiny_data

NAN = float("nan")
DIVERGING = {
    "parameterization": {"base": {"lr": 1e30}},
    "checkpoint": {"every": 1, "keep": 2},
    "telemetry": {"every": 1},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def train(tmp_path, monkeypatch, capsys):
    """`train(config)` → exit status and standard output of the command, in this process."""

    def call(made):
        dump_config(made, tmp_path / "c.yaml")
        command = ["archscale", "train", str(tmp_path / "c.yaml"), "--run-dir", str(tmp_path / "r")]
        monkeypatch.setattr("sys.argv", command)
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code or 0, capsys.readouterr().out

    return call


def test_a_diverged_run_ends_well_and_keeps_what_was_there_before(data, tmp_path, train):
    made, checkpoints = config(data, "muon", 5, **DIVERGING), tmp_path / "r" / "checkpoints"
    status, out = train(made)
    lines = (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()
    first = min(line["step"] for line in map(json.loads, lines) if line["loss"] is None)
    told = f"tiny: diverged: loss not finite since step {first}"
    assert status == 0
    assert out.splitlines()[-1] == told
    assert "loss not finite, val_loss not finite" in out
    assert (tmp_path / "r" / "report.html").exists()
    left = sorted({*range(max(1, first - 2), first), 4, 5})
    assert checkpoint_steps(checkpoints) == left
    assert len(left) < 5  # so something was pruned
    status, out = train(made)
    assert (status, out.splitlines()[-1]) == (0, told)
    assert "already done" in out
    with pytest.raises(CheckpointError, match="the run had diverged"):
        continued(tmp_path / "r", "ab", 1, temperature=1.0)
    # A run that is resumed after that step knows it still.
    (checkpoints / "step_00000005" / "state.json").unlink()
    assert train(made)[1].splitlines()[-1] == told
    assert checkpoint_steps(checkpoints) == left


@pytest.mark.parametrize(
    ("lines", "since"),
    [
        ([{"loss": 1.0}, {"loss": NAN}, {"loss": None}], 2),
        ([{"loss": NAN}, {"loss": 1.0}], None),
        ([{"loss": 1.0}, {"loss": 1.0, "val_loss": None}], 2),
        ([{"loss": float("inf")}, {"loss": NAN, "val_loss": 1.0}], 1),
    ],
)
def test_since_when(lines, since):
    found = None
    for step, line in enumerate(lines, 1):
        found = not_finite_since(found, {"step": step, **line})
    assert found == since


@pytest.mark.parametrize(
    ("keep", "since", "left"),
    [
        (2, None, [8, 10]),
        (1, 7, [6, 4, 10]),  # of step 6 no finite loss is known
        (1, 8, [6, 10]),
        (3, 9, [6, 8, 10]),
        (1, 1, [10]),  # none is from before
    ],
)
def test_pruning_keeps_what_is_from_before_the_loss_was_not_finite(tmp_path, keep, since, left):
    for step in (2, 4, 6, 8, 10):
        (tmp_path / f"step_{step:08d}").mkdir()
        (tmp_path / f"step_{step:08d}" / "state.json").write_text("{}")
    prune(tmp_path, keep, since)
    assert checkpoint_steps(tmp_path) == sorted(left)


def test_a_last_line_longer_than_what_is_looked_into_at_first(tmp_path):
    long = {"step": 2, "event": "x" * TAIL}
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + json.dumps(long) + '\n{"st')
    assert last_line(tmp_path) == long
