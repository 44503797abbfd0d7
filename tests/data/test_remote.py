"""Remote data are the local ones, whatever the cache holds; what it holds is whole and within its
bound."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pytest

from archscale.data import cache as cache_module
from archscale.data import remote, remote_tokens
from archscale.data.cache import Cache, the_cache
from archscale.data.places import locate
from archscale.data.preparing.prepare import inspect, verify
from archscale.data.remote import RemotePath, is_remote
from archscale.data.shards import read_manifest
from archscale.data.split import TokenSplit
from archscale.data.stored import describe
from archscale.errors import DataError
from tests.data.conftest import write_dataset
from tests.data.foreign_files import write_datatrove, write_llmc, write_megatron

CONTEXT = 16


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of 1 GB, and no waiting."""
    monkeypatch.setenv("ARCHSCALE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ARCHSCALE_CACHE_GB", "1")
    monkeypatch.setattr(remote, "DELAYS", (0.0, 0.0))
    return tmp_path / "cache"


@pytest.fixture
def memory(dataset: Path) -> Iterator[str]:
    """The data set in fsspec's memory."""
    yield upload(dataset)
    fsspec.filesystem("memory").store.clear()


def upload(directory: Path) -> str:
    store = fsspec.filesystem("memory")
    for path in directory.rglob("*"):
        if path.is_file():
            store.pipe(f"/bucket/{directory.name}/{path.relative_to(directory)}", path.read_bytes())
    return f"memory://bucket/{directory.name}"


def windows(split: TokenSplit) -> list[list[int]]:
    return split.samples(range(split.num_samples)).tolist()


def copies(directory: Path) -> list[str]:
    """Names of whole copies, without the hash."""
    files = directory.glob("*") if directory.is_dir() else ()
    return sorted(
        file.name.partition("-")[2] for file in files if file.suffix == ".bin" and "-" in file.name
    )


def names(split: TokenSplit) -> set[str]:
    return {Path(file).name for file in split.files}


def wait_for(condition) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def test_remote_windows_are_the_local_ones(dataset: Path, memory: str, cache: Path) -> None:
    for name in ("train", "validation"):
        local, distant = TokenSplit(dataset, name, CONTEXT), TokenSplit(memory, name, CONTEXT)
        distant.check(distant.vocab_size)
        assert distant.token_bytes is not None
        assert (distant.origin, distant.fingerprint) == (local.origin, local.fingerprint)
        assert windows(distant) == windows(local)
        wait_for(lambda: names(distant) <= set(copies(cache)))  # noqa: B023
        assert windows(distant) == windows(local)
    assert len(copies(cache)) == 5
    assert sorted(file.name for file in cache.glob("*.part")) == []
    assert read_manifest(memory) == read_manifest(dataset)
    *facts, files = describe(memory, None, None)
    *expected, local = describe(dataset, None, None)
    assert facts == expected
    assert [len(names) for names in files.values()] == [len(names) for names in local.values()]


