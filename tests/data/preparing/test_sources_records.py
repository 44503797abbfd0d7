"""The text in JSON lines, and what is said of lines without."""

import json
import tracemalloc
from pathlib import Path

import pytest

from archscale.data.preparing.sources.fields import BadRecord, find_field, record_text
from archscale.data.preparing.trouble import MAX_EXAMPLES, Trouble
from archscale.errors import DataError
from tests.data.preparing.sources import jsonl, read, text

BAD = [
    (b'{"text": null}', "null text", "null in field 'text' .*on_error: skip leaves"),
    (b'{"body": "x", "id": 1}', "no text field", "no text in field 'text'; there is: body, id "),
    (b"{}", "no text field", "there is: nothing "),
    (b'{"text": 7}', "not text", "no text in field 'text' but a number; there is: text "),
    (b'{"text": {"a": 1}}', "not text", "but a object"),
    (b'{"text": ["a", null]}', "not text", "a list of more than strings"),
    (b'"bare"', "not text", 'there is: string .*write each line as an object .*{"text": "..."}'),
    (b"[1]", "not text", "there is: list "),
    (b"{", "not JSON", "several lines .*one JSON object a line"),
    (b'{"text": "a"', "not JSON", "not a JSON line: Expecting"),
    (b'{"a":' * 100_000, "not JSON", "nested too deeply"),
    (b'{"text": "\xff"}', "not UTF-8", "not UTF-8: .*0xff"),
    (b'\xff\xfe{\0"\0', "not UTF-8", "UTF-16 .*iconv"),
]


@pytest.mark.parametrize(("line", "cause", "message"), BAD)
def test_a_line_without_text_is_named_or_counted(
    tmp_path: Path, line: bytes, cause: str, message: str
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "before"}\n' + line + b'\n{"text": "after"}')
    with pytest.raises(DataError, match=message) as caught:
        read(jsonl(path))
    assert "x.jsonl:2)" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    trouble = Trouble("skip")
    assert read(jsonl(path), trouble) == ["before", "after"]
    assert trouble.counts == {cause: 1}
    assert trouble.examples == [f"{caught.value.what} ({caught.value.where})"]


def test_what_json_allows_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    huge = '{"n": 1, "text": "huge"}'.replace("1", "9" * 5000)
    lines = [huge, '{"n": NaN, "text": ["a", "b"]}', " ", ""]
    path.write_text("\n".join(lines) + '\n\t{"text": "\\ud83d\\ude00 \\u0000"}\r\n')
    assert read(jsonl(path)) == ["huge", "a\nb", "", "", "\N{GRINNING FACE} \0"]


@pytest.mark.parametrize(
    ("record", "value"),
    [
        ({"a.b.c": "x", "a": {"b": {"c": "y"}}}, "x"),
        ({"a": {"b": {"c": "y"}}}, "y"),
        ({"a.b": {"c": "z"}, "a": {"other": 1}}, "z"),
        ({"a": {"b.c": "w"}}, "w"),
    ],
)
def test_dotted_fields(record: dict, value: str) -> None:
    assert find_field(record, "a.b.c") == value
    with pytest.raises(BadRecord, match="there is: a"):
        record_text(record, "a.c.c")


def test_trouble_is_merged_and_kept_as_json() -> None:
    first, second = Trouble("skip"), Trouble("skip")
    for number in range(15):
        first.record("null text", DataError(f"first {number}", "x", "y"))
        second.record("not JSON" if number % 2 else "null text", DataError("second", "x", "y"))
    copy = Trouble.from_json(json.loads(json.dumps(first.to_json())))
    copy.merge(second)
    assert copy.counts == {"null text": 23, "not JSON": 7}
    assert len(copy.examples) == MAX_EXAMPLES
    assert copy.examples[:15] == first.examples
    assert copy.on_error == "skip"


@pytest.mark.parametrize("document", ["record", "auto", "line", "paragraph"])
def test_a_huge_document_is_held_twice_at_most(tmp_path: Path, document: str) -> None:
    """As bytes and text, or as text and record; and while it is used, only once."""
    size = 4_000_000
    path = tmp_path / "x"
    words = "words " * (size // 6)
    line = json.dumps({"id": 1, "text": words}) if document == "record" else words
    path.write_text(f"{line}\n\n" * 2 if document == "paragraph" else f"{line}\n" * 2)
    del line, words
    source = jsonl(path) if document == "record" else text(path, document=document)
    tracemalloc.start()
    try:
        for unit in source.units():
            for huge in source.read(unit, Trouble("stop")):
                assert tracemalloc.get_traced_memory()[0] < 1.1 * size
                del huge
        assert 1.5 * size < tracemalloc.get_traced_memory()[1] < 2.3 * size
    finally:
        tracemalloc.stop()
