"""Execute a `shards.ExchangePlan`: momentum shards → whole matrices → orthogonalize → direction
shards.

Per batch two packed all-to-alls. What a rank would send to itself never enters the wire: it is
written straight into the stage (the owner's flat buffer of whole matrices) and back, so a single
process exchanges nothing. While one batch is orthogonalized the next one's momentum is already
travelling; at most two batches are in flight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from archscale.distributed import Piece, all_to_all
from archscale.optim.shards import Batch, ExchangePlan, Segment, held_rectangles


class Block(NamedTuple):
    """`rows` × `cols` elements of a flat buffer; rows begin `stride` elements apart."""

    offset: int
    rows: int
    cols: int
    stride: int

    def of(self, flat: Tensor) -> Tensor:
        """(rows, cols), or (cols,) where it is one row, in the buffer's memory."""
        if self.rows == 1:
            return flat[self.offset : self.offset + self.cols]
        return flat[self.offset :].as_strided((self.rows, self.cols), (self.stride, 1))


class Move(NamedTuple):
    """A copy between a block of a local shard (of parameter `param`) or of the stage, and one of
    the wire or the stage."""

    param: int  # 0 where `here` lies in the stage
    here: Block
    there: Block


@dataclass
class _Route:
    """One batch as one rank sees it."""

    stacks: list[tuple[int, int, int, list[int]]] = field(
        default_factory=list
    )  # (stage offset, rows, cols, views)
    stage: int = 0  # elements of whole matrices owned here
    stay: list[Move] = field(default_factory=list)  # local, stage: momentum owned where it is held
    pack: list[Move] = field(default_factory=list)  # local, wire: momentum to other owners
    assemble: list[Move] = field(default_factory=list)  # stage, wire: momentum from other holders
    return_stay: list[Move] = field(
        default_factory=list
    )  # local, stage: directions held where they are owned
    scatter: list[Move] = field(default_factory=list)  # stage, wire: directions to other holders
    unpack: list[Move] = field(default_factory=list)  # local, wire: directions from other owners
    sends: list[int] = field(default_factory=list)  # elements to each rank on the way in …
    receives: list[int] = field(default_factory=list)
    returns: list[int] = field(
        default_factory=list
    )  # … and on the way back; more than came in, with replicas
    restores: list[int] = field(default_factory=list)


@dataclass
class Run:
    """`count` equal pieces of matrices, adjacent in this rank's flat local tensor of one
    parameter."""

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


Read = Callable[[int, Block, Tensor], None]
"""Writes what is to be orthogonalized of a block of a parameter's flat local tensor into a tensor
of its shape."""


