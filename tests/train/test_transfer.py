"""The parameterizations and the growing batch in real runs."""

import json

import numpy as np
import pytest
import torch

from archscale.config import Config
from archscale.errors import ConfigError
from archscale.model import initialize
from archscale.optim.roles import assign_roles
from archscale.plan.transfer import resolve, transfer_of
from archscale.train.build import build_model, build_optimizer
from archscale.train.trainer import train
from tests.train.tiny import config, crash_after, run, tiny_data

BASE = {"depth": 1, "width": 48, "lr": 0.003, "tokens": 4000, "batch_tokens": 768}
HYPERP = {
    "model": {"tied_embeddings": False, "depth_mup": True},
    "parameterization": {"kind": "hyperp", "base": BASE},
    "schedule": {"batch_ramp_tokens": 1536, "batch_ramp_stages": 2},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("data"))


def growing(data: str, **sections) -> Config:
    return config(data, "muonh", 12, **{**HYPERP, "checkpoint": {"every": 3}, **sections})


def curve(lines: list[dict]) -> np.ndarray:
    return np.array([(line["loss"], line["lr"], line["tokens"]) for line in lines])


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    # Weights perturbed by 1e-6, ten times what another order of float32 sums does, move these
    # losses by 7e-7.
    np.testing.assert_allclose(found[:, 0], expected[:, 0], rtol=5e-6)
    assert np.array_equal(found[:, 1:], expected[:, 1:])


def test_hyperp_and_a_growing_batch_on_any_ranks_and_after_a_crash(pool, data, tmp_path):
    """12 sequences a step until 96 are seen, then 24; the crash falls into the ramp, the resumption
    after it.

    Tied, unlike HyperP, because a perturbation by 1e-6 moves the untied model's losses by 5e-4 (see
    `tiny.config`).
    """
    made = growing(data, model={"tied_embeddings": True, "depth_mup": True})
    alone = curve(run(made, str(tmp_path / "alone")))
    assert alone[:, 2].tolist() == [
        12 * 16 * min(n, 8) + 24 * 16 * max(0, n - 8) for n in range(1, 17)
    ]
    for lines in pool(2).run(run, made, str(tmp_path / "fsdp")):
        assert_same(curve(lines), alone)
    folder = str(tmp_path / "moving")
    crash_after(made, folder, 7)
    for lines in pool(2).run(run, made, folder):
        assert_same(curve(lines), alone)


def test_rates_follow_size_tokens_and_the_batch_of_each_step(data, tmp_path):
    lines = run(growing(data, schedule={**HYPERP["schedule"], "kind": "constant"}), str(tmp_path))
    peak = 0.003 * (1 / 2) ** 0.5 * (12 * 24 * 16 / 4000) ** -0.32 * (384 / 768) ** 0.5
    expected = [peak * (0.5**0.5 if n < 8 else 1) for n in range(16)]
    np.testing.assert_allclose([line["lr"] for line in lines], expected, rtol=1e-12)


def test_the_head_is_on_the_sphere(data, tmp_path):
    """Every matrix and the head keep their norm; the embedding does not."""
    run(growing(data), str(tmp_path))
    rows = {row["parameter"]: row for row in json.loads((tmp_path / "manifest.json").read_text())}
    assert (rows["head.weight"]["rule"], rows["embedding.weight"]["rule"]) == ("adamh", "adamw")
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["optimizer/weight_norm_drift"] < 1e-6
    assert last["optimizer/relative_update_max"] == pytest.approx(last["lr"], rel=0.02)


def test_auto_budget_and_plan_of_a_run(data, tmp_path):
    made = growing(
        data,
        training={
            "tokens": "auto",
            "batch_tokens": "auto",
            "micro_batch": 6,
            "precision": "fp32",
            "compile": False,
        },
        schedule={},
    )
    summary = train(made, tmp_path / "run")
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert (plan["training"]["steps"], plan["training"]["trained_tokens"]) == (
        summary["steps"],
        summary["tokens"],
    )
    assert plan["training"]["batch_tokens"] == 768
    assert plan["problems"] == []
    config_yaml = (tmp_path / "run" / "config.yaml").read_text()
    assert f"tokens: {plan['training']['tokens']}" in config_yaml
    assert train(made, tmp_path / "run")["already_done"]


def test_training_refuses_what_the_plan_refuses(data, tmp_path):
    with pytest.raises(ConfigError, match="hyperp does not know how moonlight transfers"):
        train(
            config(data, "moonlight", 10, parameterization={"kind": "hyperp", "base": BASE}),
            tmp_path / "run",
        )
    with pytest.raises(ConfigError, match=r"micro_batch 7 "):
        train(
            config(
                data,
                "muonh",
                10,
                training={
                    "tokens": 3840,
                    "batch_tokens": 384,
                    "micro_batch": 7,
                    "precision": "fp32",
                    "compile": False,
                },
            ),
            tmp_path / "run",
        )
    assert not (tmp_path / "run").exists()


def test_mup_scales_the_logits(data):
    """Half the base's width … twice it: the same weights give half the logits."""
    logits = []
    for width in (24, 12):
        base = {**BASE, "width": width}
        made = config(
            data,
            "adamw",
            10,
            parameterization={"kind": "mup++", "base": base},
            optimizer={"matrix": {"rule": "adamw"}},
        )
        resolved = resolve(made.with_vocab(300))
        model = build_model(resolved, 0, transfer_of(resolved))
        initialize(model, seed=0)
        logits.append(model(torch.arange(16)[None]).logits)
    torch.testing.assert_close(logits[1], logits[0] / 2)


def test_every_role_decays_as_the_transfer_says(data):
    made = config(
        data,
        "orscale_lm",
        10,
        model={"tied_embeddings": False},
        parameterization={"kind": "mup++", "base": {**BASE, "depth": 4}},
        optimizer={"matrix": {"rule": "orscale_lm"}, "weight_decay": 0.1},
    )
    made = resolve(made.with_vocab(300))
    model = build_model(made, 0, transfer_of(made))
    initialize(model, seed=0)
    optimizer = build_optimizer(made, assign_roles(model), transfer_of(made).roles)
    decays = {group["role"]: group["weight_decay"] for group in optimizer.param_groups}
    assert decays == {"matrix": pytest.approx(0.2), "embedding": 0.0, "head": 0.0, "vector": 0.0}
