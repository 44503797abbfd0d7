"""Every sharding is a set of pieces: who holds what of each matrix, who orthogonalizes it, what
travels.

Whatever the engine (a whole DDP replica, FSDP2's rows, the columns of tensor parallelism, an
expert-parallel shard, a ZeRO partition that cuts a matrix anywhere), each rank holds equally spaced
runs of the row-major flattened parameter (`Piece`). Within a matrix they are rectangles. Every
matrix view (a row block of a fused projection, one expert of a stack) is one interval of its
parameter. From the pieces of all ranks one plan follows, the same on every rank, computed once and
without communication.

This file is pure Python on integers; `exchange.py` executes the plan.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from archscale.distributed import Piece

# Elements of the whole matrices that a rank orthogonalizes at a time, or of the directions that it
# then sends: 64 MiB in bf16.
MAX_BATCH_ELEMENTS = 1 << 25
VIEWS = ("stack", "flatten")  # what a parameter of more than two dimensions can be


@dataclass(frozen=True)
class MatrixView:
    """One logical matrix (rows, cols) stored at [offset, offset + rows · cols) of parameter number
    `param`."""

    name: str
    param: int
    offset: int
    rows: int
    cols: int

    @property
    def numel(self) -> int:
        return self.rows * self.cols

    @property
    def cost(self) -> int:
        """Relative work of orthogonalizing it: m n min(m, n)."""
        return self.numel * min(self.rows, self.cols)


def matrix_views(
    name: str,
    param: int,
    shape: Sequence[int],
    blocks: Sequence[tuple[str, int]] | None = None,
    view: str | None = None,
) -> list[MatrixView]:
    """The matrices of one parameter.

    Args:
        shape: of the whole parameter: (m, n); (E, m, n) with `view` "stack"; (m, …) with "flatten".
        blocks: (block name, rows) of a fused projection, in storage order, of each matrix of a
            stack; they sum to m.
        view: what a parameter of more than two dimensions is: a "stack" of matrices, or one matrix
            with all but its first dimension flattened ("flatten"), as convolution kernels are.

    Raises:
        ValueError: a shape that is no matrix under `view`, or blocks that do not sum to the rows.
    """
    dimensions = tuple(shape)
    if len(dimensions) < 2:
        raise ValueError(
            f"parameter {name!r} has shape {dimensions}; a matrix rule takes 2-D matrices: put"
            " vectors in a group with rule='adamw', and where a wrapper has flattened a matrix use"
            " one that keeps its shape (fully_shard)"
        )
    if len(dimensions) > 2 and view not in VIEWS:
        raise ValueError(
            f"parameter {name!r} has shape {dimensions}; a matrix rule takes 2-D matrices: put it"
            f" in a group with view='flatten' (a convolution kernel, one matrix of {dimensions[0]}"
            f" rows), view='stack' ({dimensions[0]} matrices) or rule='adamw'"
        )
    if len(dimensions) > 3 and view == "stack":
        raise ValueError(
            f"parameter {name!r} has shape {dimensions}; view='stack' takes (E, m, n): reshape it,"
            " or use view='flatten'"
        )
    stacked = view == "stack" and len(dimensions) == 3
    stack, m = dimensions[:2] if stacked else (1, dimensions[0])
    n = dimensions[2] if stacked else math.prod(dimensions[1:])
    blocks = blocks or [("", m)]
    if sum(rows for _, rows in blocks) != m:
        raise ValueError(f"parameter {name!r}: blocks {list(blocks)} do not sum to its {m} rows")
    views, offset = [], 0
    for e in range(stack):
        for block, rows in blocks:
            suffix = (f"[{e}]" if stacked else "") + (f".{block}" if block else "")
            views.append(MatrixView(name + suffix, param, offset, rows, n))
            offset += rows * n
    return views


class Rectangle(NamedTuple):
    """Rows [top, bottom) and columns [left, right) of a view."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def numel(self) -> int:
        return (self.bottom - self.top) * (self.right - self.left)

    def contains(self, other: Rectangle) -> bool:
        return (
            self.top <= other.top
            and other.bottom <= self.bottom
            and self.left <= other.left
            and other.right <= self.right
        )


