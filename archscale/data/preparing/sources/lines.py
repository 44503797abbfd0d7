"""The lines of a file that begin in a range of its bytes."""

import io
from functools import cached_property

from archscale.data.preparing.sources.opening import Content, opened
from archscale.data.preparing.sources.units import Part, shown

UTF8_MARK = b"\xef\xbb\xbf"


def seek_line(stream: io.BufferedReader, start: int) -> int:
    """Goes to the first line that begins after byte `start`, or to the file's beginning for 0.

    Returns:
        Where that is.
    """
    if start == 0:
        return 0
    stream.seek(start)
    return start + len(stream.readline())


class Lines:
    """Iterates over the lines of a part, with their ends, without the mark of UTF-8 at the file's
    beginning. They begin after `part.start` and at most at `part.stop`: so each line belongs to one
    part, wherever the file is cut.

    Not a generator, which would keep a huge line while it is used.

    Attributes:
        number: how many lines were read.
        start: position of the last one in the file.
    """

    def __init__(self, content: Content, part: Part):
        self.number = self.start = 0
        self._readline = content.stream.readline
        self._part = part
        self._position = seek_line(content.stream, part.start)

    def __iter__(self) -> "Lines":
        return self

    def __next__(self) -> bytes:
        if self._part.stop is not None and self._position > self._part.stop:
            raise StopIteration
        line = self._readline()
        self.start = self._position
        self._position += len(line)
        if self.start == 0:
            line = line.removeprefix(UTF8_MARK)
        if not line:
            raise StopIteration
        self.number += 1
        return line

    @property
    def place(self) -> str:
        """File and number of the last line, from 1, for messages."""
        return f"{shown(self._part.path)}:{self._before + self.number}"

    @cached_property
    def _before(self) -> int:
        """How many lines of the file belong to the parts before this one: only read when there is a
        message."""
        if self._part.start == 0:
            return 0
        with opened(self._part.path) as content:
            return sum(1 for _ in Lines(content, Part(self._part.path, stop=self._part.start)))
