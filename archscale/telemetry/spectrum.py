"""Spectra of gradients and momenta ("Spectral Flattening Is All Muon Needs").

Let the gradient of a loss f be L-Lipschitz and M = U Σ Vᵀ the gradient of one matrix. A step along
an orthogonal Q obeys f(W − η Q) ≤ f − η ⟨M, Q⟩ + (L/2) η² ‖Q‖². For Q = U Vᵀ this is
f − η ‖M‖_* + (L/2) η² rank, so the loss falls while η < (2/L) σ̄, σ̄ = ‖M‖_* / rank the AVERAGE
singular value; gradient descent is bounded by the largest. How far a matrix is from flat: σ_max /
σ̄, the flattening gain, and the effective rank ‖M‖_*² / ‖M‖².

Shapes: k matrices of a stack, m rows, n columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

EXACT = 2048  # short sides up to this take an exact decomposition


def spectrum(M: Tensor, exact: int = EXACT) -> dict[str, Tensor]:
    """`sigma_max`, `sigma_mean` (over min(m, n) singular values), `effective_rank` and
    `flattening_gain` of each matrix, (k,) each; zero of a zero matrix, NaN of one that is not
    finite.

    Args:
        M: (k, m, n).
        exact: largest short side for singular values themselves; beyond it σ_max comes from power
            iteration and ‖M‖_* from the square root of the Gram matrix's eigenvalues.
    """
    short = min(M.shape[-2:])
    # A decomposition of a NaN would fail for the whole stack.
    finite = M.isfinite().flatten(1).all(-1)
    M = torch.where(finite[:, None, None], M, 0.0)
    if short <= exact:
        values = singular_values(M)
        largest = values.amax(-1)
    else:
        values = gram_singular_values(M)
        largest = largest_singular_value(M)
    values = torch.where(finite[:, None], values, torch.nan)
    largest = torch.where(finite, largest, torch.nan)
    nuclear, square = values.sum(-1), values.square().sum(-1)
    return {
        "sigma_max": largest,
        "sigma_mean": nuclear / short,
        "effective_rank": _ratio(nuclear.square(), square),
        "flattening_gain": _ratio(largest * short, nuclear),
    }


def singular_values(M: Tensor) -> Tensor:
    """Singular values (k, min(m, n)) of a stack (k, m, n) in descending order; exact, float32 or
    better."""
    return torch.linalg.svdvals(M if M.dtype == torch.float64 else M.float())


def gram_singular_values(M: Tensor) -> Tensor:
    """`singular_values` from the eigenvalues of the Gram matrix in float64: a third of the work,
    and σ to 1e-8 of the largest."""
    X = M.double() if M.shape[-2] <= M.shape[-1] else M.mT.double()
    return torch.linalg.eigvalsh(X @ X.mT).clamp(min=0).sqrt().flip(-1).float()


def largest_singular_value(M: Tensor, iterations: int = 20, vectors: int = 4) -> Tensor:
    """σ_max of each matrix of a stack (k, m, n), (k,) float32, by randomized subspace iteration
    (arXiv 0909.4061, algorithm 4.4) from a fixed seed: at most σ_max, and 1e-3 below it on spectra
    without a gap."""
    X = M.float() if M.shape[-2] <= M.shape[-1] else M.mT.float()
    generator = torch.Generator().manual_seed(0)
    V = torch.randn(X.shape[-1], vectors, generator=generator).to(X.device).expand(len(X), -1, -1)
    for _ in range(iterations):
        V = torch.linalg.qr(X.mT @ (X @ V)).Q
    return torch.linalg.matrix_norm(X @ V, ord=2)


def nuclear_norm_estimate(M: Tensor, Q: Tensor) -> Tensor:
    """⟨M, Q⟩ of stacks (k, m, n) and their orthogonalizations: ‖M‖_* as exactly as Q is orthogonal
    (2.5 % for five polar-express iterations), at the cost of an inner product; (k,), float32 or
    better."""
    M, Q = (x.flatten(1) if x.dtype == torch.float64 else x.flatten(1).float() for x in (M, Q))
    return torch.linalg.vecdot(M, Q)


def heterogeneity_gain(nuclear: Tensor, rank: Tensor) -> Tensor:
    """κ_eff of layers with nuclear norms a_ℓ = ‖G_ℓ‖_* and ranks q_ℓ = ‖Q_ℓ‖², (k,) each: scalar,
    at least 1.

    By the bound above, one step size for all orthogonalized layers guarantees a decrease of
    (Σ a_ℓ)² / (2 L Σ q_ℓ), a step size for each Σ a_ℓ² / (2 L q_ℓ); κ_eff is the second over the
    first (Cauchy–Schwarz; 1 where a_ℓ / q_ℓ = σ̄_ℓ is the same everywhere). OrScale (arXiv
    2605.07815) names such a gain; this formula is derived here.
    """
    return _ratio((nuclear.square() / rank).sum() * rank.sum(), nuclear.sum().square())


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is."""
    return torch.where(b == 0, torch.zeros_like(a), a / b)
