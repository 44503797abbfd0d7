"""The one update rule (OrScale, HyperP): every matrix optimizer is a row of the table `RULES`.

For a weight W (m, n) with direction Q (U Vᵀ of the momentum, or an elementwise direction), learning
rate η and decay λ:

    D = λ_c W + s Q                            the direction that is really subtracted
    r = ‖W‖ / (c ‖D‖ + ε),  r̂ = clip(r)        trust ratio (r̂ = 1 where the rule has none)
    W ← (1 − η λ_d) W − η r̂ D                  λ_c coupled decay, λ_d decoupled decay
    W ← R W / ‖W‖                              only on the sphere

Since D is a combination of W and Q, three inner products decide the step: w = ‖W‖², q = ‖Q‖², p =
⟨W, Q⟩. Everything in this file is a pure function of them, vectorised over matrices; nothing here
sees a matrix or a process group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Direction = Literal["orthogonal", "adam", "lion", "momentum"]

SHAPE_FACTORS = {
    "one": lambda m, n: 1.0,
    "jordan": lambda m, n: math.sqrt(max(1.0, m / n)),
    "spectral": lambda m, n: math.sqrt(m / n),
    "moonlight": lambda m, n: 0.2 * math.sqrt(max(m, n)),  # RMS of the step matches AdamW's
}


def check_clip(clip: tuple[float, float] | None) -> None:
    if clip is not None and not 0 <= clip[0] <= clip[1]:
        raise ValueError(
            f"clip bounds {tuple(clip)} are crossed or negative; give (r_min, r_max) with 0 <="
            " r_min <= r_max"
        )


@dataclass(frozen=True)
class Rule:
    """One optimizer. A new one is a new `Rule`, added to `RULES` or passed to
    `MatrixOptimizer(rule=...)`.

    Attributes:
        name: what the manifest and the state dict call it.
        direction: where Q comes from: `orthogonal` (whole matrix), or elementwise `adam`, `lion`,
            `momentum`.
        shape: key of `SHAPE_FACTORS`; s = SHAPE_FACTORS[shape](m, n).
        ratio: what the trust ratio divides by: `update` ‖D‖, `direction` ‖Q‖, `momentum` ‖M̂‖, or
            None (r̂ = 1).
        calibrated: c is set once, at the first non-zero direction, so that the first ratio is 1;
            otherwise c = 1.
        decay: `decoupled` (outside D), `coupled` (inside D) or `none`.
        clip: bounds (r_min, r_max) of the trust ratio, or None.
        sphere: retract to the initial norm R after every step.
    """

    name: str
    direction: Direction = "orthogonal"
    shape: str = "one"
    ratio: Literal["update", "direction", "momentum"] | None = None
    calibrated: bool = False
    decay: Literal["decoupled", "coupled", "none"] = "decoupled"
    clip: tuple[float, float] | None = None
    sphere: bool = False

    def __post_init__(self) -> None:
        if self.shape not in SHAPE_FACTORS:
            raise ValueError(
                f"rule {self.name!r}: unknown shape factor {self.shape!r}; one of"
                f" {', '.join(SHAPE_FACTORS)}"
            )
        check_clip(self.clip)
        if self.ratio is None and (self.calibrated or self.clip):
            raise ValueError(
                f"rule {self.name!r}: calibration and clip need a trust ratio; set ratio or drop"
                " them"
            )
        if self.ratio == "momentum" and self.direction != "orthogonal":
            raise ValueError(f"rule {self.name!r}: ratio 'momentum' needs direction 'orthogonal'")

    @property
    def needs_norms(self) -> bool:
        """Whether the step depends on inner products over the whole matrix."""
        return self.ratio is not None or self.sphere

    def shape_factor(self, m: int, n: int) -> float:
        return SHAPE_FACTORS[self.shape](m, n)


_TABLE = (
    Rule("muon", shape="jordan"),
    Rule("muon_spectral", shape="spectral"),
    Rule("moonlight", shape="moonlight"),
    Rule("orscale", ratio="update", decay="coupled", clip=(0.5, 1.5)),
    Rule(
        "orscale_lm",
        shape="moonlight",
        ratio="update",
        calibrated=True,
        decay="coupled",
        clip=(0.1, 5.0),
    ),
    Rule("muonh", ratio="update", decay="none", sphere=True),
    Rule(
        "orscale_lm_sphere",
        shape="moonlight",
        ratio="update",
        calibrated=True,
        decay="none",
        clip=(0.1, 5.0),
        sphere=True,
    ),
    # The three hybrids that fail, kept because the ablation is part of the result (OrScale, section
    # on hybrids).
    Rule("hybrid_shape", ratio="direction", clip=(0.5, 1.5)),
    Rule("hybrid_momentum", ratio="momentum", clip=(0.5, 1.5)),
    Rule(
        "hybrid_decoupled", shape="moonlight", ratio="direction", calibrated=True, clip=(0.1, 5.0)
    ),
    # Elementwise directions. adamh is muonh with Adam's direction: HyperP's output head.
    Rule("adamh", direction="adam", ratio="update", decay="none", sphere=True),
    Rule("adamw", direction="adam"),
    Rule("lion", direction="lion"),
    Rule("sgd", direction="momentum"),
    Rule("lamb", direction="adam", ratio="update", decay="coupled", clip=(0.0, 10.0)),
)
RULES: dict[str, Rule] = {rule.name: rule for rule in _TABLE}


def get_rule(rule: str | Rule) -> Rule:
    """The named preset, or the rule itself. ValueError names the known ones."""
    if isinstance(rule, Rule):
        return rule
    if rule not in RULES:
        raise ValueError(
            f"unknown rule {rule!r}; known: {', '.join(RULES)} (or pass an archscale.optim.Rule)"
        )
    return RULES[rule]


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
