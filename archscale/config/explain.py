"""Errors of a config in one line: what is wrong, the file that the key came from, and the remedy.

Nothing here knows which keys exist: `explain` is given the schema's root class.
"""

import math
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from archscale.config.layers import Layer
from archscale.config.synonyms import synonym
from archscale.config.values import EXPECTED
from archscale.errors import ConfigError, nearest, one_line, show

# pydantic error type; its context holds a list of ConfigErrors: key "problems"
PROBLEMS = "archscale_problems"


def explain(error: ValidationError, root: type[BaseModel], layers: Sequence[Layer]) -> ConfigError:
    """A validation error as one line: the first problem, and how many more there are.

    Unknown keys come first: a misspelt key is often the reason why another one is missing.
    """
    problems = [
        item for detail in error.errors(include_url=False) for item in _problems(detail, root)
    ]
    problems.sort(key=lambda item: not item.what.startswith("unknown key"))
    if layers:
        problems = [
            ConfigError(item.what, f"{item.where} in {_origin(item.where, layers)}", item.remedy)
            for item in problems
        ]
    return ConfigError.several(
        [
            ConfigError(*(one_line(part) for part in (item.what, item.where, item.remedy)))
            for item in problems
        ]
    )


def _origin(dotted: str, layers: Sequence[Layer]) -> str:
    """The newest layer that has the key, or the part of its path that exists; otherwise the newest
    file."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        for layer in reversed(layers):
            value: Any = layer.data
            for part in parts[:length]:
                if isinstance(value, list) and part.isdigit() and int(part) < len(value):
                    value = value[int(part)]
                elif isinstance(value, dict) and part in value:
                    value = value[part]
                else:
                    break
            else:
                return layer.origin
    files = [layer.origin for layer in layers if not layer.origin.startswith("override ")]
    return files[-1] if files else layers[-1].origin


def _problems(detail: Any, root: type[BaseModel]) -> Iterator[ConfigError]:
    """What one pydantic error means to a user; `where` is the dotted key alone."""
    kind, loc, value = detail["type"], detail["loc"], detail["input"]
    if kind == PROBLEMS:
        yield from detail["ctx"]["problems"]
        return
    dotted = ".".join(str(part) for part in loc)
    owner, field = _owner(root, loc)
    keys = fields_by_key(owner)
    if kind == "extra_forbidden":
        yield ConfigError(
            f"unknown key {show(loc[-1])}",
            dotted,
            which_key(dotted, list(keys), list(all_keys(root))),
        )
    elif kind == "missing":
        yield ConfigError(f"{dotted} is missing", dotted, f"add `{loc[-1]}`")
    elif kind == "literal_error":
        choices = [str(choice) for choice in _literals(field.annotation)]
        close = nearest(value, choices)
        remedy = f"did you mean {close}?" if close else "choose one of them"
        yield ConfigError(
            f"got {show(value)}, expected one of {', '.join(choices)}", dotted, remedy
        )
    elif kind in ("model_type", "model_attributes_type", "dict_type"):
        inner = _model_in(field.annotation) if field else root
        remedy = (
            f"give its keys: {', '.join(fields_by_key(inner))}"
            if inner
            else "give `key: value` pairs"
        )
        yield ConfigError(
            f"got {show(value)}, expected a section of `key: value` pairs", dotted, remedy
        )
    else:
        expected = {
            EXPECTED: detail.get("ctx", {}).get("expected", ""),
            "bool_type": "true or false",
            "string_type": "text",
            "string_too_short": "text that is not empty",
            "list_type": "a list",
            "too_short": "a list that is not empty",
        }.get(kind, detail["msg"])
        default = field.get_default(call_default_factory=False) if field else None
        example = "" if default is None or field.is_required() else f", such as {show(default)}"
        quoted = " in quotes" if kind == "string_type" and value is not None else ""
        yield ConfigError(
            f"got {show(value)}, expected {expected}", dotted, f"give {expected}{quoted}{example}"
        )


def fields_by_key(section: type[BaseModel]) -> dict[str, Any]:
    """The section's fields by their name in the YAML."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


def _owner(root: type[BaseModel], loc: tuple[Any, ...]) -> tuple[type[BaseModel], Any]:
    """The section that holds the last key of `loc`, and that key's field (None for an unknown
    key)."""
    owner, field = root, None
    for part in loc:
        if isinstance(part, int):  # an index into a list: the field is still the list's
            continue
        if field is not None:
            owner = _model_in(field.annotation) or owner
        field = fields_by_key(owner).get(part)
    return owner, field


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for part in typing.get_args(annotation) if (model := _model_in(part))), None)


def _literals(annotation: Any) -> Iterator[Any]:
    for part in typing.get_args(annotation):
        if isinstance(part, str | int):
            yield part
        else:
            yield from _literals(part)


def which_key(dotted: str, here: Sequence[str], everywhere: Sequence[str]) -> str:
    """What an unknown key probably means, as a question.

    Args:
        dotted: the unknown key with its sections.
        here: the keys of its section. everywhere: all dotted keys.
    """
    key = dotted.rpartition(".")[2]
    if ours := our_name(dotted, everywhere):
        return f"did you mean {ours}?"
    if close := nearest(key, here):
        return f"did you mean {close}?"
    if elsewhere := [other for other in everywhere if other.rpartition(".")[2] == key]:
        return f"did you mean {' or '.join(elsewhere)}?"
    return f"the keys here are {', '.join(here)}"


def our_name(dotted: str, everywhere: Sequence[str]) -> str | None:
    """The key of `everywhere` that other libraries call so, with how its value differs; or the
    option of a command."""
    meant = synonym(dotted)
    if meant is None or not meant.key:
        return meant and meant.hint
    # A study has the keys of a config below a section of its own.
    known = next(
        (key for key in everywhere if key == meant.key or key.endswith(f".{meant.key}")), None
    )
    return f"{known} ({meant.hint})" if known and meant.hint else known


def all_keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key below `section`, those of sections included."""
    for key, field in fields_by_key(section).items():
        yield prefix + key
        inner = _model_in(field.annotation)
        if inner:
            yield from all_keys(inner, f"{prefix}{key}.")


def divisors(value: int) -> list[int]:
    small = [divisor for divisor in range(1, math.isqrt(value) + 1) if value % divisor == 0]
    return [*small, *(value // divisor for divisor in small)]


def choice(values: Sequence[int], target: int) -> str:
    """The values nearest to the target on either side, as "a" or "a or b"."""
    around = [
        max((v for v in values if v <= target), default=None),
        min((v for v in values if v >= target), default=None),
    ]
    return " or ".join(str(value) for value in dict.fromkeys(around) if value is not None)
