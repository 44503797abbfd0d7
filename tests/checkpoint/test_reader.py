"""What a checkpoint's files hold is read as torch reads it, without a copy where none is needed."""

import time

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


def test_what_waits_to_be_summed_up_is_bounded(tmp_path, monkeypatch):
    """A file of 64 blocks of which a small tensor is wanted, and a slow processor."""
    tensors = {"large": torch.zeros(64, reader.BLOCK // 4), "small": torch.arange(3)}
    writer = SummedWriter(tmp_path)
    dcp.save(dict(tensors), storage_writer=writer, no_dist=True)
    most, sum_block = 0, reader._SummedStream._sum

    def slowly(stream, block):
        nonlocal most
        most = max(most, stream._summing._work_queue.qsize())
        time.sleep(0.002)
        sum_block(stream, block)

    monkeypatch.setattr(reader._SummedStream, "_sum", slowly)
    compared = DirectReader(tmp_path, writer.recorded)
    small = torch.zeros(3, dtype=torch.int64)
    dcp.load({"small": small}, storage_reader=compared, no_dist=True)
    assert small.tolist() == [0, 1, 2]
    assert compared.problems == []
    assert most <= 1


@pytest.mark.parametrize("change", ["longer", "a bit"])
def test_a_file_that_is_not_as_it_was_written_is_named(tmp_path, change):
    writer = SummedWriter(tmp_path)
    dcp.save(dict(TENSORS), storage_writer=writer, no_dist=True)
    (path,) = tmp_path.glob("*.distcp")
    content = bytearray(path.read_bytes())
    if change == "longer":
        content += b"x"
    else:  # of a tensor that nobody asks for
        content[content.index(TENSORS["matrix"].numpy().tobytes()) + 5] ^= 1
    path.write_bytes(content)
    compared = DirectReader(tmp_path, writer.recorded)
    dcp.load({"whole": torch.zeros(7, dtype=torch.int64)}, storage_reader=compared, no_dist=True)
    assert [path.name in problem for problem in compared.problems] == [True]
