"""Checkpoints are what the state was when they were begun, and are read as they were written."""

import errno
import json
import os
import threading
import zlib
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from archscale.checkpoint import directory as directory_module
from archscale.checkpoint import saving
from archscale.checkpoint.choosing import load_newest
from archscale.checkpoint.directory import damage, prune, read_state, recorded_files, shares
from archscale.checkpoint.integrity import problems_of
from archscale.checkpoint.reader import DirectReader
from archscale.checkpoint.saving import Saver, load_checkpoint, verify_together
from archscale.checkpoint.writer import SummedFile
from archscale.config import CheckpointConfig
from archscale.distributed import fragment, rank
from archscale.errors import CheckpointError
from archscale.files import checkpoint_steps, step_directory
from archscale.optim import MatrixOptimizer

MODES = {"asynchronous": {}, "foreground": {"async": False}}


class Training:
    """Two matrices and their optimizer; `weights` and `save` as a run has them."""

    def __init__(self, folder: Path, **settings):
        torch.manual_seed(0)
        self.params = {name: torch.nn.Parameter(torch.randn(12, 8)) for name in "ab"}
        self.optimizer = MatrixOptimizer(self.params.items(), lr=0.1, rule="orscale_lm")
        self.saver = Saver(folder, CheckpointConfig(**settings))
        self.taken = 0
        self.step()

    @property
    def weights(self):
        return {name: fragment(p) for name, p in self.params.items()}

    def step(self) -> None:
        for p in self.params.values():
            p.grad = torch.randn(12, 8)
        self.optimizer.step()
        self.taken += 1

    def save(self, **state) -> None:
        self.saver.save(self.weights, self.optimizer, {"step": self.taken, **state})

    def content(self) -> dict[str, torch.Tensor]:
        held = {f"model.{name}": p.detach() for name, p in self.params.items()}
        for p, state in zip(self.params.values(), self.optimizer.state.values()):
            held |= {f"{id(p)} {key}": value for key, value in state.items()}
        return {name: value.clone() for name, value in held.items()}


def saved(folder: Path, step: int = 1) -> Path:
    with (training := Training(folder)).saver:
        training.save()
    return step_directory(folder, step)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def test_a_checkpoint_is_the_state_when_it_was_begun(tmp_path, monkeypatch):
    """However slowly it is written; training, the random state and the plain state go on."""
    release, write = threading.Event(), SummedFile.write

    def slowly(self, data):
        assert release.wait(20)
        return write(self, data)

    monkeypatch.setattr(SummedFile, "write", slowly)
    training, plain = Training(tmp_path), {"history": [1.0]}
    began, random_state = [], torch.get_rng_state()
    with training.saver:
        for _ in range(2):
            release.clear()
            began.append(training.content())
            training.save(guard=plain)
            assert checkpoint_steps(tmp_path) == list(range(1, training.taken))
            training.step()
            plain["history"].append(2.0)
            threading.Timer(0.05, release.set).start()
        training.saver.wait()
        assert checkpoint_steps(tmp_path) == [1, 2]
        assert not same(*began)
        for step, expected, history in zip((1, 2), began, ([1.0], [1.0, 2.0])):
            state = load_checkpoint(
                step_directory(tmp_path, step), training.weights, training.optimizer
            )
            assert same(training.content(), expected)
            assert state["guard"] == {"history": history}
            assert torch.equal(torch.get_rng_state(), random_state) == (step == 1)


@pytest.mark.parametrize("mode", MODES)
def test_a_save_leaves_the_process_as_it_was(tmp_path, mode):
    """The second one copies into the memory of the first."""
    before = torch.get_rng_state(), torch.serialization.get_crc32_options()
    training = Training(tmp_path, keep=9, **MODES[mode])
    random_state = torch.get_rng_state()
    with training.saver:
        training.save()
        training.saver.wait()
        buffers = {b.data_ptr() for b in training.saver._snapshot._buffers.values()}
        training.step()
        torch.set_rng_state(random_state)
        training.save()
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.serialization.get_crc32_options() == before[1]
    assert {b.data_ptr() for b in training.saver._snapshot._buffers.values()} == buffers
    assert bool(buffers) == (mode == "asynchronous")
    assert checkpoint_steps(tmp_path) == [1, 2]
    assert [problems_of(step_directory(tmp_path, step)) for step in (1, 2)] == [([], True)] * 2


def test_state_json_has_what_every_other_file_is(tmp_path):
    path = saved(tmp_path)
    state = read_state(path)
    assert state["files"] == {
        file.name: {"bytes": file.stat().st_size, "crc32": f"{zlib.crc32(file.read_bytes()):08x}"}
        for file in path.iterdir()
        if file.name != "state.json"
    }
    assert {".metadata", "rng_0.bin"} < state["files"].keys()


def test_torch_reads_it_without_us(tmp_path):
    path = saved(tmp_path)
    dcp_to_torch_save(path, tmp_path / "all.pt")
    read = torch.load(tmp_path / "all.pt")
    tensors = {"model.a": torch.zeros(12, 8)}
    dcp.load(tensors, checkpoint_id=path)
    expected = Training(tmp_path).content()["model.a"]
    assert torch.equal(tensors["model.a"], expected)
    assert torch.equal(read["model"]["a"] if "model" in read else read["model.a"], expected)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "rng_0.bin", "state.json"])
