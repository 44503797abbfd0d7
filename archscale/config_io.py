"""Reading and writing config files: YAML layers, kinds of values, and errors in one line.

Nothing here knows which keys exist: the schema is `archscale.config`, and `explain` is given its
root class.

A config is a stack of layers, oldest ancestor first: the `base:` chain, the file itself, then each
override. The layers are kept beside their merged result, so that an error can name the file that a
key came from.
"""

import contextlib
import difflib
import json
import math
import os
import tempfile
import typing
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    PlainValidator,
    ValidationError,
)
from pydantic_core import PydanticCustomError

from archscale.config_synonyms import synonym
from archscale.errors import ConfigError, explain_os_error

PROBLEMS = (  # pydantic error type; its context holds a list of ConfigErrors: key "problems"
    "archscale_problems"
)
EXPECTED = (  # pydantic error type; its context says what was expected: key "expected"
    "archscale_expected"
)


class Layer(NamedTuple):
    """One source of keys: a file's content, without its `base`, or one override."""

    origin: str
    data: dict[str, Any]


def read_layers(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> list[Layer]:
    """The `base:` chain of `path`, oldest first, then the file, then one layer per override
    `a.b=c`."""
    layers: list[Layer] = []
    seen: list[Path] = []
    file: Path | None = Path(path)
    where = ""
    while file is not None:
        if file.resolve() in seen:
            raise ConfigError(
                f"{file} inherits from itself", where, "remove one `base` of the cycle"
            )
        seen.append(file.resolve())
        data = read_file(file, where)
        base = data.pop("base", None)
        if base is not None and not (isinstance(base, str) and base):
            raise ConfigError(
                f"got {show(base)}, expected a file name", f"base in {file}", "name one YAML file"
            )
        layers.insert(0, Layer(str(file), data))
        where = f"base in {file}"
        file = None if base is None else Path(os.path.normpath(file.parent / base))
    return layers + [_parse_override(text) for text in overrides]


def merge(layers: Sequence[Layer]) -> dict[str, Any]:
    """Later layers win. Mappings merge key by key; lists and null replace what they meet."""
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = _merged(merged, layer.data)
    return merged


def _merged(old: Any, new: Any) -> Any:
    if not isinstance(new, dict):
        return new
    below = old if isinstance(old, dict) else {}
    return below | {key: _merged(below.get(key), value) for key, value in new.items()}


def write_yaml(data: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Atomically: a crash leaves the old file or the new one, never a part."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            yaml.safe_dump(dict(data), stream, sort_keys=False, allow_unicode=True, width=110)
            stream.flush()
            os.fsync(stream.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(
            temporary, 0o666 & ~umask
        )  # mkstemp's 0600 would hide the file from the rest of the group
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


# --- YAML


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses duplicate keys, keys that are not strings, and self-containing
    structures."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {show(key)} is not a string, put it in quotes",
                    problem_mark=key_node.start_mark,
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {show(key)} is there twice", problem_mark=key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=True)


# Depth first, not in PyYAML's two passes: a self-containing alias is an error then, not an endless
# merge.
_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.construct_mapping)
_Loader.add_constructor(
    "tag:yaml.org,2002:seq", lambda loader, node: loader.construct_sequence(node, deep=True)
)


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = (
            f", line {error.problem_mark.line + 1}"
            if error.problem_mark and "\n" in text.strip()
            else ""
        )
        what = _one_line(error.problem or error.context or "cannot be read")
        raise ConfigError(
            f"not valid YAML: {what}", f"{where}{line}", "correct the YAML there"
        ) from error
    except (
        yaml.YAMLError,
        ValueError,
        RecursionError,
    ) as error:  # ValueError: an impossible date or number
        what = _one_line(str(error))
        raise ConfigError(f"not valid YAML: {what}", where, "correct the YAML there") from error


def read_file(
    path: Path, included_from: str = "", needs: str = "`name` and `data: {train: ...}`"
) -> dict[str, Any]:
    """The mapping in a YAML file; `included_from` and `needs` (what a file of this kind has at
    least) are for errors."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        remedy = (
            "give a path relative to the file that names it" if included_from else "check the path"
        )
        raise ConfigError(f"there is no file {path}", included_from or str(path), remedy) from error
    except OSError as error:
        cause, remedy = explain_os_error(error, "name a YAML file")
        raise ConfigError(
            f"cannot read {path}: {cause}", included_from or str(path), remedy
        ) from error
    except UnicodeDecodeError as error:
        what = f"cannot read {path}: {_one_line(str(error))}"
        raise ConfigError(what, included_from or str(path), "name a YAML file in UTF-8") from error
    data = _parse_yaml(text, str(path))
    if data is None:
        raise ConfigError("the file is empty", str(path), f"give at least {needs}")
    if not isinstance(data, dict):
        raise ConfigError(
            f"got {show(data)}, expected `key: value` pairs", str(path), "begin with `name: ...`"
        )
    return data


def _parse_override(text: str) -> Layer:
    origin = f"override {text}"
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"got {show(text)}", "override", "write it as section.key=value")
    if parts[0] == "base":
        raise ConfigError("`base` cannot be overridden", origin, "write it in a file")
    data = _parse_yaml(value, origin)
    for part in reversed(parts):
        data = {part: data}
    return Layer(origin, data)


# --- kinds of values


def _number(value: Any, expected: str, valid: Callable[[float], bool]) -> int | float:
    """YAML 1.1 reads 1e9 and 10.4e9 as text: text that is a number counts as one. A bool does not,
    nor does what is not finite or absurdly large."""
    number: int | float | None = (
        None if isinstance(value, bool) or not isinstance(value, int | float) else value
    )
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            number = float(value) if set(value) & set(".eE") else int(value)
    if number is None or not abs(number) < 1e100 or not valid(number):
        raise PydanticCustomError(EXPECTED, "expected {expected}", {"expected": expected})
    return number


def _whole(least: int, auto: bool = False, null: bool = False) -> BeforeValidator:
    expected = (
        f"a whole number of at least {least}"
        + (" or auto" if auto else "")
        + (" or null" if null else "")
    )

    def validate(value: Any) -> Any:
        if (auto and value == "auto") or (null and value is None):
            return value
        return int(_number(value, expected, lambda x: least <= x < 2**63 and x == int(x)))

    return BeforeValidator(validate)


def _real(interval: str, valid: Callable[[float], bool]) -> BeforeValidator:
    expected = f"a number {interval}"
    return BeforeValidator(lambda value: float(_number(value, expected, valid)))


def _pair(interval: str, valid: Callable[[float], bool]) -> BeforeValidator:
    expected = f"a list of two numbers {interval}"

    def validate(value: Any) -> tuple[float, float]:
        if not isinstance(value, list | tuple) or len(value) != 2:
            raise PydanticCustomError(EXPECTED, "expected {expected}", {"expected": expected})
        first, second = (float(_number(item, expected, valid)) for item in value)
        return first, second

    return BeforeValidator(validate)


Count = Annotated[int, _whole(1)]
CountOrZero = Annotated[int, _whole(0)]
CountOrAuto = Annotated[int | Literal["auto"], _whole(1, auto=True)]
# null in the YAML, always a number once the section is built: plain, because int would refuse the
# null
Derived = Annotated[int, PlainValidator(_whole(1, null=True).func)]
Positive = Annotated[float, _real("above 0", lambda x: x > 0)]
NonNegative = Annotated[float, _real("of at least 0", lambda x: x >= 0)]
Share = Annotated[float, _real("in [0, 1]", lambda x: 0 <= x <= 1)]
PositiveShare = Annotated[float, _real("in (0, 1]", lambda x: 0 < x <= 1)]
BelowOne = Annotated[float, _real("in [0, 1)", lambda x: 0 <= x < 1)]
BelowOnePair = Annotated[tuple[float, float], _pair("in [0, 1)", lambda x: 0 <= x < 1)]
Bounds = Annotated[tuple[float, float], _pair("of at least 0", lambda x: x >= 0)]


def _printable(value: str) -> str:
    if (
        not value.isprintable()
    ):  # YAML does not carry every control character through a dump and a load
        raise PydanticCustomError(EXPECTED, "", {"expected": "text without control characters"})
    return value


Text = Annotated[str, Field(min_length=1), AfterValidator(_printable)]


# --- errors


def explain(error: ValidationError, root: type[BaseModel], layers: Sequence[Layer]) -> ConfigError:
    """A validation error as one line: the first problem, and how many more there are.

    Unknown keys come first: a misspelt key is often the reason why another one is missing.
    """
    found = [item for detail in error.errors(include_url=False) for item in _problems(detail, root)]
    found.sort(key=lambda item: not item.what.startswith("unknown key"))
    if layers:
        found = [
            ConfigError(item.what, f"{item.where} in {_origin(item.where, layers)}", item.remedy)
            for item in found
        ]
    return ConfigError.several(
        [
            ConfigError(*(_one_line(part) for part in (item.what, item.where, item.remedy)))
            for item in found
        ]
    )


def show(value: Any) -> str:
    """A value as it could stand in the YAML, at most 60 characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def nearest(word: Any, choices: Sequence[str]) -> str | None:
    matches = difflib.get_close_matches(str(word), choices, n=1)
    return matches[0] if matches else None


def _one_line(text: str) -> str:
    return " ".join(text.split())


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
    return next((found for part in typing.get_args(annotation) if (found := _model_in(part))), None)


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
