"""The lines of a file that begin in a range of its bytes."""

import io

from archscale.data.preparing.sources.compressed import BUFFER_BYTES
from archscale.data.preparing.sources.opening import Content, opened
from archscale.data.preparing.sources.units import Part, shown
from archscale.data.preparing.trouble import Trouble

UTF8_MARK = b"\xef\xbb\xbf"


def seek_line(stream: io.BufferedReader, start: int, stop: int | None) -> int:
    """Goes to the first line that begins after byte `start`, or to the file's beginning for 0; not
    much further than `stop`, as the rest of a line without end may be huge.

    Returns:
        Where that is: after `stop` if no line begins before.
    """
    if start == 0:
        return 0
    position = stream.seek(start)
    while stop is None or position <= stop:
        piece = stream.readline(BUFFER_BYTES)
        position += len(piece)
        if not piece or piece.endswith(b"\n"):
            break
    return position


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
        self._position = seek_line(content.stream, part.start, part.stop)

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

    def place(self, trouble: Trouble) -> str:
        """File and number of the last line, from 1, for messages. In a later part, where all before
        it is to be counted for that, only if the work ends with the message; else its byte."""
        path, before = shown(self._part.path), 0
        if self._part.start:
            if trouble.on_error == "skip":
                return f"{path}, byte {self.start:,}"
            with opened(self._part.path) as content:
                earlier = Part(self._part.path, stop=self._part.start)
                before = sum(1 for _ in Lines(content, earlier))
        return f"{path}:{before + self.number}"
