"""The mathematics of spectral flattening (arXiv 2605.13079): how far one step may go, and how an
orthogonalized step is conditioned.

If f has an L-Lipschitz gradient G (Frobenius), a step −η D changes it by at most
− η ⟨G, D⟩ + (L/2) η² ‖D‖², so it falls for all η < (2/L) ⟨G, D⟩ / ‖D‖², which is

    2/L           for D = G,
    (2/L) σ_max   for D = G / σ_max,
    (2/L) σ̄       for D = U Vᵀ,  σ̄ = ‖G‖_* / rank.

W, E, G are (m, n); curvatures A (n, n) of the inputs and B (m, m) of the outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from archscale.optim import orthogonalize
from archscale.telemetry.spectrum import singular_values

Step = Callable[[Tensor], Tensor]  # gradient (m, n) → what is subtracted, (m, n)
FLOOR = 1e-12  # singular and eigenvalues below this share of the largest are zero


# --- planted spectra and curvatures


def power_spectrum(count: int, exponent: float, mean: float) -> Tensor:
    """(count,) float64: σ_i ∝ i^(−exponent), scaled to the given mean."""
    values = torch.arange(1, count + 1, dtype=torch.float64) ** -exponent
    return values * (mean / values.mean())


def planted(values: Tensor, m: int, n: int, generator: torch.Generator) -> Tensor:
    """(m, n) float64 with these min(m, n) singular values and random singular vectors."""
    U = _orthonormal(m, len(values), generator)
    V = _orthonormal(n, len(values), generator)
    return (U * values) @ V.mT


def covariance(size: int, condition: float, generator: torch.Generator) -> Tensor:
    """(size, size) float64, symmetric: eigenvalues from 1 down to 1 / condition, even in their
    logarithm."""
    values = torch.logspace(0, -math.log10(condition), size, dtype=torch.float64)
    U = _orthonormal(size, size, generator)
    return (U * values) @ U.mT


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q


@dataclass(frozen=True)
class LeastSquares:
    """f(E) = ½ ‖B^½ E A^½‖², E = W − W* (m, n): matrix least squares, whose Hessian is the
    Kronecker product A ⊗ B."""

    A: Tensor
    B: Tensor

    @classmethod
    def planted(
        cls, m: int, n: int, lipschitz: float, condition: float, generator: torch.Generator
    ) -> LeastSquares:
        """With this L and condition number of A ⊗ B, the latter shared equally by A and B."""
        half = math.sqrt(condition)
        A = covariance(n, half, generator)
        return cls(lipschitz * A, covariance(m, half, generator))

    def gradient(self, E: Tensor) -> Tensor:
        return self.B @ E @ self.A

    def loss(self, E: Tensor) -> float:
        return 0.5 * float(torch.sum(E * self.gradient(E)))

    def rise(self, E: Tensor, D: Tensor) -> Callable[[float], float]:
        """η → f(E − η D) − f(E)."""
        before = self.loss(E)
        return lambda lr: self.loss(E - lr * D) - before

    @property
    def lipschitz(self) -> float:
        """L: the largest eigenvalue of A ⊗ B."""
        return float(torch.linalg.eigvalsh(self.A)[-1] * torch.linalg.eigvalsh(self.B)[-1])

    def error_of(self, gradient: Tensor) -> Tensor:
        """The E with this gradient."""
        return torch.linalg.solve(self.B, torch.linalg.solve(self.A, gradient.mT).mT)


# --- the edge


def directions(scheme: str) -> dict[str, Step]:
    """The compared steps: `gradient` G, `normalized` G / σ_max, `muon_exact`, and `muon`, five
    iterations of an orthogonalization scheme."""
    return {
        "gradient": lambda G: G,
        "normalized": lambda G: G / singular_values(G[None])[0, 0].to(G.dtype),
        "muon_exact": lambda G: orthogonalize(G, "exact", G.dtype),
        "muon": lambda G: orthogonalize(G, scheme, G.dtype),
    }


def guaranteed(gradients: Sequence[Tensor], steps: Sequence[Tensor], lipschitz: float) -> float:
    """(2/L) ⟨G, D⟩ / ‖D‖² over all matrices together: every shorter step decreases the loss."""
    along = sum(
        float(torch.sum(G.double() * D.double())) for G, D in zip(gradients, steps, strict=True)
    )
    return 2 / lipschitz * along / sum(float(D.double().square().sum()) for D in steps)


def edge(
    rise: Callable[[float], float], start: float, tolerance: float = 1e-4, growth: float = 2**0.5
) -> float:
    """The end of the first interval of step sizes that decrease the loss, by bisection, to
    `tolerance` (relative).

    Args:
        rise: η → f(W − η D) − f(W); what is not finite counts as a rise.
        start: a first η; from it the search goes down, by factors of `growth`, until the loss
            falls, or up until it rises. So that no later interval is taken for the first, `start`
            should lie well below the edge.

    Returns:
        0 where no step of at least 1e-6 `start` decreases the loss, inf where none up to 1e6
        `start` increases it.
    """

    def falls(step: float) -> bool:
        change = rise(step)
        return math.isfinite(change) and change < 0

    low = high = start
    if falls(start):
        while falls(high):
            low, high = high, high * growth
            if high > 1e6 * start:
                return math.inf
    else:
        while not falls(low):
            low, high = low / growth, low
            if low < 1e-6 * start:
                return 0.0
    while high / low > 1 + tolerance:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if falls(middle) else (low, middle)
    return math.sqrt(low * high)


def largest_curvature(
    product: Callable[[Tensor], Tensor], size: int, iterations: int, seed: int = 0
) -> float:
    """L = max |λ| of a symmetric matrix of which only v → H v is known, v (size,): Lanczos in
    float64, with full reorthogonalization; a lower bound that converges from below."""
    basis: list[Tensor] = []
    diagonal, off = [], []
    v = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    v /= v.norm()
    for _ in range(min(iterations, size)):
        basis.append(v)
        w = product(v).double()
        diagonal.append(float(v @ w))
        Q = torch.stack(basis)
        w = w - Q.mT @ (Q @ w)
        # Once more: the first pass leaves rounding of the size of w before it.
        w = w - Q.mT @ (Q @ w)
        norm = float(w.norm())
        off.append(norm)
        if norm <= FLOOR * max(map(abs, diagonal)):
            break  # an invariant subspace: its eigenvalues are exact
        v = w / norm
    side = np.diag(off[: len(diagonal) - 1], 1)
    return float(np.abs(np.linalg.eigvalsh(np.diag(diagonal) + side + side.T)).max())


def log_slopes(
    y: Sequence[float], columns: Mapping[str, Sequence[float]]
) -> dict[str, tuple[float, float]]:
    """Least squares of log y on an intercept and the logs of the columns: slope and standard error
    of each.

    NaN where the points do not decide: fewer than parameters + 1, or columns that depend on each
    other.
    """
    X = np.column_stack(
        [np.ones(len(y)), *(np.log(np.asarray(c, float)) for c in columns.values())]
    )
    free = len(y) - X.shape[1]
    if free < 1 or np.linalg.matrix_rank(X) < X.shape[1]:
        return dict.fromkeys(columns, (math.nan, math.nan))
    target = np.log(np.asarray(y, float))
    slopes, *_ = np.linalg.lstsq(X, target, rcond=None)
    left = target - X @ slopes
    errors = np.sqrt(np.diag(np.linalg.inv(X.T @ X)) * (left @ left) / free)
    return {name: (float(slopes[i]), float(errors[i])) for i, name in enumerate(columns, 1)}


def residual(Q: Tensor) -> tuple[float, float]:
    """How far Q (m, n) is from orthogonal: max_i |σ_i − 1|, and ‖Q Qᵀ − I‖ / √m, m the short
    side."""
    values = singular_values(Q.double()[None])[0]
    return float((values - 1).abs().max()), float((values.square() - 1).square().mean().sqrt())


def flatness(gradients: Sequence[Tensor]) -> dict[str, float]:
    """`sigma_max`, `sigma_mean` (‖G‖_* / rank) and `rank` over all matrices together."""
    values = [singular_values(G.double()[None])[0] for G in gradients]
    largest = max(float(v[0]) for v in values)
    rank = sum(int((v > FLOOR * v[0]).sum()) for v in values)
    return {
        "sigma_max": largest,
        "sigma_mean": sum(float(v.sum()) for v in values) / max(rank, 1),
        "rank": rank,
    }


# --- trajectories


def descend(problem: LeastSquares, E: Tensor, step: Step, lr: float, steps: int) -> list[float]:
    """Losses before each of `steps` updates E ← E − lr · step(gradient) and after the last; ends
    early, with inf, past 1e12 times the first loss."""
    losses = [problem.loss(E)]
    for _ in range(steps):
        E = E - lr * step(problem.gradient(E))
        losses.append(problem.loss(E))
        if not losses[-1] <= 1e12 * losses[0]:
            return [*losses[:-1], math.inf]
    return losses


def first_at_most(losses: Sequence[float], target: float) -> int | None:
    """Number of the first entry not above `target`."""
    return next((i for i, loss in enumerate(losses) if loss <= target), None)


def judged(losses: Sequence[float], target: float) -> dict[str, Any]:
    """A trajectory in four numbers: `first_rise`, the first step after which the loss is above its
    start; `diverged`, whether it ends there or is not finite; `steps_to_target`; `final`."""
    rise = next((i for i, loss in enumerate(losses) if not loss <= losses[0]), None)
    return {
        "first_rise": rise,
        "diverged": not losses[-1] <= losses[0],
        "steps_to_target": first_at_most(losses, target),
        "final": losses[-1],
    }


# --- conditioning


@dataclass(frozen=True)
class Conditioning:
    """Condition numbers of a symmetric positive matrix: `condition` λ_max / λ_min, and `effective`
    λ_max / mean λ, which zeros do not move."""

    condition: float
    effective: float

    def __mul__(self, other: Conditioning) -> Conditioning:
        """Those of the Kronecker product: both ratios multiply."""
        return Conditioning(self.condition * other.condition, self.effective * other.effective)


def conditioning(matrix: Tensor) -> Conditioning:
    values = torch.linalg.eigvalsh(matrix.double())
    least = float(values[0])
    return Conditioning(
        float(values[-1]) / least if least > 0 else math.inf, float(values[-1] / values.mean())
    )


def damped(matrix: Tensor, damping: float) -> Tensor:
    """matrix + damping · (mean eigenvalue) · I, float64."""
    X = matrix.double()
    return X + damping * X.diagonal().mean() * torch.eye(len(X), dtype=torch.float64)


def power(matrix: Tensor, exponent: float) -> Tensor:
    """matrix^exponent, symmetric positive definite."""
    values, U = torch.linalg.eigh(matrix.double())
    return (U * values**exponent) @ U.mT


def preconditioned(
    A: Tensor, B: Tensor, gradients: Tensor, damping: float = 0.0
) -> dict[str, Conditioning]:
    """How the curvature H = A ⊗ B is conditioned before and after Muon's preconditioning.

    Q = (G Gᵀ)^(−½) G is a step preconditioned by P = I ⊗ C^(−½), C = E[G Gᵀ] the gradient
    covariance; the spectrum that decides is that of P^½ H P^½ = A ⊗ (C^(−¼) B C^(−¼)). With R =
    E[Gᵀ G] the same Q is also (G Gᵀ)^(−¼) G (Gᵀ G)^(−¼), which preconditions both sides by half as
    much: (R^(−⅛) A R^(−⅛)) ⊗ (C^(−⅛) B C^(−⅛)).

    Args:
        A: (n, n). B: (m, m). gradients: samples (k, m, n).
        damping: of A and B, relative to their mean eigenvalue; of C and R its square, since they
            are squares of gradients.

    Returns:
        `before`, `left`, `both`, and `spread`: that of C^½, of the gradient's singular values,
        which the gain is claimed to follow.
    """
    G = gradients.double()
    A, B = damped(A, damping), damped(B, damping)
    C = damped(torch.einsum("kmn,kpn->mp", G, G) / len(G), damping**2)
    R = damped(torch.einsum("kmn,kmp->np", G, G) / len(G), damping**2)
    half, quarter = power(C, -1 / 4), power(C, -1 / 8)
    other = power(R, -1 / 8)
    return {
        "before": conditioning(A) * conditioning(B),
        "left": conditioning(A) * conditioning(half @ B @ half),
        "both": conditioning(other @ A @ other) * conditioning(quarter @ B @ quarter),
        "spread": conditioning(power(C, 1 / 2)),
    }
