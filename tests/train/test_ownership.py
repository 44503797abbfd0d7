"""A run directory has one owner: a living one refuses others, a dead one none."""

import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from archscale.errors import ConfigError, TrainingError
from archscale.files import OWNER
from archscale.train import ownership, trainer
from archscale.train.ownership import process_start, sole_owner, this_process
from tests.pool import WorkerError
from tests.train.tiny import config, tiny_data


@pytest.fixture
def other() -> Iterator[subprocess.Popen]:
    """Another process of this machine."""
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


@pytest.fixture(autouse=True)
def _hurry(monkeypatch):
    monkeypatch.setattr(ownership, "PATIENCE", 0.2)
    monkeypatch.setattr(ownership, "STALE", 0.6)


def leave(directory: Path, **changes) -> Path:
    """The file of an owner that is this process but for the changes."""
    path = directory / OWNER
    path.write_text(json.dumps(asdict(replace(this_process(), **changes))))
    return path


def own(directory: Path) -> dict:
    """Own the directory for a moment; returns the owner's file."""
    with sole_owner(directory):
        return json.loads((directory / OWNER).read_text())


def test_a_living_owner_is_named_and_nothing_is_written(pool, tmp_path, other):
    leave(tmp_path, pid=other.pid, started=process_start(other.pid))
    data = tmp_path.with_name("data")
    data.mkdir()
    with pytest.raises(
        TrainingError, match=rf"process {other.pid} on .* \(since 20.*\) trains in this directory"
    ):
        trainer.train(config(tiny_data(data)), tmp_path)
    with pytest.raises(WorkerError) as caught:
        pool(2).run(own, tmp_path)
    assert caught.value.type_name == "TrainingError"
    assert os.listdir(tmp_path) == [OWNER]


def test_who_was_killed_refuses_nobody(tmp_path, other):
    """At once, also before its parent has heard of its end, which may be never in a container."""
    leave(tmp_path, pid=other.pid, started=process_start(other.pid))
    other.kill()
    assert own(tmp_path)["pid"] == os.getpid()
    assert os.listdir(tmp_path) == []


def test_a_process_that_has_the_number_of_the_owner_is_not_the_owner(tmp_path, other):
    """Nor is this one, which may be number 1 of its container as the dead one was."""
    for pid in (other.pid, os.getpid()):
        leave(tmp_path, pid=pid, started=process_start(pid) - 1)
        began = time.monotonic()
        assert own(tmp_path)["token"]
        assert time.monotonic() - began < ownership.STALE


@pytest.mark.parametrize("changed", [{"host": "elsewhere"}, {"namespace": "pid:[7]"}, {"boot": ""}])
def test_an_owner_that_cannot_be_looked_up_is_known_by_its_signs_of_life(tmp_path, capfd, changed):
    path = leave(tmp_path, **changed)
    own(tmp_path)
    assert "waiting up to 1 s for a sign that it lives" in capfd.readouterr().err
    path = leave(tmp_path, **changed)
    sign = threading.Timer(0.2, os.utime, [path])
    sign.start()
    with pytest.raises(TrainingError, match="trains in this directory"):
        own(tmp_path)
    sign.join()
    os.utime(path, (1e9, 1e9))
    capfd.readouterr()
    own(tmp_path)
    assert capfd.readouterr().err == ""


def test_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(ownership, "BEAT", 0.02)
    ended = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda status: ended.set() or time.sleep(1))
    path = tmp_path / OWNER
    with sole_owner(tmp_path):
        for harm in (lambda: os.utime(path, (1e9, 1e9)), path.unlink):
            harm()
            end = time.monotonic() + 10
            while not path.exists() or path.stat().st_mtime <= 1e9:
                assert time.monotonic() < end
                time.sleep(0.01)
        leave(tmp_path, token="a later owner's")
        assert ended.wait(10)
    assert path.exists()


def test_the_file_of_a_new_owner_is_not_taken_for_that_of_the_dead_one(tmp_path):
    path = leave(tmp_path, token="new")
    ownership._remove(path, replace(this_process(), token="dead"))
    assert json.loads(path.read_text())["token"] == "new"
    assert os.listdir(tmp_path) == [OWNER]


def test_a_file_system_without_hard_links(tmp_path, monkeypatch):
    def refuse(*args: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with sole_owner(tmp_path), pytest.raises(TrainingError):
        own(tmp_path)
    assert os.listdir(tmp_path) == []


def test_what_was_made_for_a_run_that_is_refused_goes(tmp_path):
    with pytest.raises(ConfigError), sole_owner(tmp_path / "runs" / "r"):
        raise ConfigError("", "", "")
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot write the run directory.*--run-dir"):
        own(tmp_path / "file" / "r")
