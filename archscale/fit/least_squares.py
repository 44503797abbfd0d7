"""Nonlinear least squares and Huber regression, many at once.

Replicates of a bootstrap, left-out points and several starts of one fit are all rows of one batch.

B fits, n points, p parameters, c columns of x; θ (B, p), residuals (B, n).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]
Model = Callable[
    [Array], tuple[Array, Array]
]  # θ (B, p) → prediction (B, n), its derivatives (B, n, p)

LIMIT = 200  # iterations; a fit of informative data takes 5 to 20


@dataclass(frozen=True)
class Solution:
    """Minima.

    Attributes:
        theta: (B, p).
        objective: (B,), Σ ρ(residual).
        residuals: (B, n), z − prediction.
        jacobian: (B, n, p), of the prediction.
        converged: (B,).
    """

    theta: Array
    objective: Array
    residuals: Array
    jacobian: Array
    converged: NDArray[np.bool_]


def solve(
    model: Model,
    z: Array,
    theta: Array,
    *,
    delta: float | None = None,
    weights: Array | None = None,
    limit: int = LIMIT,
) -> Solution:
    """Minimizes Σ w ρ(z − model(θ)) by Levenberg–Marquardt with Marquardt's scaling, each fit with
    its own damping.

    Args:
        z: (B, n) or (1, n), what is fitted.
        theta: (B, p), starts.
        delta: ρ is Huber's: r²/2 up to |r| = delta, linear beyond (iteratively reweighted); None:
            r²/2.
        weights: (B, n), w; None: 1.
        limit: iterations.
    """
    theta = np.array(theta, dtype=float)
    B, p = theta.shape
    z = np.broadcast_to(z, (B, z.shape[-1]))
    w = np.ones_like(z) if weights is None else np.broadcast_to(weights, z.shape)
    residuals, jacobian, objective = _evaluate(model, z, w, theta, delta)
    damping = np.full(
        B, 1e-9
    )  # near nothing: a form that is linear in θ is solved by the first step
    converged = np.zeros(B, dtype=bool)
    rounding = 1e-30 * (w * z * z).sum(1)  # residuals of a perfect fit
    active = np.flatnonzero(np.isfinite(objective))
    for _ in range(limit):
        if not len(active):
            break
        J, r = jacobian[active], residuals[active]
        weighted = J * (w[active] * huber_weights(r, delta))[..., None]
        normal, gradient = weighted.mT @ J, (weighted.mT @ r[..., None])[..., 0]
        diagonal = np.einsum("bpp->bp", normal)
        floor = 1e-300 + 1e-14 * diagonal.max(1, keepdims=True) * (diagonal == 0)
        damped = normal + np.eye(p) * (damping[active][:, None] * diagonal + floor)[:, None, :]
        step = _solve(damped, gradient)
        decrement = (gradient * step).sum(1)
        trial = _evaluate(model, z[active], w[active], theta[active] + step, delta)
        better = trial[2] <= objective[active]
        done = decrement <= 1e-13 * objective[active] + rounding[active]
        taken = active[better]
        theta[taken] += step[better]
        residuals[taken], jacobian[taken], objective[taken] = (part[better] for part in trial)
        damping[active] = np.where(
            better, np.maximum(damping[active] / 30, 1e-12), damping[active] * 30
        )
        # A step that only rounding keeps from improving is the end as well.
        done |= ~better & (decrement <= 1e-9 * objective[active] + rounding[active])
        converged[active[done]] = True
        active = active[~done & (damping[active] < 1e12)]
    return Solution(theta, objective, residuals, jacobian, converged)


def covariance(solution: Solution, delta: float | None = None) -> Array:
    """(B, p, p): asymptotic covariance of θ from each fit's own residuals; no weights.

    s² (JᵀJ)⁻¹ with s² = Σ r² / (n − p); under Huber's ρ, s² is K² [Σ ψ² / (n − p)] / [mean ψ′]², K
    = 1 + (p / n) (1 − mean ψ′) / mean ψ′ (Huber, Robust Statistics, section 7.6).
    """
    r, J = solution.residuals, solution.jacobian
    n, p = J.shape[1:]
    psi = r * huber_weights(r, delta)
    variance = (psi * psi).sum(1) / (n - p)
    if delta is not None:
        inside = np.maximum((np.abs(r) <= delta).mean(1), 1 / n)
        variance *= ((1 + p / n * (1 - inside) / inside) / inside) ** 2
    normal = J.mT @ J
    size = np.sqrt(np.maximum(np.einsum("bpp->bp", normal), 1e-300))
    scaled = normal / (
        size[:, :, None] * size[:, None, :]
    )  # unit diagonal: parameters may differ by many decades
    inverse = np.linalg.pinv(scaled, hermitian=True, rcond=1e-15)
    return variance[:, None, None] * inverse / (size[:, :, None] * size[:, None, :])


def huber_weights(residuals: Array, delta: float | None) -> Array:
    """ψ(r) / r."""
    if delta is None:
        return np.ones_like(residuals)
    return delta / np.maximum(np.abs(residuals), delta)


def _evaluate(
    model: Model, z: Array, w: Array, theta: Array, delta: float | None
) -> tuple[Array, Array, Array]:
    """Residuals, Jacobian, objective; the objective of a θ that has none is infinite, so that no
    step leads there."""
    with np.errstate(all="ignore"):
        prediction, jacobian = model(theta)
        r = z - prediction
        rho = r * r / 2
        if delta is not None:
            size = np.abs(r)
            rho = np.where(size <= delta, rho, delta * (size - delta / 2))
        objective = (w * rho).sum(1)
        usable = np.isfinite(objective) & np.isfinite(jacobian).all((1, 2))
    return r, jacobian, np.where(usable, objective, np.inf)


def _solve(matrices: Array, vectors: Array) -> Array:
    try:
        return np.linalg.solve(matrices, vectors[..., None])[..., 0]
    except np.linalg.LinAlgError:  # one singular matrix fails the whole batch
        return (np.linalg.pinv(matrices, hermitian=True) @ vectors[..., None])[..., 0]
