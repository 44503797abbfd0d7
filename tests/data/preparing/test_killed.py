"""Real text, real processes, killed at random moments."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.commands import ROOT
from tests.data.preparing.corpora import hashes


def _start(folder: Path, output: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "archscale", "data", "prepare", "recipe.yaml"]
    command += ["--set", f"output={output}", "--workers", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


@pytest.mark.slow
def test_killed_ten_times_at_random(tmp_path: Path) -> None:
    """The standard library and its tests, about 30 MB, with a tokenizer trained on them."""
    recipe = {
        "name": "stdlib",
        "sources": [{"kind": "python_stdlib", "include_tests": True}],
        "tokenizer": {"train": {"vocab_size": 1024}},
        "output": "data",
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert _start(tmp_path, "undisturbed").wait() == 0
    rng, kills = random.Random(0), 0
    while kills < 10:
        process = _start(tmp_path, "disturbed")
        try:
            # Longer each time, so that every phase is reached on machines of any speed.
            process.wait(rng.uniform(0.3, 1.5 + kills))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
        else:
            break
    assert kills > 2
    process = _start(tmp_path, "disturbed")
    assert process.wait() == 0, process.stderr and process.stderr.read()
    assert hashes(tmp_path / "disturbed") == hashes(tmp_path / "undisturbed")
    assert not list(tmp_path.glob(".*"))
