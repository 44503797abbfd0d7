"""`archscale checkpoint list`, `verify`, `prune` and `diff`, on checkpoints of tiny runs."""

import json
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from archscale.checkpoint.difference import TensorReader, compare_checkpoints, compare_tensors
from archscale.checkpoint.directory import kept_steps, read_state, recorded_files, state_text
from archscale.checkpoint.integrity import coverage_problem, problems_of
from archscale.cli import app
from archscale.errors import CheckpointError
from archscale.files import checkpoint_steps, step_directory
from archscale.train.ownership import sole_owner
from archscale.train.pruning import prune_checkpoints
from tests.train.tiny import config, run, tiny_data

SECTIONS = {"checkpoint": {"every": 2, "keep": 9}, "telemetry": {"every": 1}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, pool) -> dict[int, Path]:
    """By number of processes a run with checkpoints of steps 2, 4, 6 and 8, not to be changed."""
    folder = tmp_path_factory.mktemp("runs")
    data = tiny_data(folder)
    made = config(data, "orscale_lm", 8, **SECTIONS)
    run(made, str(folder / "alone"))
    pool(2).run(run, made, str(folder / "two"))
    return {1: folder / "alone", 2: folder / "two"}


@pytest.fixture
def copied(runs, tmp_path) -> Path:
    return shutil.copytree(runs[1], tmp_path / "r")


def step(run_dir: Path, number: int) -> Path:
    return step_directory(run_dir / "checkpoints", number)


def steps(run_dir: Path) -> list[int]:
    return checkpoint_steps(run_dir / "checkpoints")


def command(*arguments: object) -> tuple[int, str, str]:
    """(exit status, standard output, the error's line)."""
    done = CliRunner().invoke(app, ["checkpoint", *map(str, arguments)])
    failed = isinstance(done.exception, CheckpointError)
    assert failed or done.exception is None or isinstance(done.exception, SystemExit), (
        done.exception
    )
    return (2 if failed else done.exit_code), done.stdout, str(done.exception)


def change_state(path: Path, **values) -> None:
    state = read_state(path) | values
    files = recorded_files(state)
    plain = {key: value for key, value in state.items() if key not in ("files", "crc32", "format")}
    (path / "state.json").write_text(state_text(plain, files, state["world_size"]))


def with_checksums(path: Path) -> None:
    """Give `state.json` the checksums of the files as they are."""
    files = {
        name: {"bytes": len(content), "crc32": f"{zlib.crc32(content):08x}"}
        for name in read_state(path)["files"]
        for content in [(path / name).read_bytes()]
    }
    change_state(path, files=files)


# --- list


