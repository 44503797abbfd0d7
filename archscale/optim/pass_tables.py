"""What the kernels of `fused.py` run over: parts of parameters, a chunk of them for each program.

Made once for a plan. Columns are those of `pass_kernels.COLUMNS`; offsets and counts are in
elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from archscale.optim.exchange import Block, Part
from archscale.optim.layout import Layout, StepPlan

CHUNK = 1 << 14  # elements of a part that one program takes


@dataclass
class Table:
    """Parts that a kernel runs over.

    Attributes:
        chunks: (chunks, columns) int64 on the device, see `pass_kernels.COLUMNS`.
        apart: whether rows of a part lie apart.
        aligned: whether all offsets and counts are multiples of 16.
    """

    parts: Sequence[Part]
    chunks: Tensor
    apart: bool
    aligned: bool


@dataclass
class Tables:
    """All tables of a plan.

    Attributes:
        of_moves: by identity of an exchange's moves.
        unsent: by exchange: what another rank sends.
        returned: by exchange: all parts of Q that come back, in the order of the routes.
        whole: by parameters: all their elements.
        staying: parts of matrices under elementwise rules.
        ranges: (views, 3) int64: view, first slot of its partial sums, slot behind the last.
        slots: number of partial sums.
    """

    of_moves: dict[int, Table] = field(default_factory=dict)
    unsent: list[Table] = field(default_factory=list)
    returned: list[Table] = field(default_factory=list)
    whole: dict[tuple[int, ...], Table] = field(default_factory=dict)
    staying: Table | None = None
    ranges: Tensor | None = None
    slots: int = 0


def make_table(parts: Sequence[Part], first_slot: int = 0) -> tuple[Table, int]:
    """A table on the CPU, and the slot behind its last one."""
    fields = torch.tensor(
        [
            [param, *here[::3], *there[::3], here.cols, here.rows * here.cols, view, counted]
            for param, here, there, view, counted in parts
        ],
        dtype=torch.int64,
    ).view(-1, 9)
    numel = fields[:, 6]
    assert not len(parts) or int(numel.max()) < 1 << 31, "a part of 2³¹ elements"
    counts = (numel + CHUNK - 1) // CHUNK
    first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    start = (torch.arange(len(first)) - first) * CHUNK
    rows = fields.repeat_interleave(counts, 0)
    counted = rows[:, 8]
    slot = torch.where(counted > 0, first_slot + counted.cumsum(0) - 1, -1)
    stop = torch.minimum(start + CHUNK, rows[:, 6])
    chunks = torch.cat(
        [rows[:, :6], torch.stack([start, stop, rows[:, 7], slot], dim=1)], dim=1
    ).contiguous()
    apart = any(p.here.rows > 1 for p in parts)
    aligned = not apart and not bool((fields[:, [1, 3, 6]] % 16).any())
    return Table(parts, chunks, apart, aligned), first_slot + int(counted.sum())


def make_tables(layout: Layout, plan: StepPlan) -> Tables:
    """The tables of a plan, on the device."""
    tables, ranges = Tables(), []

    def make(parts: Sequence[Part], numbers: Sequence[int] | None) -> Table:
        """The table of parts; `numbers`: what the optimizer calls their views."""
        if numbers is not None:
            parts = [part._replace(view=numbers[part.view]) for part in parts]
        table, tables.slots = make_table(parts, tables.slots)
        ranges.append(table.chunks[:, 8:])
        table.chunks = table.chunks.to(layout.device)
        return table

    for part in plan.orthogonalizations:
        exchange = part.exchange
        for route in exchange.routes:
            for moves in (route.stay, route.pack):
                sent, _ = make_table(moves.parts)
                sent.chunks = sent.chunks.to(layout.device)
                tables.of_moves[id(moves)] = sent
        unsent, _ = make_table(exchange.unsent)
        unsent.chunks = unsent.chunks.to(layout.device)
        tables.unsent.append(unsent)
        legs = [moves for route in exchange.routes for moves in (route.return_stay, route.unpack)]
        whole = make([p for moves in legs for p in moves.parts], part.views)
        tables.returned.append(whole)
        begin = 0
        for moves in legs:  # parts of the whole one
            own, _ = make_table(moves.parts)
            own.chunks = whole.chunks[begin : begin + len(own.chunks)]
            begin += len(own.chunks)
            tables.of_moves[id(moves)] = own
    staying = [
        Part(run.param, block, block, run.view + k, run.counted)
        for run in plan.runs
        if layout.group_of[run.param].rule.elementwise
        for k in range(run.count)
        for block in (Block(run.lo + k * run.length, 1, run.length, run.length),)
    ]
    tables.staying = make(staying, None)
    tables.ranges = _ranges(torch.cat(ranges)).to(layout.device)
    return tables


def _ranges(views_and_slots: Tensor) -> Tensor:
    """(views, 3): view, its first slot, slot behind its last one; from (view, slot) of all chunks.
    What a view has lies together."""
    views, slots = views_and_slots[views_and_slots[:, 1] >= 0].unbind(1)
    distinct, counts = torch.unique_consecutive(views, return_counts=True)
    assert len(distinct) == len(set(distinct.tolist())), "the parts of a view lie apart"
    last = counts.cumsum(0)
    assert torch.equal(slots, torch.arange(len(slots)))
    return torch.stack([distinct, last - counts, last], dim=1).contiguous()
