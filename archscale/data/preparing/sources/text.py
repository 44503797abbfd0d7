"""Text files, whole or cut into documents."""

import codecs
import io
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from archscale.data.preparing.sources.base import SourceBase
from archscale.data.preparing.sources.compressed import BUFFER_BYTES, buffered
from archscale.data.preparing.sources.cutting import (
    DOCUMENTS,
    LARGEST,
    Excerpt,
    cut,
    grain,
    paragraphs,
)
from archscale.data.preparing.sources.fields import BadRecord
from archscale.data.preparing.sources.globbing import match_files
from archscale.data.preparing.sources.lines import UTF8_MARK, Lines
from archscale.data.preparing.sources.opening import Content, cut_large, list_files, opened
from archscale.data.preparing.sources.remote import is_remote
from archscale.data.preparing.sources.units import UNIT_BYTES, Part, Unit, group, shown
from archscale.data.preparing.trouble import DamagedFile, Trouble, UnreadableFile

_EXAMPLE = "*.txt"
# That of UTF-32 begins with that of UTF-16.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


class TextSource(SourceBase):
    """Text files, also compressed; `path` is a glob or URL."""

    kind: Literal["text"]
    path: str
    encoding: str = "utf-8"
    document: Literal["auto", "file", "line", "paragraph"] = Field(
        default="auto",
        description="what a document is; auto: a file, but a file alone is cut at line ends, "
        "rather at blank lines, into about 200 documents of 1 to 64 kB, together the file",
    )

    @field_validator("encoding")
    @classmethod
    def _known(cls, encoding: str) -> str:
        try:
            "".encode(encoding)
        except (LookupError, UnicodeError) as error:
            raise ValueError(f"{error}; Python's documentation lists those known") from error
        if codecs.lookup(encoding).name in ("idna", "punycode"):
            raise ValueError(f"{encoding} is for names of hosts, not for text")
        return "utf-8" if codecs.lookup(encoding).name == "utf-8-sig" else encoding

    def files(self) -> list[tuple[str, Path]]:
        return [] if is_remote(self.path) else match_files(self.path, _EXAMPLE)

    def remote_files(self) -> list[Part]:
        return list_files(self.path, _EXAMPLE) if is_remote(self.path) else []

    def units(self, limit: int = UNIT_BYTES) -> list[Unit]:
        parts = self._parts()
        has_several = self.document in ("line", "paragraph") or parts[0].cut
        # Where a line ends is not seen in single bytes of a wide encoding.
        if has_several and not self._wide:
            parts = [piece for part in parts for piece in cut_large(part, limit)]
        return group(parts, limit)

    def notes(self) -> list[str]:
        alone = self._parts()[0]
        if not alone.cut:
            return []
        return [
            f"{shown(alone.path)} is cut at line ends into documents; "
            "with document: file it would be one"
        ]

    def _parts(self) -> list[Part]:
        parts = list_files(self.path, _EXAMPLE)
        if self.document == "auto" and len(parts) == 1:
            return [replace(parts[0], cut=True)]
        return parts

    @property
    def _wide(self) -> bool:
        """Whether a line does not end with the byte "\\n"."""
        return "\n".encode(self.encoding) != b"\n"

    def read_part(self, part: Part, trouble: Trouble) -> Iterator[str]:
        with opened(part.path) as content:
            try:
                self._refuse_other_marks(content.stream)
                content = self._prepared(content, part)
                excerpts = self._excerpts(content, part)
            except BadRecord as error:
                error.record(trouble, shown(part.path))
                return
            while True:
                try:
                    document = self._decode(next(excerpts))
                except StopIteration:
                    return
                except BadRecord as error:
                    content.read_on(trouble)
                    error.record(trouble, shown(part.path))
                    continue
                yield document
                del document

    def _prepared(self, content: Content, part: Part) -> Content:
        """In UTF-8 where the encoding is wide, and with its size where that decides on cuts."""
        if self._wide:
            content = content._replace(stream=buffered(self._in_utf8(content.stream)), size=None)
        return _measured(content) if part.cut else content

    def _excerpts(self, content: Content, part: Part) -> Iterator[Excerpt]:
        """The documents of a part, encoded."""
        if self.document == "line":
            lines = Lines(content, part)
            # Not a generator, which would keep a huge line while it is used.
            return map(partial(_without_end, lines), lines)
        if self.document == "paragraph":
            return paragraphs(content.stream, part.start, part.stop)
        if part.cut:
            size = grain(content.size or 0)
            last = None if part.stop is None else math.ceil(part.stop / size)
            return cut(content.stream, size, math.ceil(part.start / size), last)
        return (Excerpt(0, stream.read()) for stream in [content.stream])

    def _in_utf8(self, stream: io.BufferedReader) -> Iterator[bytes]:
        """A text of a wide encoding."""
        decode = codecs.getincrementaldecoder(self.encoding)().decode
        position = 0
        while True:
            data = stream.read(BUFFER_BYTES)
            try:
                yield decode(data, final=not data).encode("utf-8", "surrogatepass")
            except UnicodeDecodeError as error:
                # The decoder has kept the beginning of a character back.
                begin = position + len(data) - len(error.object)
                raise self._wrong(error, begin) from error
            if not data:
                return
            position += len(data)

    def _decode(self, excerpt: Excerpt) -> str:
        data = excerpt.data if excerpt.start else excerpt.data.removeprefix(UTF8_MARK)
        try:
            return data.decode("utf-8" if self._wide else self.encoding)
        except UnicodeDecodeError as error:
            raise self._wrong(error, excerpt.start) from error

    def _wrong(self, error: UnicodeDecodeError, start: int) -> BadRecord:
        problem = f"not {self.encoding} text: {error.reason} at byte {start + error.start:,}"
        return BadRecord(problem, "set the source's encoding", "wrong encoding")

    def _refuse_other_marks(self, stream: io.BufferedReader) -> None:
        if codecs.lookup(self.encoding).name != "utf-8":
            return
        head = stream.peek(4)[:4]
        for mark, encoding in _MARKS.items():
            if head.startswith(mark):
                problem = f"not utf-8 text: it begins with the mark of {encoding}"
                raise BadRecord(problem, f"set the source's encoding: {encoding}", "wrong encoding")


def _without_end(lines: Lines, line: bytes) -> Excerpt:
    """The last one of `lines`."""
    return Excerpt(lines.start, line.rstrip(b"\r\n"))


def _measured(content: Content) -> Content:
    """With its size; of a larger one that only reading tells, the size from which on documents do
    not get larger. So a text is cut alike whether it is compressed or not."""
    if content.size is not None:
        return content
    rest = iter(partial(content.stream.read1, BUFFER_BYTES), b"")
    pieces: list[bytes] = []
    size = 0
    try:
        while size < DOCUMENTS * LARGEST and (piece := next(rest, b"")):
            pieces.append(piece)
            size += len(piece)
    except (BadRecord, DamagedFile, UnreadableFile) as error:
        rest = _raising(error)
    return content._replace(stream=buffered(chain(pieces, rest)), size=size)


def _raising(error: Exception) -> Iterator[bytes]:
    """Where the damage is reached, not before: what comes first is kept."""
    yield from ()
    raise error
