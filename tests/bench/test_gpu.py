"""Every check of the GPU protocol runs on a CPU in small sizes; what needs CUDA is not tested."""

import json

import pytest
import torch
from typer.testing import CliRunner

from archscale import cli
from archscale.bench.gpu import CHECKS, SHAPES, Bench, listing, phases, run_checks, values_of
from archscale.bench.timing import GPU_ROWS, gpu_matmul_rows
from archscale.bench.workload import Workload
from archscale.config import Config, load_config
from archscale.errors import ArchscaleError
from tests.commands import ROOT

CPU = torch.device("cpu")
ROWS = {  # check → labels of rows, and what each of them has
    "attention": ({"causal", "window", "document mask", "Z-value"}, "forward, ms"),
    "kernel": ({"1 × 64×64"}, "relative error"),
    "smoke": ({"dense", "experts", "muonh", "float32 beside the CPU"}, "case"),
    "mfu": (
        {"as it is", "logits of 83 tokens at a time", "logits of 8192 tokens at a time"},
        "head and loss, ms",
    ),
    "optimizer": ({"orscale_lm", "muonh", "adamw"}, "without Q, ms"),
    "moe": ({"dense", "fine experts", "fine experts, accumulation 4"}, "forward, ms"),
    "hf": ({"ours, muonh", "Qwen3, bf16 autocast"}, "tokens/s"),
}


@pytest.fixture
def single_thread():
    """A busy machine takes many times as long for small sizes on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "check", [pytest.param(name, marks=[pytest.mark.slow] * (name == "smoke")) for name in CHECKS]
)
def test_a_check_runs_on_a_cpu(check, single_thread):
    command = ["bench", "gpu", check, "--tiny", "--repeats", "2", "--micro-batch", "2", "--json"]
    done = CliRunner().invoke(cli.app, command)
    assert done.exit_code == 0, done.output
    rows = {row["case"]: row for row in json.loads(done.stdout)["checks"][check]}
    labels, key = ROWS[check]
    assert labels <= rows.keys()
    assert all(key in rows[label] for label in labels)
    assert not any("failed" in row for row in rows.values())
    assert all(f"{label}: " in done.stderr for label in labels)
    if check == "kernel":
        assert rows["1 × 64×64"]["relative error"] < 1e-2
    if check == "smoke":
        assert rows["float32 beside the CPU"]["largest difference of the loss in 10 steps"] == 0
        assert all(row["sixth loss"] < row["first loss"] for row in list(rows.values())[:-1])


def test_a_case_that_fails_is_a_row_and_the_exit_status(monkeypatch):
    def check(bench):
        bench.case("bad", lambda: {"ms": 1 / 0})
        bench.case("good", lambda: {"ms": 1.5})

    monkeypatch.setitem(CHECKS, "kernel", check)
    done = CliRunner().invoke(cli.app, ["bench", "gpu", "kernel", "--tiny"])
    assert done.exit_code == 1
    assert "ZeroDivisionError: division by zero (test_gpu.py:" in done.stdout
    assert "| good | – | 1.5 |" in done.stdout
    assert "good: ms 1.5" in done.stderr


def test_without_a_gpu_the_sizes_are_refused():
    with pytest.raises(ArchscaleError, match=r"no CUDA device .*--tiny"):
        run_checks(["kernel"], Bench(CPU))


def test_the_protocol_lists_the_checks_in_their_order():
    rows = [line.split("|")[1].strip() for line in listing().splitlines()]
    assert rows == ["check", "---", *CHECKS]
    assert [check.value for check in cli.Check] == [*CHECKS, "all"]
    assert CliRunner().invoke(cli.app, ["bench", "gpu"]).stdout.strip() == listing()
    assert listing() in (ROOT / "archscale/bench/README.md").read_text(encoding="utf-8")


def test_the_large_model_is_the_published_one():
    published = load_config(ROOT / "configs" / "orscale" / "1b.yaml")
    mine = Config.from_dict(values_of(Bench(CPU), "1b", 4, 2, {}))
    assert mine.model == published.model
    assert mine.accumulation(1) == 2
    tiny = values_of(Bench(CPU, tiny=True), "1b", 4, 2, {"training": {"compile": True}})
    assert (tiny["model"], tiny["training"]["compile"]) == (SHAPES["tiny"], False)


def test_the_phases_are_parts_of_a_step(single_thread):
    work = Workload(values_of(Bench(CPU, tiny=True), "1b", 2, 2, {}), CPU)
    before = work.engine.module.head.forward
    times = phases(work, 3)
    parts = {"forward", "head and loss", "backward", "clip", "optimizer"}
    assert times.keys() == parts | {"step", "host"}
    assert min(times.values()) > 0
    assert times["head and loss"] < times["forward"]
    assert sum(times[p] for p in parts - {"head and loss"}) < 1.5 * times["step"]
    assert work.engine.module.head.forward == before


def test_a_gpu_multiplies_matrices_as_large_as_fit():
    assert gpu_matmul_rows(70 * 10**9, torch.bfloat16) == GPU_ROWS
    assert gpu_matmul_rows(10**8, torch.bfloat16) == 2048  # four of 17 MB
    assert gpu_matmul_rows(10**8, torch.float64) == 1024
