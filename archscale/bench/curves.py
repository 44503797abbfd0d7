"""Whether two runs of one config are one trajectory: their metrics step by step, bit for bit or
within a bound.

What differs first is named by step, key and both values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Lines = Mapping[int, Mapping[str, Any]]  # by step the line of metrics.jsonl

EXACT_KEYS = ("lr", "loss", "grad_norm", "val_loss")
# Another layout sums in another order: the relative difference of a loss that this may come to.
# In float32 the first invariant of the project, over 50 steps. bfloat16 rounds each value by up to
# 2^-9 of it, and a loss is a mean over tokens; steps amplify what rounding changed, by up to a few
# times in a few steps (1e-3 was measured). Its bound is statistical: twice the unit 2^-8.
FLOAT32_BOUND = 1e-5
BFLOAT16_BOUND = 2.0**-7


@dataclass(frozen=True)
class Outcome:
    """How a curve compares with the expected one.

    Attributes:
        problem: what differs first; None where nothing does.
        text: the whole outcome in words.
    """

    problem: str | None
    text: str


def compare_exactly(expected: Lines, curve: Lines, steps: Sequence[int]) -> Outcome:
    """Every loss, norm and rate of `steps`, bit for bit."""
    for step in steps:
        if step not in curve:
            return _differs(f"step {step} has no line of metrics")
        for key in EXACT_KEYS:
            a, b = expected[step].get(key), curve[step].get(key)
            if a != b:
                return _differs(f"differs first at step {step}: {key} {b!r} instead of {a!r}")
    return Outcome(None, f"{len(steps)} steps bitwise equal")


def compare_closely(
    expected: Lines, curve: Lines, steps: Sequence[int], *, bfloat16: bool
) -> Outcome:
    """Every loss of `steps` within the bound of the precision, every rate bit for bit.

    A token whose last chosen and first rejected expert nearly tie is routed by rounding. From the
    first step on whose experts' loads differ, the bound is bfloat16's.
    """
    tie = next((step for step in steps if _loads(expected, step) != _loads(curve, step)), None)
    largest, where = 0.0, None
    for step in steps:
        if step not in curve:
            return _differs(f"step {step} has no line of metrics")
        loose = bfloat16 or (tie is not None and step >= tie)
        for key in ("lr", "loss", "val_loss"):
            a, b = expected[step].get(key), curve[step].get(key)
            bound = 0.0 if key == "lr" else BFLOAT16_BOUND if loose else FLOAT32_BOUND
            gap = _relative(a, b)
            if gap > bound:
                return _differs(
                    f"differs first at step {step}: {key} {b!r} instead of {a!r}, {gap:.2g} of it,"
                    f" more than {bound:.2g}"
                )
            if gap > largest:
                largest, where = gap, step
    bounds = f"{BFLOAT16_BOUND if bfloat16 else FLOAT32_BOUND:.2g}"
    if tie is not None and not bfloat16:
        bounds += f", from step {tie} on, where experts' loads first differ, {BFLOAT16_BOUND:.2g}"
    most = "equal losses" if where is None else f"losses within {largest:.2g} (step {where})"
    return Outcome(None, f"{len(steps)} steps, {most}, bound {bounds}")


def _differs(problem: str) -> Outcome:
    return Outcome(problem, problem)


def _relative(a: Any, b: Any) -> float:
    """|a − b| / |a|; what is not finite or not there (None) equals only itself."""
    if a == b:
        return 0.0
    if a is None or b is None:
        return math.inf
    return abs(a - b) / abs(a) if a else math.inf


def _loads(lines: Lines, step: int) -> dict[str, Any]:
    line = lines.get(step, {})
    return {k: v for k, v in line.items() if k.startswith("moe/layer_") and k.endswith("/load")}
