"""The plan: figures that agree with what runs, every problem at once, every config of the repository."""

import json
import re
from pathlib import Path

import pytest

from archscale.config import Config, load_config
from archscale.errors import ConfigError
from archscale.optim.engine import STATE_OF
from archscale.optim.rules import RULES
from archscale.scaling.devices import DEVICES, Device, find_device
from archscale.scaling.plan import ELEMENTWISE, INITIALIZATION, STATE_BUFFERS, make_plan
from archscale.scaling.plan_text import render
from archscale.train.preflight import plan_config, refuse

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted(path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.yaml"))
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


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_every_config_of_the_repository_can_be_planned(path):
    """On 64 H100 (8 for OrScale's small batches), or on two processes of a CPU; what is not built yet is the only problem."""
    small = path.parts[1] not in ("hyperp", "orscale")
    loaded = load_config(ROOT / path, ["model.vocab_size=4096"] if small else [])
    ranks = 2 if small else 8 if "orscale" in path.parts else 64
    plan = make_plan(loaded, world_size=ranks, device=None if small else H100)
    assert {p.where for p in plan.problems} == ({"model.moe"} if loaded.model.moe else set()), whats(plan)
    text = render(plan.as_dict())
    assert all(title in text for title in ("\nmodel", "\nparameterization", "\ntraining", "\nmemory", "\ndisk"))
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
    count = lambda d, w: 12 * w * w * d + 2 * w * V + 2 * w * d * (2 * d) * 128 + 2 * w * d * 4 * 128  # noqa: E731
    for family in ("dense", "moe"):
        found = make_plan(load_config(ROOT / f"configs/hyperp/{family}_d{depth}.yaml")).figures
        assert found["model"]["published_parameters"] == count(depth, w)
        assert found["training"]["tokens"] == 10_400_000_000 * count(depth, w) // 208_142_336


def test_every_problem_at_once():
    plan = make_plan(
        config(
            model={"moe": {"top_k": 4}, "depth_mup": True},
            parameterization={"kind": "hyperp"},
            optimizer={"matrix": {"rule": "muon"}, "element": {"kind": "lion"}},
            training={"micro_batch": 3},
        ),
        world_size=2,
    )
    assert [p.where for p in plan.problems] == [
        "model.moe", "optimizer.matrix.rule", "optimizer.element.kind", "training.micro_batch",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"\(and 3 more problems: `archscale plan` lists them\)$"):
        refuse(plan)
    assert [p["where"] for p in plan.as_dict()["problems"]] == [p.where for p in plan.problems]
    assert "model" in plan.figures  # what can be known is shown all the same


def test_what_does_not_fit_is_refused_with_a_remedy_that_helps():
    tiny = Device("tiny", 1e12, make_plan(config()).figures["memory"]["peak"] - 1, "made up")
    plan = make_plan(config(), device=tiny)
    assert plan.figures["devices"][0]["fits"] is False
    (problem,) = plan.problems
    assert problem.where == "training.micro_batch"
    assert problem.remedy == "set training.micro_batch: 1, or training.activation_checkpoint: block"
    less = make_plan(config(training={"micro_batch": 1}), device=tiny).figures["memory"]["peak"]
    least = make_plan(config(training={"activation_checkpoint": "block"}), device=tiny).figures["memory"]["peak"]
    assert max(less, least) < plan.figures["memory"]["peak"]
    assert not make_plan(config(), device=Device("big", 1e12, 10**9, "made up")).problems


def test_time_is_work_over_speed():
    (row,) = make_plan(config(), world_size=2, device=Device("x", 1e12, None, "made up"), mfu=0.25).figures["devices"]
    plan = make_plan(config(), world_size=2)
    assert row["seconds"] == pytest.approx(plan.figures["flops"]["total"] / (2 * 0.25 * 1e12))
    assert row["fits"] is None


def test_an_unknown_device_is_not_guessed():
    assert find_device("NVIDIA H100 80GB HBM3") is H100
    assert find_device("NVIDIA A100-SXM4-80GB") is DEVICES["a100"]
    unknown = find_device("Tesla K80")
    assert (unknown.peak, unknown.memory) == (None, None)
    plan = make_plan(config(), device=unknown)
    assert plan.figures["devices"][0]["seconds"] is None
    assert "Tesla K80  n/a at 40% of peak n/a, memory n/a" in render(plan.as_dict())


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


def test_an_unknown_vocabulary_is_taken_from_the_data_or_is_a_problem(tmp_path):
    plan = plan_config(config(model={"vocab_size": None}, data={"train": str(tmp_path / "none")}))
    assert "no such dataset directory" in plan.problems[0].what
    assert "or give model.vocab_size" in plan.problems[0].remedy
    assert "memory" not in plan.figures


def test_tables_agree_with_the_optimizer():
    for name, rule in RULES.items():
        assert STATE_BUFFERS.get(name, 1) == len(STATE_OF[rule.direction])
        assert (name in ELEMENTWISE) == (rule.direction != "orthogonal")


def test_initialization_of_the_plan_is_the_models():
    from archscale.model.transformer import EMBEDDING_STD, HEAD_STD

    assert INITIALIZATION["embedding"] == f"N(0, {EMBEDDING_STD:g})".replace("0.0001", "1e-4").replace("1e-04", "1e-4")
    assert INITIALIZATION["head"] == INITIALIZATION["tied"] == f"N(0, {HEAD_STD:g})"
