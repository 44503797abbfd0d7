"""What surrounds a command: terminals without the characters, readers who leave, an environment
that half announces a torchrun, no home. Each process takes seconds, so that one has several of
these."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from archscale import distributed
from archscale.config import dump_config
from archscale.errors import ConfigError
from tests.commands import MASTER_VARIABLES, RANK_VARIABLES, ROOT
from tests.train.tiny import config, tiny_data

ASCII = {
    **{"LANG": "C", "LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
    **{"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("data"))


def start(*arguments: object, cwd, **variables: str) -> subprocess.Popen:
    """`archscale` whose standard output and error are pipes, in an environment without a home."""
    drop = RANK_VARIABLES | MASTER_VARIABLES | {"HOME", "PYTHONUNBUFFERED"}
    env = {key: value for key, value in os.environ.items() if key not in drop}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    # Its list of fonts takes seconds to make anew.
    env["MPLCONFIGDIR"] = str(Path.home() / ".cache" / "matplotlib")
    command = [sys.executable, "-m", "archscale", *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, cwd=cwd, env=env | variables)


def test_training_outlives_an_ascii_terminal_whose_reader_leaves(tmp_path, data):
    """Without a home, in a directory that cannot be written, and with half of torchrun's
    variables."""
    dump_config(config(data, steps=3, telemetry={"every": 1}), tmp_path / "c.yaml")
    command = ["train", tmp_path / "c.yaml", "--run-dir", tmp_path / "r"]
    process = start(*command, cwd="/proc", WORLD_SIZE="1", RANK="", **ASCII)
    first = process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read().decode("ascii")
    assert process.wait(100) == 0, errors
    assert b"on 1 x cpu" in first
    assert errors.count("standard output was closed; the work goes on") == 1
    assert "Traceback" not in errors
    lines = (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    assert (tmp_path / "r" / "report.html").exists()


def test_a_command_whose_output_nobody_reads_is_over(tmp_path):
    process = start("plan", ROOT / "configs" / "quickstart.yaml", cwd=tmp_path)
    process.stdout.close()
    errors = process.stderr.read().decode()
    assert process.wait(100) == 141
    assert "Traceback" not in errors
    assert "Exception ignored" not in errors


@pytest.mark.parametrize(
    ("variables", "refusal"),
    [
        ({}, None),
        ({"WORLD_SIZE": ""}, None),
        ({"WORLD_SIZE": "1"}, None),
        ({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": ""}, None),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, and RANK is not set .*start with torchrun"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR and MASTER_PORT not set"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK is 2, with a WORLD_SIZE of 2"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', not a number"),
    ],
)
def test_half_of_what_torchrun_sets(monkeypatch, variables, refusal):
    for name in RANK_VARIABLES | MASTER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if refusal:
        with pytest.raises(ConfigError, match=refusal):
            distributed.start()
        return
    assert distributed.launched_world_size() == 1
    distributed.start()
    assert not distributed.is_distributed()
