"""The optimizer's fused passes written with PyTorch's operators: what each kernel reads, computes
and writes, on any device.

Counted, each pass is one launch, as its kernel is on a GPU (`archscale.optim.pass_kernels`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from archscale.bench.count import LaunchCounter
from archscale.optim.coefficients import InnerProducts
from archscale.optim.elementwise import adam_directions_, dot, look_aheads, momenta_, update_
from archscale.optim.exchange import Block, Part
from archscale.optim.fused import FusedPasses, direction_dtype
from archscale.optim.layout import Group, Layout, StepPlan
from archscale.optim.pass_tables import Table
from archscale.optim.passes import Shards
from archscale.optim.state import State


class OneKernelPasses(FusedPasses):
    """Fused passes without kernels.

    Args:
        counter: what counts them; None: nothing does.
    """

    def __init__(
        self,
        layout: Layout,
        state: State,
        plan: StepPlan,
        shards: Shards,
        counter: LaunchCounter | None = None,
    ):
        super().__init__(layout, state, plan, shards, None)
        self._counter = counter
        self._sums: dict[int, list[Tensor]] = {}  # by view, (3,) of each part

    def move_momentum(self, table: Table, buffer: Tensor | None) -> None:
        def move(part: Part) -> None:
            options = self.layout.group_of[part.param].options
            mu, nesterov = options["momentum"], options["nesterov"]
            _, G, M = (part.here.of(tensor) for tensor in self._tensors(part.param))
            momenta_([M], [G], mu)
            if buffer is not None:
                part.there.of(buffer).copy_(look_aheads([M], [G.clone()], mu, nesterov)[0])

        self._one_launch("momentum and pack", table, move)

    def take_direction(self, table: Table, buffer: Tensor | None) -> None:
        def take(part: Part) -> None:
            W = part.here.of(self._tensors(part.param)[0])
            Q = self._direction(part, None if buffer is None else buffer.dtype)
            came = Q if buffer is None else part.there.of(buffer)
            if buffer is not None:
                Q.copy_(came)
            if part.counted:
                W, came = W.reshape(1, -1), came.to(Q.dtype).reshape(1, -1)
                sums = [dot(W, W), dot(came, came), dot(W, came)]
                self._sums.setdefault(part.view, []).append(torch.cat(sums))

        self._one_launch("inner products", table, take)

    def sum_products(self, products: InnerProducts) -> None:
        with self._region("inner products"):
            for view, sums in self._sums.items():
                w, q, p = torch.stack(sums).sum(0)
                products.w[view], products.q[view], products.p[view] = w, q, p

    def move_weights(
        self, table: Table, keep: Tensor, apply: Tensor, bad: Tensor, wire: torch.dtype | None
    ) -> None:
        def move(part: Part) -> None:
            view = slice(part.view, part.view + 1)
            if bad.device.type != "meta" and bool(bad[view]):
                for moment in self._stored_moments(part.param):
                    part.here.of(moment).zero_()
                return
            W, Q = part.here.of(self._tensors(part.param)[0]), self._direction(part, wire)
            W, Q = (tensor.view(-1, part.here.cols) for tensor in (W, Q))
            update_(W, Q, keep[view, None], apply[view, None])

        self._one_launch("update", table, move)

    def adam(self, group: Group, table: Table, corrections: Tensor) -> None:
        options, updates = group.options, not group.has_views
        lr = options["lr"]
        keep = 1 - lr * options["weight_decay"] * (group.rule.decay == "decoupled")

        def move(part: Part) -> None:
            W, G, M, V = self._tensors(part.param)
            Q = G.nan_to_num(0.0, 0.0, 0.0) if updates else G
            step = self.state[self.layout.params[part.param]]["step"]
            adam_directions_([Q], [M], [V], [step], options["betas"], options["adam_eps"])
            if updates:
                W.mul_(keep).sub_(Q * lr)

        self._one_launch("elementwise", table, move)

    def _direction(self, part: Part, wire: torch.dtype | None) -> Tensor:
        """A part of Q in the memory of the gradient."""
        G, (offset, rows, cols, stride) = self._tensors(part.param)[1], part.here
        Q = G.view(direction_dtype(G.dtype, wire))
        ratio = Q.numel() // max(1, G.numel())
        return Block(ratio * offset, rows, cols, ratio * stride).of(Q)

    def _one_launch(self, name: str, table: Table, of_part: Callable[[Part], None]) -> None:
        """All parts of a table, in one launch where there is anything to do."""
        if len(table.chunks):
            with self._region(name):
                for part in table.parts:
                    of_part(part)

    def _region(self, name: str) -> AbstractContextManager[None]:
        if self._counter is None:
            return contextlib.nullcontext()
        return self._counter.region(f"optimizer: {name}")
