"""Every sharding is a set of intervals: who holds what of each matrix, who orthogonalizes it, what travels.

Whatever the engine (a whole DDP replica, FSDP2's dim-0 shard, an expert-parallel shard, a ZeRO partition that cuts a
matrix anywhere), each rank holds contiguous intervals [lo, hi) of the row-major flattened parameter. Every matrix view
(a row block of a fused projection, one expert of a stack) is itself contiguous there. From the intervals of all ranks
one plan follows, the same on every rank, computed once and without communication.

This file is pure Python on integers; `engine.py` executes the plan.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

Interval = tuple[int, int]  # [lo, hi) of the row-major flattened parameter
# Of whole matrices that a rank orthogonalizes at a time, or of the directions that it then sends: 64 MiB in bf16.
MAX_BATCH_ELEMENTS = 1 << 25


@dataclass(frozen=True)
class MatrixView:
    """One logical matrix (rows, cols) stored at [offset, offset + rows · cols) of parameter number `param`."""

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
    name: str, param: int, shape: Sequence[int], blocks: Sequence[tuple[str, int]] | None = None
) -> list[MatrixView]:
    """The matrices of one parameter.

    Args:
        shape: (m, n), or (E, m, n) for a stack, of the whole parameter.
        blocks: (block name, rows) of a fused projection, in storage order, of each matrix of a stack; they sum to m.

    Raises:
        ValueError: neither 2-D nor 3-D, or blocks that do not sum to the rows.
    """
    if len(shape) not in (2, 3):
        raise ValueError(
            f"parameter {name!r} has shape {tuple(shape)}; a matrix rule takes 2-D matrices or 3-D stacks: "
            "put vectors in a group with rule='adamw'"
        )
    stack, m, n = (1, *shape) if len(shape) == 2 else tuple(shape)
    blocks = blocks or [("", m)]
    if sum(rows for _, rows in blocks) != m:
        raise ValueError(f"parameter {name!r}: blocks {list(blocks)} do not sum to its {m} rows")
    views, offset = [], 0
    for e in range(stack):
        for block, rows in blocks:
            suffix = (f"[{e}]" if len(shape) == 3 else "") + (f".{block}" if block else "")
            views.append(MatrixView(name + suffix, param, offset, rows, n))
            offset += rows * n
    return views


@dataclass(frozen=True)
class Segment:
    """[lo, hi) of a view (flat, relative to the view), held by the same ranks throughout."""

    view: int
    lo: int
    hi: int
    holders: tuple[int, ...]
    source: int  # the one holder that sends it and counts it in inner products

    @property
    def numel(self) -> int:
        return self.hi - self.lo


@dataclass
class Batch:
    """One exchange: each rank orthogonalizes a few whole matrices between two packed all-to-alls."""

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
    intervals: Sequence[Sequence[Sequence[Interval]]],
    max_batch_elements: int = MAX_BATCH_ELEMENTS,
) -> ExchangePlan:
    """Plan the exchange of `views` from `intervals[rank][param]`, a list of intervals.

    Raises:
        ValueError: an element of a view that no rank holds, named by view.
    """
    world = len(intervals)
    segments_holders = [_cut(view, intervals) for view in views]
    owners = _assign(views, segments_holders, world)
    segments = [
        [Segment(v, lo, hi, holders, _source(holders, owners[v], v)) for lo, hi, holders in cuts]
        for v, cuts in enumerate(segments_holders)
    ]
    plan = ExchangePlan(world, list(views), owners, segments)
    owned = [
        sorted((v for v in range(len(views)) if owners[v] == r), key=lambda v: _order(views, v)) for r in range(world)
    ]
    # What an owner holds of a batch: whole matrices, or all the copies of their directions that replicas get back.
    held = [
        max(view.numel, sum(s.numel * len({*s.holders} - {owners[v]}) for s in segments[v]))
        for v, view in enumerate(views)
    ]
    count = max(
        (min(len(mine), math.ceil(sum(held[v] for v in mine) / max_batch_elements)) for mine in owned), default=0
    )
    chunks = [_chunk(mine, [views[v].cost for v in mine], count) for mine in owned]
    plan.batches = [Batch([chunks[r][b] for r in range(world)]) for b in range(count)]
    return plan


def _cut(view: MatrixView, intervals: Sequence[Sequence[Sequence[Interval]]]) -> list[tuple[int, int, tuple[int, ...]]]:
    """The view cut wherever its set of holders changes: (lo, hi, holders), relative to the view."""
    start, end = view.offset, view.offset + view.numel
    held = []  # (lo, hi, rank), clipped to the view
    for rank, by_param in enumerate(intervals):
        for lo, hi in by_param[view.param]:
            lo, hi = max(lo, start) - start, min(hi, end) - start
            if lo < hi:
                held.append((lo, hi, rank))
    points = sorted({0, view.numel, *(x for lo, hi, _ in held for x in (lo, hi))})
    cuts = []
    for lo, hi in itertools.pairwise(points):
        holders = tuple(sorted(rank for a, b, rank in held if a <= lo and hi <= b))
        if not holders:
            raise ValueError(f"matrix {view.name!r}: no rank holds its elements [{lo}, {hi})")
        cuts.append((lo, hi, holders))
    return cuts


def _assign(views: Sequence[MatrixView], cuts: list[list[tuple[int, int, tuple[int, ...]]]], world: int) -> list[int]:
    """Owners by longest-processing-time-first; a rank that already holds a whole matrix keeps it while its share lasts."""
    load = [0] * world
    fair = sum(view.cost for view in views) / world
    owners = [0] * len(views)
    for v in sorted(range(len(views)), key=lambda v: _order(views, v)):
        cost = views[v].cost
        whole = set.intersection(*(set(holders) for _, _, holders in cuts[v])) if cuts[v] else set()
        at_home = [r for r in whole if load[r] + cost <= fair * 1.02] if 0 < len(whole) < world else []
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
