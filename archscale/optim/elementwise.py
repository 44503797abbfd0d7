"""What a step does element by element, as pure functions on tensors: momentum and the elementwise
directions before the orthogonalization, inner products and the update after it.

They see a rank's flat local shards, and no parameter, process group or matrix shape. Each direction
overwrites the gradient G that it came from, so that every rule of `rules.RULES` ends in the same
W ← keep · W − apply · Q.
"""

from __future__ import annotations

import torch
from torch import Tensor


def momentum_(M: Tensor, G: Tensor, mu: float) -> None:
    """M ← μ M + G."""
    M.mul_(mu).add_(G)


def look_ahead(M: Tensor, G: Tensor, mu: float, nesterov: bool) -> Tensor:
    """M̂ = μ M + G (Nesterov), or M itself.

    μ M + G overwrites G; where M's dtype is finer than G's it is a tensor of its own.
    """
    if not nesterov:
        return M
    in_place = torch.promote_types(M.dtype, G.dtype) == G.dtype
    return torch.add(G, M, alpha=mu, out=G if in_place else None)


def momentum_direction_(G: Tensor, momentum: Tensor, mu: float, nesterov: bool) -> None:
    """Q = M̂: SGD with momentum."""
    momentum_(momentum, G, mu)
    G.copy_(look_ahead(momentum, G, mu, nesterov))


def adam_direction_(
    G: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Q = m̂ / (√v̂ + ε), bias-corrected (Adam, arXiv 1412.6980, algorithm 1).

    Args:
        step: number of this step, 1 at the first; float32 scalar.
    """
    beta1, beta2 = betas
    step = step.to(exp_avg_sq.dtype)  # float64 weights get a correction in float64
    exp_avg.lerp_(G.to(exp_avg.dtype), 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(G, G, value=1 - beta2)
    denominator = exp_avg_sq.sqrt().div_((1 - beta2**step).sqrt()).add_(eps)
    torch.div(exp_avg, denominator, out=G).div_(1 - beta1**step)


def lion_direction_(G: Tensor, exp_avg: Tensor, betas: tuple[float, float]) -> None:
    """Q = sign(β₁ m + (1 − β₁) G) (Lion, arXiv 2302.06675, algorithm 2)."""
    beta1, beta2 = betas
    own = G.to(exp_avg.dtype)
    direction = torch.lerp(exp_avg, own, 1 - beta1).sign_()
    exp_avg.lerp_(own, 1 - beta2)
    G.copy_(direction)


def dot(A: Tensor, B: Tensor) -> Tensor:
    """⟨A_i, B_i⟩ of each row of (count, length), (count,) in float32 or better."""
    A, B = (X if X.dtype == torch.float64 else X.float() for X in (A, B))
    return torch.dot(A[0], B[0])[None] if len(A) == 1 else torch.linalg.vecdot(A, B)


def update_(W: Tensor, Q: Tensor, keep: Tensor, apply: Tensor) -> None:
    """W ← keep · W − apply · Q of each row of (count, length); keep and apply (count, 1)."""
    if W.dtype == keep.dtype:
        W.mul_(keep).addcmul_(Q, apply, value=-1)
    else:
        W.copy_(W * keep - Q * apply)
