"""Recorded curves see errors that all layouts share, which parity between layouts cannot."""

import numpy as np
import pytest

from archscale.model import layers
from tests.golden.curves import CASES, curve, data, recorded

# Relative, of the losses: four times the larger of two measured changes, that by perturbing all
# weights by 1e-6 and that under the harshest stand-in for another processor (tests/README.md).
# Another order of float32 sums is a perturbation of about 1e-7. Gradient norms are more sensitive
# than losses: they moved by up to 9e-3.
LOSS = {
    "muonh_dense": 6e-6,  # 1.4e-6 and 2.8e-7
    "orscale_lm_dense": 2.1e-5,  # 4.4e-6 and 5.2e-6
    "adamw_dense": 5e-6,  # 1.2e-6 and 9.9e-8
    "lion_dense": 1.8e-5,  # 4.4e-6 and 7.0e-7
    "lamb_dense": 1.2e-5,  # 1.2e-6 and 2.9e-6
    "moonlight_experts": 9e-6,  # 2.1e-6 and 1.9e-7
}
GRAD_NORM = 3.6e-2
# Far above the rounding of a router's logits, about 1e-6 here: no token is routed by rounding.
GAP = 2e-5


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return data(tmp_path_factory.mktemp("golden"))


def distance(found: dict, expected: dict, key: str) -> float:
    return float(np.max(np.abs(np.array(found[key]) / np.array(expected[key]) - 1)))


@pytest.mark.parametrize("name", CASES)
def test_curves_are_the_recorded_ones(tokens, tmp_path, name):
    found, expected = curve(tokens, name, str(tmp_path)), recorded(name)
    assert found.keys() == expected.keys()
    assert expected.get("smallest_gap", 1.0) > GAP
    assert distance(found, expected, "loss") < LOSS[name]
    assert distance(found, expected, "grad_norm") < GRAD_NORM
    assert expected["loss"][-1] < 0.96 * expected["loss"][0]


def test_a_small_error_of_the_optimizer_is_seen(tokens, tmp_path):
    changed = {"optimizer": {"matrix": {"rule": "muonh", "momentum": 0.96}, "weight_decay": 0.0}}
    found = curve(tokens, "muonh_dense", str(tmp_path), **changed)
    assert distance(found, recorded("muonh_dense"), "loss") > 2 * LOSS["muonh_dense"]


@pytest.mark.parametrize("name", ["adamw_dense", "moonlight_experts"])
def test_a_small_error_of_the_model_is_seen(tokens, tmp_path, monkeypatch, name):
    """An ε of every norm that is 2 % larger."""
    original = layers.RMSNorm.__init__
    monkeypatch.setattr(
        layers.RMSNorm,
        "__init__",
        lambda norm, width, dtype, eps: original(norm, width, dtype, 1.02 * eps),
    )
    found = curve(tokens, name, str(tmp_path))
    assert distance(found, recorded(name), "loss") > 2 * LOSS[name]
