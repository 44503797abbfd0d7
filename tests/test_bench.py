"""The bench runs and its figures hang together; speed itself is not tested."""

import json

import pytest

from archscale.bench.optimizer import nominal_flops, parse_shapes
from archscale.errors import ConfigError
from tests.pool import launch


def test_shapes_and_flops():
    assert parse_shapes(["28x512x256", "3x4"]) == [(28, 512, 256), (1, 3, 4)]
    assert nominal_flops([(2, 4, 8)]) == 2 * 5 * (4 * 16 * 8 + 2 * 64)
    with pytest.raises(ConfigError, match=r"'5xa' is not a shape \(--shape\): write COUNTxROWSxCOLS"):
        parse_shapes(["5xa"])


def test_optimizer_bench_measures_ours_peers_and_two_ranks():
    command = [
        "bench",
        "optimizer",
        "--shape",
        "4x64x64",
        "--rounds",
        "2",
        "--processes",
        "2",
        "--dtype",
        "float32",
        "--json",
    ]
    [measured] = json.loads(launch(command).stdout)
    labels = {row["label"] for row in measured["rows"]}
    assert {"archscale muon", "archscale orscale_lm", "archscale muonh", "torch.optim.AdamW"} <= labels
    assert all(row["seconds"] > 0 for row in measured["rows"])
    [distributed] = measured["distributed"]
    # Half of each matrix travels to its owner and back; what a rank keeps does not.
    assert distributed["bytes"] == distributed["packed"] == 2 * (4 * 64 * 64 // 2) * 4
