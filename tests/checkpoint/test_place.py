"""Checkpoints outside of the run directory: in another directory, and in stores behind URLs."""

import json
import os
import shutil
from collections.abc import Iterator

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from typer.testing import CliRunner

from archscale.checkpoint import saving
from archscale.checkpoint.difference import TensorReader
from archscale.checkpoint.directory import damage
from archscale.checkpoint.integrity import problems_of
from archscale.checkpoint.listing import list_checkpoints
from archscale.checkpoint.place import StoreError, StorePath, checkpoints_of, newest_step, place_of
from archscale.checkpoint.saving import load_checkpoint
from archscale.checkpoint.target import find_target
from archscale.cli import app
from archscale.data import remote
from archscale.distributed import rank
from archscale.errors import ArchscaleError, CheckpointError, ConfigError, TrainingError
from archscale.files import checkpoint_steps, step_directory
from archscale.report.read import read_runs
from archscale.train import ownership
from archscale.train.loading import load_model
from archscale.train.ownership import sole_owner, this_process
from tests.checkpoint.test_saving import Training, same
from tests.train.tiny import config, crash_after, run, tiny_data

MEMORY = "memory://bucket/run/checkpoints"


class Failing(MemoryFileSystem):
    """A store whose changes number `fails_at` fail with `error`."""

    protocol = "failing"
    store: dict = {}  # noqa: RUF012
    pseudo_dirs: list = [""]  # noqa: RUF012
    changes: list[str] = []  # noqa: RUF012
    fails_at: range = range(0)
    error: Exception = OSError("reset by peer")

    def _changing(self, path: str) -> None:
        self.changes.append(path.rpartition("/")[2])
        if len(self.changes) - 1 in self.fails_at:
            raise self.error

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        self._changing(path)
        super().pipe_file(path, value, mode)

    def _open(self, path, mode="rb", **kwargs):
        if mode == "wb" and "data" not in kwargs:
            self._changing(path)
        return super()._open(path, mode, **kwargs)

    def cp_file(self, path1, path2, **kwargs):
        self._changing(path2)
        super().cp_file(path1, path2)

    @classmethod
    def reset(cls, fails_at: range = range(0), error: Exception | None = None) -> None:
        cls.changes.clear()
        cls.fails_at, cls.error = fails_at, error or OSError("reset by peer")


@pytest.fixture(autouse=True)
def stores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Empty stores of this process, without waiting."""
    fsspec.register_implementation("failing", Failing, clobber=True)
    monkeypatch.setattr(remote, "DELAYS", (0.0,))
    monkeypatch.setattr(saving, "AGAIN", (0.0,))
    for kind in (MemoryFileSystem, Failing):
        kind.store.clear()
        kind.pseudo_dirs[:] = [""]
    Failing.reset()
    yield
    MemoryFileSystem.store.clear()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return tiny_data(tmp_path_factory.mktemp("data"))


def settings(directory: object, **others) -> dict:
    checkpoint = {"directory": str(directory), "every": 2, "keep": 9, **others}
    return {"checkpoint": checkpoint, "telemetry": {"every": 1}}


def command(*arguments: object) -> tuple[int, str]:
    """Exit status, and the output or the error's line."""
    done = CliRunner().invoke(app, ["checkpoint", *map(str, arguments)])
    if isinstance(done.exception, ArchscaleError):
        return 2, str(done.exception)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout


def save_now(training: Training) -> None:
    training.save()
    training.saver.wait()


def weights(path) -> dict[str, torch.Tensor]:
    reader = TensorReader(path)
    return {name: reader.read(name) for name in reader.tensors}


