"""Elementwise directions on local shards: Adam (AdamW, LAMB, adamh), Lion, momentum SGD.

Each function updates its state in place and overwrites the gradient with the direction U, so that
every rule of `rules.RULES` ends in the same W ← keep · W − apply · U.
"""

from __future__ import annotations

import torch
from torch import Tensor


def adam_direction_(
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """U = m̂ / (√v̂ + ε), bias-corrected (Kingma and Ba 2017). `step` is 1 on the first call;
    float32 scalar."""
    beta1, beta2 = betas
    step = step.to(exp_avg_sq.dtype)  # float64 weights get a correction in float64
    exp_avg.lerp_(grad.to(exp_avg.dtype), 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = exp_avg_sq.sqrt().div_((1 - beta2**step).sqrt()).add_(eps)
    torch.div(exp_avg, denominator, out=grad).div_(1 - beta1**step)


def lion_direction_(grad: Tensor, exp_avg: Tensor, betas: tuple[float, float]) -> None:
    """U = sign(β₁ m + (1 − β₁) g) (Chen et al. 2023)."""
    beta1, beta2 = betas
    own = grad.to(exp_avg.dtype)
    direction = torch.lerp(exp_avg, own, 1 - beta1).sign_()
    exp_avg.lerp_(own, 1 - beta2)
    grad.copy_(direction)


def momentum_direction_(grad: Tensor, momentum: Tensor, mu: float, nesterov: bool) -> None:
    """U = M ← μ M + G, or the Nesterov look-ahead μ M + G."""
    momentum.mul_(mu).add_(grad)
    if nesterov:
        grad.add_(momentum, alpha=mu)
    else:
        grad.copy_(momentum)
