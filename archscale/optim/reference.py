"""The update rule on one whole matrix, in the papers' symbols (OrScale, arXiv 2605.07815; HyperP,
arXiv 2603.28743): the page that the fast path is tested against.

Slow, single-process, any dtype (the tests use float64). It shares only tables with the engine: the
presets and the coefficients.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    tall = M.shape[0] > M.shape[1]
    X = (M.mT if tall else M) / (NORMALIZATION[scheme] * M.norm())
    for a, b, c in COEFFICIENTS[scheme]:
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X.mT if tall else X


@dataclass
class ReferenceOptimizer:
    """One matrix W (m, n) under `rule`, updated in place by `step(G)`; the options are those of
    `MatrixOptimizer`."""

    W: Tensor
    rule: Rule
    lr: float
    momentum: float = 0.95
    nesterov: bool = True
    weight_decay: float = 0.0
    clip: tuple[float, float] | None = None
    eps: float = 1e-6
    ratio_exponent: float = 1.0
    calibration: float | None = None
    orthogonalizer: str = "polar_express"
    betas: tuple[float, float] = (0.9, 0.95)
    adam_eps: float = 1e-8

    def __post_init__(self) -> None:
        self.M, self.V, self.t = torch.zeros_like(self.W), torch.zeros_like(self.W), 0
        self.R = self.W.norm()
        self.c = self.calibration if self.rule.calibrated else 1.0

    def step(self, G: Tensor) -> None:
        W, rule, η, λ, ε = self.W, self.rule, self.lr, self.weight_decay, self.eps
        m, n = W.shape
        s = rule.shape_factor(m, n)
        λ_c = λ if rule.decay == "coupled" else 0.0
        λ_d = λ if rule.decay == "decoupled" else 0.0

        Q, M_hat = self.direction(G)
        D = λ_c * W + s * Q
        if not Q.any() and (self.c is None or rule.sphere):
            return  # nothing to calibrate on, and on the sphere no direction is no step
        norm = {"update": D, "direction": Q, "momentum": M_hat, None: D}[rule.ratio].norm()
        if self.c is None:  # once, so that the first ratio is 1
            base = D if rule.ratio == "update" else Q
            self.c = 0.2 * max(m, n) ** 0.5 if W.norm() < ε else W.norm() / base.norm()

        r = W.new_ones(())
        if rule.has_trust_ratio:
            r = (W.norm() / (self.c * norm + ε)) ** self.ratio_exponent
        clip = self.clip or rule.clip
        if clip is not None:
            zero_can_move = clip[0] == 0 and not W.any()  # LAMB
            r = W.new_ones(()) if zero_can_move else r.clamp(*clip)
        W.copy_((1 - η * λ_d) * W - η * r * D)
        if rule.sphere:
            W.mul_(self.R / W.norm())

    def direction(self, G: Tensor) -> tuple[Tensor, Tensor]:
        """(Q, M̂): the direction, and the look-ahead momentum that it comes from."""
        β1, β2 = self.betas
        self.t += 1
        if self.rule.direction == "adam":  # arXiv 1412.6980, algorithm 1
            self.M = β1 * self.M + (1 - β1) * G
            self.V = β2 * self.V + (1 - β2) * G**2
            m_hat, v_hat = self.M / (1 - β1**self.t), self.V / (1 - β2**self.t)
            return m_hat / (v_hat.sqrt() + self.adam_eps), self.M
        if self.rule.direction == "lion":  # arXiv 2302.06675, algorithm 2
            Q = torch.sign(β1 * self.M + (1 - β1) * G)
            self.M = β2 * self.M + (1 - β2) * G
            return Q, self.M
        self.M = self.momentum * self.M + G
        M_hat = self.momentum * self.M + G if self.nesterov else self.M
        orthogonal = self.rule.direction == "orthogonal"
        return orthogonalize(M_hat, self.orthogonalizer) if orthogonal else M_hat, M_hat
