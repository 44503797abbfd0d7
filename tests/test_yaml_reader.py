"""YAML is read as YAML 1.2's core schema has it, and written so that either version reads it."""

from __future__ import annotations

import ast
import math
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from archscale.errors import ConfigError, DataError
from archscale.yaml_reader import parse_yaml, yaml_text

PACKAGE = Path(__file__).resolve().parent.parent / "archscale"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        # where YAML 1.1 reads something else
        ("1e-3", 1e-3),
        ("4e2", 400.0),
        ("+1E-2", 0.01),
        ("0256", 256),
        ("007", 7),
        ("08", 8),
        ("0o17", 15),
        ("256:00", "256:00"),
        ("0b11", "0b11"),
        ("off", "off"),
        ("Yes", "Yes"),
        ("2024-02-29", "2024-02-29"),
        ("2024-02-30", "2024-02-30"),
        ("=", "="),
        # where both agree
        ("2_000_000", 2_000_000),
        ("0x1F", 31),
        ("-1.5", -1.5),
        ("1.", 1.0),
        (".5", 0.5),
        ("-.inf", -math.inf),
        ("True", True),
        ("false", False),
        ("~", None),
        ("Null", None),
        ("", None),
        ("'1e3'", "1e3"),
        ("{a: [1, {b: x}], c: &d [2], e: *d}", {"a": [1, {"b": "x"}], "c": [2], "e": [2]}),
        ("!!str 12", "12"),
    ],
)
def test_readings(text: str, value: object) -> None:
    read = parse_yaml(text, "a file")
    assert (type(read), read) == (type(value), value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: {b: 1, b: 2}", 'the key "b" is there twice'),
        ("1: 2", "the key 1 is not a string"),
        ("a: &a {b: 1}\n<<: *a", "merge keys (<<) are not read"),
        ("a: !!set {b}", "the tag !!set is not read here"),
        ("a: !!timestamp 2024-02-30", "the tag !!timestamp is not read here"),
        ("!!int many", '"many" is not a whole number'),
        ("&a [*a]", "recursive"),
        ("[" * 5_000, "nested too deeply"),
        ("9" * 5_000, "is not a whole number"),
        ("a: [1", "expected"),
        ("a\x00", "not allowed"),
    ],
)
def test_refused_in_one_line(text: str, problem: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_yaml(text, "recipe.yaml", DataError)
    assert problem in caught.value.what
    assert "\n" not in str(caught.value)


def test_the_line_is_named() -> None:
    with pytest.raises(ConfigError, match=r"\(run.yaml, line 3\)"):
        parse_yaml("a: 1\nb: 2\na: 3\n", "run.yaml")


LOOKS_LIKE_SOMETHING = st.from_regex(
    r"\A[-+]?[0-9._eE:xob]{1,6}\Z|\A(yes|No|on|OFF|y|null|~|true|=|<<|2024-0[1-3]-[0-3][0-9])\Z"
)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False),
    st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs"))),
    LOOKS_LIKE_SOMETHING,
)


@given(st.dictionaries(LOOKS_LIKE_SOMETHING.filter(lambda key: key != "<<"), LEAVES))
@settings(max_examples=200, deadline=None)
def test_what_is_written_reads_the_same_in_either_version(data: dict) -> None:
    text = yaml_text(data)
    assert parse_yaml(text, "written") == data
    assert yaml.safe_load(text) == data


def test_yaml_is_read_here_alone() -> None:
    reads = {"load", "safe_load", "load_all", "safe_load_all", "full_load"}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Attribute(value=ast.Name(id="yaml"), attr=name) if name in reads:
                    assert path.name == "yaml_reader.py", f"{path}:{node.lineno}"
