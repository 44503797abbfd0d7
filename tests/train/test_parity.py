"""Invariant 1: one process, DDP, FSDP2 and HSDP give the same losses, step by step."""

import numpy as np
import pytest

from tests.train.tiny import LAYOUTS, RULES, losses, tiny_data

STEPS = 50
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


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rule_on_every_layout(pool, data, alone, tmp_path, rule, layout):
    world, parallel = LAYOUTS[layout]
    curves = pool(world).run(losses, data, str(tmp_path), rule, STEPS, parallel, timeout=110)
    assert max(furthest(curve, alone(rule)) for curve in curves) < TOLERANCE


@pytest.mark.parametrize("micro_batch", [1, 6])
def test_accumulation_changes_nothing(pool, data, alone, tmp_path, micro_batch):
    """F4: the same samples in other micro-batches, on one process and under DDP and FSDP2."""
    training = {"micro_batch": micro_batch}
    assert (
        furthest(losses(data, str(tmp_path / "one"), "orscale_lm", STEPS, None, training), alone("orscale_lm"))
        < TOLERANCE
    )
    for layout in ("ddp2", "fsdp2"):
        world, parallel = LAYOUTS[layout]
        curves = pool(world).run(
            losses, data, str(tmp_path / layout), "orscale_lm", STEPS, parallel, training, timeout=110
        )
        assert max(furthest(curve, alone("orscale_lm")) for curve in curves) < TOLERANCE
