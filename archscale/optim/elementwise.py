"""What a step does element by element, as pure functions on tensors: momentum and the elementwise
directions before the orthogonalization, inner products and the update after it.

They see a rank's flat local shards, and no parameter, process group or matrix shape. Each direction
overwrites the gradient G that it came from, so that every rule of `rules.RULES` ends in the same
W ← keep · W − apply · Q.
"""

from __future__ import annotations

import torch
from torch import Tensor


def momenta_(M: list[Tensor], G: list[Tensor], mu: float) -> None:
    """M ← μ M + G of each pair."""
    for m in M:
        m.mul_(mu)  # `_foreach_mul_` would round μ to bfloat16 for a bfloat16 M
    torch._foreach_add_(M, G)


def look_aheads(M: list[Tensor], G: list[Tensor], mu: float, nesterov: bool) -> list[Tensor]:
    """M̂ = μ M + G of each pair (Nesterov), or M itself.

    μ M + G overwrites G; where M's dtype is finer than G's it is a tensor of its own.
    """
    if not nesterov:
        return M
    if all(torch.promote_types(m.dtype, g.dtype) == g.dtype for m, g in zip(M, G)):
        torch._foreach_add_(G, M, alpha=mu)
        return G
    return list(torch._foreach_add(G, M, alpha=mu))


def momentum_direction_(G: Tensor, momentum: Tensor, mu: float, nesterov: bool) -> None:
    """Q = M̂: SGD with momentum."""
    momenta_([momentum], [G], mu)
    G.copy_(look_aheads([momentum], [G], mu, nesterov)[0])


def adam_directions_(
    G: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    step: list[Tensor],
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Q = m̂ / (√v̂ + ε) of each, bias-corrected (Adam, arXiv 1412.6980, algorithm 1).

    Args:
        step: number of this step, 1 at the first; float32 scalars.
    """
    beta1, beta2 = betas
    # Float64 weights get a correction in float64.
    step = [t.to(v.dtype) for t, v in zip(step, exp_avg_sq)]
    torch._foreach_lerp_(exp_avg, [g.to(m.dtype) for g, m in zip(G, exp_avg)], 1 - beta1)
    torch._foreach_mul_(exp_avg_sq, beta2)
    torch._foreach_addcmul_(exp_avg_sq, G, G, value=1 - beta2)
    denominator = torch._foreach_sqrt(exp_avg_sq)
    torch._foreach_div_(denominator, torch._foreach_sqrt(bias_corrections(beta2, step)))
    torch._foreach_add_(denominator, eps)
    for m, d, g in zip(exp_avg, denominator, G):
        torch.div(m, d, out=g)
    torch._foreach_div_(G, bias_corrections(beta1, step))


def bias_corrections(beta: float, step: list[Tensor]) -> list[Tensor]:
    """1 − βᵗ of each."""
    corrections = list(torch._foreach_pow(beta, step))
    torch._foreach_neg_(corrections)
    torch._foreach_add_(corrections, 1)
    return corrections


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