def test_a_store_holds_what_a_directory_holds(tmp_path):
    """And what is damaged there is found."""
    folders = (tmp_path, place_of(MEMORY))
    for folder in folders:
        with (training := Training(folder)).saver:
            training.save()
            expected = training.content()
            training.step()
            training.save()
    local, stored = (step_directory(folder, 1) for folder in folders)
    assert {path.name for path in stored.rglob("*")} == {path.name for path in local.iterdir()}
    assert same(weights(local), weights(stored))
    load_checkpoint(stored, training.weights, training.optimizer)
    assert same(training.content(), expected)
    assert problems_of(stored) == ([], True)
    assert checkpoint_steps(folders[1]) == [1, 2]

    file = next(path for path in stored.rglob("*") if path.name.endswith(".distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp has the checksum"):
        load_checkpoint(stored, training.weights, training.optimizer)
    file.write_bytes(bytes(content[:-1]))
    assert "truncated" in (damage(stored) or "")


@pytest.mark.parametrize("asynchronous", [True, False])
def test_whichever_write_fails_the_checkpoint_before_is_whole(asynchronous):
    """The mark is written last, so that no unfinished checkpoint counts as one."""
    folder = place_of("failing://bucket/run")
    with (training := Training(folder, **{"async": asynchronous})).saver:
        training.save()
        training.saver.wait()
        writes = len(Failing.changes)
        assert Failing.changes[-1] == "state.json"
        assert writes > 3
        for number in range(writes):
            Failing.reset(range(number, number + 1), PermissionError("Access Denied"))
            training.step()
            with pytest.raises(CheckpointError, match=r"Access Denied.*credentials"):
                save_now(training)
            assert checkpoint_steps(folder) == [1]
        Failing.reset()
        training.save()
    assert checkpoint_steps(folder) == [1, training.taken]
    assert problems_of(step_directory(folder, training.taken)) == ([], True)


def test_passing_failures_are_waited_for(monkeypatch):
    folder = place_of("failing://bucket/run")
    with (training := Training(folder)).saver:
        training.save()
        training.saver.wait()
        writes = len(Failing.changes)
        for number in range(writes):
            Failing.reset(range(number, number + 1))
            training.step()
            training.save()
            training.saver.wait()
            assert problems_of(step_directory(folder, training.taken)) == ([], True)
        Failing.reset(range(2, 99))
        training.step()
        with pytest.raises(CheckpointError, match=r"reset by peer.*check the network"):
            save_now(training)


def test_an_upload_that_breaks_off_is_begun_again(monkeypatch):
    """In the middle of a stream, which cannot be repeated alone."""
    from fsspec.implementations.memory import MemoryFile

    folder, breaking_off, write = place_of(MEMORY), [2], MemoryFile.write

    def breaking(self, content):
        if self.path.endswith(".distcp") and not hasattr(self, "breaks_off"):
            self.breaks_off = breaking_off[0] > 0
            breaking_off[0] -= 1
        if getattr(self, "breaks_off", False):
            raise OSError("connection lost")
        return write(self, content)

    monkeypatch.setattr(MemoryFile, "write", breaking)
    with (training := Training(folder, **{"async": False})).saver:
        with pytest.raises(CheckpointError, match="cannot write a checkpoint: .*connection lost"):
            training.save()
        assert checkpoint_steps(folder) == []
        breaking_off[0] = 1
        training.save()
    assert problems_of(step_directory(folder, 1)) == ([], True)


def test_a_run_in_a_store(data, tmp_path):
    """Goes on after a crash as if there had been none, leaves what follows a checkpoint that
    `--resume` names aside, and is found by every command through its run directory."""
    straight, crashed = tmp_path / "straight", tmp_path / "crashed"
    run(config(data, steps=6, **settings(tmp_path / "elsewhere")), str(straight))
    assert not (straight / "checkpoints").exists()
    assert newest_step(straight) == 6

    made = config(data, steps=6, **settings(MEMORY))
    crash_after(made, str(crashed), 5)
    folder = checkpoints_of(crashed)
    assert checkpoint_steps(folder) == [2, 4]
    (folder / "step_00000006" / "rng_0.bin").write_bytes(b"half")  # of a killed save
    assert [row["step"] for row in list_checkpoints(folder)["checkpoints"]] == [2, 4]
    assert len(list_checkpoints(crashed)["unfinished"]) == 1
    run(made, str(crashed))
    last = step_directory(folder, 6)
    assert same(weights(last), weights(step_directory(tmp_path / "elsewhere", 6)))
    status, said = command("diff", last, tmp_path / "elsewhere" / "step_00000006")
    assert status == 0, said.splitlines()[2:]

    run(made, str(crashed), f"{MEMORY}/step_00000002")
    assert checkpoint_steps(folder) == [2, 4, 6]
    aside = folder / "abandoned" / "after_step_00000002"
    assert checkpoint_steps(aside) == [4, 6]
    assert same(weights(step_directory(aside, 6)), weights(last))
    found = json.loads(command("list", crashed, "--json")[1])
    assert [row["step"] for row in found["abandoned"]] == [4, 6]
    assert [row["step"] for row in found["checkpoints"]] == [2, 4, 6]

    status, said = command("verify", crashed, aside)
    assert status == 0
    assert said.count(": whole") == 5
    assert read_runs([crashed])[0].checkpoint[0] == 6
    target = find_target(crashed)
    assert target.config.checkpoint.directory == MEMORY
    assert load_model(target).config.vocab_size == target.tokenizer.vocab_size
    with sole_owner(place_of(MEMORY)):
        status, said = command("prune", crashed, "--keep", 1)
        assert status == 2
        assert "trains in this directory" in said
    assert command("prune", MEMORY, "--keep", 1)[0] == 0
    assert checkpoint_steps(folder) == [6]
    assert not (folder / "owner.json").exists()

    with pytest.raises(CheckpointError, match="the run's checkpoints lie in memory://"):
        run(config(data, steps=6), str(crashed))


def test_a_store_that_fails_is_no_reason_to_start_again(data, tmp_path, monkeypatch):
    made = config(data, steps=2, **settings("failing://bucket/run"))
    run(made, str(tmp_path / "r"))

    def unreachable(self, path, **kwargs):
        raise OSError("no route to host")

    for method in ("ls", "info", "cat_file"):
        with monkeypatch.context() as patch:
            patch.setattr(Failing, method, unreachable)
            with pytest.raises(StoreError, match="no route to host"):
                run(made, str(tmp_path / "r"))
    assert checkpoint_steps(place_of("failing://bucket/run")) == [2]


def test_one_run_in_a_place(data, tmp_path):
    """Another run that names the checkpoints of one that trains is refused; so is one of another
    trajectory when that has ended."""
    for place in (MEMORY, str(tmp_path / "place")):
        made = config(data, steps=2, **settings(place))
        with (
            sole_owner(tmp_path / "a", place_of(place)),
            pytest.raises(TrainingError, match=r"trains in this directory \(.*directory"),
        ):
            run(made, str(tmp_path / "b"))
        run(made, str(tmp_path / "a"))
        other = config(data, steps=2, **settings(place), seed=5)
        with pytest.raises(ConfigError, match="seed is 5"):
            run(other, str(tmp_path / "c"))
        shutil.rmtree(tmp_path / "a")
    run(config(data, steps=2), str(tmp_path / "own"))
    with sole_owner(tmp_path / "own"), pytest.raises(TrainingError, match="another checkpoint"):
        run(
            config(data, steps=2, **settings(tmp_path / "own" / "checkpoints")), str(tmp_path / "b")
        )


def test_an_owner_on_another_machine(monkeypatch):
    """Is waited for; it lives where it has renewed its entry."""
    monkeypatch.setattr(ownership, "STALE", 0.3)
    folder, owner = place_of(MEMORY), this_process()
    elsewhere = json.dumps({**vars(owner), "host": "another", "token": "t"})
    (folder / "owner.json").write_bytes(elsewhere.encode())
    with sole_owner(folder):
        assert json.loads((folder / "owner.json").read_bytes())["host"] == owner.host
    assert not (folder / "owner.json").exists()


def test_places_that_cannot_be_written(data, tmp_path):
    """One line with the cause, before the first step."""
    reasons = {
        "nothing://bucket/run": "nothing",
        "failing://bucket/run": r"Access Denied.*credentials of this machine",
    }
    Failing.reset(range(99), PermissionError("Access Denied"))
    for place, reason in reasons.items():
        with pytest.raises(StoreError, match=reason) as caught:
            run(config(data, steps=2, **settings(place)), str(tmp_path / "r"))
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "r" / "metrics.jsonl").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="another checkpoint.directory"):
        run(config(data, steps=2, **settings(tmp_path / "file")), str(tmp_path / "r"))


