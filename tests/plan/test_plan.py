"""The plan: figures that agree with what runs, every problem at once, every config of the
repository."""

import json
import math
import re
from fractions import Fraction
from itertools import product
from pathlib import Path

import pytest
import torch

from archscale.config import Config, load_config
from archscale.data.packing_index import PackedSize
from archscale.errors import ConfigError
from archscale.plan.devices import DEVICES, RESERVED, Device, find_device, this_device
from archscale.plan.passes import SourceTokens, data_figures
from archscale.plan.plan import kept_checkpoints, make_plan
from archscale.plan.preflight import plan_config, refuse
from archscale.plan.text import reading_text, render

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted(path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.yaml"))
CONFIGS = [
    path for path in CONFIGS if path.parts[1] not in ("sweeps", "studies")
]  # not runs, tested on their own
H100 = DEVICES["h100"]


def config(**sections) -> Config:
    base = {
        "name": "t",
        "model": {"depth": 2, "width": 64, "head_dim": 16, "context": 128, "vocab_size": 512},
        "data": {"train": "d"},
        "training": {"tokens": 10**6, "batch_tokens": 1024, "micro_batch": 2, "precision": "fp32"},
    }
    for key, value in sections.items():
        base[key] = {**base.get(key, {}), **value}
    return Config.from_dict(base)


def whats(plan) -> str:
    return " | ".join(f"{p.where}: {p.what}: {p.remedy}" for p in plan.problems)


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        (H100, "bf16"),
        (Device("cpu", None, 10**12, "", bf16=True), "bf16"),
        (Device("cpu", None, 10**12, "", bf16=False), "fp32"),
        (None, "bf16"),  # as on all that are compared
    ],
)
def test_a_device_decides_the_precision(device, expected):
    given, auto = (
        make_plan(config(training={"precision": precision}), device=device)
        for precision in (expected, "auto")
    )
    assert auto.config == given.config
    assert auto.figures["memory"] == given.figures["memory"]
    assert f"  {expected}, chosen by the device\n" in render(auto.as_dict())
    assert f"  {expected}\n" in render(given.as_dict())


@pytest.mark.parametrize("units", [(), ("_is_amx_tile_supported",), ("_is_avx512_bf16_supported",)])
def test_a_processor_without_bf16_units_computes_in_float32(monkeypatch, units):
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name in units)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    expected = "bf16" if units else "fp32"
    assert [this_device().precision, find_device("cpu").precision] == [expected] * 2


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_every_config_of_the_repository_can_be_planned(path):
    """On 64 H100 (8 for OrScale's small batches), or on two processes of a CPU."""
    small = path.parts[1] not in ("hyperp", "orscale")
    loaded = load_config(ROOT / path, ["model.vocab_size=4096"] if small else [])
    ranks = 2 if small else 8 if "orscale" in path.parts else 64
    plan = make_plan(loaded, world_size=ranks, device=None if small else H100)
    assert not plan.problems, whats(plan)
    text = render(plan.as_dict())
    assert all(
        title in text
        for title in ("\nmodel", "\nparameterization", "\ntraining", "\nmemory", "\ndisk")
    )
    assert not re.search(r"\bnan\b|\bNone\b", text)
    json.dumps(plan.as_dict())


@pytest.mark.parametrize(
    ("family", "depth", "tokens"),
    [
        ("dense", 8, 10_400_000_000),
        ("dense", 12, 28_488_664_987),
        ("moe", 8, 10_400_000_000),
        ("moe", 12, 28_488_664_987),
    ],
)
def test_published_families_have_their_published_budgets(family, depth, tokens):
    plan = make_plan(load_config(ROOT / f"configs/hyperp/{family}_d{depth}.yaml"), world_size=64)
    assert plan.figures["training"]["tokens"] == tokens


@pytest.mark.parametrize("depth", [16, 20, 24])
def test_larger_members_follow_the_published_formula(depth):
    w, V = 128 * depth, 32000

    def count(d, w):
        return 12 * w * w * d + 2 * w * V + 2 * w * d * (2 * d) * 128 + 2 * w * d * 4 * 128

    for family in ("dense", "moe"):
        found = make_plan(load_config(ROOT / f"configs/hyperp/{family}_d{depth}.yaml")).figures
        assert found["model"]["published_parameters"] == count(depth, w)
        assert found["training"]["tokens"] == 10_400_000_000 * count(depth, w) // 208_142_336


