"""The tables of keys in the READMEs, written from the schema: its fields, types, defaults and
docstrings.

    python -m tests.config.key_table        # rewrites them
"""

import ast
import inspect
import itertools
import json
import re
import textwrap
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import annotated_types
from pydantic import BaseModel, BeforeValidator, PlainValidator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from archscale.config import Config
from archscale.config.schema import NOT_YET
from archscale.sweep.config import GridConfig

ROOT = Path(__file__).parents[2]
SCHEMAS: dict[str, type[BaseModel]] = {
    "configs/README.md": Config,
    "configs/sweeps/README.md": GridConfig,
}
COMMAND = "python -m tests.config.key_table"
BEGIN = f"<!-- keys, written by `{COMMAND}` -->"
END = "<!-- end of keys -->"
HEAD = "| key | value | default | meaning |\n|---|---|---|---|"
LIST_ITEM = ".N"  # stands for an index: data.mixture.N.path
WORDS = {bool: "true or false", str: "text", int: "whole number", float: "number", list: "list"}


class Key(NamedTuple):
    """A row: the dotted key, what may stand there, its default and its meaning, as Markdown."""

    dotted: str
    value: str
    default: str
    meaning: str

    def __str__(self) -> str:
        cells = (f"`{self.dotted}`", self.value, self.default, self.meaning)
        return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


def keys(section: type[BaseModel], prefix: str = "") -> Iterator[Key]:
    """A row for every key below `section`, in the order of the schema."""
    meanings = attribute_docstrings(section)
    hints = typing.get_type_hints(section, include_extras=True)
    for name, field in section.model_fields.items():
        dotted = f"{prefix}{field.alias or name}"
        meaning = meanings[name] + "".join(
            f" **Not available yet**: {row.what}." for row in NOT_YET if row.key == dotted
        )
        yield Key(dotted, allowed(hints[name]), default(field), meaning)
        for inner, index in sections_in(hints[name]):
            yield from keys(inner, f"{dotted}{index}.")


def attribute_docstrings(section: type[BaseModel]) -> dict[str, str]:
    """Field → its docstring in one line; those of parent classes too."""
    found: dict[str, str] = {}
    for owner in reversed(section.__mro__):
        if owner is BaseModel or not issubclass(owner, BaseModel):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0].body
        for field, text in itertools.pairwise(body):
            match field, text:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(docstring))),
                ):
                    found[name] = " ".join(docstring.split())
    return found


def sections_in(hint: Any) -> Iterator[tuple[type[BaseModel], str]]:
    """The sections that a value of this type holds, and what an index to them is written as."""
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        yield hint, ""
    index = LIST_ITEM if typing.get_origin(hint) is list else ""
    for part in typing.get_args(hint):
        yield from ((section, index + inner) for section, inner in sections_in(part))


def allowed(hint: Any) -> str:
    """What may stand there, in words: the validators' own where they have any."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(allowed(part) for part in parts))
    if origin is Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if origin is Annotated:
        return annotated(parts[0], parts[1:])
    if origin is list:  # of texts, sections, lists of mappings …
        return re.sub(r"^[a-z]+( number)?", r"list of \g<0>s", allowed(parts[0]))
    if origin is dict:
        return "mapping"
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        return "section"
    return "`null`" if hint is type(None) else WORDS.get(hint, "any")


def annotated(base: Any, metadata: tuple[Any, ...]) -> str:
    text = allowed(base)
    for item in metadata:
        if isinstance(item, BeforeValidator | PlainValidator):
            text = expected_by(item.func)
        for bound in item.metadata if isinstance(item, FieldInfo) else ():
            match bound:
                case annotated_types.Ge(ge=least):
                    text += f" of at least {plain(float(least))}"
                case annotated_types.Gt(gt=least):
                    text += f" above {plain(float(least))}"
                case annotated_types.Le(le=greatest):
                    text += f" and at most {plain(float(greatest))}"
                case annotated_types.Lt(lt=greatest):
                    text += f" and below {plain(float(greatest))}"
                case annotated_types.MinLen() | annotated_types.MaxLen():
                    pass  # an empty text or list is refused
                case _:
                    raise AssertionError(f"no words for {bound}")
    return text


def expected_by(validator: Any) -> str:
    try:
        validator(object())
    except PydanticCustomError as error:
        expected = re.sub(r"^a ", "", error.context["expected"])
        return re.sub(r"\b(auto|null)\b", r"`\1`", expected)
    raise AssertionError(f"{validator} takes anything")


def default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default_factory is not None:  # of a section its defaults, of a list or mapping: empty
        return "`[]`" if field.default_factory is list else ""
    return "" if isinstance(field.default, BaseModel) else f"`{plain(field.default)}`"


def plain(value: Any) -> str:
    """As in YAML, floats shortened."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(plain(item) for item in value)}]"
    if isinstance(value, float):
        return re.sub(r"e([+-])0*", lambda match: f"e{match[1].strip('+')}", f"{value:.6g}")
    return value if isinstance(value, str) else json.dumps(value)


def render(schema: type[BaseModel]) -> str:
    """One table for the keys at the top that are no sections, then one for each section."""
    groups: dict[str, list[Key]] = {}
    inner = {
        name: section
        for name, hint in typing.get_type_hints(schema, include_extras=True).items()
        for section, _ in sections_in(hint)
    }
    for key in keys(schema):
        top = key.dotted.split(".")[0]
        if (key.dotted, key.value, key.default) != (top, "section", ""):  # that is its heading
            groups.setdefault(top if top in inner else "", []).append(key)
    parts = []
    for top, rows in groups.items():
        if top:
            parts.append(f"### {top}\n\n{' '.join((inspect.getdoc(inner[top]) or '').split())}")
        parts.append("\n".join([HEAD, *map(str, rows)]))
    return "\n\n".join(parts)


def written(page: str) -> str:
    """What stands between the marks of a page."""
    text = (ROOT / page).read_text()
    assert text.count(BEGIN) == text.count(END) == 1, f"{page}: no marks for the table of keys"
    return text.partition(BEGIN)[2].partition(END)[0].strip()


def rewrite(page: str) -> None:
    before, _, rest = (ROOT / page).read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    (ROOT / page).write_text(f"{before}{BEGIN}\n\n{render(SCHEMAS[page])}\n\n{END}{after}")


if __name__ == "__main__":
    for name in SCHEMAS:
        rewrite(name)