def test_copies_are_read_without_asking_for_ids(
    dataset: Path, memory: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = windows(first := TokenSplit(memory, "train", CONTEXT))
    wait_for(lambda: len(copies(cache)) == len(first.files))
    asked = []
    whole = RemotePath.read_bytes
    monkeypatch.setattr(
        RemotePath,
        "read_bytes",
        lambda self, start=0, stop=None: asked.append(start) or whole(self, start, stop),
    )
    again = TokenSplit(memory, "train", CONTEXT)
    asked.clear()
    assert windows(again) == expected
    assert set(asked) == {0}  # headers alone


def test_bound_below_the_data_reads_by_ranges(
    dataset: Path, memory: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARCHSCALE_CACHE_GB", "1.6e-6")  # two shards of 728 bytes
    local, distant = TokenSplit(dataset, "train", CONTEXT), TokenSplit(memory, "train", CONTEXT)
    for _ in range(3):
        assert windows(distant) == windows(local)
        wait_for(remote_tokens._WORKER._queue.empty)
        files = cache.glob("*") if cache.is_dir() else ()
        assert sum(file.stat().st_size for file in files) <= 1600
    wait_for(lambda: len(copies(cache)) == 2)


def test_without_a_cache_nothing_is_written(
    dataset: Path, memory: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARCHSCALE_CACHE_GB", "0")
    assert windows(TokenSplit(memory, "train", CONTEXT)) == windows(
        TokenSplit(dataset, "train", CONTEXT)
    )
    assert not cache.exists()


def test_foreign_files_are_found_behind_urls(tmp_path: Path) -> None:
    ids = np.arange(1000) % 250
    sets = {name: tmp_path / name for name in ("llmc", "megatron", "datatrove")}
    for directory in sets.values():
        directory.mkdir()
    write_llmc(sets["llmc"] / "x_train_0.bin", ids)
    write_llmc(sets["llmc"] / "x_val_0.bin", ids[:200])
    write_megatron(sets["megatron"] / "x", np.split(ids, 4))
    write_datatrove(sets["datatrove"] / "x.ds", np.split(ids, 4))
    urls = {name: upload(directory) for name, directory in sets.items()}
    for url in (
        urls["llmc"],
        f"{urls['llmc']}/*train*.bin",
        urls["megatron"],
        f"{urls['megatron']}/x",
        urls["datatrove"],
    ):
        split = TokenSplit(url, "train", CONTEXT, vocab_size=250)
        split.check(50_000)
        assert split.tokens(0, split.num_tokens).tolist() == ids.tolist(), url
        assert verify(url) == []
    assert inspect(urls["llmc"])["validation"]["tokens"] == 200


def test_another_object_under_the_name_is_noticed(dataset: Path, memory: str, cache: Path) -> None:
    split = TokenSplit(memory, "train", CONTEXT)
    expected = windows(split)
    wait_for(lambda: len(copies(cache)) == len(split.files))
    store = fsspec.filesystem("memory")
    path = f"/bucket/{dataset.name}/train_00001.bin"
    store.pipe(path, store.cat_file(path))  # the same bytes, written later
    again = TokenSplit(memory, "train", CONTEXT)
    assert windows(again) == expected
    wait_for(lambda: copies(cache).count("train_00001.bin") == 2)


def test_another_object_is_noticed_while_it_is_read(
    dataset: Path, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARCHSCALE_CACHE_GB", "0")
    monkeypatch.setattr(remote_tokens, "_AGAIN", 0.0)
    store = fsspec.filesystem("memory")
    path = f"/bucket/{dataset.name}/train_00001.bin"
    reading = TokenSplit(memory, "train", CONTEXT)
    windows(reading)
    store.pipe(path, store.cat_file(path))
    with pytest.raises(DataError, match=r"another object stands there since it was opened"):
        windows(reading)


def test_a_damaged_shard_is_never_a_copy(dataset: Path, cache: Path, flip) -> None:
    flip(dataset / "train_00002.bin", 200)
    split = TokenSplit(upload(dataset), "train", CONTEXT)

    def read_on() -> None:
        end = time.monotonic() + 10
        while time.monotonic() < end:  # until the thread has the damaged shard
            windows(split)

    with pytest.raises(DataError, match=r"do not match their checksum \(memory://.*00002"):
        read_on()
    assert "train_00002.bin" not in copies(cache)
    with pytest.raises(DataError, match=r"do not match their checksum"):
        split.check(split.vocab_size)


def test_a_damaged_copy_is_not_read(dataset: Path, memory: str, cache: Path, flip) -> None:
    first = TokenSplit(memory, "train", CONTEXT)
    expected = windows(first)
    wait_for(lambda: len(copies(cache)) == len(first.files))
    the_cache.__globals__["_cache"].cache_clear()  # as in another process
    (cut,) = cache.glob("*train_00001.bin")
    cut.write_bytes(cut.read_bytes()[:364])
    again = TokenSplit(memory, "train", CONTEXT)
    assert windows(again) == expected
    wait_for(lambda: len(copies(cache)) == len(first.files))
    assert cut.stat().st_size == 728
    flip(cut, 200)
    with pytest.raises(DataError, match=rf"damaged copy of {memory}.*{cut}.*delete that file"):
        again.check(again.vocab_size)


def test_a_deleted_copy_does_not_stay_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Cache(tmp_path / "c", 1000)
    for name in ("a", "b"):
        store.add(name, 100, lambda file: file.write(b"x" * 100) and None)
        assert store.read(name, 100) is not None
    (tmp_path / "c" / "a").unlink()
    monkeypatch.setattr(cache_module, "_TOUCH", 0.0)  # a minute later
    assert store.read("b", 100) is not None
    assert list(store._maps) == ["b"]


def test_a_short_file_is_not_continued_by_the_next(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = TokenSplit(dataset, "train", CONTEXT)
    whole = split._stored.open
    monkeypatch.setattr(split._stored, "open", lambda number: whole(number)[:100])
    with pytest.raises(DataError, match=r"ends before token 300 .*train_00000\.bin"):
        split.tokens(90, 310)


def test_a_cache_that_cannot_be_written_is_done_without(
    dataset: Path,
    memory: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("ARCHSCALE_CACHE", str(blocked / "c"))
    local, distant = TokenSplit(dataset, "train", CONTEXT), TokenSplit(memory, "train", CONTEXT)
    for _ in range(3):
        assert windows(distant) == windows(local)
        wait_for(remote_tokens._WORKER._queue.empty)
    (line,) = capfd.readouterr().err.splitlines()
    assert "warning: no more copies" in line
    assert "ARCHSCALE_CACHE" in line


def test_an_object_that_is_replaced_while_it_is_copied_is_no_copy(
    dataset: Path, memory: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = remote_tokens.RemoteTokens(
        RemotePath(f"{memory}/train_00001.bin"), np.dtype("<u2"), 128, 300
    )
    store, path = fsspec.filesystem("memory"), f"/bucket/{dataset.name}/train_00001.bin"
    whole = RemotePath.read_bytes

    def read_and_replace(self: RemotePath, start: int = 0, stop: int | None = None) -> bytes:
        content = whole(self, start, stop)
        store.pipe(path, store.cat_file(path))
        return content

    monkeypatch.setattr(RemotePath, "read_bytes", read_and_replace)
    used = the_cache()
    assert used is not None
    with pytest.raises(DataError, match="another object stands there since it was opened"):
        tokens.copy(used)
    store.rm(path)
    with pytest.raises(DataError, match="the object was deleted since it was opened"):
        tokens[0:10]
    assert copies(cache) == []


class _Flaky:
    """A request that fails `times` times."""

    def __init__(self, times: int, error: Exception):
        self.times, self.error, self.calls = times, error, 0

    def __call__(self, path: str, **_: object) -> bytes:
        self.calls += 1
        if self.calls <= self.times:
            raise self.error
        return b"content"


@pytest.mark.parametrize(
    ("error", "times", "calls"),
    [
        (TimeoutError("slow down"), 2, 3),
        (ConnectionResetError("reset"), 3, 3),
        (PermissionError("Access Denied"), 3, 1),
    ],
)
def test_retries(monkeypatch: pytest.MonkeyPatch, error: Exception, times: int, calls: int) -> None:
    flaky = _Flaky(times, error)
    store = type(fsspec.filesystem("memory"))
    whole = store.cat_file

    def cat_file(self, path: str, **arguments: object) -> bytes:
        # The thread that copies may still read what another test has asked for.
        return (flaky if path == "/bucket/x" else partial(whole, self))(path, **arguments)

    monkeypatch.setattr(store, "cat_file", cat_file)
    place = RemotePath("memory://bucket/x")
    if times < 3:
        assert place.read_bytes() == b"content"
    else:
        with pytest.raises(DataError, match=rf"cannot read it: {error}.*memory://bucket/x"):
            place.read_bytes()
    assert flaky.calls == calls


def test_urls_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"this directory is not a prepared data set"):
        TokenSplit("memory://bucket/nothing", "train", 8)
    with pytest.raises(DataError, match=r"cannot read nowhere://.*use one of s3://"):
        TokenSplit("nowhere://bucket/x", "train", 8)
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(DataError, match=r"needs the package gcsfs.*pip install gcsfs"):
        TokenSplit("gs://bucket/x", "train", 8)
    monkeypatch.setenv("ARCHSCALE_CACHE_GB", "much")
    with pytest.raises(DataError, match=r"'much' is no number of gigabytes"):
        the_cache()


def test_paths_and_urls() -> None:
    assert locate("data/x") == Path("data/x")
    url = locate("s3://bucket/data/")
    assert isinstance(url, RemotePath)
    assert str(url / "a.bin") == "s3://bucket/data/a.bin"
    assert str((url / "a.bin").with_name("b.idx")) == "s3://bucket/data/b.idx"
    assert not is_remote("C:/data")


def test_copies_unused_for_longest_give_way(tmp_path: Path) -> None:
    store = Cache(tmp_path / "c", 250)

    def add(name: str) -> bool:
        return store.add(name, 100, lambda file: file.write(b"x" * 100) and None)

    assert add("a")
    assert add("b")
    assert not add("c")  # both are in use
    old = time.time() - 2 * cache_module.RECENT
    os.utime(tmp_path / "c" / "a", (old, old))
    os.utime(tmp_path / "c" / "b", (old - 5, old - 5))
    assert add("c")
    assert store.read("b", 100) is None
    copy = store.read("a", 100)
    assert copy is not None
    assert bytes(copy) == b"x" * 100
    assert not store.add("d", 300, lambda _: None)
    os.utime(tmp_path / "c" / "c", (old, old))
    Cache(tmp_path / "c", 199).trim()
    assert sorted(file.name for file in (tmp_path / "c").iterdir()) == [".lock", "a"]


def test_a_failed_copy_leaves_nothing(tmp_path: Path) -> None:
    store = Cache(tmp_path / "c", 1000)

    def half(file) -> None:
        file.write(b"x" * 50)
        raise DataError("the store broke off", "x", "again")

    with pytest.raises(DataError, match="broke off"):
        store.add("a", 100, half)
    assert [file.name for file in (tmp_path / "c").iterdir()] == [".lock"]
    blocked = tmp_path / "file"
    blocked.write_text("")


WRITER = """
import sys, time
from pathlib import Path
from archscale.data.cache import Cache
def slowly(file):
    for _ in range(10):
        file.write(b"x" * 10)
        file.flush()
        print("writing", flush=True)
        time.sleep(float(sys.argv[2]))
print(Cache(Path(sys.argv[1]), 1000).add("a", 100, slowly), flush=True)
"""


def start_writer(directory: Path, pause: float) -> subprocess.Popen:
    command = [sys.executable, "-c", WRITER, str(directory), str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_killed_process_leaves_nothing_that_is_taken_for_a_copy(tmp_path: Path) -> None:
    store = Cache(tmp_path / "c", 150)
    writer = start_writer(tmp_path / "c", 60.0)
    assert writer.stdout is not None
    writer.stdout.readline()
    assert store.read("a", 100) is None
    assert not store.add("a", 100, lambda _: None)  # that process is at it
    assert not store.add("b", 100, lambda _: None)  # and its room is taken
    writer.kill()
    writer.wait()
    assert store.read("a", 100) is None
    assert store.add("b", 100, lambda file: file.write(b"y" * 100) and None)
    assert sorted(file.name for file in (tmp_path / "c").iterdir()) == [".lock", "b"]


@pytest.mark.slow
def test_many_processes_make_one_copy(tmp_path: Path) -> None:
    writers = [start_writer(tmp_path / "c", 0.02) for _ in range(6)]
    printed = [writer.communicate(timeout=60)[0].splitlines() for writer in writers]
    assert any(lines[-1] == "True" for lines in printed)
    assert sum("writing" in lines for lines in printed) == 1
    assert (tmp_path / "c" / "a").read_bytes() == b"x" * 100


class _Server(ThreadingHTTPServer):
    directory: Path
    ranges = True
    marks = True
    failures = 0


class _Handler(BaseHTTPRequestHandler):
    """Files of a directory, with ranges and marks of their version."""

    server: _Server

    def _answer(self, body: bool) -> None:
        path = self.server.directory / self.path.strip("/")
        if body and self.server.failures:
            self.server.failures -= 1
            self.send_error(503)
            return
        if not path.is_file():
            self.send_error(404)
            return
        content, status = path.read_bytes(), 200
        size = len(content)
        if self.server.ranges and (wanted := self.headers.get("Range")):
            start, _, stop = wanted.removeprefix("bytes=").partition("-")
            content, status = content[int(start) : int(stop or size) + 1], 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        if self.server.marks:
            self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        self.send_header("Accept-Ranges", "bytes" if self.server.ranges else "none")
        self.end_headers()
        if body:
            self.wfile.write(content)

    def do_GET(self) -> None:
        self._answer(True)

    def do_HEAD(self) -> None:
        self._answer(False)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(dataset: Path) -> Iterator[_Server]:
    pytest.importorskip("aiohttp")
    server = _Server(("127.0.0.1", 0), _Handler)
    server.directory = dataset.parent
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_http(dataset: Path, server: _Server, cache: Path) -> None:
    url = f"http://127.0.0.1:{server.server_port}/{dataset.name}"
    server.failures = 2
    split = TokenSplit(url, "train", CONTEXT)
    server.failures = 2
    assert windows(split) == windows(TokenSplit(dataset, "train", CONTEXT))
    wait_for(lambda: len(copies(cache)) == len(split.files))
    with pytest.raises(DataError, match=r"no split 'other'"):
        TokenSplit(url, "other", CONTEXT)
    with pytest.raises(DataError, match=r"not a prepared data set"):
        TokenSplit(url + "2", "train", CONTEXT)


def test_nothing_is_copied_without_marks_of_versions(
    dataset: Path, server: _Server, cache: Path
) -> None:
    server.marks = False
    ids = np.arange(1000) % 250
    write_llmc(dataset.parent / "x.bin", ids)
    url = f"http://127.0.0.1:{server.server_port}/x.bin"
    windows(TokenSplit(url, "train", CONTEXT, vocab_size=250))
    wait_for(remote_tokens._WORKER._queue.empty)
    write_llmc(dataset.parent / "x.bin", ids[::-1])
    again = TokenSplit(url, "train", CONTEXT, vocab_size=250)
    assert again.tokens(0, 1000).tolist() == ids[::-1].tolist()
    assert copies(cache) == []


def test_http_without_ranges_or_a_server(
    dataset: Path, server: _Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARCHSCALE_CACHE_GB", "0")
    server.ranges = False
    url = f"http://127.0.0.1:{server.server_port}/{dataset.name}"
    split = TokenSplit(url, "train", CONTEXT)
    with pytest.raises(DataError, match=r"whole files instead of ranges.*local directory"):
        windows(split)
    with pytest.raises(DataError, match=r"cannot read it: .*asked 3 times.*check the network"):
        TokenSplit("http://127.0.0.1:9/set", "train", CONTEXT)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty bucket of a local S3 server."""
    server_class = pytest.importorskip("moto.server").ThreadedMotoServer
    s3fs = pytest.importorskip("s3fs")
    server = server_class(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("bucket")
    yield "s3://bucket"
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


READER = """
import sys, time
import numpy as np
from archscale.data.split import TokenSplit
split = TokenSplit(sys.argv[1], "train", 1024)
rng = np.random.default_rng(int(sys.argv[2]))
print("open", flush=True)
while True:
    split.samples(rng.integers(0, split.num_samples, 16).tolist())
    print("read", flush=True)
"""


@pytest.mark.slow
def test_s3(tmp_path: Path, bucket: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids as from the local directory under any bound; processes killed while they copy leave whole
    copies alone; another object is noticed."""
    s3fs = pytest.importorskip("s3fs")
    rng = np.random.default_rng(0)
    shards = [rng.integers(0, 50_000, 8_000_000) for _ in range(4)]  # of 16 MB
    directory = write_dataset(tmp_path / "set", shards, [shards[0][:50_000]], 50_000)
    s3fs.S3FileSystem().put(str(directory), f"{bucket}/set", recursive=True)
    url = f"{bucket}/set"
    for attempt in range(4):
        readers = [
            subprocess.Popen(
                [sys.executable, "-c", READER, url, str(number)], stdout=subprocess.PIPE, text=True
            )
            for number in range(2)
        ]
        for reader in readers:
            assert reader.stdout is not None
            for _ in range(2 + attempt):
                reader.stdout.readline()
        for reader in readers:
            reader.kill()
            reader.wait()
        for copy in cache.glob("*.bin"):
            assert copy.read_bytes() == (directory / copy.name.partition("-")[2]).read_bytes()

    local = TokenSplit(directory, "train", 1024)
    numbers = rng.integers(0, local.num_samples, 512).tolist()
    expected = local.samples(numbers)
    for gigabytes in ("0.04", "1"):
        monkeypatch.setenv("ARCHSCALE_CACHE_GB", gigabytes)
        for copy in cache.iterdir():
            os.utime(copy, (0, 0))
        distant = TokenSplit(url, "train", 1024)
        for _ in range(4):
            started = time.perf_counter()
            assert (distant.samples(numbers) == expected).all()
            rate = len(numbers) / (time.perf_counter() - started)
            used = sum(file.stat().st_size for file in cache.iterdir())
            print(f"{gigabytes} GB: {rate:,.0f} windows/s, {used / 1e6:.0f} MB in the cache")
            assert used <= float(gigabytes) * 1e9
    wait_for(lambda: len(copies(cache)) == 4)
    started = time.perf_counter()
    assert (distant.samples(numbers) == expected).all()
    print(f"copied: {len(numbers) / (time.perf_counter() - started):,.0f} windows/s")
    assert not list(cache.glob("*.part"))

    s3fs.S3FileSystem().pipe("bucket/set/train_00001.bin", b"another")
    with pytest.raises(DataError, match=r"foreign file"):
        TokenSplit(url, "train", 1024).check(50_000)


def test_a_server_that_does_not_answer_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(remote, "SILENCE", 0.1)
    monkeypatch.setattr(remote, "DELAYS", (0.0,))
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()  # and nothing more: connections are accepted by the kernel
        url = f"http://127.0.0.1:{server.getsockname()[1]}/tokens/dataset.json"
        with pytest.raises(DataError, match="asked 2 times"):
            remote.RemotePath(url).version()
