"""`bench generate` compares the same tokens; speed itself is not tested."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from archscale.bench.generate import bench_generate
from archscale.errors import ConfigError
from tests.export.runs import make_run
from tests.train.tiny import tiny_data

CPU = torch.device("cpu")


def test_both_generate_the_same(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    run_dir = make_run(tiny_data(tmp_path), tmp_path / "run")
    few = {"prompt": 4, "rounds": 2, "device": CPU}
    (row,) = bench_generate(run_dir, batches=[2], new=5, **few)
    assert row["equal tokens"] == 1
    assert row["archscale, tokens/s"] > 0
    assert row["low"] <= row["ratio"] <= row["high"]
    with pytest.raises(ConfigError, match=r"4 \+ 13 tokens are more than the context of 16"):
        bench_generate(run_dir, batches=[2], new=13, **few)
