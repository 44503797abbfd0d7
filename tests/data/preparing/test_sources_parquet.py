"""Parquet: columns of any kind of text, nested ones, row groups; what is said of others."""

import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from archscale.data.preparing.sources import ParquetSource
from archscale.data.preparing.trouble import Trouble
from archscale.errors import DataError
from tests.data.preparing.sources import read

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

TEXTS = [f"text {i}\n" for i in range(150)]


def parquet(path: Path, **keys: object) -> ParquetSource:
    return ParquetSource.model_validate({"kind": "parquet", "path": str(path)} | keys)


def _write(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=40)
    return path


STRINGS = pa.array(TEXTS)
COLUMNS = {
    "string": STRINGS,
    "large string": STRINGS.cast(pa.large_string()),
    "view": pa.array(TEXTS, pa.string_view()),
    "dictionary": STRINGS.dictionary_encode(),
    "binary": STRINGS.cast(pa.binary()),
    "large binary": STRINGS.cast(pa.large_binary()),
    "fixed binary": pa.array([b"0123"] * 150, pa.binary(4)),
    "dictionary of binary": STRINGS.cast(pa.binary()).dictionary_encode(),
    "list": pa.array([[text, "end"] for text in TEXTS]),
    "large list": pa.array([[text, "end"] for text in TEXTS], pa.large_list(pa.string())),
    "fixed list": pa.array([[text, "end"] for text in TEXTS], pa.list_(pa.string(), 2)),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_kinds_of_columns(tmp_path: Path, name: str) -> None:
    try:
        path = _write(tmp_path / "x", id=list(range(150)), text=COLUMNS[name])
    except pa.ArrowNotImplementedError as error:
        pytest.skip(f"this pyarrow cannot write it: {error}")
    expected = {"fixed binary": ["0123"] * 150}.get(
        name, [f"{text}\nend" for text in TEXTS] if "list" in name else TEXTS
    )
    assert read(parquet(path)) == expected
    assert read(parquet(path), limit=1) == expected


def test_nested_columns(tmp_path: Path) -> None:
    inner = pa.array([{"text": text, "parts": [text]} for text in TEXTS])
    outer = pa.array([None if i == 7 else {"doc": {"text": text}} for i, text in enumerate(TEXTS)])
    path = _write(tmp_path / "x", doc=inner, a=outer)
    assert read(parquet(path, field="doc.text")) == TEXTS
    assert read(parquet(path, field="doc.parts")) == TEXTS
    with pytest.raises(DataError, match="no field 'doc.parts.element'; there is: doc, a"):
        read(parquet(path, field="doc.parts.element"))
    trouble = Trouble("skip")
    assert len(read(parquet(path, field="a.doc.text"), trouble)) == 149
    assert trouble.counts == {"null text": 1}
    path = _write(tmp_path / "y", **{"doc": inner, "doc.text": pa.array(["exactly"] * 150)})
    assert read(parquet(path, field="doc.text")) == ["exactly"] * 150


def test_large_files_are_units_of_row_groups(tmp_path: Path) -> None:
    _write(tmp_path / "a", text=STRINGS)
    _write(tmp_path / "b", text=STRINGS)
    source = parquet(tmp_path / "*")
    assert len(source.units()) == 1
    units = source.units(limit=400)
    assert units[1].name.endswith("a row groups 1 to 2")
    assert len(units) == 8
    assert read(source, limit=400) == TEXTS * 2


@pytest.mark.parametrize("limit", [1, 10**9])
def test_a_row_without_text_is_named_or_counted(tmp_path: Path, limit: int) -> None:
    texts: list[Any] = [text.encode() for text in TEXTS]
    texts[90], texts[100] = None, b"\xff"
    path = _write(tmp_path / "x.parquet", text=texts)
    with pytest.raises(DataError, match=r"null in field 'text' .*x\.parquet, row 90\)"):
        read(parquet(path), limit=limit)
    trouble = Trouble("skip")
    assert len(read(parquet(path), trouble, limit=limit)) == 148
    assert trouble.counts == {"null text": 1, "not UTF-8": 1}
    assert "row 100" in trouble.examples[1]


def test_text_that_is_not_utf_8(tmp_path: Path) -> None:
    claimed = pa.Array.from_buffers(
        pa.string(), 2, pa.array([b"a", b"\xff"]).buffers(), null_count=0
    )
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": claimed}), path)
    trouble = Trouble("skip")
    assert read(parquet(path), trouble) == ["a"]
    assert trouble.counts == {"not UTF-8": 1}


@pytest.mark.parametrize(
    ("columns", "cause", "message"),
    [
        ({"body": ["x"], "id": [1]}, "no text field", "no field 'text'; there is: body, id"),
        ({"text": [1]}, "not text", "field 'text' holds int64, not text; there is: text"),
        ({"text": [[1]]}, "not text", "list<.*int64>, not text"),
        ({"text": [["a", None]]}, "not text", "but a list of more than strings; there is: text"),
        ({"text": [None]}, "null text", "null in field 'text'"),
    ],
)
def test_other_columns_say_what_they_hold(
    tmp_path: Path, columns: dict, cause: str, message: str
) -> None:
    path = _write(tmp_path / "x.parquet", **columns)
    with pytest.raises(DataError, match=rf"{message}.*x\.parquet"):
        read(parquet(path))
    trouble = Trouble("skip")
    assert read(parquet(path), trouble) == []
    assert trouble.counts == {cause: 1}


@pytest.mark.parametrize("cut", [0, 3, 0.5, 0.99])
def test_damaged_files(tmp_path: Path, cut: float) -> None:
    path = _write(tmp_path / "x.parquet", text=TEXTS)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(cut * len(whole)) if cut < 1 else cut])
    with pytest.raises(DataError, match=r"not a whole Parquet file: .*x\.parquet") as caught:
        read(parquet(path))
    assert "\n" not in str(caught.value)
    trouble = Trouble("skip")
    assert read(parquet(path), trouble, limit=1) == []
    assert trouble.counts == {"damaged file": 1}
    damaged = bytearray(whole)
    damaged[len(whole) // 8 : len(whole) // 4] = b"\xff" * (len(whole) // 4 - len(whole) // 8)
    path.write_bytes(damaged)
    trouble = Trouble("skip")
    assert len(read(parquet(path), trouble)) < 150
    assert trouble.counts["damaged file"] == 1


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Only the rows of a batch are there, of 20 MB in one row group."""
    path = tmp_path / "x.parquet"
    texts = [f"{i:05}" * 400 for i in range(10_000)]
    table = pa.table({"text": texts})
    pq.write_table(table, path, row_group_size=10_000, compression="none", use_dictionary=False)
    del table
    del texts
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    peak = 0
    try:
        for unit in parquet(path).units():
            for _ in parquet(path).read(unit, Trouble("stop")):
                peak = max(peak, pa.total_allocated_bytes() - before)
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
        assert peak < 10_000_000
    finally:
        tracemalloc.stop()
