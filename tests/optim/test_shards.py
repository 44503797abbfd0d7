"""The exchange plan: every element once, whatever the intervals."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from archscale.optim.shards import matrix_views, plan_exchange


@st.composite
def layouts(draw):
    """Random parameters and random intervals: cuts anywhere, empty ranks, replicas."""
    world = draw(st.integers(1, 5))
    shapes = draw(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 7)), min_size=1, max_size=5))
    replicas = draw(st.sampled_from([r for r in range(1, world + 1) if world % r == 0]))
    shards = world // replicas
    intervals = [[] for _ in range(world)]
    for m, n in shapes:
        cuts = sorted(draw(st.lists(st.integers(0, m * n), min_size=shards - 1, max_size=shards - 1)))
        bounds = [0, *cuts, m * n]
        for rank in range(world):
            s = rank % shards
            intervals[rank].append([(bounds[s], bounds[s + 1])])
    return shapes, intervals, replicas


@settings(max_examples=150, deadline=None)
@given(layouts(), st.integers(1, 60))
def test_every_element_has_one_source_one_owner_and_all_its_holders(layout, limit):
    shapes, intervals, replicas = layout
    world = len(intervals)
    views = [v for i, shape in enumerate(shapes) for v in matrix_views(f"p{i}", i, shape)]
    plan = plan_exchange(views, intervals, max_batch_elements=limit)
    placed = sorted(v for batch in plan.batches for mine in batch.views for v in mine)
    assert placed == list(range(len(views)))  # each matrix orthogonalized once
    for batch in plan.batches:
        for owner, mine in enumerate(batch.views):
            assert all(plan.owners[v] == owner for v in mine)
            for v in mine:
                arrived = [
                    e
                    for r in range(world)
                    for s in plan.inbound(batch, r, owner)
                    if s.view == v
                    for e in range(s.lo, s.hi)
                ]
                assert sorted(arrived) == list(range(views[v].numel))
                for rank in range(world):
                    lo, hi = intervals[rank][v][0]
                    back = sorted(
                        e for s in plan.outbound(batch, owner, rank) if s.view == v for e in range(s.lo, s.hi)
                    )
                    assert back == list(range(lo, hi))
    for segments in plan.segments:
        assert all(len(s.holders) == replicas and s.source in s.holders for s in segments)


def test_work_is_balanced():
    views = [v for i in range(16) for v in matrix_views(f"p{i}", i, (32, 32) if i % 2 else (32, 64))]
    intervals = [[[(r * v.numel // 4, (r + 1) * v.numel // 4)] for v in views] for r in range(4)]
    plan = plan_exchange(views, intervals)
    load = [sum(v.cost for v, o in zip(views, plan.owners) if o == r) for r in range(4)]
    assert max(load) == min(load)


@pytest.mark.parametrize("world", [1, 2, 8])
def test_batches_are_bounded_also_by_what_replicas_get_back(world):
    """DDP: an owner sends each direction to all other replicas, so the more there are, the fewer matrices a batch has."""
    views = [v for i in range(64) for v in matrix_views(f"p{i}", i, (8, 8))]
    plan = plan_exchange(views, [[[(0, 64)]] * 64] * world, max_batch_elements=512)
    for batch in plan.batches:
        for mine in batch.views:
            assert len(mine) * 64 * max(1, world - 1) <= 512 + 64 * world
    assert len(plan.batches) == max(64 // world, 64 * (world - 1) // world) * 64 // 512


def test_whole_matrices_stay_where_they_are():
    """Experts spread over ranks: nothing to send."""
    views = [v for i in range(2) for v in matrix_views(f"p{i}", i, (8, 4, 4))]
    intervals = [[[(r * 64, (r + 1) * 64)] for _ in range(2)] for r in range(2)]
    plan = plan_exchange(views, intervals)
    assert all(s.source == plan.owners[s.view] for segments in plan.segments for s in segments)


def test_fused_blocks_and_stacks_become_views():
    views = matrix_views("qkv", 0, (12, 5), [("q", 8), ("k", 2), ("v", 2)])
    assert [(v.name, v.offset, v.rows, v.cols) for v in views] == [
        ("qkv.q", 0, 8, 5),
        ("qkv.k", 40, 2, 5),
        ("qkv.v", 50, 2, 5),
    ]
    stack = matrix_views("up", 0, (2, 4, 3), [("gate", 2), ("up", 2)])
    assert [(v.name, v.offset) for v in stack] == [
        ("up[0].gate", 0),
        ("up[0].up", 6),
        ("up[1].gate", 12),
        ("up[1].up", 18),
    ]


def test_refusals():
    with pytest.raises(ValueError, match="'norm'.*2-D matrices or 3-D stacks.*adamw"):
        matrix_views("norm", 0, (5,))
    with pytest.raises(ValueError, match="'qkv'.*do not sum to its 12 rows"):
        matrix_views("qkv", 0, (12, 5), [("q", 8)])
    with pytest.raises(ValueError, match=r"'p'.*no rank holds its elements \[4, 10\)"):
        plan_exchange(matrix_views("p", 0, (2, 5)), [[[(0, 4)]], [[(10, 10)]]])
