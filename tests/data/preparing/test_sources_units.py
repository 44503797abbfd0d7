"""Documents do not depend on how sources are cut into units."""

import io
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from archscale.data.preparing.sources.compressed import BUFFER_BYTES
from archscale.data.preparing.sources.cutting import cut
from archscale.data.preparing.sources.units import Part, Unit, byte_ranges, group
from archscale.data.preparing.trouble import Trouble
from tests.data.preparing.sources import jsonl, read, text

LINES = st.lists(
    st.one_of(st.text("ab é", max_size=12), st.sampled_from(["", "", " "])), max_size=30
)
ENDS = st.sampled_from(["\n", "\r\n"])
ONE_FILE = settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def test_small_files_are_read_together_and_large_ones_alone() -> None:
    parts = [Part(name, size=size) for name, size in zip("abcdef", (3, 4, 3, 20, 1, 9))]
    units = group(parts, 10)
    assert [[part.path for part in unit.parts] for unit in units] == [
        ["a", "b", "c"],
        ["d"],
        ["e", "f"],
    ]
    assert [unit.size for unit in units] == [10, 20, 10]
    assert units[0].name == "a and 2 files after it"
    assert group([Part("x"), Part("y", size=1)], 10)[0] == Unit((Part("x"),))
    assert group([], 10) == []


def test_the_name_of_a_range() -> None:
    ranges = byte_ranges("a.jsonl", 25_000, 10_000)
    assert [part.name for part in ranges] == [
        "a.jsonl bytes 0 to 10,000",
        "a.jsonl bytes 10,000 to 20,000",
        "a.jsonl bytes 20,000 to the end",
    ]
    assert sum(part.size or 0 for part in ranges) == 25_000
    assert byte_ranges("empty", 0, 10) == [Part("empty", size=0)]
    assert Unit((Part("new\nline\udcff"),)).name == r"new\nline\xff"


@ONE_FILE
@example(lines=[], end="\n", limit=1, mark=True)
@given(lines=LINES, end=ENDS, limit=st.integers(1, 40), mark=st.booleans())
@pytest.mark.parametrize("document", ["line", "paragraph"])
def test_lines_and_paragraphs_are_those_of_the_whole(
    tmp_path: Path, document: str, lines: list[str], end: str, limit: int, mark: bool
) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"\xef\xbb\xbf" * mark + end.join(lines).encode())
    whole = end.join(lines)
    if document == "line":
        expected = whole.split(end)[: None if whole and not whole.endswith(end) else -1]
    else:
        blank = [not line.strip() for line in lines]
        expected, together = [], []
        for line, is_blank in zip([*lines, ""], [*blank, True]):
            if not is_blank:
                together.append(line)
            elif together:
                expected.append(end.join(together))
                together = []
    source = text(path, document=document)
    assert read(source) == expected
    assert read(source, limit=limit) == expected


@ONE_FILE
@given(lines=LINES, limit=st.integers(1, 60), mark=st.booleans())
def test_json_lines_are_those_of_the_whole(
    tmp_path: Path, lines: list[str], limit: int, mark: bool
) -> None:
    path = tmp_path / "x"
    content = "\n".join(json.dumps({"text": line}, ensure_ascii=False) for line in lines)
    path.write_bytes(b"\xef\xbb\xbf" * mark + content.encode())
    assert read(jsonl(path), limit=limit) == lines


@ONE_FILE
@given(
    lines=LINES,
    end=ENDS,
    grain=st.integers(1, 50),
    at=st.lists(st.integers(1, 300), max_size=6, unique=True),
)
def test_cuts_depend_on_nothing_before_them(
    tmp_path: Path, lines: list[str], end: str, grain: int, at: list[int]
) -> None:
    """From any cut to any other, together they are the text, and the same documents."""
    path = tmp_path / "x"
    path.write_bytes(end.join(lines).encode())

    def documents(first: int, last: int | None) -> list[bytes]:
        with open(path, "rb") as stream:
            return [excerpt.data for excerpt in cut(stream, grain, first, last)]

    whole = documents(0, None)
    assert b"".join(whole) == path.read_bytes()
    assert all(whole)
    assert all(document.endswith(b"\n") for document in whole[:-1])
    starts = [0, *sorted(at)]
    parts = [documents(*part) for part in zip(starts, [*starts[1:], None])]
    assert [document for part in parts for document in part] == whole


def test_cuts_are_rather_at_blank_lines() -> None:
    paragraph = b"a line of words\n" * 6 + b"\n"
    excerpts = list(cut(io.BufferedReader(io.BytesIO(paragraph * 50)), 200))
    assert len(excerpts) > 20
    assert all(excerpt.data.endswith(b"\n\n") for excerpt in excerpts)
    assert [excerpt.start for excerpt in excerpts[:2]] == [0, len(excerpts[0].data)]


def test_a_line_of_a_later_range_is_named_by_its_number_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    lines = [f'{{"text": "{number:03}"}}' for number in range(99)]
    lines[70] = "{"
    path.write_text("\n".join(lines))
    with pytest.raises(Exception, match=r"x\.jsonl:71\)"):
        read(jsonl(path), limit=100)
    trouble = Trouble("skip")
    assert len(read(jsonl(path), trouble, limit=100)) == 98
    assert f"x.jsonl, byte {70 * len(lines[0] + ' '):,})" in trouble.examples[0]


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="Linux counts the bytes read")
@pytest.mark.parametrize("kind", ["bad lines", "no blank line", "no line end"])
def test_units_read_no_more_than_the_file(tmp_path: Path, kind: str) -> None:
    """But for a buffer at each end of a unit: not half of the file again for every unit."""
    path, size, limit = tmp_path / "x", 2_000_000, 40_000
    path.write_bytes(b"x" * size if kind == "no line end" else (b"x" * 99 + b"\n") * (size // 100))
    source = jsonl(path) if kind == "bad lines" else text(path, document="paragraph")
    began = _bytes_read()
    read(source, Trouble("skip"), limit)
    assert size <= _bytes_read() - began < size + size // limit * 2 * BUFFER_BYTES


def _bytes_read() -> int:
    """By this process, up to now."""
    return int(Path("/proc/self/io").read_text().split()[1])
