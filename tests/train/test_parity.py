"""One trajectory: one process, DDP, FSDP2 and HSDP give the same losses, step by step."""

import json
from pathlib import Path

import numpy as np
import pytest

from archscale.distributed import local_tensor, rank, world_size
from archscale.model.transformer import Block
from archscale.optim import engine as engine_module
from archscale.parallel import native
from tests.train.tiny import LAYOUTS, RULES, config, losses, run, tiny_data

STEPS = 50
# Rounding is amplified by orthogonalization and by steps. Weights perturbed by 1e-6, ten times what
# another order of float32 sums does, move the losses of these 50 steps by up to 4e-5; stand-ins for
# other processors (tests/README.md) by 2.5e-6.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """One-process losses by rule, computed once."""
    found: dict[str, list[float]] = {}

    def get(rule: str) -> list[float]:
        if rule not in found:
            found[rule] = losses(data, str(tmp_path_factory.mktemp("alone")), rule, STEPS)
        return found[rule]

    return get


def furthest(a: list[float], b: list[float]) -> float:
    assert len(a) == len(b) == STEPS + 1
    assert a[-2] < 0.9 * a[0]  # it learns
    return float(np.max(np.abs(np.array(a) / np.array(b) - 1)))


@pytest.mark.parametrize(
    ("layout", "rule"),
    [("fsdp2", rule) for rule in RULES]
    + [("ddp2", "orscale_lm"), ("ddp2", "adamw"), ("fsdp3", "orscale_lm"), ("hsdp4", "muonh")]
    + [
        pytest.param("ddp2", rule, marks=pytest.mark.slow)
        for rule in RULES
        if rule not in ("orscale_lm", "adamw")
    ],
)
def test_every_rule_on_every_layout(pool, data, alone, tmp_path, rule, layout):
    world, sections = LAYOUTS[layout]
    curves = pool(world).run(losses, data, str(tmp_path), rule, STEPS, **sections)
    assert max(furthest(curve, alone(rule)) for curve in curves) < TOLERANCE


@pytest.mark.parametrize("micro_batch", [3, pytest.param(12, marks=pytest.mark.slow)])
def test_accumulation_changes_nothing(pool, data, alone, tmp_path, micro_batch):
    """The same samples in other micro-batches, on one process and under DDP and FSDP2."""
    training = {"micro_batch": micro_batch}
    curve = losses(data, str(tmp_path / "one"), "orscale_lm", STEPS, training=training)
    assert furthest(curve, alone("orscale_lm")) < TOLERANCE
    for layout in ("ddp2", "fsdp2"):
        world, sections = LAYOUTS[layout]
        folder = str(tmp_path / layout)
        curves = pool(world).run(
            losses, data, folder, "orscale_lm", STEPS, **sections, training=training
        )
        assert max(furthest(curve, alone("orscale_lm")) for curve in curves) < TOLERANCE


OPTIONS = {
    "untied": {"model": {"tied_embeddings": False}},
    "recompute": {"training": {"activation_checkpoint": "block"}},
    "no reshard": {"parallel": {"reshard_after_forward": False}},
    "documents": {"data": {"document_mask": True}},
    "window": {"model": {"window": 5}},
    "per head": {"optimizer": {"matrix": {"rule": "orscale_lm", "per_head": True}}},
    "fused": {
        "optimizer": {"matrix": {"rule": "orscale_lm", "fused_qkv": True, "fused_gate_up": True}}
    },
    "bfloat16 momentum": {
        "optimizer": {"matrix": {"rule": "orscale_lm", "momentum_dtype": "bfloat16"}}
    },
    "relu2, depth-mup": {"model": {"mlp": "relu2", "depth_mup": True}},
}


# Each option on one of the two layouts; on the other one it is a slow test. Resharding is FSDP2's.
CASES = [
    pytest.param(
        layout, option, marks=() if layout == ("ddp2", "fsdp2")[number % 2] else pytest.mark.slow
    )
    for number, option in enumerate(OPTIONS, start=1)
    for layout in ("ddp2", "fsdp2")
    if (layout, option) != ("ddp2", "no reshard")
]


