"""A data set that stands in the output before anything is done: is it the recipe's?"""

import os
from typing import Any

from archscale.data.preparing.destination import ELSEWHERE, Destination
from archscale.data.preparing.examine import summarize
from archscale.data.preparing.progress import Say
from archscale.data.preparing.recipe import Recipe
from archscale.data.preparing.source_files import first_change
from archscale.data.preparing.work import WORK_MARK, open_work
from archscale.data.shards import SOURCE_FILES, read_manifest
from archscale.data.tokenizer import load_tokenizer
from archscale.errors import DataError


def already_there(recipe: Recipe, destination: Destination, say: Say) -> dict[str, Any]:
    """The summary of the data set in the output.

    Raises:
        DataError: it is another one.
    """
    manifest, output = read_manifest(destination.directory), str(destination.output)
    if not recipe.makes_the_same_as(manifest.recipe):
        raise DataError("output holds a dataset made from another recipe", output, ELSEWHERE)
    given = recipe.tokenizer.path
    if given and os.path.exists(given):
        tokenizer = load_tokenizer(given, recipe.tokenizer.kind, recipe.tokenizer.eos)
        if tokenizer.fingerprint != manifest.tokenizer.fingerprint:
            problem = f"output holds a dataset made with another tokenizer than {given} is now"
            raise DataError(problem, output, ELSEWHERE)
    records = destination.directory / SOURCE_FILES
    if records.exists():
        _refuse_missing_sources(recipe, output)
    if not records.exists():
        say(f"{output} has no {SOURCE_FILES}: whether its source files changed is not known")
    elif change := first_change(records, recipe, say):
        problem = f"output holds a dataset whose source files changed since: {change}"
        raise DataError(problem, output, ELSEWHERE)
    say(f"{output} is already there, made from this recipe and these sources")
    if (destination.work / WORK_MARK).is_file():  # of a process killed at the very end
        with open_work(destination.work, None, say) as work:
            work.remove()
    return summarize(destination.output, manifest, already_there=True)


def _refuse_missing_sources(recipe: Recipe, output: str) -> None:
    """DataError if the sources cannot be listed any more."""
    try:
        for source in recipe.all_sources():
            source.files()
    except DataError as error:
        problem = f"{output} is already there, but its sources cannot be found: {error.what}"
        remedy = "use the data set as it is, or bring them back"
        raise DataError(problem, error.where, remedy) from error
