"""Encoded units → a whole dataset directory, ready to be moved to its place."""

import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from archscale.data.preparing.assemble import Choice, split_entries, write_shards
from archscale.data.preparing.division import Spread, empty_split, validation_share
from archscale.data.preparing.duplicates import mark_kept
from archscale.data.preparing.encode import EncodedUnit
from archscale.data.preparing.fidelity import Fidelity
from archscale.data.preparing.preparation import Preparation
from archscale.data.preparing.recipe import Recipe
from archscale.data.preparing.source_files import HashFiles, write_records
from archscale.data.preparing.trouble import Trouble
from archscale.data.preparing.work import key
from archscale.data.shards import (
    DATASET_VERSION,
    MANIFEST,
    SOURCE_FILES,
    TOKEN_BYTES,
    Manifest,
    SkippedEntry,
    TokenizerEntry,
)
from archscale.data.tokenizer import Tokenizer
from archscale.files import write_atomically


def write_directory(
    preparation: Preparation,
    units: Sequence[EncodedUnit],
    tokenizer: Tokenizer,
    entry: TokenizerEntry,
    hashing: Sequence[HashFiles],
) -> tuple[Manifest, Path]:
    """Writes the whole dataset into a directory, the manifest last."""
    recipe, work, say = preparation.recipe, preparation.work, preparation.say
    fidelity, trouble, dropped = _totals(recipe, units)
    fidelity.refuse(recipe.lossy)
    choice = Choice(
        kept=mark_kept(units, recipe.deduplicate, work.folder("duplicates")),
        validation=_validation_share(recipe, units),
    )
    stems = [unit.stem.name for unit in units]
    decides = [stems, recipe.deduplicate, choice.validation, preparation.shard_tokens]
    directory = work.folder(f"whole-{key(*decides)}")
    splits, stretches = split_entries(units, choice)
    for split, split_entry in splits.items():
        if split_entry.documents == 0:
            raise empty_split(split, "its documents are in validation too", recipe.name)
    documents = sum(split_entry.documents for split_entry in splits.values())
    dropped["duplicate"] = sum(unit.documents for unit in units) - documents
    write_shards(preparation, splits, stretches, choice, entry, directory)
    (directory / "tokenizer").mkdir(exist_ok=True)
    file = f"tokenizer/{tokenizer.file}"
    write_atomically(directory / file, tokenizer.content)
    table = io.BytesIO()
    np.save(table, tokenizer.lengths)
    write_atomically(directory / TOKEN_BYTES, table.getvalue())
    sources = write_records(hashing, preparation.units, directory / SOURCE_FILES)
    manifest = Manifest(
        format_version=DATASET_VERSION,
        name=recipe.name,
        tokenizer=entry.model_copy(update={"file": file}),
        splits=splits,
        recipe=recipe.model_dump(mode="json"),
        origin=key(recipe.decides(), sources, tokenizer.fingerprint),
        dropped=dict(dropped),
        skipped=SkippedEntry(counts=dict(trouble.counts), examples=trouble.examples),
        fidelity=fidelity.to_json(),
    )
    write_atomically(directory / MANIFEST, manifest.model_dump_json(indent=2))
    for line in trouble.examples:
        say(f"skipped: {line}")
    for left in directory.rglob(".*"):  # what a killed process was writing
        left.unlink()
    return manifest, directory


def _totals(recipe: Recipe, units: Sequence[EncodedUnit]) -> tuple[Fidelity, Trouble, Counter[str]]:
    fidelity, trouble = Fidelity(), Trouble(recipe.on_error)
    dropped = Counter(empty=0, duplicate=0, unweighted=0, repaired=0)
    for unit in units:
        fidelity.merge(unit.fidelity)
        trouble.merge(unit.trouble)
        dropped.update(unit.dropped)
    return fidelity, trouble, dropped


def _validation_share(recipe: Recipe, units: Sequence[EncodedUnit]) -> float:
    spreads = {True: Spread(), False: Spread()}
    for unit in units:
        spreads[unit.unit.held_out].merge(unit.spread)
    return validation_share(recipe, spreads[False], spreads[True])
