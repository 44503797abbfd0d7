"""Sources behind URLs: object stores, web servers, the hub."""

import gzip
import json
import socket
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from archscale.data.preparing.sources import HuggingFaceSource, ParquetSource, Part, Unit
from archscale.data.preparing.trouble import Trouble
from archscale.errors import DataError
from tests.data.preparing.sources import jsonl, read, text

fsspec = pytest.importorskip("fsspec")

TEXTS = [f"text {i}" for i in range(50)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


@pytest.fixture
def memory() -> Iterator[str]:
    """A URL to write below."""
    system = fsspec.filesystem("memory")
    yield "memory://corpus"
    if system.exists("/corpus"):  # a test that was skipped has written nothing
        system.rm("/corpus", recursive=True)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The URL of a web server for `tmp_path`."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path)) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


def _put(url: str, content: bytes) -> None:
    with fsspec.open(url, "wb") as file:
        file.write(content)


def test_files_of_an_object_store(memory: str) -> None:
    _put(f"{memory}/b/2.jsonl", gzip.compress(LINES))
    _put(f"{memory}/a/1.jsonl", LINES)
    _put(f"{memory}/a/[1].txt", b"one\n" * 3)
    source = jsonl(f"{memory}/**/*.jsonl")
    assert source.files() == []
    assert [part.path for part in source.units()[0].parts] == [
        "memory:///corpus/a/1.jsonl",
        "memory:///corpus/b/2.jsonl",
    ]
    assert source.units()[0].size == len(LINES) + len(gzip.compress(LINES))
    assert read(source) == read(source, limit=1) == TEXTS * 2
    assert read(text(f"{memory}/a/[1].txt")) == ["one\n" * 3]
    assert read(text(f"{memory}/a/[1].txt", document="line")) == ["one"] * 3


def test_parquet_in_an_object_store(memory: str, tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    pa = pytest.importorskip("pyarrow")
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "x", row_group_size=20)
    _put(f"{memory}/x.parquet", (tmp_path / "x").read_bytes())
    source = ParquetSource(kind="parquet", path=f"{memory}/*.parquet")
    assert len(source.units(limit=1)) == 3
    assert read(source) == read(source, limit=1) == TEXTS


def test_trouble_with_an_object_store(memory: str) -> None:
    for pattern in ("none/*.jsonl", "none.jsonl"):
        with pytest.raises(DataError, match=r"no (such )?file .*memory://corpus/none"):
            read(jsonl(f"{memory}/{pattern}"))
    _put(f"{memory}/1.jsonl", gzip.compress(LINES)[:100])
    _put(f"{memory}/2.jsonl", LINES)
    source = jsonl(f"{memory}/*.jsonl")
    units = source.units(limit=1)
    fsspec.filesystem("memory").rm("/corpus/2.jsonl")
    trouble = Trouble("skip")
    for unit in units:
        list(source.read(unit, trouble))
    assert trouble.counts == {"damaged file": 1, "unreadable file": 1}


@pytest.mark.parametrize("error", [TimeoutError("timed out"), PermissionError("Access Denied")])
def test_what_may_pass_is_never_skipped(
    memory: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the file would be missing for good in a data set that says that it is done."""
    _put(f"{memory}/1.jsonl", LINES)
    source = jsonl(f"{memory}/1.jsonl")
    unit = source.units()[0]

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("fsspec.implementations.memory.MemoryFile.read", fail)
    with pytest.raises(DataError, match=f"cannot read the file: {error} .*check the URL"):
        list(source.read(unit, Trouble("skip")))


def test_a_web_server(server: str, tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(LINES))
    (tmp_path / "y.jsonl").write_bytes(LINES)
    assert read(jsonl(f"{server}/x.jsonl.gz?download=true")) == TEXTS
    both = jsonl(f"{server}/*.jsonl*")
    assert read(both) == TEXTS * 2
    assert [
        part.mark for part in both.remote_files() if "Last-Modified" not in str(part.mark)
    ] == []
    trouble = Trouble("skip")
    gone = jsonl(f"{server}/none")
    assert list(gone.read(Unit((Part(gone.path),)), trouble)) == []
    assert trouble.counts == {"unreadable file": 1}
    for name in ("none", "none*"):
        with pytest.raises(DataError, match=rf"(no file|File not found).*{server}/none"):
            read(jsonl(f"{server}/{name}"))


def test_no_network_is_one_line() -> None:
    pytest.importorskip("aiohttp")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    source = jsonl(f"http://127.0.0.1:{port}/x")
    with pytest.raises(
        DataError, match=rf"cannot read the file: Cannot connect .*{port}.*check"
    ) as caught:
        read(source)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="Cannot connect"):
        list(source.read(Unit((Part(source.path),)), Trouble("skip")))


@pytest.mark.parametrize(
    ("protocol", "message"),
    [("gs", r"pip install archscale\[remote\]"), ("nowhere", "check the URL")],
)
def test_a_protocol_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, protocol: str, message: str
) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(DataError, match=rf"{protocol}.*{message}") as caught:
        read(jsonl(f"{protocol}://bucket/x"))
    assert "\n" not in str(caught.value)


def test_s3(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("s3fs")
    boto3 = pytest.importorskip("boto3")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    server.start()
    try:
        url = "http://{}:{}".format(*server.get_host_and_port())
        for key, value in {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(key, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="corpus")
        client.put_object(Bucket="corpus", Key="a/1.jsonl.gz", Body=gzip.compress(LINES))
        client.put_object(Bucket="corpus", Key="a/b/2.jsonl", Body=LINES)
        assert read(jsonl("s3://corpus/**/*.jsonl*")) == TEXTS * 2
        assert jsonl("s3://corpus/a/b/2.jsonl").units()[0].size == len(LINES)
        marks = []
        for content in (LINES, LINES.swapcase()):
            client.put_object(Bucket="corpus", Key="a/b/2.jsonl", Body=content)
            marks += [part.mark for part in jsonl("s3://corpus/**/2.jsonl").remote_files()]
        assert marks[0] != marks[1]
        assert all("ETag" in str(mark) for mark in marks)
        gone = jsonl("s3://corpus/none.jsonl")
        with pytest.raises(DataError, match="s3://corpus/none"):
            read(gone)
        trouble = Trouble("skip")
        assert list(gone.read(Unit((Part(gone.path),)), trouble)) == []
        assert trouble.counts == {"unreadable file": 1}
    finally:
        server.stop()


def test_hub_data_sets_are_read_by_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for number in range(3):
        texts = [{"doc": {"text": f"{number}.{i}" if i != 1 else None}} for i in range(3)]
        (tmp_path / f"{number}.jsonl").write_text("\n".join(map(json.dumps, texts)))
    for streaming in (True, False):
        source = HuggingFaceSource(
            kind="huggingface",
            name="json",
            data_files=str(tmp_path / "*.jsonl"),
            field="doc.text",
            streaming=streaming,
        )
        units = source.units()
        assert [unit.name for unit in units] == (
            [f"json shards {n} to {n + 1}" for n in range(3)]
            if streaming
            else ["json shards 0 to 1"]
        )
        trouble = Trouble("skip")
        assert read(source, trouble) == [f"{n}.{i}" for n in range(3) for i in (0, 2)]
        assert trouble.counts == {"null text": 3}
        assert len(source.files()) == 3


@pytest.mark.parametrize("streaming", [True, False])
def test_only_damage_of_a_hub_data_set_is_skipped(
    tmp_path: Path, streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n' * 3)
    source = HuggingFaceSource(
        kind="huggingface", name="json", data_files=str(tmp_path / "x.jsonl"), streaming=streaming
    )
    (unit,) = source.units()
    for error, skipped in {
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"): "damaged file",
        FileNotFoundError("gone"): "unreadable file",
        ConnectionError("Network is unreachable"): None,
        RuntimeError("anything else"): None,
    }.items():

        def fail(*_: object, error: Exception = error) -> Iterator[dict]:
            yield {"text": "before"}
            raise error

        monkeypatch.setattr(datasets.IterableDataset, "__iter__", fail)
        monkeypatch.setattr(datasets.Dataset, "__iter__", fail)
        trouble = Trouble("skip")
        if skipped:
            assert list(source.read(unit, trouble)) == ["before"]
            assert trouble.counts == {skipped: 1}
        else:
            with pytest.raises(DataError, match=f"cannot read the data set: {error}"):
                list(source.read(unit, trouble))
