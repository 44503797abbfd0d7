"""The step of every matrix optimizer from three inner products (OrScale, HyperP).

The rule is in `archscale.rules`. Since D is a combination of W and Q, three inner products decide
the step: w = ‖W‖², q = ‖Q‖², p = ⟨W, Q⟩. Everything here is a pure function of them, vectorised
over matrices; nothing here sees a matrix or a process group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from archscale.rules import Rule


@dataclass
class InnerProducts:
    """Of k matrices, float32 or better, each (k,). q < 0 or non-finite marks a direction that must
    not be applied."""

    w: Tensor  # ‖W‖²
    q: Tensor  # ‖Q‖²
    p: Tensor  # ⟨W, Q⟩
    momentum: Tensor | None = None  # ‖M̂‖², for ratio 'momentum' alone


@dataclass
class Step:
    """W ← keep · W − apply · Q for k matrices; the rest is state and telemetry. Each (k,)."""

    keep: Tensor
    apply: Tensor
    calibration: Tensor  # c; 0 while not calibrated
    ratio: Tensor  # r
    clipped_ratio: Tensor  # r̂
    clipped: Tensor  # bool
    # bool: the direction was not finite; nothing is applied and the momentum must be reset
    bad: Tensor
    weight_norm: Tensor  # ‖W‖ before the step
    relative_update: Tensor  # ‖ΔW‖ / ‖W‖


def step_coefficients(
    rule: Rule,
    products: InnerProducts,
    *,
    lr: float,
    weight_decay: float,
    shape_factor: Tensor,
    zero_calibration: Tensor,
    calibration: Tensor,
    radius: Tensor,
    clip: tuple[float, float] | None,
    eps: float,
    taking_part: Tensor | None = None,
) -> Step:
    """The update rule of REFERENCE 1 (OrScale eq. for D and r; HyperP's retraction), from three
    inner products.

    Args:
        products: of the k matrices.
        lr, weight_decay: η and λ, not yet multiplied.
        shape_factor: s, (k,).
        zero_calibration: c of a matrix whose initial norm is below eps (0.2 √max(m, n)), (k,).
        calibration: c, (k,); 0 where a calibrated rule has not seen a non-zero direction yet.
        radius: R, (k,); read only on the sphere.
        clip: bounds in force (the rule's own unless overridden).
        taking_part: (k,) bool: matrices that have a gradient; the others are left as they are.
            None: all have.
    """
    w, q, p, s = products.w, products.q, products.p, shape_factor
    bad = ~torch.isfinite(q) | (q < 0)
    q, p = torch.where(bad, 0.0, q), torch.where(bad, 0.0, p)
    coupled = weight_decay if rule.decay == "coupled" else 0.0
    decoupled = weight_decay if rule.decay == "decoupled" else 0.0
    weight_norm = w.sqrt()
    # ‖D‖² = λ² w + 2 λ s p + s² q; rounding can push a vanishing D below zero.
    update_norm = (coupled**2 * w + 2 * coupled * s * p + s**2 * q).clamp(min=0).sqrt()

    frozen = bad
    if taking_part is not None:
        bad, frozen = bad & taking_part, bad | ~taking_part
    if rule.calibrated:
        denominator = update_norm if rule.ratio == "update" else q.sqrt()
        first = (calibration == 0) & (q > 0)
        if taking_part is not None:
            first = first & taking_part
        fresh = torch.where(
            weight_norm < eps, zero_calibration, weight_norm / denominator.clamp(min=1e-30)
        )
        calibration = torch.where(first, fresh, calibration)
        frozen = frozen | (
            calibration == 0
        )  # before its calibration a matrix is neither updated nor decayed

    if rule.ratio is None:
        ratio = torch.ones_like(w)
    else:
        norm = {"update": update_norm, "direction": q.sqrt()}.get(rule.ratio)
        if norm is None:
            assert products.momentum is not None, "ratio 'momentum' needs ‖M̂‖²"
            norm = products.momentum.sqrt()
        ratio = weight_norm / (calibration * norm + eps)
    clipped_ratio = ratio if clip is None else ratio.clamp(*clip)
    if clip is not None and clip[0] == 0:
        clipped_ratio = torch.where(
            weight_norm == 0, 1.0, clipped_ratio
        )  # LAMB: a zero weight can still move

    if taking_part is not None:
        ratio, clipped_ratio = (torch.where(taking_part, r, 1.0) for r in (ratio, clipped_ratio))

    keep = 1 - lr * decoupled - lr * clipped_ratio * coupled
    apply = lr * clipped_ratio * s
    if rule.sphere:
        new_norm = (keep**2 * w - 2 * keep * apply * p + apply**2 * q).sqrt()
        scale = radius / new_norm
        keep, apply = keep * scale, apply * scale
        frozen = frozen | (q == 0)  # no direction, no step: not even a rounding of the radius
    keep, apply = torch.where(frozen, 1.0, keep), torch.where(frozen, 0.0, apply)
    change = ((keep - 1) ** 2 * w - 2 * (keep - 1) * apply * p + apply**2 * q).clamp(min=0).sqrt()
    return Step(
        keep=keep,
        apply=apply,
        calibration=calibration,
        ratio=ratio,
        clipped_ratio=clipped_ratio,
        clipped=(clipped_ratio != ratio) & ~frozen,
        bad=bad,
        weight_norm=weight_norm,
        relative_update=change / weight_norm.clamp(min=eps),
    )