class Watch(Protocol):
    """Measures whole matrices on the ranks that own them.

    Attributes:
        keys: names of what it measures of M̂ and Q.
        gradients: names of what it measures of gradients, which takes an exchange of its own; none:
            no exchange.
    """

    keys: tuple[str, ...]
    gradients: tuple[str, ...]

    def __call__(self, momentum: Tensor, direction: Tensor) -> Tensor:
        """Of M̂ and its Q, stacks (k, m, n) in the wire's dtype → (keys, k). Neither may be written
        to."""

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
        local: this rank's pieces by parameter, in the order in which its flat local tensor stores
            them.
        rank, group: this rank in process group `group`.
    """

    def __init__(
        self, plan: ExchangePlan, local: Sequence[Sequence[Piece]], rank: int, group: Any = None
    ):
        self.plan, self._rank, self._group = plan, rank, group
        self._held = [held_rectangles(view, local[view.param]) for view in plan.views]
        self._routes = [self._route(batch) for batch in plan.batches]

    @property
    def elements_sent(self) -> int:
        """Matrix elements that this rank sends to others in one run, both ways."""
        return sum(sum(route.sends) + sum(route.returns) for route in self._routes)

    def run(
        self,
        read: Read,
        directions: dict[int, Tensor],
        orthogonalize_: Callable[[Tensor, list[int]], None],
        wire_dtype: torch.dtype,
    ) -> None:
        """Gather whole matrices with `read`, orthogonalize them, scatter the results into
        `directions`.

        Args:
            directions: flat local tensors by parameter, overwritten. `read` may read from them: a
                block is read before it is written.
            orthogonalize_: called on each owned stack (k, m, n) with its k view numbers; overwrites
                it.
            wire_dtype: of the whole matrices and of what travels.
        """

        def send(route: _Route) -> tuple[Tensor, Any]:
            wire = torch.empty(sum(route.sends), dtype=wire_dtype, device=device)
            for param, local, at in route.pack:
                read(param, local, at.of(wire))
            return all_to_all(wire, route.sends, route.receives, self._group)

        def receive(route: _Route, arriving: tuple[Tensor, Any]) -> Tensor:
            stage = torch.empty(route.stage, dtype=wire_dtype, device=device)
            for param, local, at in route.stay:
                read(param, local, at.of(stage))
            wire, work = arriving
            work.wait()
            for _, at, there in route.assemble:
                at.of(stage).copy_(there.of(wire))
            return stage

        def send_back(route: _Route, stage: Tensor) -> tuple[Tensor, Any]:
            wire = torch.empty(sum(route.returns), dtype=wire_dtype, device=device)
            for _, at, there in route.scatter:
                there.of(wire).copy_(at.of(stage))
            arriving = all_to_all(wire, route.returns, route.restores, self._group)
            for param, local, at in route.return_stay:
                local.of(directions[param]).copy_(at.of(stage))
            return arriving

        def receive_back(route: _Route, arriving: tuple[Tensor, Any]) -> None:
            wire, work = arriving
            work.wait()
            for param, local, there in route.unpack:
                local.of(directions[param]).copy_(there.of(wire))

        routes = self._routes
        if not routes:
            return
        device = next(iter(directions.values())).device
        arriving = following = send(routes[0])
        returning: tuple[Tensor, Any] | None = None
        for i, route in enumerate(routes):
            if i + 1 < len(routes):
                following = send(routes[i + 1])
            stage = receive(route, arriving)
            for at, rows, cols, views in route.stacks:
                orthogonalize_(
                    stage[at : at + len(views) * rows * cols].view(len(views), rows, cols), views
                )
            if returning is not None:
                receive_back(routes[i - 1], returning)
            returning = send_back(route, stage)
            arriving = following
        if returning is not None:
            receive_back(routes[-1], returning)

    # --- plan

    def runs(self, numbers: Sequence[int]) -> list[Run]:
        """The pieces that this rank holds, for inner products and the update.

        Args:
            numbers: of the plan's views, in the optimizer's own count.
        """
        runs: list[Run] = []
        for v, segments in enumerate(self.plan.segments):
            pieces: list[tuple[int, int, bool]] = []  # (offset, length, counted) of this view
            for segment in segments:
                if self._rank not in segment.holders:
                    continue
                block, counted = self._local(segment), segment.source == self._rank
                for row in range(block.rows):
                    start = block.offset + row * block.stride
                    if pieces and sum(pieces[-1][:2]) == start and pieces[-1][2] == counted:
                        pieces[-1] = (pieces[-1][0], pieces[-1][1] + block.cols, counted)
                    else:
                        pieces.append((start, block.cols, counted))
            for start, length, counted in pieces:
                run = Run(self.plan.views[v].param, start, length, 1, numbers[v], counted)
                if not (runs and _lengthen(runs[-1], run)):
                    runs.append(run)
        return runs

    def _local(self, segment: Segment) -> Block:
        """Where this rank stores a segment that it holds: one row where the segment is contiguous
        there."""
        held = next(h for h in self._held[segment.view] if h.area.contains(segment.area))
        return _block(held.locate(segment.area), segment, held.stride)

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

        def staged(s: Segment) -> Block:
            cols = plan.views[s.view].cols
            return _block(place[s.view] + s.area.top * cols + s.area.left, s, cols)

        for other in range(plan.world):
            if other == me:
                for moves, segments in (
                    (route.stay, plan.inbound(batch, me, me)),
                    (route.return_stay, plan.outbound(batch, me, me)),
                ):
                    for s in segments:
                        _append(moves, plan.views[s.view].param, self._local(s), staged(s))
            inward, outward = plan.inbound(batch, me, other), plan.outbound(batch, other, me)
            from_other, to_other = plan.inbound(batch, other, me), plan.outbound(batch, me, other)
            for elements, moves, segments, held_here in (
                (route.sends, route.pack, inward, True),
                (route.restores, route.unpack, outward, True),
                (route.receives, route.assemble, from_other, False),
                (route.returns, route.scatter, to_other, False),
            ):
                at = begin = sum(elements)
                for s in segments if other != me else ():
                    param, here = (
                        (plan.views[s.view].param, self._local(s)) if held_here else (0, staged(s))
                    )
                    _append(moves, param, here, _block(at, s, s.area.right - s.area.left))
                    at += s.numel
                elements.append(at - begin)
        return route


def _block(offset: int, segment: Segment, stride: int) -> Block:
    """A segment at `offset` of a buffer; one row where it is contiguous there."""
    top, bottom, left, right = segment.area
    if stride == right - left:
        return Block(offset, 1, segment.numel, segment.numel)
    return Block(offset, bottom - top, right - left, stride)


def _append(moves: list[Move], param: int, here: Block, there: Block) -> None:
    """Append a move, or lengthen the last one where both sides go on contiguously."""
    if here.rows != there.rows:  # contiguous on one side only: rows on both
        rows, cols = max(here[1:3], there[1:3])
        here, there = (
            Block(b.offset, rows, cols, b.stride if b.rows == rows else cols) for b in (here, there)
        )
    if moves and here.rows == 1 and moves[-1].here.rows == 1 and moves[-1].param == param:
        last = moves[-1]
        count = last.here.cols
        if last.here.offset + count == here.offset and last.there.offset + count == there.offset:
            both = (Block(b.offset, 1, count + here.cols, count + here.cols) for b in last[1:])
            moves[-1] = Move(param, *both)
            return
    moves.append(Move(param, here, there))


def _lengthen(last: Run, run: Run) -> bool:
    """Take `run` into `last` where it is the same piece of the next matrix and lies behind it."""
    if (last.param, last.length, last.counted, last.view + last.count) != (
        run.param,
        run.length,
        run.counted,
        run.view,
    ) or last.lo + last.count * last.length != run.lo:
        return False
    last.count += 1
    return True
