"""Execute a `shards.ExchangePlan`: momentum shards → whole matrices → orthogonalize → direction shards.

Per batch two packed all-to-alls. What a rank would send to itself never enters the wire: it is written straight into the
stage (the owner's flat buffer of whole matrices) and back, so a single process exchanges nothing. While one batch is
orthogonalized the next one's momentum is already travelling; at most two batches are in flight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from archscale.distributed import all_to_all
from archscale.optim.shards import Batch, ExchangePlan, Interval

# A copy of one contiguous run: (what, offset in it, offset in the other buffer, length). `what` numbers a parameter when
# the run is part of a local shard, and is 0 when it is part of a stage.
Move = tuple[int, int, int, int]


@dataclass
class _Route:
    """One batch as one rank sees it."""

    stacks: list[tuple[int, int, int, list[int]]] = field(default_factory=list)  # (stage offset, rows, cols, views)
    stage: int = 0  # elements of whole matrices owned here
    stay: list[Move] = field(default_factory=list)  # (param, local, stage): momentum owned where it is held
    pack: list[Move] = field(default_factory=list)  # (param, local, wire): momentum to other owners
    assemble: list[Move] = field(default_factory=list)  # (0, stage, wire): momentum from other holders
    return_stay: list[Move] = field(default_factory=list)  # (param, local, stage): directions held where they are owned
    scatter: list[Move] = field(default_factory=list)  # (0, stage, wire): directions to other holders
    unpack: list[Move] = field(default_factory=list)  # (param, local, wire): directions from other owners
    sends: list[int] = field(default_factory=list)  # elements to each rank on the way in …
    receives: list[int] = field(default_factory=list)
    returns: list[int] = field(default_factory=list)  # … and on the way back; more than came in, with replicas
    restores: list[int] = field(default_factory=list)


@dataclass
class Run:
    """`count` equal pieces of matrices, adjacent in this rank's flat local tensor of one parameter."""

    param: int
    lo: int
    length: int
    count: int
    view: int  # the first; the others follow
    counted: bool  # whether this rank counts them in inner products (one holder of each piece does)

    def of(self, flat: Tensor) -> Tensor:
        return flat[self.lo : self.lo + self.count * self.length].view(self.count, self.length)

    @property
    def views(self) -> slice:
        return slice(self.view, self.view + self.count)


