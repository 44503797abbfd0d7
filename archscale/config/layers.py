"""Reading and writing config files as layers of YAML. Nothing here knows which keys exist.

A config is a stack of layers, oldest ancestor first: the `base:` chain, the file itself, then each
override. The layers are kept beside their merged result, so that an error can name the file that a
key came from.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from archscale.errors import ConfigError, explain_os_error, one_line, show
from archscale.files import write_atomically
from archscale.yaml_reader import parse_yaml, yaml_text


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
    write_atomically(target, yaml_text(data))


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
    data = parse_yaml(text, str(path))
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
    data = parse_yaml(value, origin)
    for part in reversed(parts):
        data = {part: data}
    return Layer(origin, data)
