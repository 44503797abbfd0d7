"""Spectra against their definitions, exact and randomized."""

import pytest
import torch

from archscale.optim import orthogonalize
from archscale.telemetry.spectrum import (
    gram_singular_values,
    heterogeneity_gain,
    largest_singular_value,
    nuclear_norm_estimate,
    singular_values,
    spectrum,
)


def planted(values: torch.Tensor, m: int, n: int, seed: int = 0) -> torch.Tensor:
    """(m, n) with these singular values, float64."""
    generator = torch.Generator().manual_seed(seed)
    U, V = (
        torch.linalg.qr(torch.randn(size, len(values), generator=generator, dtype=torch.float64)).Q
        for size in (m, n)
    )
    return U * values @ V.mT


SPECTRA = {
    "flat": torch.ones(24, dtype=torch.float64),
    "power law": torch.arange(1, 25, dtype=torch.float64) ** -1.0,
    "low rank": torch.tensor([3.0, 1.0, *[0.0] * 22], dtype=torch.float64),
    "one spike": torch.tensor([100.0, *[1.0] * 23], dtype=torch.float64),
}


@pytest.mark.parametrize("exact", [1024, 1])
@pytest.mark.parametrize("shape", [(24, 60), (60, 24)])
@pytest.mark.parametrize("name", SPECTRA)
def test_a_planted_spectrum_is_found(name, shape, exact):
    """Exactly, and as large matrices are measured."""
    values = SPECTRA[name]
    M = torch.stack(
        [planted(values, *shape, seed) * scale for seed, scale in ((0, 1.0), (1, 1e-5))]
    )
    found = spectrum(M, exact)
    scale = torch.tensor([1.0, 1e-5], dtype=torch.float64)
    tolerance = {"rtol": 1e-4 if exact > 1 else 2e-3, "atol": 0.0, "check_dtype": False}
    torch.testing.assert_close(found["sigma_max"], values.max() * scale, **tolerance)
    torch.testing.assert_close(found["sigma_mean"], values.mean() * scale, **tolerance)
    rank = (values.sum() ** 2 / values.square().sum()).expand(2)
    torch.testing.assert_close(found["effective_rank"], rank, **tolerance)
    torch.testing.assert_close(
        found["flattening_gain"], (values.max() / values.mean()).expand(2), **tolerance
    )


def test_randomized_and_exact_agree_on_noise():
    """The hardest case: no gap between the largest singular values."""
    M = torch.randn(3, 80, 200, generator=torch.Generator().manual_seed(0))
    exact = singular_values(M)
    torch.testing.assert_close(gram_singular_values(M), exact, rtol=1e-5, atol=1e-5)
    randomized = largest_singular_value(M)
    assert (randomized <= exact[:, 0] * (1 + 1e-6)).all()
    assert (randomized >= exact[:, 0] * 0.98).all()


@pytest.mark.parametrize("exact", [1024, 1])
def test_zero_and_broken_matrices(exact):
    M = torch.zeros(3, 4, 6)
    M[1, 0, 0] = float("nan")
    M[2] = torch.eye(4, 6)
    found = spectrum(M, exact)
    for key, values in found.items():
        assert values[0] == 0, key
        assert values[1].isnan(), key
        assert values[2].isfinite(), key
    assert found["effective_rank"][2] == pytest.approx(4, rel=1e-4)


def test_the_nuclear_norm_at_the_cost_of_an_inner_product():
    M = torch.randn(2, 48, 96, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    nuclear = singular_values(M).sum(-1)
    torch.testing.assert_close(
        nuclear_norm_estimate(M, orthogonalize(M, "exact", torch.float64)), nuclear
    )
    five = nuclear_norm_estimate(M, orthogonalize(M, dtype=torch.float32).double())
    torch.testing.assert_close(five, nuclear, rtol=0.025, atol=0)


def test_heterogeneity_gains_what_steps_of_their_own_would():
    """Against the best common and the best own step sizes of Σ η a − (L/2) η² q, found by
    search."""
    a, q = torch.tensor([3.0, 0.5, 8.0]), torch.tensor([4.0, 2.0, 16.0])
    steps = torch.linspace(0, 3, 30001)
    gains = steps[:, None] * a - steps[:, None] ** 2 * q / 2
    expected = gains.amax(0).sum() / gains.sum(1).amax()
    assert heterogeneity_gain(a, q) == pytest.approx(expected.item(), rel=1e-6)
    assert heterogeneity_gain(q * 0.3, q) == pytest.approx(1)
    assert heterogeneity_gain(q * 0, q) == 0
