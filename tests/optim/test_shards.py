"""The exchange plan: every element once, whatever the shards."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from archscale.distributed import Piece, box_pieces
from archscale.optim.exchange import Exchange
from archscale.optim.shards import held_rectangles, matrix_views, plan_exchange


def cuts(draw, size, parts):
    """Bounds of `parts` intervals that cover [0, size), some of them empty."""
    inner = draw(st.lists(st.integers(0, size), min_size=parts - 1, max_size=parts - 1))
    return list(itertools.pairwise([0, *sorted(inner), size]))


@st.composite
def layouts(draw):
    """Random parameters and shards: intervals cut anywhere, or rows × pieces of each row; empty
    ranks, replicas."""
    shapes = draw(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 7)), min_size=1, max_size=5))
    rows, cols, replicas = (draw(st.integers(1, 3)) for _ in range(3))
    pieces = [[] for _ in range(rows * cols * replicas)]
    for m, n in shapes:
        boxes = list(itertools.product(cuts(draw, m, rows), cuts(draw, n, cols)))
        anywhere = cuts(draw, m * n, rows * cols)
        boxed = draw(st.booleans())
        for rank, held in enumerate(pieces):
            part = rank % (rows * cols)
            low, high = anywhere[part]
            held.append(
                box_pieces((m, n), boxes[part])
                if boxed
                else [Piece(low, high - low)]
                if low < high
                else []
            )
    return shapes, pieces, replicas


def elements(pieces):
    return [
        p.start + i * p.stride + j for p in pieces for i in range(p.count) for j in range(p.length)
    ]


def of_area(area, cols):
    return [
        r * cols + c for r in range(area.top, area.bottom) for c in range(area.left, area.right)
    ]


@settings(max_examples=150, deadline=None)
@given(layouts(), st.integers(1, 60))
def test_every_element_has_one_source_one_owner_and_all_its_holders(layout, limit):
    shapes, pieces, replicas = layout
    world = len(pieces)
    views = [v for i, shape in enumerate(shapes) for v in matrix_views(f"p{i}", i, shape)]
    plan = plan_exchange(views, pieces, max_batch_elements=limit)
    placed = sorted(v for batch in plan.batches for mine in batch.views for v in mine)
    assert placed == list(range(len(views)))  # each matrix orthogonalized once
    for batch in plan.batches:
        for owner, mine in enumerate(batch.views):
            assert all(plan.owners[v] == owner for v in mine)
            for v in mine:
                inbound = [
                    s for r in range(world) for s in plan.inbound(batch, r, owner) if s.view == v
                ]
                arrived = [e for s in inbound for e in of_area(s.area, views[v].cols)]
                assert sorted(arrived) == list(range(views[v].numel))
                for rank in range(world):
                    outbound = [s for s in plan.outbound(batch, owner, rank) if s.view == v]
                    back = [e for s in outbound for e in of_area(s.area, views[v].cols)]
                    assert sorted(back) == sorted(elements(pieces[rank][v]))
    for segments in plan.segments:
        assert all(len(s.holders) == replicas and s.source in s.holders for s in segments)


@settings(max_examples=100, deadline=None)
@given(layouts(), st.lists(st.integers(1, 3), min_size=1, max_size=3))
def test_what_a_rank_holds_is_found_in_its_local_tensor(layout, blocks):
    """Rectangles and runs point at the elements that lie there, for blocks of rows too."""
    shapes, pieces, _ = layout
    for rank, held in enumerate(pieces):
        for i, (m, n) in enumerate(shapes):
            rows = [min(b, m) for b in blocks if sum(blocks) < m] or [m]
            rows = [*rows, m - sum(rows)] if sum(rows) < m else rows
            views = matrix_views(f"p{i}", 0, (m, n), [(str(j), r) for j, r in enumerate(rows)])
            local = elements(held[i])  # by place in the local tensor
            seen = []
            for view in views:
                for area, offset, stride in held_rectangles(view, held[i]):
                    for r, c in itertools.product(
                        range(area.bottom - area.top), range(area.right - area.left)
                    ):
                        element = view.offset + (area.top + r) * n + area.left + c
                        assert local[offset + r * stride + c] == element
                        seen.append(element)
            assert sorted(seen) == sorted(local)
            one_param = [[ranks[i]] for ranks in pieces]
            plan = plan_exchange(views, one_param)
            runs = Exchange(plan, [held[i]], rank).runs(list(range(len(views))))
            covered = [at for run in runs for at in range(run.lo, run.lo + run.count * run.length)]
            assert covered == list(range(len(local)))
            for run in runs:
                for k in range(run.count):
                    view, start = views[run.view + k], run.lo + k * run.length
                    inside = range(view.offset, view.offset + view.numel)
                    assert all(e in inside for e in local[start : start + run.length])


def test_work_is_balanced():
    views = [
        v for i in range(16) for v in matrix_views(f"p{i}", i, (32, 32) if i % 2 else (32, 64))
    ]
    pieces = [[[Piece(r * v.numel // 4, v.numel // 4)] for v in views] for r in range(4)]
    plan = plan_exchange(views, pieces)
    load = [sum(v.cost for v, o in zip(views, plan.owners) if o == r) for r in range(4)]
    assert max(load) == min(load)


@pytest.mark.parametrize("world", [1, 2, 8])
def test_batches_are_bounded_also_by_what_replicas_get_back(world):
    """DDP: an owner sends each direction to all other replicas, so the more there are, the fewer
    matrices a batch has."""
    views = [v for i in range(64) for v in matrix_views(f"p{i}", i, (8, 8))]
    plan = plan_exchange(views, [[[Piece(0, 64)]] * 64] * world, max_batch_elements=512)
    for batch in plan.batches:
        for mine in batch.views:
            assert len(mine) * 64 * max(1, world - 1) <= 512 + 64 * world
    assert len(plan.batches) == max(64 // world, 64 * (world - 1) // world) * 64 // 512


def test_whole_matrices_stay_where_they_are():
    """Experts spread over ranks: nothing to send."""
    views = [v for i in range(2) for v in matrix_views(f"p{i}", i, (8, 4, 4), view="stack")]
    pieces = [[[Piece(r * 64, 64)] for _ in range(2)] for r in range(2)]
    plan = plan_exchange(views, pieces)
    assert all(s.source == plan.owners[s.view] for segments in plan.segments for s in segments)


def test_fused_blocks_and_stacks_become_views():
    views = matrix_views("qkv", 0, (12, 5), [("q", 8), ("k", 2), ("v", 2)])
    assert [(v.name, v.offset, v.rows, v.cols) for v in views] == [
        ("qkv.q", 0, 8, 5),
        ("qkv.k", 40, 2, 5),
        ("qkv.v", 50, 2, 5),
    ]
    stack = matrix_views("up", 0, (2, 4, 3), [("gate", 2), ("up", 2)], "stack")
    assert [(v.name, v.offset) for v in stack] == [
        ("up[0].gate", 0),
        ("up[0].up", 6),
        ("up[1].gate", 12),
        ("up[1].up", 18),
    ]


def test_a_convolution_kernel_is_one_matrix():
    (kernel,) = matrix_views("conv", 0, (8, 4, 3, 3), view="flatten")
    assert (kernel.rows, kernel.cols, kernel.name) == (8, 36, "conv")


def test_refusals():
    with pytest.raises(ValueError, match="'norm'.*2-D matrices.*adamw"):
        matrix_views("norm", 0, (5,))
    with pytest.raises(ValueError, match="'conv'.*view='flatten'.*view='stack'.*rule='adamw'"):
        matrix_views("conv", 0, (8, 4, 3))
    with pytest.raises(ValueError, match=r"'conv'.*'stack' takes \(E, m, n\)"):
        matrix_views("conv", 0, (8, 4, 3, 3), view="stack")
    with pytest.raises(ValueError, match="'qkv'.*do not sum to its 12 rows"):
        matrix_views("qkv", 0, (12, 5), [("q", 8)])
    with pytest.raises(ValueError, match=r"'p'.*no rank holds its rows \[0, 1\), columns \[4, 5\)"):
        plan_exchange(matrix_views("p", 0, (2, 5)), [[[Piece(0, 4)]], [[]]])
