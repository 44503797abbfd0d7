"""What to do about a data set that is not there."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from archscale.errors import ConfigError
from archscale.yaml_reader import parse_yaml

CHECKOUT = Path(__file__).resolve().parents[2]
RECIPES = "data_prep"


def how_to_make(directory: Path) -> str:
    """The command that prepares this directory, where a recipe in the current directory's data_prep
    or the checkout's has it as its output; else how to write such a recipe."""
    folders = [Path(RECIPES)]
    if Path.cwd() != CHECKOUT:
        folders.append(CHECKOUT / RECIPES)
    for folder in folders:
        for recipe in sorted(folder.glob("*.yaml")):
            output = _output(recipe)
            if output and os.path.abspath(output) == os.path.abspath(directory):
                return f"make it with `archscale data prepare {shlex.quote(str(recipe))}`"
    manual = next((path for folder in folders if (path := folder / "README.md").is_file()), None)
    where = (
        f"{manual} shows how"
        if manual
        else "data_prep/README.md of archscale's source, which is not installed here, shows how"
    )
    return (
        f"write a recipe with `output: {directory}` ({where}) and give it to `archscale data"
        " prepare`"
    )


def _output(recipe: Path) -> str | None:
    """`output` of a recipe; None for a file that is not one, which is not this error's matter."""
    try:
        content = parse_yaml(recipe.read_text(encoding="utf-8"), str(recipe))
    except (OSError, UnicodeDecodeError, ConfigError):
        return None
    output = content.get("output") if isinstance(content, dict) else None
    return output if isinstance(output, str) else None
