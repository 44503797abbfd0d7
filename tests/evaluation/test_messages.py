"""What `archscale eval` says of what it cannot do: one line, exit status 2."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from archscale.data.preparing.prepare import prepare
from archscale.export.export import export
from archscale.report.read import read_run
from archscale.report.run import write_run_page
from archscale.sweep.table import read_table

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run, and what is wrong, beside it."""
    shutil.copytree(trained / "run", tmp_path / "run")
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "empty.txt").touch()
    (tmp_path / "text.txt").write_text("abcd efgh")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/thesis.tex").write_text("years of work")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["thesis"], "no run with a whole checkpoint (thesis)"),
        (["nowhere"], "no such directory (nowhere)"),
        (["text.txt"], "not a directory (text.txt)"),
        (["run", "--text", "latin.txt"], "byte 4 is not UTF-8 (latin.txt)"),
        (["run", "--text", "empty.txt"], "there is no text in it (empty.txt)"),
        (["run", "--text", "no.txt"], "cannot read the text: No such file or directory (no.txt)"),
        (["run", "--data", "no"], "no data set (no)"),
        (["run", "--data", "thesis"], "not a prepared data set"),
        (
            ["run", "--text", "text.txt", "--context", "8,17"],
            "a context of 17 tokens is longer than the model's 16 (--context): give at most 16",
        ),
        (["run", "--text", "text.txt", "--context", "eight"], "'eight' is no length (--context)"),
        (
            ["run", "--text", "text.txt", "--context", "8", "--stride", "9"],
            "a stride of 9 tokens leaves out some between windows of 8 (--stride)",
        ),
        (["run", "--stride", "4"], "there is no text to read (--stride)"),
        (
            ["run", "--batch", "97"],
            "windows of the run's validation are no whole batches of 97 (--batch)",
        ),
        (["run", "--limit", "4"], "no task is named (--limit)"),
    ],
)
def test_one_line(
    command: Command,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(folder)
    status, out, err = command("eval", *arguments)
    assert (status, out, len(err.splitlines())) == (2, "", 1), err
    assert said in err
    assert not (folder / "run/evaluations.jsonl").exists()


def test_another_tokenizer(command: Command, trained: Path, folder: Path) -> None:
    recipe = [f"output={folder}/other", "tokenizer.train.vocab_size=290"]
    prepare(trained / "recipe.yaml", recipe)
    export(folder / "run", folder / "export", shard_size="5GB")
    for target in ("run", "export"):
        status, _, err = command("eval", folder / target, "--data", folder / "other")
        assert (status, len(err.splitlines())) == (2, 1), err
        assert "another tokenizer, of 290 ids, than the model's, of 300" in err
    status, _, err = command("eval", folder / "export")
    assert (status, len(err.splitlines())) == (2, 1)
    assert "an exported model has no validation data of its own" in err
    endless = folder / "endless"
    shutil.copytree(folder / "export", endless)
    told = json.loads((endless / "config.json").read_text())
    (endless / "config.json").write_text(json.dumps(told | {"max_position_embeddings": None}))
    status, _, err = command("eval", endless, "--text", folder / "text.txt")
    assert (status, len(err.splitlines())) == (2, 1), err
    (folder / "export/model.safetensors").write_bytes(b"damaged")
    status, _, err = command("eval", folder / "export", "--text", folder / "text.txt")
    assert (status, len(err.splitlines())) == (2, 1), err
    assert "transformers cannot load the model" in err


def test_a_damaged_and_a_diverged_checkpoint(command: Command, folder: Path) -> None:
    checkpoint = folder / "run/checkpoints/step_00000004"
    state = json.loads((checkpoint / "state.json").read_text())
    weights = next(path for path in checkpoint.iterdir() if path.suffix == ".distcp")
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    status, _, err = command("eval", checkpoint)
    assert (status, len(err.splitlines())) == (2, 1), err
    assert "the checkpoint is damaged" in err
    weights.write_bytes(whole)
    (checkpoint / "state.json").write_text(json.dumps(state | {"not_finite_since": 4}))
    status, _, err = command("eval", checkpoint)
    assert (status, len(err.splitlines())) == (2, 1), err
    assert "diverged" in err or "damaged" in err


def test_results_are_kept_shown_and_tabulated(
    command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    status, out, _ = command("eval", "run", "--text", "text.txt", "--json")
    assert status == 0
    (result,) = json.loads(out)["results"]
    assert (result["kind"], result["name"]) == ("text", "text.txt")
    status, out, _ = command("eval", "run/checkpoints/step_00000002", "--text", "text.txt")
    assert status == 0
    assert "bits_per_byte" in out
    with open("run/evaluations.jsonl", "a") as file:
        others = {"val_loss": 9.0, "eval/of_training": 9.0}
        line = {"step": 4, "kind": "task", "name": "a", "figures": {}, "metrics": others}
        file.write(json.dumps(line) + '\n{"step": 4, "kind": "te')
    with open("run/metrics.jsonl") as metrics:
        *_, last = map(json.loads, metrics)
    with open("run/metrics.jsonl", "a") as metrics:
        metrics.write(json.dumps(last | {"eval/of_training": 0.5}) + "\n")
    columns = read_table(["run"]).columns
    label = f"text.txt-{hashlib.sha256(b'abcd efgh').hexdigest()[:6]}"
    (row,) = columns[f"eval/{label}/bits_per_byte"]
    assert row == result["figures"]["bits_per_byte"]  # of the last step, not the last line
    # What training has written stays.
    assert [*columns["val_loss"], *columns["eval/of_training"]] == [last["val_loss"], 0.5]
    record = read_run(Path("run"))
    assert [entry["step"] for entry in record.evaluations] == [4, 2, 4]
    assert record.warnings == ["evaluations.jsonl: 1 line cut short, damaged or foreign: skipped"]
    write_run_page([record], Path("page.html"))
    page = Path("page.html").read_text()
    assert "text text.txt" in page
    assert f"bits_per_byte {result['figures']['bits_per_byte']:.6g}" in page


def test_unknown_tasks(
    command: Command, trained: Path, task_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = pytest.importorskip("lm_eval.tasks")

    class LocalTasks(tasks.TaskManager):  # without thousands of files to look through
        def __init__(self, include_path=None, include_defaults=True):
            super().__init__(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(tasks, "TaskManager", LocalTasks)
    asked = ["eval", trained / "run", "--task-path", task_folder, "--tasks"]
    status, _, err = command(*asked, "word")
    assert (status, len(err.splitlines())) == (2, 1)
    assert "lm-eval knows no task 'word' (--tasks): did you mean words?" in err
    broken = trained / "broken.yaml"
    broken.write_text("task: broken\ndataset_path: json\noutput_type: no_such\n")
    status, _, err = command(*asked, broken)
    assert (status, len(err.splitlines())) == (2, 1), err
    assert "cannot load" in err
