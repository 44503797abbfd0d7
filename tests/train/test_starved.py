"""One rank alone that cannot read its data ends the run for all, and says why."""

from pathlib import Path

import pytest
import yaml

from tests.commands import launch
from tests.train.tiny import config, tiny_data


@pytest.mark.slow
def test_a_starved_rank_ends_the_run_with_its_cause(tmp_path: Path) -> None:
    made = tmp_path / "c.yaml"
    content = config(tiny_data(tmp_path), steps=8, telemetry={"every": 1}).resolved()
    made.write_text(yaml.safe_dump(content))
    command = ["train", made, "--run-dir", tmp_path / "r"]
    done = launch(command, 2, timeout=120, check=False, module="tests.train.starved")
    assert done.returncode != 0
    assert done.stderr.count("archscale: the disk is gone (a.bin): mount it") == 1
    assert (tmp_path / "r/metrics.jsonl").read_text().count("\n") < 3
