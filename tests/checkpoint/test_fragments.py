"""Intervals of any cut in torch.distributed.checkpoint."""

import math

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st

from archscale.checkpoint.fragments import Stored, boxes
from archscale.distributed import Fragment, rank, world_size


@given(st.lists(st.integers(1, 4), max_size=4), st.data())
def test_boxes_are_the_interval_in_order(shape, data):
    whole = torch.arange(math.prod(shape)).reshape(shape)
    lo = data.draw(st.integers(0, whole.numel()))
    hi = data.draw(st.integers(lo, whole.numel()))
    cut = boxes(shape, lo, hi)
    pieces = [whole[tuple(slice(o, o + n) for o, n in zip(*box))].reshape(-1) for box in cut]
    assert torch.cat([torch.empty(0, dtype=torch.int64), *pieces]).tolist() == list(range(lo, hi))
    assert len(cut) <= max(1, 2 * len(shape) - 1)


SHAPES = {"matrix": (7, 5), "stack": (3, 4, 5), "vector": (11,), "one": (1, 1)}


def values(name: str) -> torch.Tensor:
    return torch.arange(math.prod(SHAPES[name])).float() + len(name)


def cut(name: str, world: int, me: int) -> Fragment:
    """The `me`-th of `world` parts, cut without regard to rows; later parts are the longer ones,
    the first may be empty."""
    flat = values(name)
    ends = [len(flat) * (i * i) // (world * world) for i in range(world + 1)]
    return Fragment(SHAPES[name], ends[me], flat[ends[me] : ends[me + 1]].clone())


def save(path: str) -> None:
    dcp.save({name: Stored(cut(name, world_size(), rank())) for name in SHAPES}, checkpoint_id=path)


def load(path: str) -> bool:
    """Whether this rank's parts came back, by another cut than they were saved in."""
    found = {name: cut(name, world_size(), world_size() - 1 - rank()) for name in SHAPES}
    expected = {name: part.data.clone() for name, part in found.items()}
    for part in found.values():
        part.data.zero_()
    dcp.load({name: Stored(part) for name, part in found.items()}, checkpoint_id=path)
    return all(torch.equal(part.data, expected[name]) for name, part in found.items())


@pytest.mark.parametrize("world", [2, 3])
def test_saved_in_one_cut_and_loaded_in_another(pool, tmp_path, world):
    pool(world).run(save, str(tmp_path))
    assert pool(4).run(load, str(tmp_path)) == [True] * 4
    assert load(str(tmp_path))
    plain = {name: torch.zeros(shape) for name, shape in SHAPES.items()}  # what anyone else reads
    dcp.load(plain, checkpoint_id=str(tmp_path))
    for name, tensor in plain.items():
        assert torch.equal(tensor.view(-1), values(name))


def test_another_shape_is_refused(tmp_path):
    dcp.save({"matrix": Stored(cut("matrix", 1, 0))}, checkpoint_id=tmp_path)
    with pytest.raises(dcp.api.CheckpointException, match="Size mismatch"):
        dcp.load({"matrix": Stored(Fragment((5, 7), 0, torch.zeros(35)))}, checkpoint_id=tmp_path)
