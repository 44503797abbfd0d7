"""What a checkpoint's files hold is read as torch reads it, without a copy where none is needed."""

import pytest
import torch
import torch.distributed.checkpoint as dcp

from archscale.checkpoint import reader
from archscale.checkpoint.reader import DirectReader, find_record
from archscale.checkpoint.writer import SummedWriter

TENSORS = {
    "matrix": torch.randn(33, 17, generator=torch.Generator().manual_seed(0)),
    "bf16": torch.arange(35.0).view(7, 5).bfloat16(),
    "number": torch.tensor(3.5),
    "whole": torch.arange(7),
    "turned": torch.arange(24.0).view(6, 4).T,  # not row by row in its storage
    "truth": torch.tensor([True, False]),
    "nothing": torch.empty(0, 3),
    "bytes": torch.arange(9, dtype=torch.uint8),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    dcp.save(dict(TENSORS), storage_writer=SummedWriter(folder), no_dist=True)
    return folder


def load(saved, targets):
    dcp.load(targets, storage_reader=DirectReader(saved), no_dist=True)
    return targets


def test_every_tensor_is_what_was_saved(saved):
    loaded = load(saved, {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()})
    for name, tensor in TENSORS.items():
        assert torch.equal(loaded[name], tensor), name


def test_memory_that_is_not_contiguous_or_of_another_dtype_is_filled(saved):
    targets = {"matrix": torch.zeros(17, 33).T, "whole": torch.zeros(7, dtype=torch.int32)}
    loaded = load(saved, targets)
    assert torch.equal(loaded["matrix"], TENSORS["matrix"])
    assert loaded["whole"].tolist() == list(range(7))


def test_whole_tensors_are_read_into_their_own_memory(saved, monkeypatch):
    buffered = []
    original = DirectReader._buffered
    monkeypatch.setattr(
        DirectReader, "_buffered", lambda *args: buffered.append(1) or original(*args)
    )
    load(saved, {"matrix": torch.zeros(33, 17), "bf16": torch.zeros(7, 5, dtype=torch.bfloat16)})
    assert not buffered
    load(saved, {"turned": torch.zeros(4, 6)})
    assert buffered


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "f"
    torch.save({"a": torch.zeros(2)}, path)
    with open(path, "rb", buffering=0) as file, pytest.raises(ValueError, match="no tensor at"):
        find_record(file, 0, path.stat().st_size)
    with open(path, "rb", buffering=0) as file, pytest.raises(EOFError, match="ends too early"):
        reader.read_into(file, 0, memoryview(bytearray(path.stat().st_size + 1)))
