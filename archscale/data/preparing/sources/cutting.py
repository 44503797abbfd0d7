"""Streams of text cut into documents, wherever the reading begins and ends."""

import io
from collections.abc import Iterator
from typing import Literal, NamedTuple

from archscale.data.preparing.sources.lines import UTF8_MARK, seek_line

SMALLEST, LARGEST = 1_000, 64_000
# Enough documents for a validation split of a percent.
DOCUMENTS = 200


class Excerpt(NamedTuple):
    """Bytes of a file, and the position of the first."""

    start: int
    data: bytes


def grain(size: int) -> int:
    """About how many bytes a document has that is cut out of a text of `size` bytes."""
    return min(max(size // DOCUMENTS, SMALLEST), LARGEST)


def cut(
    stream: io.BufferedReader, grain: int, first: int = 0, last: int | None = None
) -> Iterator[Excerpt]:
    """A text as documents of about `grain` bytes, which together are the text.

    Cut k = 1, 2, … is after the first blank line that begins in the `grain` bytes from k · grain
    on; or, if none does, before the first line that begins there or later. So it depends on nothing
    before k · grain - 1.

    Args:
        stream: at the text's beginning.
        first: the documents from this cut on (0: from the beginning).
        last: up to this cut; None: to the end.
    """
    number = max(1, first)
    position = start = max(0, first * grain - 1)
    if position:
        stream.seek(position)
    pieces: list[bytes] = []
    while last is None or number <= last:
        target = number * grain
        if position < target:
            pieces += [stream.read(target - 1 - position), stream.readline()]
            position += len(pieces[-2]) + len(pieces[-1])
        ahead, end = _lines_to_a_blank_one(stream, target + grain - position)
        position += sum(map(len, ahead))
        if end == "blank":
            pieces, ahead = pieces + ahead, []
        cut_at = position - sum(map(len, ahead))
        # What is before the first cut belongs to another reader.
        if number != first and cut_at > start:
            yield Excerpt(start, _joined(pieces))
        if end == "text" and position > cut_at and number != last:
            yield Excerpt(cut_at, _joined(ahead))
        if end == "text":
            return
        pieces, start, number = ahead, cut_at, number + 1


def _lines_to_a_blank_one(
    stream: io.BufferedReader, length: int
) -> tuple[list[bytes], Literal["blank", "length", "text"]]:
    """The lines that begin in the next `length` bytes, as far as the first blank one; and what
    ended them: that, the length, or the text."""
    lines: list[bytes] = []
    while length > 0:
        line = stream.readline()
        if not line:
            return lines, "text"
        lines.append(line)
        length -= len(line)
        if not line.strip():
            return lines, "blank"
    return lines, "length"


def _joined(pieces: list[bytes]) -> bytes:
    """Emptied, as a piece may be huge."""
    whole = b"".join(pieces)
    pieces.clear()
    return whole


def paragraphs(stream: io.BufferedReader, start: int, stop: int | None) -> Iterator[Excerpt]:
    """What is separated by blank lines, without the last line end.

    Args:
        stream: at the text's beginning.
        start, stop: those after the first blank line that begins after `start` (0: from the
            beginning), as far as the first that begins after `stop` (None: to the end).
    """
    position = seek_line(stream, start, stop)
    others = start > 0
    pieces: list[bytes] = []
    first = position
    # Until the end, or until it is known that no paragraph begins in the range.
    while not (others and stop is not None and position > stop):
        line = stream.readline()
        if not line:
            break
        if (line if position else line.removeprefix(UTF8_MARK)).strip():
            if not others:
                pieces.append(line)
        else:
            if pieces:
                yield Excerpt(first, _joined(pieces).rstrip(b"\r\n"))
            if stop is not None and position > stop:
                return
            others = False
        position += len(line)
        if not pieces:
            first = position
    if pieces:
        yield Excerpt(first, _joined(pieces).rstrip(b"\r\n"))