def test_every_problem_at_once():
    plan = make_plan(
        config(
            model={"moe": {"top_k": 4}, "depth_mup": True},
            parallel={"expert": 2},
            parameterization={
                "kind": "hyperp",
                "base": {
                    "depth": 2,
                    "width": 64,
                    "lr": 0.01,
                    "tokens": 10**6,
                    "batch_tokens": 1024,
                },
            },
            optimizer={"matrix": {"rule": "muon"}, "element": {"kind": "lion"}},
            training={"micro_batch": 3},
        ),
        world_size=2,
    )
    assert [p.where for p in plan.problems] == [
        "optimizer.matrix.rule",
        "optimizer.element.kind",
        "parallel.expert",
        "training.micro_batch",
    ]
    with pytest.raises(ConfigError, match=r"\(and 3 more problems: `archscale plan` lists them\)$"):
        refuse(plan)
    assert [p["where"] for p in plan.as_dict()["problems"]] == [p.where for p in plan.problems]
    assert "model" in plan.figures  # what can be known is shown all the same


def test_what_does_not_fit_is_refused_with_a_remedy_that_helps():
    eager = {"training": {"compile": False}}
    peak = make_plan(config(**eager)).figures["memory"]["peak"]
    tiny = Device("tiny", 1e12, peak - 1 + RESERVED, "made up")
    plan = make_plan(config(**eager), device=tiny)
    assert plan.figures["devices"][0]["fits"] is False
    (problem,) = plan.problems
    assert problem.where == "training.micro_batch"
    assert problem.remedy == "set training.micro_batch: 1, or training.activation_checkpoint: block"
    less = make_plan(config(training={"micro_batch": 1}), device=tiny).figures["memory"]["peak"]
    least = make_plan(config(training={"activation_checkpoint": "block"}), device=tiny).figures[
        "memory"
    ]["peak"]
    assert max(less, least) < peak
    assert not make_plan(
        config(**eager), device=Device("big", 1e12, peak + RESERVED, "made up")
    ).problems
    # A compiled model keeps less: refused only when what it holds beside the activations is too
    # much already.
    peak = make_plan(config()).figures["memory"]["peak"]
    tight = Device("tight", 1e12, peak - 1 + RESERVED, "made up")
    compiled = make_plan(config(), device=tight)
    assert compiled.problems == []
    (advice,) = compiled.advice
    assert " a device (eager; a compiled model keeps less) do not fit into the " in advice.what
    assert make_plan(config(), device=Device("nothing", 1e12, 1000, "made up")).problems


def test_figures_worked_by_hand():
    """Depth 1, width 4, one head of 4, relu² of 4, context 8, vocabulary 10, tied, no norms of q
    and k, no gate; one step."""
    c = config(
        model={
            "depth": 1,
            "width": 4,
            "head_dim": 4,
            "mlp": "relu2",
            "mlp_ratio": 1,
            "context": 8,
            "vocab_size": 10,
            "tied_embeddings": True,
            "qk_norm": False,
            "gated_attention": False,
        },
        optimizer={"matrix": {"rule": "muonh", "momentum_dtype": "bfloat16"}},
        training={
            "tokens": 64,
            "batch_tokens": 16,
            "micro_batch": 1,
            "precision": "fp32",
            "activation_checkpoint": "block",
        },
        checkpoint={"keep": 2},
    )
    f = make_plan(c, device=Device("x", 1e6, None, "made up"), mfu=0.5).figures
    # Six matrices of 4 × 4 (q, k, v, out, up, down), the embedding of 10 × 4, three norms of 4.
    assert f["model"]["parameters"] == {
        "total": 148,
        "active": 148,
        "embedding": 40,
        "head": 0,
        "matrix": 96,
        "vector": 12,
        "router": 0,
    }
    # Twice each matrix element; scores and values 4 · 4 · (mean of 4.5 visible keys); head 2 · 40.
    forward = {"projections": 128.0, "mlp": 64.0, "attention": 72.0, "head": 80.0}
    assert f["flops"]["forward_per_token"] == forward
    assert f["flops"]["training_per_token"] == 3 * 344
    assert f["flops"]["total"] == 3 * 344 * 64
    assert f["flops"]["recomputation_per_token"] == 264
    # Five iterations of 4 m² n + 2 m³ on each of the six.
    assert f["flops"]["optimizer_per_step"] == 6 * 5 * 6 * 64
    assert f["flops"]["optimizer_share"] == pytest.approx(11520 / (1032 * 16))
    executed = (1032 + 264) * 64 + 4 * 11520
    assert f["flops"]["executed"] == executed
    assert f["devices"][0]["seconds"] == pytest.approx(executed / 0.5e6)
    assert f["devices"][0]["step_seconds"] == pytest.approx(executed / 0.5e6 / 4)
    # float32 weights; bfloat16 momentum of matrices, two float32 moments of the rest.
    each = 4 * 148 + 2 * 96 + 8 * 52
    # Of one step there is one checkpoint; `keep` is 2.
    copy = 4 * 148 + 2 * 96 + 8 * 52
    assert f["checkpoint"] == {"bytes": each, "kept": 1, "disk": 2 * each, "host_copy": copy}
    assert f["memory"]["terms"]["parameters"] == 592
    assert f["memory"]["terms"]["optimizer_state"] == 608
    assert f["communication"] == {"parameters": 0, "gradients": 0, "optimizer": 0, "experts": 0}


