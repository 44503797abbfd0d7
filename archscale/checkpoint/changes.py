"""What a run has changed on purpose at a checkpoint, as its later checkpoints record it: plain data
in their `state.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Self

from archscale.config.batch import BatchSchedule

OPTIMIZER, DATA, SCHEDULE = RESETS = ("optimizer", "data", "schedule")


@dataclass(frozen=True)
class Change:
    """A deliberate change.

    Attributes:
        kind: `extend` (rates and schedule planned anew), `decay` (`--decay-from`), or `reset`.
        step: from which on it holds; a fall-back may have gone behind the one that was named.
        id: of the checkpoint that was named for it.
        details: plain data; of a reset its `parts`, of an extension the `keys` that differ, with
            their values before and now.
    """

    kind: Literal["extend", "decay", "reset"]
    step: int
    id: str
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def parts(self) -> list[str]:
        """What it resets."""
        return list(self.details["parts"]) if self.kind == "reset" else []

    @property
    def changes_rates(self) -> bool:
        """Whether the steps before it may have had other rates than the config says."""
        return self.kind == "extend" or bool({OPTIMIZER, SCHEDULE} & {*self.parts})


@dataclass(frozen=True)
class Origin:
    """Where something begins: after so many steps and sequences of the run."""

    step: int = 0
    samples: int = 0


@dataclass(frozen=True)
class Origins:
    """Where the order of the data and the schedule (with the ramp of the batch) begin."""

    data: Origin = Origin()
    schedule: Origin = Origin()

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Self:
        """Those that a checkpoint's state names; one that names none has the run's beginning."""
        return cls(**{name: Origin(**values) for name, values in state.get("origins", {}).items()})

    def batches(self, configured: BatchSchedule) -> BatchSchedule:
        """Sequences of every step, numbered through the whole run."""
        start = self.schedule
        return replace(configured, first_step=start.step, first_sample=start.samples)

    def windows(self, configured: BatchSchedule) -> BatchSchedule:
        """Sequences of every step, by the numbers that the data order gives them."""
        start = self.schedule
        return replace(
            configured, first_step=start.step, first_sample=start.samples - self.data.samples
        )


def recorded(state: Mapping[str, Any]) -> list[Change]:
    """The changes before a checkpoint, oldest first."""
    return [Change(**change) for change in state.get("changes", [])]


def to_state(origins: Origins, changes: list[Change]) -> dict[str, Any]:
    """What `Origins.of_state` and `recorded` read."""
    return {"origins": asdict(origins), "changes": [asdict(change) for change in changes]}
