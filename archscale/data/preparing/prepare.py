"""A recipe → a dataset directory.

The work is cut into jobs that leave their results in a work directory; whenever the process ends,
the same command goes on with what is missing. The data set appears when all of it is on disk.
"""

import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from archscale.data.preparing.already import already_there
from archscale.data.preparing.beginnings import first_texts, refuse_lossy
from archscale.data.preparing.destination import ELSEWHERE, Destination, choose_destination
from archscale.data.preparing.directory import write_directory
from archscale.data.preparing.documents import RecipeUnit, list_units
from archscale.data.preparing.encode import EncodeUnit, encode_jobs
from archscale.data.preparing.examine import inspect, summarize, verify
from archscale.data.preparing.make_tokenizer import make_tokenizer
from archscale.data.preparing.preparation import Preparation
from archscale.data.preparing.progress import Say
from archscale.data.preparing.recipe import Recipe, load_recipe
from archscale.data.preparing.source_files import hash_jobs
from archscale.data.preparing.sources.units import shown
from archscale.data.preparing.work import PartNumber, WorkDirectory, open_work
from archscale.errors import DataError, explain_os_error

__all__ = ["inspect", "prepare", "verify"]

SHARD_TOKENS = 100_000_000  # per file: 200 MB of uint16
_ALONE_BYTES = 8_000_000  # of sources: so little is done before worker processes have started


def prepare(
    recipe_path: str | Path,
    overrides: Sequence[str] = (),
    shard_tokens: int = SHARD_TOKENS,
    say: Say = lambda _: None,
    *,
    workers: int | None = None,
    part: str | None = None,
    finish: bool = False,
) -> dict[str, Any]:
    """Makes the dataset of a recipe, goes on making it, or finds it made.

    Args:
        recipe_path: YAML; relative paths in it start at the current directory.
        overrides: "dotted.key=value".
        shard_tokens: tokens per shard file.
        say: receives lines of progress.
        workers: processes; by default one for each core, or this one alone for a small corpus.
        part: "2/5" encodes the second of five shares of the units and no more, so that machines
            that see the same files can share the work.
        finish: makes the data set of units that are all encoded.

    Returns:
        A summary: name, output, already_there, vocab_size, fingerprint, dropped, skipped where
        documents were, and per split tokens, documents, bytes, bytes_per_token, shards. Of a part:
        name, output, part, units.

    Raises:
        DataError: a bad recipe or source; a split that stays empty; a tokenizer that loses text;
            `output` holds something else; or not all units are encoded.
    """
    recipe = load_recipe(recipe_path, overrides)
    number = PartNumber.parse(part) if part else None
    destination = choose_destination(recipe.output)
    if destination.finished:
        return already_there(recipe, destination, say)
    units = list_units(recipe)
    for note in (note for source in recipe.all_sources() for note in source.notes()):
        say(note)
    with _work(destination, number, not finish, say) as work:
        preparation = Preparation(
            recipe=recipe,
            units=units,
            work=work,
            workers=workers or _default_workers(units),
            part=number,
            shard_tokens=shard_tokens,
            say=say,
        )
        beginnings = first_texts(recipe, units)
        tokenizer, entry = make_tokenizer(preparation, may_train=not finish)
        refuse_lossy(beginnings, tokenizer, recipe.lossy, say)
        encoding, hashing = encode_jobs(preparation, entry), hash_jobs(preparation)
        if finish:
            _refuse_unfinished(encoding, work, _command(recipe_path, overrides))
        preparation.run("encoded", encoding)
        preparation.run_light("fingerprinted", hashing)
        if number:
            return _part_summary(recipe, number, encoding, say)
        encoded = [job.read() for job in encoding]
        manifest, directory = write_directory(preparation, encoded, tokenizer, entry, hashing)
        destination.publish(directory)
        work.remove()
    return summarize(destination.output, manifest, already_there=False)


def _command(recipe_path: str | Path, overrides: Sequence[str]) -> str:
    settings = [word for override in overrides for word in ("--set", override)]
    return shlex.join(["archscale", "data", "prepare", str(recipe_path), *settings])


def _default_workers(units: list[RecipeUnit]) -> int:
    sizes = [unit.size for unit in units]
    if None not in sizes and sum(size or 0 for size in sizes) < _ALONE_BYTES:
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _errors_explained(destination: Destination, opened: bool) -> Iterator[None]:
    """What the file system refuses, as a DataError. What is missing in a work directory that was
    opened was deleted."""
    try:
        yield
    except OSError as error:
        where = Path(error.filename or destination.output)
        ours = destination.work.parent
        if where.is_relative_to(ours) or ours.is_relative_to(where):
            cause, remedy = explain_os_error(error, ELSEWHERE, vanished=opened)
        else:  # a file that a source reads
            cause, remedy = explain_os_error(error, "check the path")
        raise DataError(f"cannot prepare: {cause}", str(where), remedy) from error


@contextmanager
def _work(
    destination: Destination, part: PartNumber | None, may_remove: bool, say: Say
) -> Iterator[WorkDirectory]:
    """The work directory. If the block fails, it is kept where there is something to go on with,
    or other machines may work there."""
    with (
        _errors_explained(destination, opened=False),
        open_work(destination.work, part, say) as work,
    ):
        try:
            with _errors_explained(destination, opened=True):
                yield work
        except BaseException as error:
            if not work.has_results():
                # Another machine may have begun a part where the file system has no locks.
                if may_remove and not work.parts():
                    work.remove()
                raise
            place = shown(str(work.path))
            kept = f"what is done is kept in {place}, and the same command goes on from there"
            if isinstance(error, DataError):
                raise DataError(error.what, error.where, f"{error.remedy}; {kept}") from error
            if isinstance(error, KeyboardInterrupt):
                say(kept)
            raise


def _refuse_unfinished(jobs: Sequence[EncodeUnit], work: WorkDirectory, command: str) -> None:
    """Names what has to be done before the data set can be finished.

    Args:
        jobs: one for each unit.
        command: that prepares this recipe.

    Raises:
        DataError: a unit is not encoded.
    """
    missing = [number for number, job in enumerate(jobs) if not job.result.exists()]
    if not missing:
        return
    problem = f"{len(missing)} of {len(jobs)} units are not encoded: first {jobs[missing[0]].name}"
    remedy = f"`{command}` encodes them here"
    counts = {part.count for part in work.parts()}
    if len(counts) == 1:
        count = counts.pop()
        parts = sorted({number % count + 1 for number in missing})
        commands = [f"`{command} --part {number}/{count}`" for number in parts]
        remedy = f"give {' and '.join(commands)}, or {remedy}"
    raise DataError(problem, str(work.path), remedy)


def _part_summary(
    recipe: Recipe, part: PartNumber, jobs: Sequence[EncodeUnit], say: Say
) -> dict[str, Any]:
    units = len(jobs[part.number - 1 :: part.count])
    say(f"part {part} is encoded; when all parts are, give the command with --finish")
    return {"name": recipe.name, "output": recipe.output, "part": str(part), "units": units}
