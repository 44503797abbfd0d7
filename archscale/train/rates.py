"""The learning rate of every step: a pure function of the config, and of where its schedule
begins."""

from __future__ import annotations

from archscale.checkpoint.changes import Origins
from archscale.config import Config
from archscale.optim.schedule import lr_multiplier
from archscale.plan.transfer import Transfer, transfer_of


class Rates:
    """The rates of a run of `config`, a resolved one.

    Args:
        transfer: of `config`, where it is there already.

    Attributes:
        batches: sequences of every step, numbered through the whole run.
        steps: of the whole run.
    """

    def __init__(self, config: Config, origins: Origins, transfer: Transfer | None = None):
        self.transfer = transfer or transfer_of(config)
        self.batches = origins.batches(config.batches)
        self.steps = origins.schedule.step + config.steps
        self._schedule, self._context = config.schedule, config.model.context
        self._total = self.schedule_tokens(self.steps)

    def schedule_tokens(self, step: int) -> int:
        """Tokens of the steps before the 0-based `step`, from the schedule's beginning on."""
        return (self.batches.at(step)[0] - self.batches.first_sample) * self._context

    def multiplier(self, step: int) -> float:
        """What every role's peak rate is multiplied by in the 0-based `step`."""
        schedule = self._schedule
        factor = lr_multiplier(
            schedule.kind,
            self.schedule_tokens(step),
            self._total,
            warmup=schedule.warmup_tokens,
            final_ratio=schedule.final_ratio,
            decay_ratio=schedule.decayed_share(self._total),
        )
        return factor * (self.batches.at(step)[1] / self.batches.size) ** (
            self.transfer.batch_exponent
        )

    def at(self, step: int) -> float:
        """The matrices' rate in the 0-based `step`."""
        return self.transfer.roles["matrix"].lr * self.multiplier(step)
