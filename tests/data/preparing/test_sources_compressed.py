"""Compressed files: by content, whatever their names; damage is named and stops only that file."""

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pytest
import zstandard

from archscale.data.preparing.sources import SourceBase
from archscale.data.preparing.trouble import Trouble
from archscale.errors import DataError
from tests.data.preparing.sources import jsonl, read, text

COMPRESS = {
    "gzip": gzip.compress,
    "zstd": zstandard.ZstdCompressor(write_checksum=True).compress,
    "xz": lzma.compress,
    "bzip2": bz2.compress,
}
TEXTS = [f"{i}: " + "".join(chr(97 + (i * k * k) % 26) for k in range(200)) for i in range(300)]


def _lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


@pytest.mark.parametrize("name", ["x.jsonl", "x.GZ", "x.gzip", "x.zst", "x.bz2"])
@pytest.mark.parametrize("kind", COMPRESS)
def test_the_content_counts_and_not_the_name(tmp_path: Path, kind: str, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(COMPRESS[kind](_lines(TEXTS)))
    assert read(jsonl(path)) == TEXTS
    path.write_bytes(COMPRESS[kind]("\n".join(TEXTS).encode()))
    assert read(text(path, document="file")) == ["\n".join(TEXTS)]
    assert read(text(path, document="line")) == TEXTS


@pytest.mark.parametrize("kind", COMPRESS)
def test_members_that_follow_one_another(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    # One of them inside of a line; an empty one; zeros as of a tape at the end.
    content = _lines(TEXTS)
    pieces = [content[:1001], b"", content[1001:30_000], content[30_000:]]
    path.write_bytes(b"".join(map(COMPRESS[kind], pieces)) + b"\0" * 512)
    assert read(jsonl(path)) == TEXTS


def test_zstd_with_a_skippable_frame_and_a_long_window(tmp_path: Path) -> None:
    skippable = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"pzst"
    parameters = zstandard.ZstdCompressionParameters(window_log=28)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    frame = compressor.compress(_lines(TEXTS)) + compressor.flush()
    (tmp_path / "x").write_bytes(skippable + frame)
    assert read(jsonl(tmp_path / "x")) == TEXTS


@pytest.mark.parametrize("kind", COMPRESS)
def test_half_a_file(tmp_path: Path, kind: str) -> None:
    """The documents before the damage are kept, and the rest counts once."""
    whole = COMPRESS[kind](_lines(TEXTS))
    path = tmp_path / "x.jsonl"
    path.write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(DataError, match=rf"not a whole {kind} file: it ends too early .*x\.jsonl"):
        read(jsonl(path))
    (tmp_path / "y.jsonl").write_bytes(_lines(["after"]))
    trouble = Trouble("skip")
    texts = read(jsonl(tmp_path / "*.jsonl"), trouble)
    assert texts[-1] == "after"
    assert texts[:-1] == TEXTS[: len(texts) - 1]
    if kind == "gzip":
        assert len(texts) > 100
    assert trouble.counts == {"damaged file": 1}
    assert "x.jsonl" in trouble.examples[0]


@pytest.mark.parametrize("source", [jsonl, text])
@pytest.mark.parametrize("kind", COMPRESS)
@pytest.mark.parametrize("place", [0.3, 0.6, 1])
def test_a_flipped_byte_is_a_damaged_file(tmp_path: Path, kind: str, place: float, source) -> None:
    """Even where the text decodes to something that looks like a wrong record."""
    content = bytearray(COMPRESS[kind](_lines(TEXTS)))
    content[min(int(place * len(content)), len(content) - 6)] ^= 0x10
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(DataError, match=rf"not a whole {kind} file: .*x\)") as caught:
        read(source(tmp_path / "x"))
    assert "None" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", [jsonl, text])
def test_a_wrong_record_of_a_damaged_file_is_damage(tmp_path: Path, source) -> None:
    """Only the checksum at the end tells."""
    stored = gzip.compress(_lines(TEXTS), compresslevel=0)
    (tmp_path / "x").write_bytes(stored.replace(b'{"text": "7', b'\xff"text": "7', 1))
    with pytest.raises(DataError, match=r"not a whole gzip file: .*x\)"):
        read(source(tmp_path / "x"))
    trouble = Trouble("skip")
    assert len(read(source(tmp_path / "x"), trouble)) > 50
    assert trouble.counts["damaged file"] == 1
    assert trouble.counts["not UTF-8"] + trouble.counts["wrong encoding"] == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl.gz", b"<html>\n<body>403", r"called \.gz but not gzip: .*'<html> <body>403'"),
        ("a.jsonl.ZST", b"", r"called \.ZST but not zstd: it is empty"),
        ("a.bz2", b"\0\1\2\3", r"called \.bz2 but not bzip2: .* bytes 00 01 02 03"),
        ("a.jsonl", b"PK\x03\x04....", "a zip archive, not text .*unpack it"),
        ("a.gz", gzip.compress(b"a\n", mtime=0) + b"trailing", "not a whole gzip file: .*header"),
    ],
)
def test_what_is_something_else_says_so(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    sources: list[SourceBase] = [text(tmp_path / name)]
    if b"trailing" not in content:
        sources.append(jsonl(tmp_path / name))
    for source in sources:
        with pytest.raises(DataError, match=message) as caught:
            read(source)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_large_compressed_file_is_one_unit(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(gzip.compress(_lines(TEXTS)))
    (tmp_path / "b").write_bytes(_lines(TEXTS))
    units = jsonl(tmp_path / "*").units(limit=1000)
    assert [unit.parts[0].path[-1] for unit in units][:2] == ["a", "b"]
    assert len(units) > 10
    assert read(jsonl(tmp_path / "*"), limit=1000) == TEXTS * 2