@pytest.mark.parametrize(("layout", "option"), CASES)
def test_options_on_two_ranks(pool, data, tmp_path, layout, option):
    expected = losses(data, str(tmp_path / "one"), "orscale_lm", 10, **OPTIONS[option])
    world, sections = LAYOUTS[layout]
    merged = {
        **OPTIONS[option],
        "parallel": {**sections.get("parallel", {}), **OPTIONS[option].get("parallel", {})},
    }
    for curve in pool(world).run(losses, data, str(tmp_path / layout), "orscale_lm", 10, **merged):
        np.testing.assert_allclose(curve, expected, rtol=1e-5)


def stream_dtypes(data: str, folder: str) -> set[str]:
    """Dtypes of the residual stream between blocks while training in bf16."""
    seen = set()
    original = Block.forward

    def watched(self, x, rope, mask, probe=None):
        out = original(self, x, rope, mask, probe)
        seen.update({str(x.dtype), str(out[0].dtype), str(rope[0].dtype)})
        return out

    Block.forward = watched
    try:
        losses(data, folder, "orscale_lm", 2, training={"precision": "bf16"})
    finally:
        Block.forward = original
    return seen


def test_the_residual_stream_stays_float32_in_bf16(pool, data, tmp_path):
    for seen in pool(2).run(stream_dtypes, data, str(tmp_path / "r")):
        assert seen == {"torch.float32"}


def test_bf16_curves_agree_statistically(pool, data, tmp_path):
    bf16 = {"precision": "bf16"}
    expected = losses(data, str(tmp_path / "one"), "orscale_lm", 10, training=bf16)
    for layout in ("ddp2", "fsdp2"):
        world, sections = LAYOUTS[layout]
        for curve in pool(world).run(
            losses, data, str(tmp_path / layout), "orscale_lm", 10, **sections, training=bf16
        ):
            np.testing.assert_allclose(curve, expected, rtol=5e-3)


def nan_run(data: str, folder: str) -> list[dict]:
    """Step 3's gradient of one matrix is NaN on the last rank."""
    original, taken = native.clip_gradients, [0]

    def poisoned(grads, max_norm, group):
        grads = list(grads)
        taken[0] += 1
        if taken[0] == 3 and rank() == world_size() - 1:
            local_tensor(grads[4]).view(-1)[0] = float("nan")
        return original(grads, max_norm, group)

    native.clip_gradients = poisoned
    try:
        return run(config(data, "orscale_lm", 8), folder)
    finally:
        native.clip_gradients = original


def test_a_nan_gradient_does_not_reach_the_weights(pool, data, tmp_path):
    curves = [
        nan_run(data, str(tmp_path / "one")),
        *pool(2).run(nan_run, data, str(tmp_path / "two")),
    ]
    for lines in curves:
        assert lines[2]["grad_norm"] is None
        assert lines[2]["event"] == "non-finite grad_norm"
        assert all(line["loss"] is not None for line in lines)
        assert lines[-1]["loss"] < lines[0]["loss"]


def count_orthogonalizations(data: str, folder: str) -> int:
    """Matrices that this rank orthogonalizes in five steps of four micro-batches."""
    original, count = engine_module.orthogonalize_, [0]

    def counted(stack, *args):
        count[0] += len(stack)
        return original(stack, *args)

    engine_module.orthogonalize_ = counted
    try:
        losses(data, folder, "muonh", 5, training={"micro_batch": 3})
    finally:
        engine_module.orthogonalize_ = original
    return count[0]


def test_every_matrix_is_orthogonalized_once_a_step(pool, data, tmp_path):
    """Matrices × steps, whatever the accumulation; the ranks share them."""
    matrices = 2 * (4 + 1 + 2 + 1)  # per block: q k v gate, out, gate up, down
    assert count_orthogonalizations(data, str(tmp_path / "one")) == 5 * matrices
    assert sum(pool(2).run(count_orthogonalizations, data, str(tmp_path / "two"))) == 5 * matrices


def test_the_manifest_is_the_golden_one(data, tmp_path):
    """Parameter → role → rule; a change of this file is a change of what trains how."""
    run(config(data, "orscale_lm", 1, model={"tied_embeddings": False}), str(tmp_path / "r"))
    rows = json.loads((tmp_path / "r" / "manifest.json").read_text())
    found = "".join(
        f"{r['parameter']}  {r['role']}  {r['rule']}  {' '.join(r['matrices'])}".rstrip() + "\n"
        for r in rows
    )
    assert found == (Path(__file__).parent / "manifest.golden").read_text()