class Watch(Protocol):
    """Measures whole matrices on the ranks that own them.

    Attributes:
        keys: names of what it measures of M̂ and Q.
        gradients: names of what it measures of gradients, which takes an exchange of its own; none: no exchange.
    """

    keys: tuple[str, ...]
    gradients: tuple[str, ...]

    def __call__(self, momentum: Tensor, direction: Tensor) -> Tensor:
        """Of M̂ and its Q, stacks (k, m, n) in the wire's dtype → (keys, k). Neither may be written to."""

    def of_gradient(self, gradient: Tensor) -> Tensor:
        """Of a stack (k, m, n) of gradients → (gradients, k)."""


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Row-wise inner products of (count, length), float32 or better."""
    a, b = (x if x.dtype == torch.float64 else x.float() for x in (a, b))
    return torch.dot(a[0], b[0])[None] if len(a) == 1 else torch.linalg.vecdot(a, b)


class Exchange:
    """The exchange of one plan on one rank.

    Args:
        plan: the same on every rank.
        local: this rank's intervals by parameter, in the order in which its flat local tensor stores them.
        rank, group: this rank in process group `group`.
    """

    def __init__(self, plan: ExchangePlan, local: Sequence[Sequence[Interval]], rank: int, group: Any = None):
        self.plan, self._local, self._rank, self._group = plan, local, rank, group
        self._routes = [self._route(batch) for batch in plan.batches]

    @property
    def elements_sent(self) -> int:
        """Matrix elements that this rank sends to others in one run, both ways."""
        return sum(sum(route.sends) + sum(route.returns) for route in self._routes)

    def run(
        self,
        momenta: dict[int, Tensor],
        grads: dict[int, Tensor],
        look_ahead: dict[int, float],
        orthogonalize_: Callable[[Tensor, list[int]], None],
        wire_dtype: torch.dtype,
    ) -> None:
        """Overwrite `grads` with the directions of M̂ = μ M + G.

        Args:
            momenta, grads: flat local tensors by parameter.
            look_ahead: μ by parameter (0: M̂ = M).
            orthogonalize_: called on each owned stack (k, m, n) with its k view numbers; overwrites it.
            wire_dtype: of the whole matrices and of what travels.
        """

        def look(param: int, lo: int, out: Tensor) -> None:
            run = slice(lo, lo + out.numel())
            if look_ahead[param]:
                torch.add(grads[param][run], momenta[param][run], alpha=look_ahead[param], out=out)
            else:
                out.copy_(momenta[param][run])

        def send(route: _Route) -> tuple[Tensor, Any]:
            wire = torch.empty(sum(route.sends), dtype=wire_dtype, device=device)
            for param, local, at, n in route.pack:
                look(param, local, wire[at : at + n])
            return all_to_all(wire, route.sends, route.receives, self._group)

        def receive(route: _Route, arriving: tuple[Tensor, Any]) -> Tensor:
            stage = torch.empty(route.stage, dtype=wire_dtype, device=device)
            for param, local, at, n in route.stay:
                look(param, local, stage[at : at + n])
            wire, work = arriving
            work.wait()
            for _, at, lo, n in route.assemble:
                stage[at : at + n] = wire[lo : lo + n]
            return stage

        def send_back(route: _Route, stage: Tensor) -> tuple[Tensor, Any]:
            wire = torch.empty(sum(route.returns), dtype=wire_dtype, device=device)
            for _, at, lo, n in route.scatter:
                wire[lo : lo + n] = stage[at : at + n]
            arriving = all_to_all(wire, route.returns, route.restores, self._group)
            for param, local, at, n in route.return_stay:
                grads[param][local : local + n] = stage[at : at + n]
            return arriving

        def receive_back(route: _Route, arriving: tuple[Tensor, Any]) -> None:
            wire, work = arriving
            work.wait()
            for param, local, lo, n in route.unpack:
                grads[param][local : local + n] = wire[lo : lo + n]

        routes = self._routes
        if not routes:
            return
        device = next(iter(grads.values())).device
        arriving = following = send(routes[0])
        returning: tuple[Tensor, Any] | None = None
        for i, route in enumerate(routes):
            if i + 1 < len(routes):
                following = send(routes[i + 1])
            stage = receive(route, arriving)
            for at, rows, cols, views in route.stacks:
                orthogonalize_(stage[at : at + len(views) * rows * cols].view(len(views), rows, cols), views)
            if returning is not None:
                receive_back(routes[i - 1], returning)
            returning = send_back(route, stage)
            arriving = following
        if returning is not None:
            receive_back(routes[-1], returning)

    # ----------------------------------------------------------------------------------------------------------- plan

    def _route(self, batch: Batch) -> _Route:
        """Everything that this rank copies and sends for one batch."""
        plan, me = self.plan, self._rank
        route = _Route()
        place: dict[int, int] = {}  # view → offset in the stage
        for v in batch.views[me]:
            view = plan.views[v]
            if not route.stacks or route.stacks[-1][1:3] != (view.rows, view.cols):
                route.stacks.append((route.stage, view.rows, view.cols, []))
            route.stacks[-1][3].append(v)
            place[v] = route.stage
            route.stage += view.numel
        for other in range(plan.world):
            inward, outward = plan.inbound(batch, me, other), plan.outbound(batch, other, me)
            for s in inward if other == me else ():
                _append(route.stay, self._held(s.view, s.lo), place[s.view] + s.lo, s.numel)
            for s in outward if other == me else ():
                _append(route.return_stay, self._held(s.view, s.lo), place[s.view] + s.lo, s.numel)
            if other == me:
                inward, outward = [], []
            from_other = plan.inbound(batch, other, me) if other != me else []
            to_other = plan.outbound(batch, me, other) if other != me else []
            for elements, runs, segments, held_here in (
                (route.sends, route.pack, inward, True),
                (route.restores, route.unpack, outward, True),
                (route.receives, route.assemble, from_other, False),
                (route.returns, route.scatter, to_other, False),
            ):
                at = sum(elements)
                for s in segments:
                    _append(
                        runs,
                        self._held(s.view, s.lo) if held_here else (0, place[s.view] + s.lo),
                        at,
                        s.numel,
                    )
                    at += s.numel
                elements.append(at - sum(elements))
        return route

    def _held(self, view: int, lo: int) -> tuple[int, int]:
        """(parameter, offset in this rank's flat local tensor) of element `lo` of a view."""
        param = self.plan.views[view].param
        position, stored = self.plan.views[view].offset + lo, 0
        for start, end in self._local[param]:
            if start <= position < end:
                return param, stored + position - start
            stored += end - start
        raise AssertionError("a segment that this rank does not hold")


def _append(moves: list[Move], here: tuple[int, int], there: int, n: int) -> None:
    """Append a move, or lengthen the last one where both sides go on contiguously."""
    what, at = here
    if moves:
        last_what, last_at, last_there, last_n = moves[-1]
        if last_what == what and last_at + last_n == at and last_there + last_n == there:
            moves[-1] = (what, last_at, last_there, last_n + n)
            return
    moves.append((what, at, there, n))
