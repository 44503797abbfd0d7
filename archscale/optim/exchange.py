"""Move the bytes of a `shards.ExchangePlan`: shards → whole matrices on their owners → shards.

Per batch two packed all-to-alls. What a rank would send to itself never enters the wire: it is
written straight into the stage (the owner's flat buffer of whole matrices) and back, so a single
process exchanges nothing. While the owners work on one batch, the next one's shards already travel;
at most two batches are in flight.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
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


class Part(NamedTuple):
    """What moves of one view, or of a piece of it."""

    param: int
    here: Block  # of the local shard
    there: Block  # of the wire or the stage, as many rows and columns
    view: int
    counted: bool  # whether this rank counts it in inner products


class Moves(list[Move]):
    """Copies between local shards and a wire or stage, as few as there can be.

    Attributes:
        parts: the same, view by view.
    """

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[Part] = []


class Ends(Protocol):
    """What stands at the shards' end of an exchange: fills what travels, and takes what comes."""

    def pack(self, moves: Moves, buffer: Tensor) -> None:
        """Fill the blocks of a wire or stage from the shards."""

    def unpack(self, moves: Moves, buffer: Tensor) -> None:
        """Take the blocks of a wire or stage into the shards."""


@dataclass
class Copies:
    """Ends that copy.

    Attributes:
        shards: flat local tensors by parameter, read.
        returned: flat local tensors by parameter, overwritten. They may be the same tensors: a
            shard is read before what comes back for it is written.
    """

    shards: dict[int, Tensor]
    returned: Mapping[int, Tensor]

    def pack(self, moves: Moves, buffer: Tensor) -> None:
        _copy([(there.of(buffer), here.of(self.shards[param])) for param, here, there in moves])

    def unpack(self, moves: Moves, buffer: Tensor) -> None:
        _copy([(here.of(self.returned[param]), there.of(buffer)) for param, here, there in moves])


