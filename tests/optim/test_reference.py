"""The engine on one process against the one-page reference, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from archscale.optim import RULES, MatrixOptimizer, Rule
from archscale.optim.reference import ReferenceOptimizer, orthogonalize

SHAPES = [(8, 16), (16, 8), (5, 5), (1, 7), (32, 4)]
DECAYS = [
    (name, decay)
    for name, rule in RULES.items()
    for decay in ((0.0, 0.1) if not rule.sphere else (0.0,))
]


def compare(rule: Rule, steps: int = 20, **options) -> float:
    """Largest relative difference of the weights after `steps` steps on random gradients."""
    generator = torch.Generator().manual_seed(0)
    weights = [
        torch.randn(shape, generator=generator, dtype=torch.float64) * 0.3 for shape in SHAPES
    ]
    params = [torch.nn.Parameter(w.clone()) for w in weights]
    references = [ReferenceOptimizer(w, rule, lr=0.02, **options) for w in weights]
    optimizer = MatrixOptimizer(params, lr=0.02, rule=rule, compute_dtype=torch.float64, **options)
    for _ in range(steps):
        for p, reference in zip(params, references):
            gradient = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.grad = gradient.clone()
            reference.step(gradient)
        optimizer.step()
    return max(((p - r.W).norm() / r.W.norm()).item() for p, r in zip(params, references))


@pytest.mark.parametrize(("name", "decay"), DECAYS)
def test_every_preset(name, decay):
    assert compare(RULES[name], weight_decay=decay) < 1e-7  # Adam's bias correction is float32


@pytest.mark.parametrize("scheme", ["quintic", "quintic_tuned", "exact"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_schemes_and_nesterov(scheme, nesterov):
    assert (
        compare(RULES["orscale_lm"], weight_decay=0.1, orthogonalizer=scheme, nesterov=nesterov)
        < 1e-9
    )


def test_clip_override():
    assert compare(RULES["orscale_lm"], clip=(0.9, 0.95)) < 1e-12


def test_another_exponent_and_a_given_calibration():
    assert compare(RULES["orscale"], weight_decay=0.1, clip=(0.0, 9.0), ratio_exponent=0.5) < 1e-12
    assert compare(RULES["orscale_lm"], weight_decay=0.1, calibration=0.7) < 1e-12


def by_hand(name: str, W, Q, M_hat, lr: float, decay: float):
    """One step of the arms of OrScale's studies that its paper does not name (its authors' own
    code), W (m, n) with Q ≈ U Vᵀ of M̂."""
    m, n = W.shape
    moonlight = 0.2 * max(m, n) ** 0.5
    if name == "muon_plain":
        return (1 - lr * decay) * W - lr * Q
    if name == "orscale_moonlight":
        D = decay * W + moonlight * Q
        return W - lr * (W.norm() / (D.norm() + 1e-6)).clamp(0.1, 5.0) * D
    rms = [(X.square().mean()).sqrt() for X in (W, M_hat)]
    return (1 - lr * decay) * W - lr * (rms[0] / rms[1]).clamp(0.5, 1.5) * moonlight * Q


@pytest.mark.parametrize("name", ["muon_plain", "orscale_moonlight", "muscale"])
def test_the_other_arms_of_orscale(name):
    """A weight such that the ratio is inside its bounds."""
    generator = torch.Generator().manual_seed(1)
    W = 0.9 * torch.randn(8, 16, generator=generator, dtype=torch.float64)
    G = torch.randn(8, 16, generator=generator, dtype=torch.float64) * (
        0.4 if name == "muscale" else 1.0
    )
    p = torch.nn.Parameter(W.clone())
    p.grad = G.clone()
    MatrixOptimizer(
        [p], lr=0.05, rule=name, weight_decay=0.1, compute_dtype=torch.float64, nesterov=True
    ).step()
    M_hat = 0.95 * G + G
    expected = by_hand(name, W, orthogonalize(M_hat, "polar_express"), M_hat, 0.05, 0.1)
    # ε of the ratio is 1e-6 beside norms of about 9, and by RMS it is left out.
    torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-7)


@settings(max_examples=30, deadline=None)
@given(
    shape=st.sampled_from(["one", "jordan", "spectral", "moonlight"]),
    ratio=st.sampled_from([None, "update", "direction", "momentum"]),
    decay=st.sampled_from(["coupled", "decoupled", "none"]),
    calibrated=st.booleans(),
    sphere=st.booleans(),
    weight_decay=st.sampled_from([0.0, 0.03, 0.3]),
)
def test_any_rule_that_can_be_built(shape, ratio, decay, calibrated, sphere, weight_decay):
    rule = Rule(
        "mine",
        shape=shape,
        ratio=ratio,
        decay=decay,
        calibrated=calibrated and ratio is not None,
        sphere=sphere,
    )
    assert compare(rule, steps=5, weight_decay=0.0 if sphere else weight_decay) < 1e-10


def run(
    rule: Rule, seed: int = 0, lr: float = 0.05, steps: int = 5, weight_decay: float = 0.0
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    p = torch.nn.Parameter(torch.randn(12, 20, generator=generator, dtype=torch.float64))
    optimizer = MatrixOptimizer(
        [p], lr=lr, rule=rule, weight_decay=weight_decay, compute_dtype=torch.float64, eps=0.0
    )
    for _ in range(steps):
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        optimizer.step()
    return p.detach()


def test_orscale_on_the_sphere_without_clip_is_muonh():
    torch.testing.assert_close(
        run(Rule("x", ratio="update", decay="coupled", sphere=True)), run(RULES["muonh"])
    )


def test_orscale_lm_with_ratio_one_is_moonlight():
    pinned = Rule(
        "x", shape="moonlight", ratio="update", calibrated=True, clip=(1.0, 1.0), decay="decoupled"
    )
    torch.testing.assert_close(
        run(pinned, weight_decay=0.1), run(RULES["moonlight"], weight_decay=0.1)
    )


def test_first_trust_ratio_of_orscale_lm_is_one():
    first = run(RULES["orscale_lm"], steps=1, weight_decay=0.0)
    torch.testing.assert_close(first, run(RULES["moonlight"], steps=1))


def test_orscale_lm_sphere_is_muonh_at_a_rescaled_rate():
    """r c ‖D‖ = ‖W‖ and λ = 0: the step is η/c ‖W‖ Q/‖Q‖."""
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(12, 20, generator=generator, dtype=torch.float64))
    optimizer = MatrixOptimizer(
        [p], lr=0.01, rule="orscale_lm_sphere", compute_dtype=torch.float64, eps=0.0, clip=(0, 1e9)
    )
    p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
    optimizer.step()
    c = optimizer.state[p]["calibration"].item()
    torch.testing.assert_close(p.detach(), run(RULES["muonh"], lr=0.01 / c, steps=1))


@pytest.mark.parametrize("eta", [1e-2, 1e-3])
def test_decay_on_the_sphere_is_second_order(eta):
    """HyperP Theorem 1: decay moves a sphere step by O(η²) only, so halving η quarters the
    difference."""

    def difference(lr: float) -> float:
        rules = [Rule("x", ratio="update", decay=d, sphere=True) for d in ("none", "decoupled")]
        out = []
        for rule in rules:
            generator = torch.Generator().manual_seed(1)
            p = torch.nn.Parameter(torch.randn(12, 20, generator=generator, dtype=torch.float64))
            optimizer = MatrixOptimizer([p], lr=lr, rule=rule, compute_dtype=torch.float64)
            optimizer.param_groups[0]["weight_decay"] = (
                0.5  # refused by the constructor, because it does nothing
            )
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            optimizer.step()
            out.append(p.detach())
        return (out[0] - out[1]).norm().item()

    assert 3.5 < difference(eta) / difference(eta / 2) < 4.5


@pytest.mark.parametrize(
    "steps", [500, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(600)])]
)
def test_sphere_does_not_drift(steps):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in ((64, 48), (3, 16, 24))]
    norms = [p.detach().double().flatten(-2).norm(dim=-1) for p in params]
    optimizer = MatrixOptimizer(
        params, lr=0.02, rule="muonh", compute_dtype=torch.float32, view="stack"
    )
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    for p, norm in zip(params, norms):
        drift = (p.detach().double().flatten(-2).norm(dim=-1) / norm - 1).abs().max()
        assert drift < 1e-5
