"""The theorem where it is exact, and every estimate against the dense computation."""

import itertools
import math

import pytest
import torch

from archscale.optim import orthogonalize
from archscale.study.flattening import (
    LeastSquares,
    conditioning,
    covariance,
    damped,
    descend,
    directions,
    edge,
    first_at_most,
    flatness,
    guaranteed,
    largest_curvature,
    log_slopes,
    planted,
    power,
    power_spectrum,
    preconditioned,
    residual,
)

SCHEMES = {
    "muon_exact": lambda G: orthogonalize(G, "exact", G.dtype),
    "muon": lambda G: orthogonalize(G, "polar_express", G.dtype),
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def measured(problem, G, tolerance=1e-5):
    """Edge and guarantee of every direction at the point with this gradient."""
    E = problem.error_of(G)
    found = {}
    for name, step in directions("polar_express").items():
        D = step(G)
        bound = guaranteed([G], [D], problem.lipschitz)
        found[name] = edge(problem.rise(E, D), bound / 7, tolerance), bound
    return found


@pytest.mark.parametrize("L", [0.25, 8.0])
@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_the_edges_of_the_theorem(L, exponent, shape):
    """Where the curvature is L in every direction: (2/L) σ̄ for exact Muon, 2/L for gradient
    descent, (2/L) σ_max for G / σ_max."""
    m, n = shape
    problem = LeastSquares(L * torch.eye(n, dtype=torch.float64), torch.eye(m, dtype=torch.float64))
    values = power_spectrum(12, exponent, 3.0)
    found = measured(problem, planted(values, m, n, generator()))
    assert found["muon_exact"][0] == pytest.approx(2 / L * 3.0, rel=1e-3)
    assert found["gradient"][0] == pytest.approx(2 / L, rel=1e-3)
    assert found["normalized"][0] == pytest.approx(2 / L * float(values.max()), rel=1e-3)
    for got, bound in found.values():
        assert got == pytest.approx(bound, rel=1e-3)


def test_a_rank_deficient_gradient_has_the_mean_over_its_rank():
    values = torch.tensor([5.0, 3.0, 1.0], dtype=torch.float64)
    problem = LeastSquares(torch.eye(9, dtype=torch.float64), torch.eye(7, dtype=torch.float64))
    G = planted(values, 7, 9, generator())
    assert measured(problem, G)["muon_exact"][0] == pytest.approx(2 * 3.0, rel=1e-3)
    assert flatness([G]) == pytest.approx({"sigma_max": 5.0, "sigma_mean": 3.0, "rank": 3})


@pytest.mark.parametrize("seed", [0, 1])
def test_below_the_guarantee_every_step_decreases_an_uneven_loss(seed):
    draw = generator(seed)
    problem = LeastSquares(2 * covariance(16, 30, draw), covariance(10, 20, draw))
    H = torch.kron(problem.A, problem.B)
    assert problem.lipschitz == pytest.approx(float(torch.linalg.eigvalsh(H)[-1]))
    for name, (got, bound) in measured(
        problem, planted(power_spectrum(10, 1.0, 1.0), 10, 16, draw)
    ).items():
        assert got >= bound * (1 - 1e-4), name


def test_least_squares_is_the_kronecker_product():
    draw = generator()
    problem = LeastSquares(covariance(5, 7, draw), covariance(3, 4, draw))
    E = torch.randn(3, 5, generator=draw, dtype=torch.float64)
    flat = E.mT.flatten()  # column by column: vec(B E A) = (A ⊗ B) vec(E)
    assert problem.loss(E) == pytest.approx(
        0.5 * float(flat @ torch.kron(problem.A, problem.B) @ flat)
    )
    X = E.clone().requires_grad_()
    [auto] = torch.autograd.grad(0.5 * (X * (problem.B @ X @ problem.A)).sum(), X)
    torch.testing.assert_close(problem.gradient(E), auto)
    torch.testing.assert_close(problem.error_of(problem.gradient(E)), E)


def test_the_edge_of_several_matrices_together():
    """Two least squares of the same L, summed: (2/L) times the mean over both spectra."""
    draw = generator()
    Gs = [planted(power_spectrum(6, 1.0, mean), 6, 8, draw) for mean in (1.0, 4.0)]
    Qs = [SCHEMES["muon_exact"](G) for G in Gs]
    problem = LeastSquares(torch.eye(8, dtype=torch.float64), torch.eye(6, dtype=torch.float64))
    base = sum(problem.loss(G) for G in Gs)
    found = edge(lambda lr: sum(problem.loss(G - lr * Q) for G, Q in zip(Gs, Qs)) - base, 0.1, 1e-5)
    assert found == pytest.approx(2 * 2.5, rel=1e-3)
    assert guaranteed(Gs, Qs, 1.0) == pytest.approx(5.0)
    assert flatness(Gs)["sigma_mean"] == pytest.approx(2.5)


@pytest.mark.parametrize("start", [1e-3, 0.7, 50.0])
def test_bisection_from_either_side(start):
    assert edge(lambda lr: lr * (lr - 2), start, 1e-6) == pytest.approx(2, rel=1e-6)


def test_edges_that_do_not_exist_and_losses_that_are_not_finite():
    assert edge(lambda lr: -lr, 1.0) == math.inf
    assert edge(lambda lr: lr, 1.0) == 0
    assert edge(lambda lr: -lr if lr < 3 else math.nan, 1.0, 1e-6) == pytest.approx(3, rel=1e-6)
    # the first of two intervals: from well below it, not from the second
    assert edge(
        lambda lr: (lr - 1) if lr < 2 else -1.0 if lr < 4 else 1.0, 0.01, 1e-6, 1.2
    ) == pytest.approx(1, rel=1e-6)


def test_the_largest_curvature_is_found_and_may_be_negative():
    draw = generator()
    X = torch.randn(40, 40, generator=draw, dtype=torch.float64)
    for H in (
        X + X.mT,
        -(X @ X.mT),
        torch.diag(torch.tensor([3.0, 3.0, -7.0, 0.0], dtype=torch.float64)),
    ):
        expected = float(torch.linalg.eigvalsh(H).abs().max())
        assert largest_curvature(lambda v: H @ v, len(H), 40) == pytest.approx(expected, rel=1e-9)  # noqa: B023
    few = [largest_curvature(lambda v: (X + X.mT) @ v, 40, k) for k in (2, 6, 12)]
    assert few == sorted(few)


def test_slopes_and_their_errors():
    draw = generator()
    a, b = (torch.rand(400, generator=draw, dtype=torch.float64) + 0.5 for _ in range(2))
    noise = 0.1 * torch.randn(400, generator=draw, dtype=torch.float64)
    y = 3 * a**1.5 * b**-0.5 * noise.exp()
    found = log_slopes(y.tolist(), {"a": a.tolist(), "b": b.tolist()})
    for name, truth, column in (("a", 1.5, a), ("b", -0.5, b)):
        slope, error = found[name]
        assert abs(slope - truth) < 4 * error
        assert error == pytest.approx(0.1 / (math.sqrt(400) * float(column.log().std())), rel=0.15)
    assert all(math.isnan(x) for x in log_slopes([1.0, 2.0], {"a": [1.0, 2.0]})["a"])
    assert all(math.isnan(x) for x in log_slopes([1.0, 2.0, 3.0], {"a": [2.0, 2.0, 2.0]})["a"])


def test_the_residual_of_five_iterations():
    G = planted(power_spectrum(16, 0.5, 1.0), 16, 24, generator())
    exact, five = residual(SCHEMES["muon_exact"](G)), residual(SCHEMES["muon"](G))
    assert max(exact) < 1e-12
    assert 1e-3 < five[0] < 0.15
    Q = SCHEMES["muon"](G)
    dense = torch.linalg.matrix_norm(Q @ Q.mT - torch.eye(16, dtype=torch.float64)) / 4
    assert five[1] == pytest.approx(float(dense))


def test_conditioning_against_the_dense_matrices():
    """All three spectra, from kron(A, B), and from the preconditioner as it multiplies a vectorised
    gradient."""
    draw = generator()
    m, n, k = 4, 6, 9
    A, B = covariance(n, 50, draw), covariance(m, 20, draw)
    G = torch.randn(k, m, n, generator=draw, dtype=torch.float64)
    H = torch.kron(A, B)
    C, R = (G @ G.mT).mean(0), (G.mT @ G).mean(0)
    eye = torch.eye(n, dtype=torch.float64)
    P = {
        "before": torch.eye(m * n, dtype=torch.float64),
        "left": torch.kron(eye, power(C, -0.5)),
        "both": torch.kron(power(R, -0.25), power(C, -0.25)),
    }
    found = preconditioned(A, B, G)
    for name, preconditioner in P.items():
        values = torch.linalg.eigvals(preconditioner @ H).real.sort().values
        assert found[name].condition == pytest.approx(float(values[-1] / values[0]), rel=1e-6), name
        assert found[name].effective == pytest.approx(
            float(values[-1] / values.mean()), rel=1e-6
        ), name
    values = torch.linalg.eigvalsh(C).sqrt()
    assert found["spread"].condition == pytest.approx(float(values[-1] / values[0]), rel=1e-6)


def test_both_preconditioners_give_muons_direction():
    G = planted(power_spectrum(5, 1.0, 1.0), 5, 5, generator())
    Q = SCHEMES["muon_exact"](G)
    C, R = G @ G.mT, G.mT @ G
    torch.testing.assert_close(power(C, -0.5) @ G, Q)
    torch.testing.assert_close(power(C, -0.25) @ G @ power(R, -0.25), Q)


def test_gaussian_errors_remove_the_condition_of_the_outputs():
    """E[G Gᵀ] = tr(A²) B² then, so the left preconditioner turns κ(A) κ(B) into κ(A), and the gain
    is the spread."""
    draw = generator()
    A, B = covariance(32, 10, draw), covariance(4, 100, draw)
    G = B @ torch.randn(4000, 4, 32, generator=draw, dtype=torch.float64) @ A
    found = preconditioned(A, B, G)
    assert found["before"].condition == pytest.approx(1000, rel=1e-6)
    assert found["left"].condition == pytest.approx(10, rel=0.1)
    assert found["before"].condition / found["left"].condition == pytest.approx(
        found["spread"].condition, rel=0.1
    )


def test_damping_is_relative_and_ratios_stay_finite():
    X = torch.diag(torch.tensor([4.0, 0.0], dtype=torch.float64))
    assert conditioning(X).condition == math.inf
    assert conditioning(damped(X, 0.1)).condition == pytest.approx(4.2 / 0.2)
    assert conditioning(damped(1000 * X, 0.1)).condition == pytest.approx(4.2 / 0.2)
    assert conditioning(X).effective == pytest.approx(2)


def test_gradient_descent_diverges_beyond_two_over_l_and_muon_stays_bounded():
    """The loss scaled by 10: σ̄ = 10, L = 10. At η = 1 gradient descent is five times over its
    edge, Muon at half of its own."""
    eye = torch.eye(6, dtype=torch.float64)
    E = planted(power_spectrum(6, 1.0, 1.0), 6, 6, generator())
    plain, scaled = LeastSquares(eye, eye), LeastSquares(10 * eye, eye)
    gradient = descend(scaled, E, lambda G: G, 1.0, 200)
    assert gradient[1] > gradient[0]
    assert gradient[-1] == math.inf
    muon = descend(scaled, E, SCHEMES["muon_exact"], 1.0, 200)
    assert len(muon) == 201
    assert max(muon) == muon[0]
    same = descend(plain, E, SCHEMES["muon_exact"], 1.0, 200)
    assert [10 * loss for loss in same] == pytest.approx(
        muon
    )  # Muon's step does not know the scale


def test_first_at_most():
    assert first_at_most([3.0, 2.0, 1.0, 0.5], 1.0) == 2
    assert first_at_most([3.0, math.inf], 1.0) is None


def test_planted_spectra_have_their_mean_and_order():
    for count, exponent in itertools.product((1, 7), (0.0, 1.3)):
        values = power_spectrum(count, exponent, 2.5)
        assert float(values.mean()) == pytest.approx(2.5)
        assert (values.diff() <= 0).all()
    values = torch.linalg.svdvals(planted(power_spectrum(7, 1.3, 2.5), 7, 9, generator()))
    torch.testing.assert_close(values, power_spectrum(7, 1.3, 2.5))
    assert conditioning(covariance(7, 33.0, generator())).condition == pytest.approx(33)
