"""Load balance of the experts over whole batches: all ranks and all micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from archscale.config import MoEConfig
from archscale.distributed import all_reduce
from archscale.model.loss import balance_loss, load_metrics, load_share
from archscale.model.moe import Routing
from archscale.parallel.engine import Engine
from archscale.train.placing import Placed


@dataclass
class LoadedExperts:
    """What stays of the experts' loads from one step to the next.

    Attributes:
        load: of the last step, all ranks and micro-batches, (L, E) int64 on the device; None: there
            was none yet.
    """

    moe: MoEConfig
    load: Tensor | None = None

    def state(self) -> list[list[int]] | None:
        """For a checkpoint: what the next step depends on; None: on nothing of this."""
        if self.load is None or self.moe.balance_scope != "previous":
            return None
        return self.load.tolist()

    def restore(self, state: list[list[int]] | None, device: torch.device) -> None:
        """Take what `state` has given."""
        self.load = None if state is None else torch.tensor(state, device=device)


class StepBalance:
    """The experts' loads in one step, and the balance loss of each of its micro-batches.

    Under `global`, f is the share of all of the step's assignments, and must be known before the
    first backward pass. The first micro-batch's come from its own forward pass; those of the others
    take a pass through the blocks without gradients, the counting pass: none with accumulation 1,
    (A − 1)/A of a forward pass with A. Loads are all-reduced once a step, all layers together,
    outside the blocks. Two other scopes need no counting pass, and are other losses: f of the
    previous step, and of each micro-batch by itself, whose loads are all-reduced one by one.

    Both passes of a micro-batch route alike, unless a compiler rounds them differently (bf16): then
    a token at a near tie may be counted beside where it goes. Every token is counted once all the
    same, and alike on all ranks.

    Args:
        tokens: of the whole step's batch, on the device.
        previous: the previous step's loads (L, E), of all ranks; None: there was none, and all
            experts count as loaded alike.
    """

    def __init__(self, moe: MoEConfig, tokens: Tensor, previous: Tensor | None = None):
        self.moe, self.tokens, self.previous = moe, tokens, previous
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
        loss = balance_loss(
            routing.mass, self._share(routing), self.tokens, self.moe.balance_weight
        )
        self.total += loss.detach()
        return loss

    def _share(self, routing: Routing) -> Tensor:
        """f of the scope that a micro-batch belongs to, (L, 1, E) or (L, B, E)."""
        if self.moe.counts_first:
            return load_share(self._reduce())[:, None]
        if not self.moe.balances_globally:
            return load_share(routing.load)
        if self.moe.balance_scope == "micro":
            load = routing.load.sum(1)
            all_reduce(load)
        elif self.previous is None:
            load = torch.ones_like(routing.load[:, 0])
        else:
            load = self.previous
        return load_share(load)[:, None]

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
