"""Singular values, scale, orientation and edge cases of every scheme."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from archscale.optim import orthogonalize, reference
from archscale.optim.orthogonalize import (
    COEFFICIENTS,
    NORMALIZATION,
    SCHEMES,
    _iterate,
    _iterate_direct,
    _iterate_gram,
    direct_cost,
    gram_cost,
)

# Singular values of Q after five iterations, for inputs with σ_i / ‖M‖ ≥ 3e-3.
INTERVALS = {
    "polar_express": (0.859, 1.141),
    "quintic": (0.682, 1.202),
    "quintic_tuned": (0.978, 1.145),
    "exact": (1, 1),
}
BF16_SLACK = 0.02


def planted(m: int, n: int, smallest: float, seed: int = 0) -> torch.Tensor:
    """(m, n) of norm 1 whose singular values fall geometrically down to `smallest` (relative to the
    norm)."""
    generator = torch.Generator().manual_seed(seed)
    k = min(m, n)
    U, _ = torch.linalg.qr(torch.randn(m, k, generator=generator, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64))
    sigma = torch.logspace(0, -2, k, dtype=torch.float64)
    sigma = (sigma / sigma.norm()).clamp(min=smallest)
    return (U * sigma) @ V.mT


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(48, 48), (32, 96), (96, 32), (64, 80)])
def test_singular_values_lie_in_the_published_interval(scheme, dtype, shape):
    Q = orthogonalize(planted(*shape, smallest=3e-3), scheme, dtype)
    assert Q.dtype == dtype
    sigma = torch.linalg.svdvals(Q.double())
    lo, hi = INTERVALS[scheme]
    slack = BF16_SLACK if dtype == torch.bfloat16 else 1e-3
    assert sigma.min() > lo - slack
    assert sigma.max() < hi + slack


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7), (1, 5), (5, 1)])
def test_equals_the_reference(scheme, shape):
    M = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        orthogonalize(M, scheme, torch.float64), reference.orthogonalize(M, scheme)
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_batch_equals_single(scheme):
    M = torch.randn(4, 6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    single = torch.stack([orthogonalize(m, scheme, torch.float64) for m in M])
    torch.testing.assert_close(orthogonalize(M, scheme, torch.float64), single)


@settings(max_examples=40, deadline=None)
@given(
    exponent=st.integers(-30, 30),
    scheme=st.sampled_from(["polar_express", "quintic", "quintic_tuned"]),
)
def test_scale_invariance(exponent, scheme):
    M = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    scaled = (M.double() * 10.0**exponent).float()
    torch.testing.assert_close(
        orthogonalize(scaled, scheme, torch.float32),
        orthogonalize(M, scheme, torch.float32),
        rtol=1e-3,
        atol=1e-4,
    )


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_unusable_matrix_gives_zero_and_leaves_its_neighbours_alone(scheme, bad):
    M = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
    expected = orthogonalize(M, scheme, torch.float32)
    if bad == 0.0:
        M[1] = 0
    else:
        M[1, 2, 3] = bad
    Q = orthogonalize(M, scheme, torch.float32)
    assert not Q[1].any()
    torch.testing.assert_close(Q[[0, 2]], expected[[0, 2]])


def test_input_is_not_changed():
    M = torch.randn(5, 7)
    before = M.clone()
    orthogonalize(M, dtype=torch.float32)
    assert torch.equal(M, before)


def test_refusals():
    with pytest.raises(ValueError, match="polar_express, quintic, quintic_tuned, exact"):
        orthogonalize(torch.ones(2, 2), "newton")
    with pytest.raises(ValueError, match=r"takes \(m, n\) or \(k, m, n\)"):
        orthogonalize(torch.ones(3))


@pytest.mark.parametrize(("m", "n"), [(16, 24), (19, 7), (8, 8)])
def test_cut_symmetric_products_equal_whole_ones(monkeypatch, m, n):
    module = importlib.import_module("archscale.optim.orthogonalize")
    monkeypatch.setattr(module, "SPLIT", 8)
    monkeypatch.setattr(module, "LEAF", 4)
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(2, m, n, generator=generator, dtype=torch.float64)
    A = X @ X.mT
    torch.testing.assert_close(module.symmetric_product(X), A)
    torch.testing.assert_close(
        module.symmetric_product(A, add=A, alpha=0.3, beta=-2.0), 0.3 * A @ A - 2.0 * A
    )


@pytest.mark.parametrize("scheme", COEFFICIENTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(40, 40), (24, 96), (96, 24), (48, 64)])
def test_gram_form_equals_direct_form(scheme, dtype, shape):
    """The same polynomial, so the same Q to rounding (6e-6 and 1e-14 here)."""
    M = torch.stack([planted(*shape, smallest=3e-3, seed=seed) for seed in range(3)])
    X = (M / (NORMALIZATION[scheme] * M.norm(dim=(1, 2), keepdim=True))).to(dtype)
    direct, gram = (
        form(X.clone(), torch.empty_like(X), COEFFICIENTS[scheme])
        for form in (_iterate_direct, _iterate_gram)
    )
    assert (direct - gram).abs().max() < {torch.float64: 1e-13, torch.float32: 5e-5}[dtype]


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 120),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_form_of_fewer_flops_is_taken(m, n, dtype):
    """The costs are what the products count up to; bfloat16 stays direct, its Gram matrix loses
    small singular values."""

    def flops(iterate):
        X = torch.zeros(1, m, n, dtype=dtype)
        with FlopCounterMode(display=False) as counter:
            iterate(X, torch.empty_like(X), COEFFICIENTS["polar_express"])
        return counter.get_total_flops()

    short, long = sorted((m, n))
    direct, gram = flops(_iterate_direct), flops(_iterate_gram)
    assert (direct, gram) == (direct_cost(short, long), gram_cost(short, long))
    assert flops(_iterate) == (direct if dtype == torch.bfloat16 else min(direct, gram))