class Held(NamedTuple):
    """A rectangle of a view that a rank holds, and where: its first element is element `offset` of
    the rank's flat local tensor, each row `stride` elements after the one before."""

    area: Rectangle
    offset: int
    stride: int

    def locate(self, part: Rectangle) -> int:
        """Where the first element of a rectangle within this one lies."""
        return self.offset + (part.top - self.area.top) * self.stride + part.left - self.area.left


def held_rectangles(view: MatrixView, pieces: Sequence[Piece]) -> list[Held]:
    """What of `view` a rank holds whose flat local tensor stores `pieces` of the parameter, one
    after another."""
    held: list[Held] = []
    begin, end, stored = view.offset, view.offset + view.numel, 0
    for piece in pieces:
        stride = piece.stride or 1
        first = (
            max(0, -(-(begin - piece.start - piece.length + 1) // stride)) if piece.count > 1 else 0
        )
        last = min(piece.count - 1, (end - 1 - piece.start) // stride) if piece.count > 1 else 0
        column = (piece.start - begin) % view.cols
        if piece.count > 1 and stride == view.cols and column + piece.length <= view.cols:
            if first <= last:
                top = (piece.start + first * stride - begin) // view.cols
                area = Rectangle(top, top + last - first + 1, column, column + piece.length)
                held.append(Held(area, stored + first * piece.length, piece.length))
        else:
            for i in range(first, last + 1):
                start = piece.start + i * stride
                low, high = max(start, begin), min(start + piece.length, end)
                if low < high:
                    offset = stored + i * piece.length + low - start
                    held += _interval(low - begin, high - begin, view.cols, offset)
        stored += piece.numel
    return held


def _interval(low: int, high: int, cols: int, offset: int) -> Iterator[Held]:
    """Elements [low, high) of a row-major matrix: the end of a row, whole rows, the beginning of a
    row."""
    while low < high:
        row, column = divmod(low, cols)
        rows = 1 if column or high - low < cols else (high - low) // cols
        right = min(cols, column + high - low)
        area = Rectangle(row, row + rows, column, right)
        yield Held(area, offset, right - column)
        low, offset = low + area.numel, offset + area.numel


class Segment(NamedTuple):
    """A rectangle of a view that the same ranks hold throughout."""

    view: int
    area: Rectangle
    holders: tuple[int, ...]
    source: int  # the one holder that sends it and counts it in inner products

    @property
    def numel(self) -> int:
        return self.area.numel


Cut = tuple[Rectangle, tuple[int, ...]]  # a rectangle of a view and the ranks that hold it


@dataclass
class Batch:
    """One exchange: each rank orthogonalizes a few whole matrices between two packed
    all-to-alls."""

    views: list[list[int]]  # by owner rank, equal shapes adjacent


@dataclass
class ExchangePlan:
    """Who does what, the same on every rank."""

    world: int
    views: list[MatrixView]
    owners: list[int]  # by view
    segments: list[list[Segment]]  # by view, in order
    batches: list[Batch] = field(default_factory=list)

    def inbound(self, batch: Batch, source: int, owner: int) -> list[Segment]:
        """Momentum segments that `source` sends to `owner`, in wire order."""
        return [s for v in batch.views[owner] for s in self.segments[v] if s.source == source]

    def outbound(self, batch: Batch, owner: int, holder: int) -> list[Segment]:
        """Direction segments that `owner` sends to `holder`, in wire order."""
        return [s for v in batch.views[owner] for s in self.segments[v] if holder in s.holders]


def plan_exchange(
    views: Sequence[MatrixView],
    pieces: Sequence[Sequence[Sequence[Piece]]],
    max_batch_elements: int = MAX_BATCH_ELEMENTS,
) -> ExchangePlan:
    """Plan the exchange of `views` from `pieces[rank][param]`, what each rank stores.

    Raises:
        ValueError: an element of a view that no rank holds, named by view.
    """
    world = len(pieces)
    cuts = [
        _cut(view, [held_rectangles(view, by_param[view.param]) for by_param in pieces])
        for view in views
    ]
    owners = _assign(views, cuts, world)
    segments = [
        [Segment(v, area, holders, _source(holders, owners[v], v)) for area, holders in parts]
        for v, parts in enumerate(cuts)
    ]
    plan = ExchangePlan(world, list(views), owners, segments)
    owned = [
        sorted((v for v in range(len(views)) if owners[v] == r), key=lambda v: _order(views, v))
        for r in range(world)
    ]
    # What an owner holds of a batch: whole matrices, or all the copies of their directions that
    # replicas get back.
    held = [
        max(view.numel, sum(s.numel * len({*s.holders} - {owners[v]}) for s in segments[v]))
        for v, view in enumerate(views)
    ]
    count = max(
        (
            min(len(mine), math.ceil(sum(held[v] for v in mine) / max_batch_elements))
            for mine in owned
        ),
        default=0,
    )
    chunks = [_chunk(mine, [views[v].cost for v in mine], count) for mine in owned]
    plan.batches = [Batch([chunks[r][b] for r in range(world)]) for b in range(count)]
    return plan


def _cut(view: MatrixView, held: Sequence[Sequence[Held]]) -> list[Cut]:
    """The view cut wherever its set of holders changes: bands of rows, each cut by columns."""
    rectangles = [(rank, h.area) for rank, areas in enumerate(held) for h in areas]
    cuts: list[Cut] = []
    for top, bottom in itertools.pairwise(
        _bounds(view.rows, ((r.top, r.bottom) for _, r in rectangles))
    ):
        across = [(rank, r) for rank, r in rectangles if r.top <= top and bottom <= r.bottom]
        for left, right in itertools.pairwise(
            _bounds(view.cols, ((r.left, r.right) for _, r in across))
        ):
            area = Rectangle(top, bottom, left, right)
            holders = tuple(sorted({rank for rank, r in across if r.contains(area)}))
            if not holders:
                raise ValueError(
                    f"matrix {view.name!r}: no rank holds its rows [{top}, {bottom}), columns"
                    f" [{left}, {right})"
                )
            cuts.append((area, holders))
    return cuts


def _bounds(size: int, spans: Iterator[tuple[int, int]]) -> list[int]:
    return sorted({0, size, *itertools.chain.from_iterable(spans)})


def _assign(views: Sequence[MatrixView], cuts: list[list[Cut]], world: int) -> list[int]:
    """Owners by longest-processing-time-first; a rank that already holds a whole matrix keeps it
    while its share lasts."""
    load = [0] * world
    fair = sum(view.cost for view in views) / world
    owners = [0] * len(views)
    for v in sorted(range(len(views)), key=lambda v: _order(views, v)):
        cost = views[v].cost
        whole = set.intersection(*(set(holders) for _, holders in cuts[v])) if cuts[v] else set()
        at_home = (
            [r for r in whole if load[r] + cost <= fair * 1.02] if 0 < len(whole) < world else []
        )
        owner = min(at_home or range(world), key=lambda r: (load[r], r))
        owners[v] = owner
        load[owner] += cost
    return owners


def _order(views: Sequence[MatrixView], v: int) -> tuple:
    return (-views[v].cost, views[v].rows, views[v].cols, v)


def _source(holders: tuple[int, ...], owner: int, view: int) -> int:
    return owner if owner in holders else holders[view % len(holders)]


def _chunk(items: list[int], costs: list[int], count: int) -> list[list[int]]:
    """`items` in order, in `count` runs of about equal cost (some may be empty)."""
    total, done = sum(costs) or 1, 0.0
    chunks: list[list[int]] = [[] for _ in range(count)]
    for item, cost in zip(items, costs):
        chunks[min(count - 1, int((done + cost / 2) / total * count))].append(item)
        done += cost
    return chunks