def _killed_and_continued(folder: str, data: str, url: str) -> None:
    made = config(data, steps=4, **settings(url))
    crash_after(made, folder, 3)
    run(made, folder)


def test_two_processes_in_a_store(data, tmp_path, pool):
    """Behind `file://`, killed and continued: bit for bit as a run that was not."""
    url = f"file://{tmp_path}/bucket/run"
    pool(2).run(run, config(data, steps=4, **settings(tmp_path / "straight")), str(tmp_path / "a"))
    pool(2).run(_killed_and_continued, str(tmp_path / "b"), data, url, timeout=60)
    assert checkpoint_steps(place_of(url)) == [2, 4]
    first, second = (step_directory(place_of(each), 4) for each in (tmp_path / "straight", url))
    assert len(list(second.rglob("*.distcp"))) == 2
    assert same(weights(first), weights(second))
    assert problems_of(second) == ([], True)


def _refused(folder: str, data: str, url: str) -> str:
    fsspec.register_implementation("failing", Failing, clobber=True)
    saving.AGAIN = remote.DELAYS = (0.0,)
    made = config(data, steps=2, **settings(url))

    class Full(Failing):
        def _changing(self, path: str) -> None:
            if rank() == 1 and path.endswith(".distcp"):
                raise PermissionError("no quota left")

    fsspec.register_implementation("failing", Full, clobber=True)
    try:
        run(made, folder)
    except CheckpointError as error:
        return str(error)
    finally:
        fsspec.register_implementation("failing", Failing, clobber=True)
    return ""


