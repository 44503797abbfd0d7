"""Reading and writing config files as layers of YAML. Nothing here knows which keys exist.

A config is a stack of layers, oldest ancestor first: the `base:` chain, the file itself, then each
override. The layers are kept beside their merged result, so that an error can name the file that a
key came from.
"""

import os
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from archscale.errors import ConfigError, explain_os_error, one_line, show
from archscale.files import write_atomically


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


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys and values; lists and empty mappings are values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def write_yaml(data: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Atomically, with the folders that lead to it."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True, width=110)
    write_atomically(target, text)


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
        problem = one_line(error.problem or error.context or "cannot be read")
        raise ConfigError(
            f"not valid YAML: {problem}", f"{where}{line}", "correct the YAML there"
        ) from error
    except (
        yaml.YAMLError,
        ValueError,
        RecursionError,
    ) as error:  # ValueError: an impossible date or number
        problem = one_line(str(error))
        raise ConfigError(f"not valid YAML: {problem}", where, "correct the YAML there") from error


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
        problem = f"cannot read {path}: {one_line(str(error))}"
        raise ConfigError(
            problem, included_from or str(path), "name a YAML file in UTF-8"
        ) from error
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
