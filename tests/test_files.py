"""Files that are whole or not there, whatever happens while they are written."""

import os

import pytest

from archscale import files
from archscale.checkpoint.place import newest_step
from archscale.files import write_atomically


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "a.txt"
    write_atomically(path, "σ = 1\n")
    write_atomically(path, b"second")
    assert path.read_bytes() == b"second"
    assert os.listdir(tmp_path) == ["a.txt"]
    mask = os.umask(0)
    os.umask(mask)
    assert (
        path.stat().st_mode & 0o777 == 0o666 & ~mask
    )  # readable for the group, as open() makes it


def test_a_failure_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_atomically(path, "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_failure_is_told_though_nothing_can_be_deleted_either(tmp_path, monkeypatch):
    def broken(*arguments: object) -> None:
        raise OSError(5, "Input/output error")

    for name in ("fsync", "unlink"):
        monkeypatch.setattr(os, name, broken)
    with pytest.raises(OSError, match="Input/output error") as caught:
        write_atomically(tmp_path / "a.txt", "new")
    assert caught.value.filename == str(tmp_path / "a.txt")


def test_an_error_names_the_file_and_not_its_temporary(tmp_path):
    path = tmp_path / "missing" / "a.txt"
    with pytest.raises(FileNotFoundError) as caught:
        write_atomically(path, "x")
    assert caught.value.filename == str(path)


def test_a_directory_that_cannot_be_synced_costs_no_file(tmp_path, monkeypatch):
    def unsupported(_: object) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(files, "sync", unsupported)
    write_atomically(tmp_path / "a.txt", "x")
    assert (tmp_path / "a.txt").read_text() == "x"


def test_two_writers_of_one_file_do_not_share_a_temporary(tmp_path, monkeypatch):
    path, replace = tmp_path / "a.txt", os.replace

    def interrupted(source: object, target: object) -> None:
        monkeypatch.setattr(os, "replace", replace)
        write_atomically(path, "the other one's")
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    write_atomically(path, "mine")
    assert path.read_text() == "mine"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_only_whole_checkpoints_count(tmp_path):
    assert newest_step(tmp_path) == 0
    for step, whole in ((5, True), (10, True), (15, False)):
        directory = tmp_path / "checkpoints" / f"step_{step:08d}"
        directory.mkdir(parents=True)
        if whole:
            (directory / "state.json").touch()
    (tmp_path / "checkpoints" / ".step_00000020.partial").mkdir()
    assert newest_step(tmp_path) == 10
