"""A run directory has one history, whatever `--resume` names and whenever a run is killed."""

import json
import os
import shutil
from pathlib import Path

import pytest

from archscale.checkpoint.directory import checkpoint_id, read_state
from archscale.files import checkpoint_steps, step_directory
from archscale.train import trainer
from tests.train.tiny import config, crash_after, run, tiny_data


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Path:
    """A run of 8 steps with checkpoints of steps 2, 4, 6 and 8, to be copied."""
    directory = tmp_path_factory.mktemp("finished") / "r"
    run(made(data), str(directory))
    return directory


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "r")


def made(data, keep: int = 9, **sections):
    checkpoint = {"every": 2, "keep": keep}
    return config(data, steps=8, checkpoint=checkpoint, telemetry={"every": 1}, **sections)


def lines(directory: Path) -> list[tuple]:
    text = (directory / "metrics.jsonl").read_text()
    return [(row["step"], row["loss"]) for row in map(json.loads, text.splitlines())]


def steps(directory: Path) -> list[int]:
    return checkpoint_steps(directory / "checkpoints")


def state(directory: Path, step: int) -> dict:
    return read_state(step_directory(directory / "checkpoints", step))


@pytest.mark.parametrize(("keep", "again"), [(1, "the same command"), (9, "auto")])
def test_a_rewind_gives_up_what_came_after(data, finished, copied, capfd, keep, again):
    """Killed after its first checkpoint it goes on from there, not from what it gave up, and not
    from where it began; also when keep has pruned that."""
    named = str(step_directory(copied / "checkpoints", 4))
    abandoned = copied / "abandoned" / "after_step_00000004"
    crash_after(made(data, keep), str(copied), 3, named)
    said = f"moved what came after step 4 into {abandoned}: checkpoints of steps 6, 8, 4 lines"
    assert said in capfd.readouterr().out
    assert steps(copied) == ([4, 6] if keep == 1 else [2, 4, 6])
    assert [step for step, _ in lines(copied)] == list(range(1, 8))
    new = state(copied, 6)["id"]
    assert checkpoint_steps(abandoned) == [6, 8]
    assert lines(abandoned) == lines(finished)[4:]
    run(made(data, keep), str(copied), "auto" if again == "auto" else named)
    assert lines(copied) == lines(finished)
    assert state(copied, 8)["parent"] == {"step": 6, "id": new}
    assert state(finished, 6)["id"] != new
    assert os.listdir(copied / "abandoned") == [abandoned.name]


def test_checkpoints_name_the_ones_before_them(finished):
    assert state(finished, 2)["parent"] is None
    for before, after in [(2, 4), (4, 6), (6, 8)]:
        parent = {"step": before, "id": state(finished, before)["id"]}
        assert state(finished, after)["parent"] == parent


def test_another_runs_checkpoint_displaces_all_of_a_directorys_own(data, finished, tmp_path):
    other = tmp_path / "other"
    run(made(data, seed=1), str(other))
    before = lines(other)
    named = str(step_directory(finished / "checkpoints", 4))
    crash_after(made(data), str(other), 1, named)
    assert steps(other) == []
    assert lines(other / "abandoned" / "after_step_00000000") == before
    crash_after(made(data), str(other), 2, named)
    crash_after(made(data), str(other), 1, named)
    assert steps(other) == [6]
    run(made(data), str(other), named)
    assert lines(other) == lines(finished)[4:]
    # Of the crash before the first checkpoint, after which the same command goes back once more.
    assert lines(other / "abandoned" / "after_step_00000000_2") == lines(finished)[4:5]
    assert len(os.listdir(other / "abandoned")) == 2


def test_a_rewind_killed_while_it_moves_is_done_by_the_same_command(
    data, finished, copied, monkeypatch
):
    named = str(step_directory(copied / "checkpoints", 2))
    move, moved = shutil.move, []

    def killed(source, target):
        moved.append(source)
        if len(moved) == 3:
            raise KeyboardInterrupt
        return move(source, target)

    monkeypatch.setattr(shutil, "move", killed)
    with pytest.raises(KeyboardInterrupt):
        run(made(data), str(copied), named)
    assert steps(copied) == [2, 4]
    monkeypatch.undo()
    run(made(data), str(copied), named)
    assert lines(copied) == lines(finished)
    assert [checkpoint_steps(path) for path in sorted((copied / "abandoned").iterdir())] == [
        [6, 8],
        [4],
    ]


def test_checkpoints_from_before_they_had_parents(data, finished, copied):
    for step in steps(copied):
        path = step_directory(copied / "checkpoints", step) / "state.json"
        new = ("id", "parent", "resumed", "crc32")
        old = {key: value for key, value in state(copied, step).items() if key not in new}
        old |= {"format": 2, "files": {k: v["bytes"] for k, v in old["files"].items()}}
        path.write_text(json.dumps(old))
    named = step_directory(copied / "checkpoints", 4)
    for taken in (2, 1):
        crash_after(made(data), str(copied), taken, str(named))
        assert steps(copied) == [2, 4, 6]
    assert state(copied, 6)["parent"] == {"step": 4, "id": checkpoint_id(read_state(named))}
    run(made(data), str(copied))
    assert lines(copied) == lines(finished)


def test_damaged_checkpoints_take_the_place_of_no_new_one(data, copied, capfd):
    (step_directory(copied / "checkpoints", 8) / "rng_0.bin").unlink()
    (step_directory(copied / "checkpoints", 6) / "rng_0.bin").unlink()
    crash_after(made(data, keep=1), str(copied), 3)
    assert steps(copied) == [4, 6]
    assert checkpoint_steps(copied / "abandoned" / "after_step_00000004") == [6, 8]
    assert "checkpoints of steps 6, 8, 0 lines of metrics" in capfd.readouterr().out


def test_what_killed_runs_did_not_finish_is_deleted(data, copied):
    checkpoints = copied / "checkpoints"
    for name in (".step_00000007.partial", ".step_00000002.deleted", ".mine"):
        (checkpoints / name).mkdir()
        (checkpoints / name / "x").write_text("x")
    for name in (".plan.json.0123456789ab.tmp", ".report.html.0123456789ab.tmp", ".mine.tmp"):
        (copied / name).touch()
    (copied / "stacks_rank_7.txt").touch()
    (copied / "stacks_rank_8.txt").write_text("Thread …")
    shutil.rmtree(step_directory(checkpoints, 8))
    run(made(data), str(copied))
    assert [path.name for path in checkpoints.glob(".*")] == [".mine"]
    left = sorted(path.name for path in copied.iterdir() if path.suffix in (".tmp", ".txt"))
    # A report may be in the making, and stacks are there to be read.
    assert left == [".mine.tmp", ".report.html.0123456789ab.tmp", "stacks_rank_8.txt"]


def test_a_line_cut_short_does_not_stop_a_finished_run(data, finished, copied):
    metrics = copied / "metrics.jsonl"
    with metrics.open("ab") as file:
        file.write(b'{"step": 9, "lo\0\xff\n{"step": 9}')
    assert trainer.train(made(data), copied)["loss"] == lines(finished)[-1][1]
    metrics.write_text("".join(metrics.read_text(errors="replace").splitlines(True)[:-3]) + '{"st')
    summary = trainer.train(made(data), copied)
    assert summary["already_done"]
    assert "loss" not in summary
