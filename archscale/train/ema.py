"""A running average of the weights (`training.ema`), which looks on: no loss depends on it.

After the update number t = 0, 1, 2, … of a run, from the weights W and the average A,

    A ← A + (1 − d_t) (W − A),    d_t = min(decay, (1 + t) / (10 + t))

Without the warm-up of d_t the weights that the run began with would stay in the average for
1 / (1 − decay) steps. Each rank averages what it stores of every parameter, in float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from archscale.distributed import Fragment
from archscale.parallel.engine import Engine

WARM_UP = 10


class RunningAverage:
    """The average of an engine's weights.

    Attributes:
        updates: how many there were since it began.
    """

    def __init__(self, decay: float, engine: Engine):
        self._decay, self._engine = decay, engine
        self.updates = 0
        self._fragments: dict[str, Fragment] | None = None  # None: it has not begun

    def begin(self) -> None:
        """Begin with the weights as they are now, unless it has begun."""
        if self._fragments is None:
            self._restart()

    def fragments(self) -> dict[str, Fragment]:
        """What checkpoints save, and load in place."""
        if self._fragments is None:
            self._fragments = {
                name: replace(weight, data=torch.empty_like(weight.data))
                for name, weight in self._engine.weights().items()
            }
        return self._fragments

    def _tensors(self) -> tuple[list[Tensor], list[Tensor]]:
        """Averages, and weights in the same order, without those of which this rank has nothing.

        The weights are asked for every time: an engine may move them, as FSDP2 does at its first
        forward pass.
        """
        averages, weights = self.fragments(), self._engine.weights()
        names = [name for name, weight in weights.items() if weight.data.numel()]
        return [averages[name].data for name in names], [weights[name].data for name in names]

    @torch.no_grad()
    def _restart(self) -> None:
        """Begin anew with the weights as they are now."""
        self.updates = 0
        torch._foreach_copy_(*self._tensors())

    def restore(self, state: dict[str, Any]) -> str | None:
        """Go on as the checkpoint of this `state` says, whose averages are loaded; without any it
        begins anew, which the sentence that is returned says."""
        recorded = state.get("ema")
        if recorded is not None:
            self.updates = int(recorded["updates"])
            return None
        self._restart()
        return (
            f"training.ema begins with the weights of step {state['step']}: the checkpoint has no"
            " running average"
        )

    def state(self) -> dict[str, Any]:
        """For a checkpoint's `state.json`."""
        return {"updates": self.updates}

    @torch.no_grad()
    def update(self) -> None:
        """Once after each step that was applied; waits for nothing on the host."""
        decay = min(self._decay, (1 + self.updates) / (WARM_UP + self.updates))
        averages, weights = self._tensors()
        torch._foreach_lerp_(averages, weights, 1 - decay)
        self.updates += 1

    @contextlib.contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """The model computes with the averages; afterwards with the weights again, bit for bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        """Exchange averages and weights, in the memory of one more tensor."""
        for average, weight in zip(*self._tensors()):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
        self._engine.weights_changed()