def test_a_bit_that_has_changed_is_found(tmp_path, name):
    path, training = saved(tmp_path), Training(tmp_path)
    flip(path / name)
    assert name in problems_of(path)[0][0]
    assert (damage(path) is None) == (name != "state.json")  # the cheap check reads no more
    with pytest.raises(CheckpointError, match=name):
        load_checkpoint(path, training.weights, training.optimizer)
    warnings = []

    def load(path):
        return load_checkpoint(path, training.weights)

    assert load_newest(tmp_path, 9, warnings.append, load) is None
    assert [name in text for text in warnings] == [True]


def test_a_checkpoint_from_before_there_were_checksums(tmp_path):
    path, training = saved(tmp_path), Training(tmp_path)
    state = read_state(path)
    state |= {"format": 2, "files": {k: v["bytes"] for k, v in state["files"].items()}}
    del state["crc32"]
    (path / "state.json").write_text(json.dumps(state))
    before = training.content()
    training.step()
    assert problems_of(path) == ([], False)
    load_checkpoint(path, training.weights, training.optimizer)
    assert same(training.content(), before)
    with (path / "rng_0.bin").open("ab") as file:
        file.write(b"x")
    assert "rng_0.bin is" in problems_of(path)[0][0]


def test_files_are_shared_between_ranks():
    files = {name: directory_module.Recorded(size, None) for name, size in zip("abcde", range(5))}
    parts = shares(files, 3)
    assert sorted(name for part in parts for name in part) == list("abcde")
    assert max(sum(file.bytes for file in part.values()) for part in parts) == 4


def verify_counting(path: str) -> tuple[str | None, list[str]]:
    """On this rank, with the names of the files that it read."""
    names, read = [], directory_module.wrong_content

    def counted(file, recorded):
        names.append(file.name)
        return read(file, recorded)

    directory_module.wrong_content = counted
    try:
        return verify_together(Path(path)), names
    finally:
        directory_module.wrong_content = read


def fail_on_rank_1(folder: str) -> list:
    """What `failed` says and what the save after a failed one raises; then one that works."""
    training, write = Training(Path(folder), keep=9), SummedFile.write
    training.save()
    training.saver.wait()

    def full(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if rank() == 1:
        SummedFile.write = full
    training.step()
    training.save()
    training.saver._thread.join(30)
    failed = training.saver.failed
    SummedFile.write = write
    with pytest.raises(CheckpointError) as caught:
        training.save()
    assert caught.value.on_every_rank
    with training.saver:
        training.save()
    return [failed, str(caught.value)]


def load_without_metadata_on_rank_1(path: str) -> str:
    training = Training(Path(path).parent, keep=9)

    def stale(*_, **__):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with pytest.MonkeyPatch.context() as patch:
        if rank() == 1:
            patch.setattr(DirectReader, "read_metadata", stale)
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(Path(path), training.weights, training.optimizer)
    return str(caught.value)


def test_a_rank_that_cannot_read_ends_all_with_its_cause(pool, tmp_path):
    path = saved(tmp_path)
    texts = pool(2).run(load_without_metadata_on_rank_1, str(path), timeout=60)
    assert ["cannot load: Stale file handle" in text for text in texts] == [True, True], texts


def test_ranks_fail_and_verify_together(pool, tmp_path):
    for failed, text in pool(2).run(fail_on_rank_1, str(tmp_path), timeout=60):
        assert failed
        assert "cannot write a checkpoint: No space left on device" in text
    assert checkpoint_steps(tmp_path) == [1, 2]
    path = step_directory(tmp_path, 1)
    answers = pool(2).run(verify_counting, str(path), timeout=60)
    assert [problem for problem, _ in answers] == [None, None]
    names = [name for _, part in answers for name in part]
    assert sorted(names) == sorted(recorded_files(read_state(path)))
    flip(path / "rng_1.bin")
    answers = pool(2).run(verify_counting, str(path), timeout=60)
    assert answers[0][0] == answers[1][0]
    assert answers[0][0].startswith("rng_1.bin has the checksum")


def test_training_that_fails_does_not_wait_for_ever_for_a_save(tmp_path, monkeypatch):
    stuck = threading.Event()
    monkeypatch.setattr(SummedFile, "write", lambda *_: stuck.wait(20))
    monkeypatch.setattr(saving, "GRACE", 0.05)
    training = Training(tmp_path)

    def fail() -> None:
        with training.saver:
            training.save()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert training.saver._thread.daemon  # so that the interpreter can end
    assert training.saver._thread.is_alive()
    assert checkpoint_steps(tmp_path) == []
    stuck.set()
    training.saver._thread.join()


@pytest.mark.parametrize(
    ("settings", "since", "left"),
    [
        ({"keep": 2}, None, [5, 6]),
        ({"keep": 2, "keep_every": 2}, None, [2, 4, 5, 6]),
        # The weights of step 6 may be the ones that give no loss: nobody has tried.
        ({"keep": 1}, None, [5, 6]),
        ({"keep": 1}, 6, [4, 5, 6]),
        ({"keep": 1, "keep_every": 3}, None, [3, 5, 6]),
    ],
)
def test_what_a_save_leaves(tmp_path, settings, since, left):
    training = Training(tmp_path, **settings)
    with training.saver:
        for step in range(1, 7):
            training.taken = step
            training.save(not_finite_since=since if since == step else None)
    assert checkpoint_steps(tmp_path) == left


def test_pruning_spares_multiples(tmp_path):
    for step in (2, 4, 6, 8):
        step_directory(tmp_path, step).mkdir()
        (step_directory(tmp_path, step) / "state.json").write_text("{}")
    prune(tmp_path, 1, None, keep_every=4)
    assert checkpoint_steps(tmp_path) == [4, 8]