def _copy(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy the second of each pair into the first."""
    if pairs:
        torch._foreach_copy_([to for to, _ in pairs], [source for _, source in pairs])


class Stack(NamedTuple):
    """Whole matrices of one shape, one after another in the stage."""

    offset: int
    rows: int
    cols: int
    views: list[int]

    def of(self, stage: Tensor) -> Tensor:
        """(k, rows, cols), in the stage's memory."""
        count = len(self.views)
        end = self.offset + count * self.rows * self.cols
        return stage[self.offset : end].view(count, self.rows, self.cols)


@dataclass
class Route:
    """One batch as one rank sees it: what it copies, and elements to and from each rank."""

    stacks: list[Stack] = field(default_factory=list)
    stage: int = 0  # elements of whole matrices owned here
    # The way in: shards that stay here (local, stage), go (local, wire) and come (stage, wire).
    stay: Moves = field(default_factory=Moves)
    pack: Moves = field(default_factory=Moves)
    assemble: Moves = field(default_factory=Moves)
    sends: list[int] = field(default_factory=list)
    receives: list[int] = field(default_factory=list)
    # The way back, the same three; with replicas more returns than came in.
    return_stay: Moves = field(default_factory=Moves)
    scatter: Moves = field(default_factory=Moves)  # (stage, wire)
    unpack: Moves = field(default_factory=Moves)  # (local, wire)
    returns: list[int] = field(default_factory=list)
    restores: list[int] = field(default_factory=list)


@dataclass
class _Transfer:
    """One batch under way."""

    route: Route
    ends: Ends
    dtype: torch.dtype
    device: torch.device
    group: Any
    stage: Tensor | None = None
    arriving: tuple[Tensor, Any] | None = None  # received, and the work that fills it

    def send(self) -> None:
        wire = self._buffer(sum(self.route.sends))
        self.ends.pack(self.route.pack, wire)
        self.arriving = all_to_all(wire, self.route.sends, self.route.receives, self.group)

    def receive(self) -> Iterator[tuple[Tensor, list[int]]]:
        """The stacks of whole matrices that this rank owns, with their numbers."""
        stage = self.stage = self._buffer(self.route.stage)
        self.ends.pack(self.route.stay, stage)
        wire = self._arrived()
        _copy([(at.of(stage), there.of(wire)) for _, at, there in self.route.assemble])
        for stack in self.route.stacks:
            yield stack.of(stage), stack.views

    def send_back(self) -> None:
        assert self.stage is not None
        stage, self.stage = self.stage, None
        wire = self._buffer(sum(self.route.returns))
        _copy([(there.of(wire), at.of(stage)) for _, at, there in self.route.scatter])
        self.arriving = all_to_all(wire, self.route.returns, self.route.restores, self.group)
        self.ends.unpack(self.route.return_stay, stage)

    def receive_back(self) -> None:
        self.ends.unpack(self.route.unpack, self._arrived())

    def _arrived(self) -> Tensor:
        assert self.arriving is not None
        (wire, work), self.arriving = self.arriving, None
        work.wait()
        return wire

    def _buffer(self, elements: int) -> Tensor:
        return torch.empty(elements, dtype=self.dtype, device=self.device)


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
        self.routes = [self._route(batch) for batch in plan.batches]
        # What this rank holds and another sends: its momentum is updated, and goes nowhere.
        self.unsent = [
            Part(plan.views[s.view].param, block, block, s.view, False)
            for batch in plan.batches
            for v in itertools.chain(*batch.views)
            for s in plan.segments[v]
            if rank in s.holders and s.source != rank
            for block in (self._local(s),)
        ]

    @property
    def elements_sent(self) -> int:
        """Matrix elements that this rank sends to others in one run, both ways."""
        return sum(sum(route.sends) + sum(route.returns) for route in self.routes)

    def whole_matrices(
        self, ends: Ends, wire_dtype: torch.dtype, device: torch.device
    ) -> Iterator[tuple[Tensor, list[int]]]:
        """Gather whole matrices, and give each stack (k, m, n) that this rank owns with its k view
        numbers. What stands in a stack when the next one is asked for goes back to the shards.

        All ranks have to run through it together, also those that own nothing.

        Args:
            ends: fills what travels from the shards, and takes what comes back.
            wire_dtype, device: of the whole matrices and of what travels.
        """
        transfers = [
            _Transfer(route, ends, wire_dtype, device, self._group) for route in self.routes
        ]
        for transfer in transfers[:1]:
            transfer.send()
        for i, transfer in enumerate(transfers):
            if i + 1 < len(transfers):
                transfers[i + 1].send()
            yield from transfer.receive()
            if i:
                transfers[i - 1].receive_back()
            transfer.send_back()
        for transfer in transfers[-1:]:
            transfer.receive_back()

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

    def _route(self, batch: Batch) -> Route:
        """Everything that this rank copies and sends for one batch."""
        plan, me, route = self.plan, self._rank, Route()
        offsets: dict[int, int] = {}  # view → where it begins in the stage
        for v in batch.views[me]:
            view = plan.views[v]
            if not route.stacks or route.stacks[-1][1:3] != (view.rows, view.cols):
                route.stacks.append(Stack(route.stage, view.rows, view.cols, []))
            route.stacks[-1].views.append(v)
            offsets[v] = route.stage
            route.stage += view.numel

        def held(s: Segment) -> tuple[int, Block]:
            return plan.views[s.view].param, self._local(s)

        def staged(s: Segment) -> tuple[int, Block]:
            cols = plan.views[s.view].cols
            return 0, _block(offsets[s.view] + s.area.top * cols + s.area.left, s, cols)

        for s in plan.inbound(batch, me, me):
            _append(route.stay, s, me, *held(s), staged(s)[1])
        for s in plan.outbound(batch, me, me):
            _append(route.return_stay, s, me, *held(s), staged(s)[1])
        for other in range(plan.world):
            legs = (
                (route.sends, route.pack, plan.inbound(batch, me, other), held),
                (route.receives, route.assemble, plan.inbound(batch, other, me), staged),
                (route.returns, route.scatter, plan.outbound(batch, me, other), staged),
                (route.restores, route.unpack, plan.outbound(batch, other, me), held),
            )
            for elements, moves, segments, place in legs:
                begin = sum(elements)
                travelling = segments if other != me else []
                elements.append(_line_up(moves, travelling, me, begin, place))
        return route


def _line_up(
    moves: Moves,
    segments: Sequence[Segment],
    rank: int,
    begin: int,
    place: Callable[[Segment], tuple[int, Block]],
) -> int:
    """Append the moves of segments that stand one after another in the wire; returns how many
    elements they have.

    Args:
        begin: place of the first one in the wire.
        place: parameter and block of a segment on the other side.
    """
    at = begin
    for s in segments:
        _append(moves, s, rank, *place(s), _block(at, s, s.area.right - s.area.left))
        at += s.numel
    return at - begin


def _block(offset: int, segment: Segment, stride: int) -> Block:
    """A segment at `offset` of a buffer; one row where it is contiguous there."""
    top, bottom, left, right = segment.area
    if stride == right - left:
        return Block(offset, 1, segment.numel, segment.numel)
    return Block(offset, bottom - top, right - left, stride)


def _append(
    moves: Moves, segment: Segment, rank: int, param: int, here: Block, there: Block
) -> None:
    """Append what `rank` moves of a segment, or lengthen the last move where both sides go on
    contiguously."""
    if here.rows != there.rows:  # contiguous on one side only: rows on both
        rows, cols = max(here[1:3], there[1:3])
        here, there = (
            Block(b.offset, rows, cols, b.stride if b.rows == rows else cols) for b in (here, there)
        )
    moves.parts.append(Part(param, here, there, segment.view, segment.source == rank))
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
