"""Load balance of the experts over one step's whole batch: all ranks and all micro-batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from archscale.config import MoEConfig
from archscale.distributed import all_reduce
from archscale.model.loss import balance_loss, load_metrics, load_share
from archscale.model.moe import Routing
from archscale.parallel.engine import Engine
from archscale.train.placing import Placed


class StepBalance:
    """The experts' loads in one step, and the balance loss of each of its micro-batches.

    Under `global`, f is the share of all of the step's assignments, and must be known before the
    first backward pass. The first micro-batch's come from its own forward pass; those of the others
    take a pass through the blocks without gradients, the counting pass: none with accumulation 1,
    (A − 1)/A of a forward pass with A. The alternatives are not the same loss (last step's f; each
    micro-batch's own) or hold the activations of all micro-batches at once. Loads are all-reduced
    once a step, all layers together, outside the blocks.

    Both passes of a micro-batch route alike, unless a compiler rounds them differently (bf16): then
    a token at a near tie may be counted beside where it goes. Every token is counted once all the
    same, and alike on all ranks.

    Args:
        tokens: of the whole step's batch, on the device.
    """

    def __init__(self, moe: MoEConfig, tokens: Tensor):
        self.moe, self.tokens = moe, tokens
        self.load: Tensor | None = (
            None  # (L, E) so far; of all ranks and micro-batches once `_reduced`
        )
        self.total = torch.zeros((), device=tokens.device)  # balance loss of this rank's tokens
        self._reduced = False

    @torch.no_grad()
    def count(self, engine: Engine, micro_batches: Sequence[Placed]) -> None:
        """The counting pass, over all micro-batches but the first."""
        if self.moe.counts_first:
            for batch in micro_batches:
                output = engine.forward(batch.inputs, documents=batch.documents, head=False)
                self._add(output.routing)

    def loss(self, routing: Routing) -> Tensor:
        """Balance loss of one micro-batch, in the order of the step: a scalar with gradient."""
        if not self._reduced:
            self._add(routing)
        if self.moe.counts_first:
            share = load_share(self._reduce())[:, None]
        else:
            share = load_share(routing.load)
        loss = balance_loss(routing.mass, share, self.tokens, self.moe.balance_weight)
        self.total += loss.detach()
        return loss

    def metrics(self) -> dict[str, Tensor]:
        """Metrics of the whole step's loads, once every micro-batch has passed; scalars on the
        device."""
        return load_metrics(self._reduce())

    def _add(self, routing: Routing) -> None:
        load = routing.load.sum(1)
        self.load = load if self.load is None else self.load + load

    def _reduce(self) -> Tensor:
        assert self.load is not None
        if not self._reduced:
            all_reduce(self.load)  # int64: exact, and the same in any order
            self._reduced = True
        return self.load
