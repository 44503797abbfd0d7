"""The tables of keys in the READMEs say what the schema says, and what the schema does."""

from typing import Literal, get_args, get_origin, get_type_hints

import pytest
from pydantic import TypeAdapter, ValidationError

from archscale.config import Config
from archscale.config.explain import all_keys
from archscale.config.schema import NOT_YET
from tests.config.key_table import COMMAND, LIST_ITEM, SCHEMAS, Key, keys, render, written

PAGES = pytest.mark.parametrize("page", SCHEMAS)


@PAGES
def test_the_table_is_that_of_the_schema(page):
    assert written(page) == render(SCHEMAS[page]), (
        f"{page} is out of date: rewrite it by `{COMMAND}`"
    )


@PAGES
def test_every_key_is_in_the_table_and_no_other(page):
    rows = [line.split("`")[1] for line in written(page).splitlines() if line.startswith("| `")]
    assert len(rows) == len(set(rows))
    headings = {line[4:] for line in written(page).splitlines() if line.startswith("### ")}
    listed = {row.replace(LIST_ITEM, "") for row in rows} | headings
    assert listed == set(all_keys(SCHEMAS[page]))


def test_the_defaults_are_those_of_a_config_that_gives_nothing():
    config = Config.from_dict({"name": "x", "data": {"train": "d"}, "model": {"moe": {}}})
    told = {row.dotted: row for row in keys(Config)}
    checked = 0
    for dotted, row in told.items():
        if LIST_ITEM in dotted or row.default in ("", "required") or row.default == "`null`":
            continue
        value = config.resolved()
        for part in dotted.split("."):
            value = value[part]
        if row.default.strip("`[]")[:1].isdigit():
            numbers = [float(number) for number in row.default.strip("`[]").split(",")]
            assert numbers == pytest.approx(value if isinstance(value, list) else [value], rel=1e-5)
        else:
            assert row.default == f"`{str(value).lower() if isinstance(value, bool) else value}`"
        checked += 1
    assert checked > 60


def choices(section, prefix=""):
    """(type, dotted key) of every field that is one of a list of values."""
    for name, field in section.model_fields.items():
        hint = get_type_hints(section)[name]
        if get_origin(hint) is Literal:
            yield hint, f"{prefix}{field.alias or name}"
        for part in (hint, *get_args(hint)):
            if hasattr(part, "model_fields"):
                yield from choices(part, f"{prefix}{name}.")


def test_the_allowed_values_are_accepted_and_no_other():
    told = {row.dotted: row.value for row in keys(Config)}
    fields = list(choices(Config))
    assert len(fields) >= 15
    for hint, dotted in fields:
        listed = [value.strip("`") for value in told[dotted].split(", ")]
        assert len(listed) == len(get_args(hint))
        for value in listed:
            TypeAdapter(hint).validate_python(int(value) if value.isdigit() else value)
        with pytest.raises(ValidationError):
            TypeAdapter(hint).validate_python("something else")


def test_values_that_training_refuses_are_marked():
    marked = {row.dotted for row in keys(Config) if "**Not available yet**" in row.meaning}
    assert marked == {row.key for row in NOT_YET}


def test_a_row_is_one_line_of_four_cells():
    assert str(Key("a.b", "x | y", "`1`", "Meaning.")) == "| `a.b` | x &#124; y | `1` | Meaning. |"
    for schema in SCHEMAS.values():
        for row in keys(schema):
            assert "\n" not in str(row)
            assert str(row).count("|") == 5
            assert row.meaning.endswith(".")
            assert row.value
