"""The text in a record: a field, or a dotted path to a field within fields."""

from typing import Any

from archscale.data.preparing.sources.units import shown
from archscale.data.preparing.trouble import Trouble
from archscale.errors import DataError

SKIP = "on_error: skip leaves such documents out and counts them"
_SHOWN_FIELDS = 12
_NAMES = {dict: "object", list: "list", str: "string", bool: "true or false", float: "number"}


class BadRecord(Exception):
    """A record without text: what is wrong, what helps, and the key under which it is counted."""

    def __init__(self, problem: str, remedy: str, cause: str):
        super().__init__(problem)
        self.problem, self.remedy, self.cause = problem, remedy, cause

    def record(self, trouble: Trouble, where: str) -> None:
        """Puts it into `trouble`, with the file and its line or row."""
        trouble.record(self.cause, DataError(self.problem, where, self.remedy))


def type_name(value: Any) -> str:
    return _NAMES.get(type(value), type(value).__name__)


def field_names(names: Any) -> str:
    """The first names of fields, for a message."""
    listed = [shown(str(name))[:60] for name in names]
    tail = ", …" if len(listed) > _SHOWN_FIELDS else ""
    return (", ".join(listed[:_SHOWN_FIELDS]) or "nothing") + tail


def find_field(record: Any, field: str) -> Any:
    """The value of a field or of a dotted path; a name that itself has dots wins if it is there.

    Raises:
        KeyError: it is not there.
    """
    if field in record:
        return record[field]
    head, dot, rest = field.partition(".")
    while dot:
        if isinstance(record.get(head), dict):
            try:
                return find_field(record[head], rest)
            except KeyError:
                pass
        following, dot, rest = rest.partition(".")
        head += "." + following
    raise KeyError(field)


def text_of(value: Any, field: str, fields: str) -> str:
    """A value as text: itself, its bytes as UTF-8, or its paragraphs joined by line breaks.

    Args:
        fields: the fields that there are, for the message.

    Raises:
        BadRecord: it is none of these.
    """
    if isinstance(value, str):
        return value
    if value is None:
        raise BadRecord(f"null in field {field!r}", SKIP, "null text")
    if isinstance(value, list) and all(isinstance(paragraph, str) for paragraph in value):
        return "\n".join(value)
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise BadRecord(f"not UTF-8 in field {field!r}: {error}", SKIP, "not UTF-8") from error
    held = "a list of more than strings" if isinstance(value, list) else f"a {type_name(value)}"
    problem = f"no text in field {field!r} but {held}; there is: {fields}"
    raise BadRecord(problem, "set the source's field", "not text")


def record_text(record: Any, field: str) -> str:
    """The text in a record as JSON or the hub gives it.

    Raises:
        BadRecord: the field is not there, or holds something else.
    """
    if not isinstance(record, dict):
        problem = f"no text in field {field!r}; there is: {type_name(record)}"
        remedy = f'write each line as an object with that field: {{"{shown(field)}": "..."}}'
        raise BadRecord(problem, remedy, "not text")
    try:
        value = find_field(record, field)
    except KeyError:
        problem = f"no text in field {field!r}; there is: {field_names(record)}"
        raise BadRecord(problem, "set the source's field", "no text field") from None
    return text_of(value, field, field_names(record) if not isinstance(value, str) else "")