def test_checkpoints_that_are_kept():
    """Counted one by one; and of billions of steps, which nobody could count."""
    for every, keep, spared, steps in product((1, 3, 4), (1, 2, 9), (None, 1, 2, 6), range(1, 27)):
        saved = sorted({*range(every, steps + 1, every), steps})
        kept = {*saved[-keep:], *(step for step in saved if spared and step % spared == 0)}
        assert kept_checkpoints(every, keep, spared, steps) == len(kept), (every, keep, spared)
    assert kept_checkpoints(1, 10**9, None, 10**12) == 10**9
    assert kept_checkpoints(1, 3, 10**6, 10**12 + 1) == 10**6 + 2


def test_communication_sets_a_bandwidth():
    plan = make_plan(config(), world_size=2, device=Device("x", 1e12, None, "made up"), mfu=0.25)
    (row,) = plan.figures["devices"]
    sent = plan.figures["communication"]
    assert sent["parameters"] > 0
    assert row["bandwidth"] == pytest.approx(sum(sent.values()) / row["step_seconds"])
    assert row["seconds"] == pytest.approx(plan.figures["flops"]["executed"] / (2 * 0.25 * 1e12))
    assert row["fits"] is None


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("h100", "h100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H200", "h200"),
        ("Tesla K80", None),
        ("NVIDIA RTX A1000 Laptop GPU", None),
        ("NVIDIA A100-PCIE-40GB", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GB200", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ],
)
def test_a_device_is_known_exactly_or_not_at_all(name, known):
    found = find_device(name)
    assert found == DEVICES[known] if known else (found.peak, found.memory) == (None, None)


def test_an_unknown_device_is_not_guessed():
    plan = make_plan(config(), device=find_device("Tesla K80"))
    assert plan.figures["devices"][0]["seconds"] is None
    assert "Tesla K80  n/a at 40% of peak n/a, memory n/a (not in the table: a100, h100" in render(
        plan.as_dict()
    )


@pytest.mark.parametrize(
    ("expert", "moe", "world", "words"),
    [
        (
            3,
            {"sparsity": 4, "top_k": 3, "shared_expert": False},
            4,
            "expert 3 does not divide the 4 ranks of a shard group.*set it to 2 or 4",
        ),
        (
            4,
            {"sparsity": 4, "top_k": 4},
            4,
            "expert 4 does not divide the 15 routed experts.*set it to 1",
        ),
        (2, None, 2, "a model without experts has none to spread.*set it to 1"),
    ],
)
def test_expert_parallelism_that_does_not_fit(expert, moe, world, words):
    plan = make_plan(
        config(model={"moe": moe, "mlp_ratio": 3}, parallel={"expert": expert}), world_size=world
    )
    assert re.search(words, whats(plan))


def test_unusual_choices_are_advised_against_and_run():
    base = {"depth": 2, "width": 64, "lr": 0.01, "tokens": 10**6, "batch_tokens": 1024}
    plan = make_plan(
        config(
            model={"moe": {"top_k": 4, "sqrt_gate": False}},
            parameterization={"kind": "hyperp", "base": base},
            schedule={"warmup_tokens": 1000},
        )
    )
    assert [a.where for a in plan.advice] == [
        "model.depth_mup",
        "model.moe.sqrt_gate",
        "schedule.warmup_tokens",
    ]


