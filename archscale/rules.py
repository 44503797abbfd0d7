"""The one update rule (OrScale, arXiv 2605.07815; HyperP, arXiv 2603.28743): every matrix optimizer
is a row of the table `RULES`, and every other list of rules derives from it.

For a weight W (m, n) with direction Q (U Vᵀ of the momentum, or an elementwise direction), learning
rate η and decay λ:

    D = λ_c W + s Q                            the direction that is really subtracted
    r = (‖W‖ / (c ‖D‖ + ε))ˣ,  r̂ = clip(r)     trust ratio (r̂ = 1 where the rule has none)
    W ← (1 − η λ_d) W − η r̂ D                  λ_c coupled decay, λ_d decoupled decay
    W ← R W / ‖W‖                              only on the sphere

The exponent x is 1 but where an optimizer is given another (`ratio_exponent`). Since D is a
combination of W and Q, three inner products decide the step: see `archscale.optim.coefficients`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

Direction = Literal["orthogonal", "adam", "lion", "momentum"]

# The moments that each direction keeps, by the names that torch.optim gives them.
MOMENTS: dict[Direction, tuple[str, ...]] = {
    "orthogonal": ("momentum",),
    "momentum": ("momentum",),
    "lion": ("exp_avg",),
    "adam": ("exp_avg", "exp_avg_sq"),
}
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
        if not self.has_trust_ratio and (self.calibrated or self.clip):
            raise ValueError(
                f"rule {self.name!r}: calibration and clip need a trust ratio; set ratio or drop"
                " them"
            )
        if self.ratio == "momentum" and self.elementwise:
            raise ValueError(f"rule {self.name!r}: ratio 'momentum' needs direction 'orthogonal'")

    @property
    def elementwise(self) -> bool:
        """Whether Q needs nothing but the elements of the gradient: nothing is orthogonalized."""
        return self.direction != "orthogonal"

    @property
    def moments(self) -> tuple[str, ...]:
        """Names of the moments in a parameter's state, each of the parameter's shape."""
        return MOMENTS[self.direction]

    @property
    def moment_buffers(self) -> int:
        """Numbers per element that the direction keeps, 4 bytes each in float32."""
        return len(self.moments)

    @property
    def has_trust_ratio(self) -> bool:
        """Whether r̂ scales the step, so that there is something to clip."""
        return self.ratio is not None

    @property
    def needs_norms(self) -> bool:
        """Whether the step depends on inner products over the whole matrix."""
        return self.has_trust_ratio or self.sphere

    @property
    def per_matrix(self) -> bool:
        """Whether the step sees matrices: it orthogonalizes them, or needs their norms."""
        return not self.elementwise or self.needs_norms

    def shape_factor(self, m: int, n: int) -> float:
        return SHAPE_FACTORS[self.shape](m, n)


_TABLE = (
    Rule("muon", shape="jordan"),
    Rule("muon_plain"),  # the baseline of OrScale's experiments
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
    # The uncalibrated arm of OrScale's scaling study.
    Rule("orscale_moonlight", shape="moonlight", ratio="update", decay="coupled", clip=(0.1, 5.0)),
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
    # The three hybrids that fail, kept because the ablation is part of OrScale's result.
    Rule("hybrid_shape", ratio="direction", clip=(0.5, 1.5)),
    Rule("hybrid_momentum", ratio="momentum", clip=(0.5, 1.5)),
    Rule(
        "hybrid_decoupled", shape="moonlight", ratio="direction", calibrated=True, clip=(0.1, 5.0)
    ),
    # RMS(W) / RMS(M̂), which is the ratio of the norms.
    Rule("muscale", shape="moonlight", ratio="momentum", clip=(0.5, 1.5)),
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


# --- which matrices it applies to

HEADS = ("q", "k", "v")  # blocks that consist of attention heads


@dataclass(frozen=True)
class Views:
    """Which matrices the blocks of a fused projection are to the optimizer: by default each is one.

    Attributes:
        per_head: rows of one attention head, where each head of the blocks q, k and v is a matrix.
        fused: names of blocks that together are one matrix, where they stand one below the other.
    """

    per_head: int | None = None
    fused: tuple[tuple[str, ...], ...] = ()

    def matrices(self, blocks: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
        """(name, rows) of each matrix, from the (name, rows) of the blocks; empty where the whole
        is one matrix without blocks."""
        names = tuple(name for name, _ in blocks)
        for together in self.fused:
            for first in range(len(names) - len(together) + 1):
                last = first + len(together)
                if names[first:last] == together:
                    rows = sum(size for _, size in blocks[first:last])
                    one = ("_".join(together), rows)
                    return self.matrices([*blocks[:first], one, *blocks[last:]])
        return [matrix for block in blocks for matrix in self._heads(*block)]

    def _heads(self, name: str, rows: int) -> Iterator[tuple[str, int]]:
        if self.per_head and name in HEADS:
            each = self.per_head
            yield from ((f"{name}{head}", each) for head in range(rows // each))
        else:
            yield name, rows
