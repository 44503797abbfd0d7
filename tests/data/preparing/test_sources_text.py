"""Text files: whole, lines, paragraphs; one alone is cut, and nothing of it changes."""

import gzip
from pathlib import Path

import pytest
from pydantic import ValidationError

from archscale.data.preparing.sources.cutting import LARGEST, SMALLEST, grain
from archscale.data.preparing.trouble import Trouble
from archscale.errors import DataError
from tests.data.preparing.sources import read, text

PAGE = "A line, ünïcödé.\r\nAnother one\n\n\n  and more\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-32", "utf-16-le", "latin-1"])
def test_a_file_alone_is_cut_and_together_unchanged(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "x.txt"
    content = PAGE * 5000
    path.write_bytes(content.encode(encoding))
    source = text(path, encoding=encoding)
    documents = read(source)
    assert "".join(documents) == content
    assert 100 < len(documents) <= 201
    assert read(source, limit=5000) == documents
    assert (len(source.units(limit=5000)) > 5) == (encoding in ("utf-8", "latin-1"))
    assert "document: file" in source.notes()[0]
    (tmp_path / "y").write_bytes(gzip.compress(path.read_bytes()))
    assert read(text(tmp_path / "y", encoding=encoding)) == documents
    assert read(text(path, encoding=encoding, document="file")) == [content]


def test_sizes_of_documents() -> None:
    assert [grain(size) for size in (0, 10_000, 10**6, 10**12)] == [
        SMALLEST,
        SMALLEST,
        5000,
        LARGEST,
    ]


def test_several_files_are_a_document_each(tmp_path: Path) -> None:
    for name in "ba":
        (tmp_path / f"{name}.txt").write_text(name + PAGE * 200)
    source = text(tmp_path / "*.txt")
    assert [document[0] for document in read(source, limit=10)] == ["a", "b"]
    assert source.notes() == []
    assert len(read(text(tmp_path / "*.txt", document="line"))) == 5 * 400


def test_the_mark_of_utf_8_is_dropped_and_that_of_utf_16_named(tmp_path: Path) -> None:
    path = tmp_path / "x"
    for document in ("auto", "file", "line", "paragraph"):
        path.write_bytes(b"\xef\xbb\xbfone")
        assert read(text(path, document=document)) == ["one"]
        assert read(text(path, document=document, encoding="utf-8-sig")) == ["one"]
        path.write_bytes("one".encode("utf-16"))
        with pytest.raises(DataError, match="set the source's encoding: utf-16"):
            read(text(path, document=document))
        assert read(text(path, document=document, encoding="utf-16")) == ["one"]


@pytest.mark.parametrize("document", ["line", "auto"])
def test_only_documents_that_are_not_text_are_left_out(tmp_path: Path, document: str) -> None:
    path = tmp_path / "x"
    line = b"a line of words\n"
    path.write_bytes(line * 1000 + b"caf\xe9\n" + line * 1000)
    with pytest.raises(DataError, match=r"not utf-8 text: .* at byte 16,003 \(.*x\)"):
        read(text(path, document=document))
    trouble = Trouble("skip")
    documents = read(text(path, document=document), trouble)
    assert trouble.counts == {"wrong encoding": 1}
    assert sum(map(len, documents)) > (29_999 if document == "line" else 30_000)


def test_damage_inside_of_utf_16(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes("words\n".encode("utf-16-le") * 100 + b"\0\xd8a")
    for document in ("auto", "line", "paragraph", "file"):
        with pytest.raises(DataError, match=r"not utf-16-le text: .* at byte 1,200"):
            read(text(path, document=document, encoding="utf-16-le"))


def test_an_unknown_encoding_is_refused_at_once() -> None:
    for encoding in ("utf-9", "base64", "undefined", "punycode"):
        with pytest.raises(ValidationError, match=encoding):
            text("x", encoding=encoding)
