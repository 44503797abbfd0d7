"""How all YAML is read and written here: by the core schema of YAML 1.2, on top of PyYAML.

PyYAML follows YAML 1.1, which reads `off` as false, `0256` as 174, `256:00` as 15,360, 2024-02-29
as a date, and 1e-3 as text. Here the first is text, the second 256, the third and fourth are text,
and the last is a number. Underscores between digits, as in 2_000_000, count for nothing, though the
core schema has none. Refused by line: a key twice, a key that is not text, the merge key `<<` of
YAML 1.1, tags of other types, and a structure that contains itself.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from typing import Any, NoReturn

import yaml

from archscale.errors import ArchscaleError, ConfigError, one_line, show

# (tag, plain scalars of it, their first characters): YAML 1.2.2, section 10.3.2.
_CORE = [
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+(?:_[0-9]+)*|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
]
_PREFIX = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict = {}  # noqa: RUF012  instead of PyYAML's, which are YAML 1.1's
    yaml_constructors: dict = {}  # noqa: RUF012  no dates, sets, binary data

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        mapping: dict[Hashable, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                self._refuse(f"the key {show(key)} is not a string, put it in quotes", key_node)
            if key in mapping:
                self._refuse(f"the key {show(key)} is there twice", key_node)
            if key == "<<":
                self._refuse("merge keys (<<) are not read, write the keys out", key_node)
            mapping[key] = self.construct_object(value_node, deep=True)
        return mapping

    def construct_int(self, node: yaml.ScalarNode) -> int:
        """Decimal, 0o… or 0x…; without bases 8 and 60 of YAML 1.1."""
        text = self.construct_scalar(node)
        try:
            return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
        except ValueError:
            self._refuse(f"{show(text)} is not a whole number", node)

    def construct_float(self, node: yaml.ScalarNode) -> float:
        text = self.construct_scalar(node).lower()
        try:
            return float(text.replace(".inf", "inf").replace(".nan", "nan"))
        except ValueError:
            self._refuse(f"{show(text)} is not a number", node)

    def refuse_tag(self, node: yaml.Node) -> NoReturn:
        self._refuse(f"the tag {node.tag.replace(_PREFIX, '!!')} is not read here", node)

    def _refuse(self, problem: str, node: yaml.Node) -> NoReturn:
        raise yaml.constructor.ConstructorError(problem=problem, problem_mark=node.start_mark)


# Depth first, not in PyYAML's two passes: an alias within itself is an error then, not a structure
# without an end.
_Loader.add_constructor(_PREFIX + "map", _Loader.construct_mapping)
_Loader.add_constructor(
    _PREFIX + "seq", lambda loader, node: loader.construct_sequence(node, deep=True)
)
_Loader.add_constructor(_PREFIX + "str", _Loader.construct_scalar)
_Loader.add_constructor(_PREFIX + "null", lambda loader, node: None)
_Loader.add_constructor(
    _PREFIX + "bool", lambda loader, node: loader.construct_scalar(node).lower() == "true"
)
_Loader.add_constructor(_PREFIX + "int", _Loader.construct_int)
_Loader.add_constructor(_PREFIX + "float", _Loader.construct_float)
_Loader.add_constructor(None, _Loader.refuse_tag)


class _Dumper(yaml.SafeDumper):
    """Quotes text that either version of YAML would read as something else."""


for _tag, _pattern, _first in _CORE:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(
            _PREFIX + _tag,
            re.compile(f"(?:{_pattern})\\Z"),
            ["" if character == "\0" else character for character in _first],
        )


def parse_yaml(text: str, where: str, error_class: type[ArchscaleError] = ConfigError) -> Any:
    """What a YAML text says: dicts with text for keys, lists, text, numbers, true, false, None.

    Args:
        where: name of the file or option, for errors.

    Raises:
        error_class: it is not YAML, or says something that is refused here.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f", line {mark.line + 1}" if mark and "\n" in text.strip() else ""
        problem = one_line(error.problem or error.context or "cannot be read")
        where += line
        cause: Exception = error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: thousands of digits
        problem, cause = one_line(str(error)), error
    except RecursionError as error:
        problem, cause = "nested too deeply", error
    raise error_class(f"not valid YAML: {problem}", where, "correct the YAML there") from cause


def yaml_text(data: Mapping[str, Any]) -> str:
    """YAML of a mapping in its own order, which `parse_yaml` and readers of YAML 1.1 read alike."""
    return yaml.dump(dict(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
