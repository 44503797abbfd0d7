"""What both pages are made with: templates, tiles, and the file that is written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from archscale import __version__
from archscale.errors import ArchscaleError, explain_os_error


@dataclass(frozen=True)
class Tile:
    """A figure of the head. `kind` colors it: "", good, bad."""

    name: str
    value: str
    note: str = ""
    kind: str = ""


@dataclass(frozen=True)
class State:
    """How far it is: in a word, the word's color, the share that is done if that is known."""

    word: str
    kind: str
    share: float | None


@cache
def _environment() -> Environment:
    """Everything that a template shows is escaped."""
    environment = Environment(
        loader=PackageLoader("archscale.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "ensure_ascii": False}
    environment.globals["version"] = __version__
    here = files("archscale.report")
    environment.globals["source"] = lambda name: here.joinpath(name).read_text(encoding="utf-8")
    return environment


def render(template: str, **context: Any) -> str:
    """A page as HTML."""
    return _environment().get_template(template).render(context)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Names the file that could not be written.

    Raises:
        ArchscaleError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        cause, remedy = explain_os_error(error, "give another with --out")
        where = str(error.filename or path)
        raise ArchscaleError(f"cannot write the report: {cause}", where, remedy) from error