def test_list_shows_what_there_is(copied):
    checkpoints = copied / "checkpoints"
    shutil.move(step(copied, 6), copied / "abandoned" / "after_step_00000004" / "step_00000006")
    (checkpoints / ".step_00000010.partial").mkdir()
    (checkpoints / ".step_00000010.partial" / "half").write_bytes(b"x" * 1000)
    change_state(step(copied, 4), not_finite_since=3)
    (step(copied, 8) / "rng_0.bin").unlink()
    found = json.loads(command("list", copied, "--json")[1])
    rows = found["checkpoints"]
    assert [(row["step"], row["tokens"]) for row in rows] == [(2, 768), (4, 1536), (8, 3072)]
    lines = [json.loads(line) for line in (copied / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows] == [lines[number - 1]["loss"] for number in (2, 4, 8)]
    assert rows[2]["val_loss"] == lines[7]["val_loss"]
    assert [row["not_finite_since"] for row in rows] == [None, 3, None]
    assert [row["problem"] for row in rows] == [None, None, "rng_0.bin is missing"]
    assert rows[1]["parent"] == {"step": 2, "id": rows[0]["id"]}
    assert [row["step"] for row in found["abandoned"]] == [6]
    assert [row["bytes"] for row in found["unfinished"]] == [1000]
    text = command("list", checkpoints)[1]
    assert "no, since step 3" in text
    assert "after_step_00000004/step_00000006" in text
    assert ".step_00000010.partial" in text


def test_list_fits_a_narrow_terminal(copied, monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    lines = command("list", copied)[1].splitlines()
    assert lines[0] == "step 2"
    assert max(map(len, lines)) <= 50
    assert all(line.isascii() for line in lines)


def test_list_goes_on_over_what_it_cannot_read(copied):
    (step(copied, 2) / "state.json").write_text('{"format": 99}')
    (step(copied, 4) / "state.json").unlink()
    (step(copied, 6) / "state.json").write_text('{"format": 2, "files": 3}')
    problems = [
        row["problem"] for row in json.loads(command("list", copied, "--json")[1])["checkpoints"]
    ]
    assert [bool(problem) for problem in problems] == [True, True, True, False]
    assert "format 99" in problems[0]


def test_list_does_without_torch(runs):
    code = (
        "import sys; from archscale.cli import main\n"
        f"sys.argv = ['archscale', 'checkpoint', 'list', {str(runs[1])!r}]\n"
        "try: main()\nfinally: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "False", done.stderr


@pytest.mark.parametrize("name", ["list", "verify"])
def test_a_folder_without_checkpoints_is_refused(tmp_path, name):
    status, _, error = command(name, tmp_path)
    assert status == 2
    assert "no checkpoints" in error


# --- verify


@pytest.mark.parametrize("processes", [1, 2])
def test_whole_checkpoints_are_whole(runs, processes):
    status, out, _ = command("verify", runs[processes])
    assert status == 0
    assert out.count(": whole\n") == 4


def test_a_checkpoint_from_before_there_were_checksums(copied):
    state = read_state(step(copied, 2))
    sizes = {name: recorded.bytes for name, recorded in recorded_files(state).items()}
    old = {**state, "format": 2, "files": sizes}
    (step(copied, 2) / "state.json").write_text(json.dumps(old))
    status, out, _ = command("verify", step(copied, 2))
    assert (status, out.count(": whole (written without checksums: sizes only)")) == (0, 1)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        ("missing", "{} is missing"),
        ("truncated", "{} is truncated: "),
        ("flipped", "{} has the checksum "),
    ],
)
def test_a_damaged_file_is_named(copied, harm, said):
    bad = next(step(copied, 4).glob("*.distcp"))
    content = bytearray(bad.read_bytes())
    if harm == "missing":
        bad.unlink()
    elif harm == "truncated":
        bad.write_bytes(content[:-1])
    else:
        content[len(content) // 2] ^= 1
        bad.write_bytes(content)
    status, out, error = command("verify", copied)
    assert status == 2
    assert "1 of 4 checkpoints damaged" in error
    assert f"{step(copied, 4)}: {said.format(bad.name)}" in out
    assert out.count(": whole") == 3


def test_what_checksums_cannot_show(copied):
    import pickle

    path = step(copied, 2) / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    entry = metadata.state_dict_metadata["model.embedding.weight"]
    entry.chunks.append(entry.chunks[0])
    path.write_bytes(pickle.dumps(metadata))
    with_checksums(step(copied, 2))
    assert (
        "tensor model.embedding.weight has chunks at [0, 0] and [0, 0] that overlap"
        in (command("verify", copied)[1])
    )
    path.write_bytes(b"nothing")
    with_checksums(step(copied, 2))
    assert ".metadata cannot be read" in command("verify", copied)[1]
    shutil.move(step(copied, 4), step(copied, 5))
    assert problems_of(step(copied, 5))[0] == ["state.json is that of step 4"]


@pytest.mark.parametrize(
    ("chunks", "problem"),
    [
        ([((0, 0), (4, 6))], None),
        ([((0, 0), (1, 2)), ((0, 2), (1, 4)), ((1, 0), (3, 6))], None),
        ([((0, 3), (4, 3)), ((0, 0), (4, 3)), ((2, 0), (0, 6))], None),
        ([((0, 0), (2, 6)), ((1, 0), (3, 6))], "overlap"),
        ([((0, 0), (4, 4)), ((3, 3), (1, 3))], "overlap"),
        ([((0, 0), (3, 6))], "incomplete: 18 of 24 elements"),
        ([((0, 0), (4, 7))], "outside of"),
        ([], "incomplete: 0 of 24"),
    ],
)
def test_coverage(chunks, problem):
    found = coverage_problem((4, 6), chunks)
    assert found is None if problem is None else problem in found


def test_a_number_is_covered_by_itself():
    assert coverage_problem((), [((), ())]) is None
    assert "overlap" in coverage_problem((), [((), ()), ((), ())])


# --- prune


def test_prune_keeps_what_the_rules_say(copied):
    status, out, _ = command("prune", copied, "--keep", 1, "--keep-every", 4, "--dry-run")
    assert status == 0
    assert "step 2 goes: " in out
    assert "2 checkpoints would be deleted, " in out
    assert steps(copied) == [2, 4, 6, 8]
    assert "2 checkpoints deleted, " in command("prune", copied, "--keep", 1, "--keep-every", 4)[1]
    assert steps(copied) == [4, 8]
    assert not (copied / "owner.json").exists()


def test_prune_keeps_one_from_before_a_loss_that_is_not_finite(copied):
    change_state(step(copied, 8), not_finite_since=5)
    command("prune", copied, "--keep", 1)
    assert steps(copied) == [2, 4, 8]  # 4: its weights gave the loss of step 5


def test_prune_keeps_the_newest_whole_one(copied):
    for number in (6, 8):
        bad = next(step(copied, number).glob("*.distcp"))
        bad.write_bytes(bytes(bad.stat().st_size))
    assert "step 4 stays: the newest that is whole" in command("prune", copied, "--keep", 2)[1]
    assert steps(copied) == [4, 6, 8]


def test_prune_is_refused_while_someone_trains(copied):
    with sole_owner(copied):
        status, _, error = command("prune", copied / "checkpoints", "--keep", 1)
        assert status == 2
        assert "trains in this directory" in error
        assert "--run-dir" not in error
        assert command("prune", copied, "--keep", 1, "--dry-run")[0] == 0
    assert steps(copied) == [2, 4, 6, 8]


def test_the_rules_of_prune():
    numbers = [10, 20, 25, 30, 40]
    assert list(kept_steps(numbers, 2, None, None)) == [30, 40]
    assert set(kept_steps(numbers, 1, 20, None)) == {20, 40}
    assert set(kept_steps(numbers, 1, None, 27)) == {25, 40}
    assert set(kept_steps(numbers, 1, None, 26)) == {20, 25, 40}
    assert set(kept_steps(numbers, 9, None, None)) == set(numbers)


def test_a_deletion_that_fails_is_one_line(copied, monkeypatch):
    monkeypatch.setattr(shutil, "rmtree", lambda *a, **k: None)
    with pytest.raises(CheckpointError, match="could not be deleted to its end"):
        prune_checkpoints(copied, 3, None, False, print)


# --- diff


def test_a_copy_is_equal(runs, copied):
    status, out, _ = command("diff", step(runs[1], 4), step(copied, 4))
    assert status == 0
    assert out.splitlines()[
        -1
    ] == f"bitwise equal: {len(TensorReader(step(copied, 4)).tensors)}" + (" tensors")


def test_two_layouts_differ_by_rounding(runs):
    status, out, _ = command("diff", step(runs[1], 2), step(runs[2], 2), "--json")
    assert status == 1
    found = json.loads(out)
    assert not found["mismatched"]
    assert 0 < max(row["norm"] for row in found["tensors"]) < 1e-3
    weights = [row for row in found["tensors"] if row["name"].startswith("model.")]
    assert max(row["norm"] for row in weights) < 1e-5


def test_steps_and_data_and_config_are_compared(runs, copied):
    state = json.loads((step(copied, 4) / "state.json").read_text())
    data = state["data"] | {"tokens": 1}
    model = state["config"]["model"] | {"rope_theta": 7.0}
    change_state(
        step(copied, 4), data=data, config=state["config"] | {"name": "other", "model": model}
    )
    difference = compare_checkpoints(step(runs[1], 4), step(copied, 4))
    assert set(difference.state) == {"data.tokens"}
    assert set(difference.config) == {"model.rope_theta", "name"}
    assert difference.another_trajectory == ["model.rope_theta"]
    assert difference.equal == len(TensorReader(step(copied, 4)).tensors)
    assert not difference.same
    text = difference.render()
    assert "config model.rope_theta: 10000.0 in A, 7.0 in B, another trajectory" in text
    change_state(step(copied, 4), data=state["data"])
    assert compare_checkpoints(step(runs[1], 4), step(copied, 4)).same  # the config alone differs


def test_diff_of_what_cannot_be_read(runs, copied, tmp_path):
    status, _, error = command("diff", step(runs[1], 4), tmp_path)
    assert status == 2
    assert "not a complete checkpoint" in error
    for bad in step(copied, 4).glob("*.distcp"):
        bad.write_bytes(b"")
    status, _, error = command("diff", step(runs[1], 4), step(copied, 4))
    assert status == 2
    assert "cannot read" in error
    assert "archscale checkpoint verify" in error


def test_differences_of_tensors():
    first = torch.tensor([0.0, 1.0, -2.0, float("nan"), 4.0])
    assert compare_tensors("t", first, first.clone()).different == 0
    second = torch.tensor([-0.0, 1.0, -3.0, float("nan"), float("inf")])
    found = compare_tensors("t", first, second)
    assert (found.different, found.elements, found.not_finite) == (3, 5, 1)
    assert (found.absolute, found.relative) == (1.0, pytest.approx(1 / 3))
    assert found.norm == pytest.approx(1 / 5**0.5)
    for dtype in (torch.bfloat16, torch.int64, torch.bool):
        assert compare_tensors("t", first.to(dtype), first.to(dtype)).different == 0
    assert compare_tensors("t", torch.tensor(1), torch.tensor(2)).absolute == 1
