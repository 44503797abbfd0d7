"""A guard over training: what is not finite, spikes, saturates or runs away is an event, and a bad
step may be skipped.

Decisions rest on numbers that all ranks share (global loss and gradient norm), so all ranks take
them together. `warn` judges what is read anyway. `act` has to know before the update, so it waits
for the device once a step: a bad step is skipped with all state untouched; more than `max_skips` in
a row end in a fall-back to an older checkpoint; more than `max_fallbacks` in the run.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

MIN_HISTORY = 16  # steps before anything counts as a spike
SATURATED = 0.9  # share of matrices whose trust ratio is clipped
RUNAWAY = 9.0  # ‖W‖ / ‖W₀‖ − 1
NORMAL = 1.4826  # standard deviation over median absolute deviation of a normal distribution


class Guard:
    """Judges steps in their order.

    Args:
        mode: warn or act. window: steps that a new one is compared with.
        spike: robust standard deviations above the median of the window from which on a loss or
            gradient norm is a spike.
        max_skips: steps in a row that may be skipped. max_fallbacks: returns to older checkpoints
            in one run.
    """

    def __init__(self, mode: str, window: int, spike: float, max_skips: int, max_fallbacks: int):
        self.acts, self.spike = mode == "act", spike
        self.max_skips, self.max_fallbacks = max_skips, max_fallbacks
        self._history: dict[str, deque[float]] = {
            key: deque(maxlen=window) for key in ("loss", "grad_norm")
        }
        self.skipped = 0  # in a row
        self.fallbacks = 0
        self._raised: set[str] = set()

    def judge(self, values: Mapping[str, float]) -> str | None:
        """What is wrong with a step, or None; only a good one joins the window.

        Args:
            values: `loss` and `grad_norm` of the step.
        """
        problem = next(
            (text for key in self._history if (text := self._problem(key, values[key]))), None
        )
        if problem is None or not self.acts:
            for key, history in self._history.items():
                if math.isfinite(values[key]):
                    history.append(values[key])
        self.skipped = self.skipped + 1 if problem and self.acts else 0
        return problem

    def _problem(self, key: str, value: float) -> str | None:
        name, history = {"loss": "loss", "grad_norm": "gradient norm"}[key], self._history[key]
        if not math.isfinite(value):
            return f"non-finite {key}"
        if len(history) < MIN_HISTORY:
            return None
        z = robust_z(value, history)
        if z <= self.spike:
            return None
        return (
            f"{name} {value:.4g} is {z:.1f} robust standard deviations above the last"
            f" {len(history)} steps' median"
        )

    @property
    def exhausted(self) -> bool:
        """Whether more steps in a row were skipped than may be."""
        return self.skipped > self.max_skips

    def watch(self, metrics: Mapping[str, Any]) -> str | None:
        """What has gone wrong with the optimizer since the last reading, or None. A state that
        lasts is reported once.

        Args:
            metrics: of the step that was read; those that are missing are in order.
        """
        drift = metrics.get("optimizer/weight_norm_drift", 0.0)
        clipped = metrics.get("optimizer/clip_fraction", 0.0)
        states = [
            ("saturation", clipped >= SATURATED, f"{clipped:.0%} of the trust ratios are clipped"),
            (
                "runaway",
                not drift < RUNAWAY,  # also where it is NaN
                f"a matrix has grown to {1 + drift:.1f} times its initial norm",
            ),
        ]
        events = []
        for name, present, text in states:
            if present and name not in self._raised:
                events.append(text)
            (self._raised.add if present else self._raised.discard)(name)
        return "; ".join(events) or None

    def state(self) -> dict[str, Any]:
        """Plain data for a checkpoint: a resumed run judges as this one would."""
        return {
            "history": {key: list(history) for key, history in self._history.items()},
            "skipped": self.skipped,
            "raised": sorted(self._raised),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Back to `state()`. Fall-backs are counted on: they belong to the process, not to the
        trajectory."""
        for key, values in state["history"].items():
            self._history[key] = deque(values, maxlen=self._history[key].maxlen)
        self.skipped, self._raised = state["skipped"], set(state["raised"])


def not_finite_since(before: int | None, line: Mapping[str, Any]) -> int | None:
    """Step since which the loss of a run is not finite, up to and with `line`; None where it is.

    Args:
        before: the same up to the line before.
        line: of metrics.jsonl, or before it was written: None stands there for what is not finite.
            A validation loss counts as well: the weights after the step already give none.
    """
    losses = [line.get(key, 0.0) for key in ("loss", "val_loss")]
    if all(loss is not None and math.isfinite(loss) for loss in losses):
        return None
    return line["step"] if before is None else before


def robust_z(value: float, history: deque[float]) -> float:
    """(value − median) / (1.4826 · median absolute deviation). Median and not mean: a spike in the
    window would raise both mean and standard deviation, and hide the next one."""
    median = statistics.median(history)
    deviation = NORMAL * statistics.median(abs(x - median) for x in history)
    # At least 1e-3 of the median's size: in a window that hardly moves, rounding is no spike.
    return (value - median) / max(deviation, 1e-3 * abs(median), 1e-30)
