"""Commands as a user types them: bad input ends in one line on stderr, status 2, and nothing
half-written."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from archscale import cli
from archscale.config import dump_config
from archscale.data.shards import HEADER_BYTES
from archscale.errors import DataError
from tests.pool import launch
from tests.train.tiny import config, tiny_data

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("data"))


def refused(result, pattern: str) -> None:
    """Status not zero, exactly one `archscale:` line that matches, no traceback of ours."""
    lines = [line for line in result.stderr.splitlines() if "archscale: " in line]
    assert result.returncode != 0
    assert len(lines) == 1, result.stderr
    assert re.search(pattern, lines[0]), lines[0]
    assert "[rank" not in result.stderr  # a rank's own traceback; torchrun's is not ours
    if "torch.distributed.run" not in str(result.args):
        assert "Traceback" not in result.stderr
        assert result.returncode == 2


def train(tmp_path, made, *arguments, processes=1):
    path = tmp_path / "c.yaml"
    if isinstance(made, dict):
        path.write_text(yaml.safe_dump(made))
    else:
        dump_config(made, path)
    command = ["train", str(path), "--run-dir", str(tmp_path / "r"), *arguments]
    return launch(command, processes=processes, check=False, cwd=tmp_path)


def test_a_missing_data_directory(tmp_path):
    result = train(tmp_path, config("nowhere"))
    refused(result, r"archscale: .*nowhere.*archscale data prepare")
    assert result.returncode == 2
    assert not (tmp_path / "r").exists()


def test_a_typo(tmp_path, data):
    made = config(data).resolved()
    made["optimizer"]["matrix"]["momentun"] = 0.9
    result = train(tmp_path, made)
    refused(result, r"optimizer\.matrix\.momentun.*momentum")
    assert result.returncode == 2


def damaged(data: str, tmp_path, change) -> str:
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    [shard] = copy.glob("train_*.bin")
    content = bytearray(shard.read_bytes())
    change(content)
    shard.write_bytes(content)
    return str(copy)


def flip(content):
    content[HEADER_BYTES + 50] ^= 1


def foreign(content):
    content[:8] = b"NOTOURS!"


def truncate(content):
    del content[-10:]


@pytest.mark.parametrize(
    ("change", "processes", "pattern"),
    [
        (flip, 1, "checksum|corrupt|damaged"),
        (foreign, 1, "not a token shard|foreign|magic"),
        (truncate, 2, "truncated|short|bytes"),
    ],
)
def test_a_damaged_shard(tmp_path, data, change, processes, pattern):
    result = train(tmp_path, config(damaged(data, tmp_path, change)), processes=processes)
    refused(result, rf"(?i)(?=.*train_00000\.bin).*({pattern})")
    assert not (tmp_path / "r" / "metrics.jsonl").exists()


def test_a_vocabulary_smaller_than_the_data(tmp_path, data):
    refused(
        train(tmp_path, config(data, model={"vocab_size": 10})),
        r"vocab_size 10 .*300.*model\.vocab_size",
    )


@pytest.mark.parametrize("processes", [1, 2])
def test_a_world_size_that_does_not_divide_the_batch(tmp_path, data, processes):
    made = config(data, training={"batch_tokens": 16 * 21, "tokens": 16 * 210, "micro_batch": 4})
    refused(
        train(tmp_path, made, processes=processes), r"training\.(batch_tokens|micro_batch).*set"
    )
    assert not (tmp_path / "r").exists()


def test_an_unwritable_run_directory(tmp_path, data):
    (tmp_path / "r").write_text("a file where the run directory should be")
    result = train(tmp_path, config(data), processes=2)
    refused(result, r"cannot write the run directory.*--run-dir")


def test_train_generate_and_again(tmp_path, data):
    result = train(tmp_path, config(data, steps=6), processes=2)
    assert result.returncode == 0, result.stderr
    assert "val_loss" in result.stdout
    run = tmp_path / "r"
    assert {p.name for p in run.iterdir()} == {
        "checkpoints",
        "config.yaml",
        "environment.json",
        "manifest.json",
        "metrics.jsonl",
        "plan.json",
        "report.html",
        "tokenizer",
    }
    rows = {row["parameter"]: row for row in json.loads((run / "manifest.json").read_text())}
    assert rows["blocks.0.attention.qkv.weight"]["rule"] == "muonh"
    assert [
        m.split()[0].split(".")[-1] for m in rows["blocks.0.attention.qkv.weight"]["matrices"]
    ] == ["q", "k", "v", "gate"]
    assert rows["embedding.weight"]["rule"] == "adamw"
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert {
        "loss",
        "grad_norm",
        "lr",
        "tokens_per_second",
        "step_seconds",
        "val_loss",
        "val_bits_per_byte",
    } <= last.keys()
    out = launch(
        ["generate", str(run), "--prompt", "ab", "--max-tokens", "5", "--temperature", "0"],
        cwd=tmp_path,
    ).stdout
    assert out.startswith("ab")
    assert "already done" in train(tmp_path, config(data, steps=6), processes=2).stdout


def test_generate_needs_a_run(tmp_path):
    refused(
        launch(["generate", str(tmp_path), "--prompt", "x"], check=False),
        "no run with a whole checkpoint.*name a run directory",
    )


def test_data_commands(tmp_path, data):
    assert "vocab_size" in launch(["data", "inspect", data]).stdout
    assert "whole" in launch(["data", "verify", data]).stdout
    bad = damaged(data, tmp_path, flip)
    result = launch(["data", "verify", bad], check=False)
    assert result.returncode == 2
    assert "train_00000.bin" in result.stderr
    refused(launch(["data", "prepare", "no.yaml"], check=False), r"no\.yaml")


def test_doctor_and_help_name_every_command():
    assert "torch" in launch(["doctor"]).stdout
    shown = launch(["--help"]).stdout
    assert all(command in shown for command in ("train", "generate", "data", "doctor"))
    for command in (
        ["train"],
        ["generate"],
        ["data", "prepare"],
        ["data", "inspect"],
        ["data", "verify"],
        ["doctor"],
    ):
        assert "Example" in launch([*command, "--help"]).stdout


def test_a_wrong_command_line_is_one_line_too():
    refused(launch(["trian"], check=False), "No such command 'trian'.*archscale.* --help")
    refused(launch(["train"], check=False), "Missing (argument|parameter).*--help")


def test_a_rank_that_fails_before_the_group_exists_says_so(tmp_path):
    dump_config(config("nowhere"), tmp_path / "c.yaml")
    env = {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    refused(
        launch(["train", str(tmp_path / "c.yaml")], check=False, env=env, cwd=tmp_path), "nowhere"
    )


def test_debug_shows_the_traceback(tmp_path):
    result = launch(
        ["generate", str(tmp_path), "--prompt", "x"], check=False, env={"ARCHSCALE_DEBUG": "1"}
    )
    assert "Traceback" in result.stderr
    assert sys.version_info >= (3, 11)


def test_the_examples_of_the_readme_run():
    code = re.findall(r"```python\n(import torch.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(code) == 1
    namespace: dict = {}
    exec(code[0], namespace)
    assert all(p.isfinite().all() for p in namespace["model"].parameters())


@pytest.mark.parametrize(
    ("torchrun", "local_rank", "waits", "reports"),
    [(True, "1", cli.REPORTED, True), (True, "0", 0, True), (False, "1", cli.UNHURRIED, False)],
)
def test_the_rank_that_reports_may_be_slower(
    monkeypatch, capsys, torchrun, local_rank, waits, reports
):
    """Torchrun would end it with the first rank that exits. One that is not ended while it waits is
    the only one that has met the error."""

    def fail():
        raise DataError("a shard is missing", "train_00000.bin", "prepare the data")

    waited, statuses = [0.0], []
    monkeypatch.setattr(cli, "_command", fail)
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    monkeypatch.setattr(cli.os, "_exit", statuses.append)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    cli.main()
    assert (sum(waited), statuses) == (waits, [2])
    assert ("archscale: a shard is missing" in capsys.readouterr().err) == reports
