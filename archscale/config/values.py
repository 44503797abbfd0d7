"""Kinds of values that a config holds: numbers with their interval, text, and what is expected of
them in words."""

import contextlib
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator
from pydantic_core import PydanticCustomError

# pydantic error type; its context says what was expected: key "expected"
EXPECTED = "archscale_expected"


def _number(value: Any, expected: str, valid: Callable[[float], bool]) -> int | float:
    """Quoted text that is a number counts as one. A bool does not, nor does what is not finite or
    absurdly large."""
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
    # YAML does not carry every control character through a dump and a load.
    if not value.isprintable():
        raise PydanticCustomError(EXPECTED, "", {"expected": "text without control characters"})
    return value


Text = Annotated[str, Field(min_length=1), AfterValidator(_printable)]


def _source_name(value: Any) -> str:
    # It ends the key of a metric, and stands in tables and on command lines.
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9_.-]+", value):
        expected = "a name of letters, digits, underscores, dots and dashes"
        raise PydanticCustomError(EXPECTED, "", {"expected": expected})
    return value


SourceName = Annotated[str, BeforeValidator(_source_name)]