def test_a_ramp_that_changes_nothing_is_refused():
    for ramp in ({"batch_ramp_tokens": 1000}, {"batch_ramp_tokens": 5000, "batch_ramp_stages": 1}):
        with pytest.raises(ConfigError, match="changes no batch"):
            config(schedule=ramp)


def test_no_budget_keeps_no_model_from_being_shown():
    c = config(
        model={"width": 48, "heads": 5},
        training={"tokens": "auto"},
        parameterization={
            "kind": "hyperp",
            "base": {"depth": 2, "width": 64, "lr": 1, "tokens": 9, "batch_tokens": 1024},
        },
    )
    plan = make_plan(c)
    assert [p.where for p in plan.problems] == ["parameterization.base.heads"]
    assert set(plan.figures) == {"model"}
    assert "parameters" in render(plan.as_dict())


def test_steps_and_batches_of_a_ramp():
    plan = make_plan(config(schedule={"batch_ramp_tokens": 102400, "batch_ramp_stages": 4}))
    training = plan.figures["training"]
    assert training["batch_sizes"] == [2, 4, 6, 8]
    assert training["steps"] > 10**6 / 1024
    assert abs(training["trained_tokens"] - 10**6) <= 1024


def test_vocabulary_advice():
    plan = make_plan(config(model={"vocab_size": 50257}, training={"precision": "bf16"}))
    assert not plan.problems
    assert [a.remedy for a in plan.advice] == ["set it to 50304; the rest is padding"]


def test_a_constant_gate_is_advised_against():
    assert [a.remedy for a in make_plan(config(model={"moe": {"top_k": 2}})).advice] == [
        "set it to at least 3"
    ]
    for moe in ({"top_k": 4}, {"top_k": 2, "shared_expert": False}):
        assert not make_plan(config(model={"moe": moe})).advice


def test_an_unknown_vocabulary_is_taken_from_the_data_or_is_a_problem(tmp_path):
    nowhere = {"train": str(tmp_path / "none")}
    plan = plan_config(config(model={"vocab_size": None}, data=nowhere))
    (problem,) = plan.problems
    assert problem.what == "no data set"
    assert problem.remedy.endswith(", or give model.vocab_size")
    assert "memory" not in plan.figures
    plan = plan_config(config(data=nowhere))
    assert (plan.problems, plan.advice[0].what) == ([], "no data set")


def test_initialization_of_the_plan_is_the_models():
    from archscale.model.transformer import EMBEDDING_STD, NORMAL_STD

    def starts(**model) -> list[str]:
        roles = plan_config(config(model=model)).figures["parameterization"]["roles"]
        return [roles[role]["initialization"] for role in roles]

    normal, small = f"N(0, {NORMAL_STD:g})", f"N(0, 1e{math.log10(EMBEDDING_STD):.0f})"
    assert starts(tied_embeddings=False) == ["U(±1/√fan_in)", small, normal, "1"]
    assert starts(tied_embeddings=True) == ["U(±1/√fan_in)", normal, "1"]
    ends = ", of the ends of branches / √(2 depth)"
    assert starts(tied_embeddings=False, init="normal") == [normal + ends, normal, normal, "1"]


def test_passes_are_over_windows_and_a_data_set_counts_once():
    """101 tokens are 10 windows of 10; two sources that share them repeat the same text."""
    half, quarter = Fraction(1, 2), Fraction(1, 4)
    figures = data_figures(
        [
            SourceTokens("a", half, 101, path="x"),
            SourceTokens("b", quarter, 101, path="x"),
            SourceTokens("c", quarter, 1009, path="y"),
        ],
        4400,
        10,
    )
    assert figures["tokens"] == 1110
    assert figures["passes"] == 4
    assert [row["passes"] for row in figures["sources"]] == [33, 33, 1.1]
    assert [row["drawn"] for row in figures["sources"]] == [2200, 1100, 1100]
    packed = PackedSize(windows=11, context=10, pieces=20, targets=100)
    full = data_figures([SourceTokens("", Fraction(1), 101, packed)], 220, 10)
    assert (full["passes"], full["real_tokens"]) == (2, 200)  # of 220 positions 20 are padding
    said = "reads 200 tokens, 4.0 for each parameter, and the data 2 times"
    assert reading_text(full, 50) == said
    assert data_figures([SourceTokens("", Fraction(1), 10)], 220, 10)["passes"] is None