def test_what_one_rank_cannot_write_all_of_them_report(data, tmp_path, pool):
    said = pool(2).run(_refused, str(tmp_path / "r"), data, "failing://bucket/run", timeout=60)
    assert "no quota left" in said[0]
    assert said[0] == said[1]


@pytest.mark.slow
def test_s3(data, tmp_path, monkeypatch):
    """Through s3fs, with a server of moto: a run, its continuation, and what is wrong with the
    bucket or the credentials."""
    server_class = pytest.importorskip("moto.server").ThreadedMotoServer
    s3fs = pytest.importorskip("s3fs")
    monkeypatch.setattr(remote, "DELAYS", (0.1,))
    server = server_class(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        with pytest.raises(StoreError, match=r"make the bucket"):
            run(config(data, steps=2, **settings("s3://bucket/run")), str(tmp_path / "r"))
        s3fs.S3FileSystem().mkdir("bucket")
        made = config(data, steps=6, **settings("s3://bucket/run"))
        crash_after(made, str(tmp_path / "r"), 5)
        run(made, str(tmp_path / "r"))
        run(config(data, steps=6, **settings(tmp_path / "local")), str(tmp_path / "straight"))
        last = step_directory(place_of("s3://bucket/run"), 6)
        assert same(weights(last), weights(step_directory(tmp_path / "local", 6)))
        run(made, str(tmp_path / "r"), "s3://bucket/run/step_00000002")
        aside = StorePath("s3://bucket/run/abandoned/after_step_00000002")
        assert checkpoint_steps(aside) == [4, 6]
        assert command("verify", tmp_path / "r", aside)[0] == 0
        assert command("prune", tmp_path / "r", "--keep", 1)[0] == 0
        assert checkpoint_steps(place_of("s3://bucket/run")) == [6]
        assert not s3fs.S3FileSystem().exists("s3://bucket/run/owner.json")
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        server.stop()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(StoreError, match=r"credentials"):
        run(config(data, steps=2, **settings("s3://bucket/other")), str(tmp_path / "other"))
