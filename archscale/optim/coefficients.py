"""The step of every matrix optimizer from three inner products (OrScale, arXiv 2605.07815; HyperP,
arXiv 2603.28743).

The rule is in `archscale.rules`. Since D is a combination of W and Q, three inner products decide
the step: w = ‖W‖², q = ‖Q‖², p = ⟨W, Q⟩. Everything here is a pure function of them, vectorised
over matrices; nothing here sees a matrix or a process group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from archscale.rules import Rule


@dataclass(frozen=True)
class Hyperparameters:
    """What a parameter group says of this step."""

    lr: float | Tensor  # η
    weight_decay: float  # λ, coupled or decoupled as the rule says
    clip: tuple[float, float] | None  # bounds in force: the rule's own unless overridden
    eps: float  # ε
    ratio_exponent: float = 1.0  # x
    calibration: float | None = None  # c of a calibrated rule; None: set at the first direction


@dataclass(frozen=True)
class MatrixScalars:
    """What a step reads of k matrices beside the inner products, each (k,)."""

    shape_factor: Tensor  # s
    zero_calibration: Tensor  # c of a matrix that starts with a norm below ε: 0.2 √max(m, n)
    calibration: Tensor  # c; 0 where a calibrated rule has not seen a direction yet
    radius: Tensor  # R; read only on the sphere


@dataclass(frozen=True)
class InnerProducts:
    """Sums over k whole matrices, each (k,) in float32 or better."""

    w: Tensor  # ‖W‖²
    q: Tensor  # ‖Q‖²
    p: Tensor  # ⟨W, Q⟩
    not_finite: Tensor  # 1 where M̂ was not finite, so that Q is zero; else 0
    momentum: Tensor | None  # ‖M̂‖², where a rule's ratio is `momentum`

    def __getitem__(self, matrices: slice) -> InnerProducts:
        """Those of some of the matrices."""
        momentum = None if self.momentum is None else self.momentum[matrices]
        return InnerProducts(
            self.w[matrices],
            self.q[matrices],
            self.p[matrices],
            self.not_finite[matrices],
            momentum,
        )


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
    group: Hyperparameters,
    matrices: MatrixScalars,
    products: InnerProducts,
    taking_part: Tensor | None = None,
) -> Step:
    """One step of k matrices under `rule`.

    Args:
        taking_part: (k,) bool: matrices that have a gradient; the others are left as they are.
            None: all have.
    """
    w, s, η = products.w, matrices.shape_factor, group.lr
    λ_c = group.weight_decay if rule.decay == "coupled" else 0.0
    λ_d = group.weight_decay if rule.decay == "decoupled" else 0.0
    bad = (products.not_finite > 0) | ~torch.isfinite(products.q)
    q, p = torch.where(bad, 0.0, products.q), torch.where(bad, 0.0, products.p)
    frozen = bad  # matrices that this step does not touch
    if taking_part is not None:
        bad, frozen = bad & taking_part, bad | ~taking_part

    # D = λ_c W + s Q, so ‖D‖² = λ_c² w + 2 λ_c s p + s² q; rounding can push a vanishing one
    # below zero.
    weight_norm, direction_norm = w.sqrt(), q.sqrt()
    update_norm = (λ_c**2 * w + 2 * λ_c * s * p + s**2 * q).clamp(min=0).sqrt()

    calibration = matrices.calibration
    if rule.calibrated:  # c = ‖W‖ / ‖D‖ at the first direction that is not zero
        first = (calibration == 0) & (q > 0)
        if taking_part is not None:
            first = first & taking_part
        denominator = update_norm if rule.ratio == "update" else direction_norm
        fresh = weight_norm / denominator.clamp(min=1e-30)
        fresh = torch.where(weight_norm < group.eps, matrices.zero_calibration, fresh)
        if group.calibration is not None:
            fresh = torch.full_like(fresh, group.calibration)
        calibration = torch.where(first, fresh, calibration)
        frozen = frozen | (calibration == 0)  # until then neither updated nor decayed

    # r = (‖W‖ / (c ‖D‖ + ε))ˣ, r̂ = clip(r)
    ratio = torch.ones_like(w)
    if rule.has_trust_ratio:
        norms = {"update": update_norm, "direction": direction_norm}
        if rule.ratio == "momentum":
            assert products.momentum is not None, "ratio 'momentum' needs ‖M̂‖²"
            norms["momentum"] = products.momentum.sqrt()
        ratio = weight_norm / (calibration * norms[str(rule.ratio)] + group.eps)
        if group.ratio_exponent != 1:
            ratio = ratio**group.ratio_exponent
    clipped_ratio = _clip(ratio, weight_norm, group.clip)
    if taking_part is not None:
        ratio, clipped_ratio = (torch.where(taking_part, r, 1.0) for r in (ratio, clipped_ratio))

    # W ← (1 − η λ_d) W − η r̂ D, and D once more as λ_c W + s Q
    keep = 1 - η * λ_d - η * clipped_ratio * λ_c
    apply = η * clipped_ratio * s
    if rule.sphere:  # W ← R W / ‖W‖
        new_norm = (keep**2 * w - 2 * keep * apply * p + apply**2 * q).clamp(min=0).sqrt()
        scale = matrices.radius / new_norm
        frozen = frozen | (new_norm == 0)  # a step that leaves nothing of W has no direction
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
        relative_update=change / weight_norm.clamp(min=group.eps),
    )


def _clip(ratio: Tensor, weight_norm: Tensor, bounds: tuple[float, float] | None) -> Tensor:
    if bounds is None:
        return ratio
    clipped = ratio.clamp(*bounds)
    # LAMB: a zero weight can still move.
    return torch.where(weight_norm == 0, 1.0, clipped) if bounds[0] == 0 else clipped
