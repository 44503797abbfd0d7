"""How many sequences each step takes: a pure function of the step, so that nothing has to be
remembered or counted.

The batch can grow: in `stages` equal stages from batch / stages to the whole batch, over the first
`ramp` sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple


class Stage(NamedTuple):
    """Steps `step` … with `size` sequences each; the first takes the global sample number
    `sample`."""

    step: int
    sample: int
    size: int


@dataclass(frozen=True)
class BatchSchedule:
    """Sequences per step, over all ranks.

    Args:
        size: of the whole batch, a multiple of `stages`.
        ramp: sequences over which the batch grows; 0: it does not.
        stages: sizes that it takes, the whole one included.
        first_step: 0-based step with which the schedule begins.
        first_sample: number of that step's first sequence.
    """

    size: int
    ramp: int = 0
    stages: int = 1
    first_step: int = 0
    first_sample: int = 0

    @cached_property
    def _stages(self) -> list[Stage]:
        """Where each size begins, counted from the schedule's own beginning. Stage k of n ends with
        the first step past k / (n − 1) of the ramp."""
        stages, step, sample = [], 0, 0
        count = self.stages if self.ramp else 1
        for k in range(1, count):
            size = self.size * k // count
            steps = max(0, -(-(self.ramp * k // (count - 1) - sample) // size))
            if steps:
                stages.append(Stage(step, sample, size))
            step, sample = step + steps, sample + steps * size
        return [*stages, Stage(step, sample, self.size)]

    @property
    def sizes(self) -> list[int]:
        """Every size that a step can have, in the order in which they come."""
        return [stage.size for stage in self._stages]

    def at(self, step: int) -> tuple[int, int]:
        """(first global sample number, sequences) of the 0-based `step` ≥ `first_step`."""
        step -= self.first_step
        stage = next(stage for stage in reversed(self._stages) if stage.step <= step)
        return self.first_sample + stage.sample + (step - stage.step) * stage.size, stage.size

    def steps(self, samples: float) -> int:
        """Whole steps from the schedule's beginning that come closest to `samples` sequences (half
        rounds up), at least 1."""
        stage = next(
            (stage for stage in reversed(self._stages) if stage.sample <= samples), self._stages[0]
        )
        return max(
            1, stage.step + int((2 * (samples - stage.sample) + stage.size) // (2 * stage.size))
        )
