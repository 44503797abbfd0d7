"""The bench runs and its figures hang together; speed itself is not tested."""

import json
import time

import pytest
import torch

from archscale.bench import optimizer as bench
from archscale.bench import train
from archscale.bench.optimizer import bench_optimizer, nominal_flops, parse_shapes
from archscale.bench.timing import paired_ratio
from archscale.config import Config
from archscale.errors import ConfigError
from archscale.optim import engine
from archscale.plan.devices import DEVICES, this_device
from tests.pool import launch


def test_shapes_and_flops():
    assert parse_shapes(["28x512x256", "3x4"]) == [(28, 512, 256), (1, 3, 4)]
    assert nominal_flops([(2, 4, 8)]) == 2 * 5 * (4 * 16 * 8 + 2 * 64)
    with pytest.raises(
        ConfigError, match=r"'5xa' is not a shape \(--shape\): write COUNTxROWSxCOLS"
    ):
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
    assert {
        "archscale muon",
        "archscale orscale_lm",
        "archscale muonh",
        "torch.optim.AdamW",
    } <= labels
    assert all(row["seconds"] >= row["fastest"] > 0 for row in measured["rows"])
    for row in measured["rows"]:
        ours = row["label"].startswith("archscale")
        assert (
            (row["fastest_ratio"] is not None)
            == (row["paired"] is not None)
            == (row["rest"] is not None)
            == ours
        )
    assert (measured["rows"][0]["fastest_ratio"], measured["rows"][0]["paired"]) == (1, [1, 1, 1])
    [distributed] = measured["distributed"]
    # Half of each matrix travels to its owner and back; what a rank keeps does not.
    assert distributed["bytes"] == distributed["packed"] == 2 * (4 * 64 * 64 // 2) * 4


def test_paired_ratio_ignores_what_disturbs_a_whole_round():
    base = [1.0, 2.0, 3.0, 50.0, 60.0]
    assert paired_ratio([1.1 * t for t in base], base) == pytest.approx((1.1, 1.1, 1.1))
    ratio, low, high = paired_ratio(
        [1.2, 2.2, 3.0, 55.0, 66.0], base
    )  # the medians alone would say 1.0
    assert ratio == pytest.approx(1.1)
    assert (low, high) == pytest.approx((1.0, 1.2), abs=0.06)
    assert low < ratio < high


class Slow(torch.optim.SGD):
    def step(self):
        time.sleep(60)


def test_slow_and_broken_peers_are_reported(monkeypatch):
    peers = {
        "slow": (__name__, "Slow", {"lr": 0.1}),
        "absent": ("no_such_library", "Muon", {}),
        "torch.optim.AdamW": ("torch.optim", "AdamW", {"lr": 0.1}),
    }
    monkeypatch.setattr(bench, "PEERS", peers)
    began = time.perf_counter()
    measured = bench_optimizer([(1, 4, 4)], dtypes=["float32"], rounds=2, limit=0.1)
    assert time.perf_counter() - began < 30
    assert measured["missing"] == {
        "slow": "TimeoutError: its first step takes more than 0.1 s",
        "absent": "ModuleNotFoundError: No module named 'no_such_library'",
    }
    assert [row.label for row in measured["rows"]][-1] == "torch.optim.AdamW"


def test_step_without_q_orthogonalizes_nothing(monkeypatch):
    calls = []
    whole = engine.orthogonalize_
    monkeypatch.setattr(
        engine, "orthogonalize_", lambda *args: calls.append(args[0].shape) or whole(*args)
    )
    measured = bench_optimizer([(2, 4, 4)], dtypes=["float32"], rounds=2, peers=False)
    assert calls == [(2, 4, 4)] * 3 * (1 + 2)  # three rules; a warm-up and two rounds
    assert all(row.rest > 0 for row in measured["rows"])


def test_train_bench_has_mfu_where_the_device_has_a_data_sheet(monkeypatch):
    sizes = {"depth": 1, "width": 32, "head_dim": 16, "context": 16, "vocab_size": 64}
    training = {"tokens": 1024, "batch_tokens": 32, "micro_batch": 2, "precision": "auto"}
    config = Config.from_dict(
        {
            "name": "t",
            "model": sizes,
            "data": {"train": "none"},
            "training": {**training, "compile": False},
        }
    )
    without = train.bench_train(config, rounds=2)
    assert without["rows"][0].mfu is None
    assert without["dtype"] == {"bf16": "bfloat16", "fp32": "float32"}[this_device().precision]
    monkeypatch.setattr(train, "this_device", lambda: DEVICES["h100"])
    text = train.report(config, rounds=2, telemetry=False, as_json=False)
    measured = json.loads(train.report(config, rounds=2, telemetry=False, as_json=True))
    [row] = measured["rows"]
    assert row["mfu"] == pytest.approx(row["share"] * measured["matmul"] / DEVICES["h100"].peak)
    header, cells = (text.splitlines()[at].split(" | ") for at in (3, 5))
    assert len(header) == len(cells)
    assert cells[header.index("MFU")] == "0%"


def test_train_bench_measures_experts_beside_the_dense_model():
    command = [
        "bench",
        "train",
        "configs/small/hyperp_moe.yaml",
        "--rounds",
        "2",
        "--telemetry",
        "--json",
    ]
    sizes = [
        "model.vocab_size=64",
        "model.context=32",
        "training.micro_batch=2",
        "parameterization.base.batch_tokens=64",
    ]
    measured = json.loads(
        launch(command + [part for size in sizes for part in ("--set", size)]).stdout
    )
    dense, experts = measured["rows"]
    assert (dense["label"], experts["label"]) == ("dense", "experts")
    assert dense["active"] == dense["parameters"] < experts["parameters"]
    assert experts["active"] - dense["active"] == 2 * 15 * 64  # the routers
    assert dense["ratio"] is None
    assert experts["ratio"][1] <= experts["ratio"][0] <= experts["ratio"][2]
    for row in (dense, experts):
        assert row["peak"] == pytest.approx(row["planned"], rel=0.1)
        assert row["tokens_per_second"] == pytest.approx(64 / row["seconds"])
        assert row["batch"] == pytest.approx(
            49 * row["optimizer"] * row["tokens_per_second"], abs=1
        )
    assert measured["telemetry"].keys() == {"dense", "experts"}
    assert measured["telemetry"]["dense"]["share"] == pytest.approx(
        (measured["telemetry"]["dense"]["ratio"][0] - 1) / 10
    )
