"""The update rule on one whole matrix, in the papers' symbols: the page that the fast path is
tested against.

Slow, single-process, any dtype (the tests use float64). It shares only tables with the engine: the
presets and the coefficients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from archscale.optim.orthogonalize import COEFFICIENTS, NORMALIZATION
from archscale.rules import Rule


def orthogonalize(M: Tensor, scheme: str) -> Tensor:
    """Q ≈ U Vᵀ of M = U Σ Vᵀ, M (m, n)."""
    if not M.any():
        return torch.zeros_like(M)
    if scheme == "exact":
        U, S, Vh = torch.linalg.svd(M, full_matrices=False)
        keep = (S.max() * max(M.shape) * torch.finfo(M.dtype).eps < S).to(M.dtype)
        return (U * keep) @ Vh
    X = (M.mT if M.shape[0] > M.shape[1] else M) / (NORMALIZATION[scheme] * M.norm())
    for a, b, c in COEFFICIENTS[scheme]:
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X.mT if M.shape[0] > M.shape[1] else X


class ReferenceOptimizer:
    """REFERENCE 1 for one matrix W (m, n), updated in place by `step(G)`."""

    def __init__(
        self,
        W: Tensor,
        rule: Rule,
        *,
        lr: float,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        clip: tuple[float, float] | None = None,
        eps: float = 1e-6,
        orthogonalizer: str = "polar_express",
        betas: tuple[float, float] = (0.9, 0.95),
        adam_eps: float = 1e-8,
    ):
        self.W, self.rule, self.η, self.μ, self.nesterov, self.λ = (
            W,
            rule,
            lr,
            momentum,
            nesterov,
            weight_decay,
        )
        self.clip, self.ε, self.scheme, self.betas, self.adam_eps = (
            clip or rule.clip,
            eps,
            orthogonalizer,
            betas,
            adam_eps,
        )
        self.M, self.V, self.t = torch.zeros_like(W), torch.zeros_like(W), 0
        self.c = None if rule.calibrated else 1.0
        self.R = W.norm()

    def direction(self, G: Tensor) -> tuple[Tensor, Tensor]:
        """(Q, M̂): the direction and the (look-ahead) momentum that it comes from."""
        β1, β2 = self.betas
        if self.rule.direction == "adam":
            self.M = β1 * self.M + (1 - β1) * G
            self.V = β2 * self.V + (1 - β2) * G**2
            U = (self.M / (1 - β1**self.t)) / ((self.V / (1 - β2**self.t)).sqrt() + self.adam_eps)
            return U, self.M
        if self.rule.direction == "lion":
            U = torch.sign(β1 * self.M + (1 - β1) * G)
            self.M = β2 * self.M + (1 - β2) * G
            return U, self.M
        self.M = self.μ * self.M + G
        M_hat = self.μ * self.M + G if self.nesterov else self.M
        Q = orthogonalize(M_hat, self.scheme) if self.rule.direction == "orthogonal" else M_hat
        return Q, M_hat

    def step(self, G: Tensor) -> None:
        W, rule, λ, η = self.W, self.rule, self.λ, self.η
        self.t += 1
        Q, M_hat = self.direction(G)
        m, n = W.shape
        s = rule.shape_factor(m, n)
        λc = λ if rule.decay == "coupled" else 0.0
        λd = λ if rule.decay == "decoupled" else 0.0
        D = λc * W + s * Q
        if self.c is None:
            if not Q.any():
                return
            base = D if rule.ratio == "update" else Q
            self.c = 0.2 * max(m, n) ** 0.5 if W.norm() < self.ε else W.norm() / base.norm()
        if rule.sphere and not Q.any():
            return
        r = W.new_ones(())
        if rule.ratio is not None:
            norm = {"update": D, "direction": Q, "momentum": M_hat}[rule.ratio].norm()
            r = W.norm() / (self.c * norm + self.ε)
            if self.clip is not None:
                r = torch.clamp(r, *self.clip)
                r = W.new_ones(()) if self.clip[0] == 0 and not W.any() else r
        W.copy_((1 - η * λd) * W - η * r * D)
        if rule.sphere:
            W.mul_(self.R / W.norm())
