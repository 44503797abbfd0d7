"""JSON lines."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from archscale.data.preparing.sources.base import SourceBase
from archscale.data.preparing.sources.fields import BadRecord, record_text
from archscale.data.preparing.sources.globbing import match_files
from archscale.data.preparing.sources.lines import Lines
from archscale.data.preparing.sources.opening import cut_large, list_files, opened
from archscale.data.preparing.sources.remote import is_remote
from archscale.data.preparing.sources.units import UNIT_BYTES, Part, Unit, group
from archscale.data.preparing.trouble import Trouble

_EXAMPLE = "*.jsonl"
_CORRECT = "correct or remove the line"
# Whole numbers as floats: Python refuses to read those of more than 4,300 digits.
_decode_json = json.JSONDecoder(parse_int=float).decode


class JsonlSource(SourceBase):
    """JSON lines, each one document, also compressed; `path` is a glob or URL."""

    kind: Literal["jsonl"]
    path: str
    field: str = "text"

    def files(self) -> list[tuple[str, Path]]:
        return [] if is_remote(self.path) else match_files(self.path, _EXAMPLE)

    def remote_files(self) -> list[Part]:
        return list_files(self.path, _EXAMPLE) if is_remote(self.path) else []

    def units(self, limit: int = UNIT_BYTES) -> list[Unit]:
        parts = list_files(self.path, _EXAMPLE)
        return group([piece for part in parts for piece in cut_large(part, limit)], limit)

    def read_part(self, part: Part, trouble: Trouble) -> Iterator[str]:
        with opened(part.path) as content:
            lines = Lines(content, part)
            # Line, its text, record and document are not all kept: each may be huge.
            while True:
                try:
                    document = self._document(_decode(next(lines)))
                except StopIteration:
                    return
                except BadRecord as error:
                    content.read_on(trouble)
                    error.record(trouble, lines.place(trouble))
                    continue
                yield document
                del document

    def _document(self, text: str) -> str:
        """An empty one for an empty line."""
        return record_text(_parse(text), self.field) if text and not text.isspace() else ""


def _decode(line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        if line.startswith((b"\xff\xfe", b"\xfe\xff")):
            remedy = "convert the file: iconv -f UTF-16 -t UTF-8"
            raise BadRecord("JSON lines in UTF-16", remedy, "not UTF-8") from error
        raise BadRecord(f"not UTF-8: {error}", _CORRECT, "not UTF-8") from error


def _parse(text: str) -> Any:
    try:
        return _decode_json(text)
    except RecursionError as error:
        raise BadRecord("not a JSON line: nested too deeply", _CORRECT, "not JSON") from error
    except ValueError as error:
        if text.strip() in ("[", "{"):
            problem = "not a JSON line: a value goes over several lines"
            remedy = "write one JSON object a line, such as with jq -c '.[]' or jq -c ."
            raise BadRecord(problem, remedy, "not JSON") from error
        raise BadRecord(f"not a JSON line: {error}", _CORRECT, "not JSON") from error
