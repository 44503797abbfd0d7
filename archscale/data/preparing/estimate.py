"""What preparing a recipe will take, before it is done: text, tokens, disk, time.

A few small units of every source are read and encoded here, and the rest is in proportion to its
bytes on disk. A hub data set has no sizes: its tokens are those that the recipe says it has.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, TypeVar

import numpy as np

from archscale.data.preparing.destination import choose_destination
from archscale.data.preparing.recipe import Recipe
from archscale.data.preparing.sources import SourceBase
from archscale.data.preparing.sources.hub import HuggingFaceSource
from archscale.data.preparing.sources.units import Unit
from archscale.data.preparing.trouble import Trouble
from archscale.data.shards import DTYPES, token_dtype
from archscale.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from archscale.errors import DataError

_SAMPLED_UNITS = 5  # of each source, evenly spaced
_UNIT_BYTES = 500_000  # of a sampled unit, where its file can be cut
_TEXT_BYTES = 8_000_000  # read of a source at most: a compressed file cannot be cut
_TABLE_BYTES = 64  # kept for each document until the shards are written

Number = TypeVar("Number", int, float)


@dataclass
class Sample:
    """What was read of a source, and what it comes to as a whole.

    Attributes:
        disk: bytes on disk of all of it; None where unknown.
        text: UTF-8 bytes of `documents`.
        expected_text: UTF-8 bytes of all of it; None where unknown.
        seconds: reading took.
        published: tokens that the recipe says there are.
    """

    disk: int | None = None
    text: int = 0
    expected_text: float | None = None
    seconds: float = 0.0
    documents: list[str] = field(default_factory=list)
    published: float | None = None


def estimate(recipe: Recipe, workers: int | None = None) -> dict[str, Any]:
    """Estimates for `archscale data prepare --dry-run`.

    Args:
        workers: processes that will prepare; None: all cores.

    Returns:
        `sources`: for each, those of validation last, {source, disk (bytes), text (bytes),
            tokens}.
        In total `text`, `documents`, `tokens`, `shards` and `work` (bytes on disk, the latter
        while it is made), `free` (bytes), `seconds`, `workers`, `vocab_size`, None where unknown;
        `notes`, lines.

    Raises:
        DataError: a source or the tokenizer cannot be read here, and the recipe does not say how
            many tokens there are; or `output` holds something else.
    """
    destination = choose_destination(recipe.output)
    notes = [f"{recipe.output} is there already"] if destination.finished else []
    held_out = recipe.validation if isinstance(recipe.validation, list) else []
    sources = [*recipe.sources, *held_out]
    samples = [_sample(source, notes) for source in sources]
    tokenizer = _tokenizer(recipe, samples, notes)
    texts = [text for sample in samples for text in sample.documents]
    tokens_per_byte, encode_rate = _encode(tokenizer, texts) if tokenizer else (None, None)
    rows = [_row(source, sample, tokens_per_byte) for source, sample in zip(sources, samples)]
    for row in rows[len(recipe.sources) :]:
        row["source"] = f"validation: {row['source']}"
    text, tokens = _total(row["text"] for row in rows), _total(row["tokens"] for row in rows)
    if text is None and tokens is not None and tokens_per_byte:
        text = tokens / tokens_per_byte
    read, seconds = sum(s.text for s in samples), sum(s.seconds for s in samples)
    documents = text * len(texts) / read if text is not None and read else None
    total_seconds = None
    workers = workers or os.cpu_count() or 1
    if text is not None and encode_rate and read:
        passes = 2 if recipe.tokenizer.train else 1  # training a tokenizer reads the sources too
        total_seconds = text * (passes * seconds / read + 1 / encode_rate) / workers
    shards = None
    if tokens is not None and tokenizer is not None:
        shards = tokens * token_dtype(tokenizer.vocab_size).itemsize
    if tokens is not None and tokenizer is None:
        narrow, wide = (tokens * DTYPES[code].itemsize / 1e9 for code in (1, 2))
        notes.append(
            f"shards take {narrow:,.3g} GB, or {wide:,.3g} GB where the vocabulary is above 65,536"
        )
    work = None if shards is None else shards + _TABLE_BYTES * (documents or 0)
    free = _free(destination.directory)
    if shards is not None and work is not None and shards + work > free:
        notes.append(f"the disk of {recipe.output} has not enough room")
    return {
        "name": recipe.name,
        "sources": rows,
        "text": text,
        "documents": documents,
        "tokens": tokens,
        "shards": shards,
        "work": work,
        "free": free,
        "seconds": total_seconds,
        "workers": workers,
        "vocab_size": tokenizer.vocab_size if tokenizer else None,
        "notes": notes,
    }


def _sample(source: SourceBase, notes: list[str]) -> Sample:
    published = source.tokens if isinstance(source, HuggingFaceSource) else None
    sample = Sample(published=published)
    try:
        # Compressed files and others have different shares of text: by the ends of their names.
        alike: dict[str, list[Unit]] = defaultdict(list)
        for unit in source.units(_UNIT_BYTES):
            alike[PurePath(unit.parts[0].path).suffix].append(unit)
        disk, text = zip(*(_sample_units(source, units, sample) for units in alike.values()))
        sample.disk, sample.expected_text = _total(disk), _total(text)
    except DataError as error:
        if published is None:
            raise
        notes.append(f"not read here: {error.what} ({error.where})")
    return sample


def _sample_units(
    source: SourceBase, units: Sequence[Unit], sample: Sample
) -> tuple[int | None, float | None]:
    """Bytes on disk of units that are alike, and UTF-8 bytes of their text, from those evenly
    spaced among them; None where unknown."""
    chosen = np.linspace(0, len(units) - 1, min(len(units), _SAMPLED_UNITS)).round().astype(int)
    read = [(units[number].size, _read(source, units[number], sample)) for number in chosen]
    disk = _total(unit.size for unit in units)
    whole = [(size, text) for size, text in read if size and text is not None]
    if disk is None or not whole:
        return disk, None
    return disk, disk * sum(text for _, text in whole) / sum(size for size, _ in whole)


def _read(source: SourceBase, unit: Unit, sample: Sample) -> int | None:
    """UTF-8 bytes of the unit's text, its first documents kept; None if the end was not read."""
    began, unit_text = time.perf_counter(), 0
    for document in source.read(unit, Trouble("skip")):
        size = len(document.encode("utf-8", "replace"))
        if sample.text < _TEXT_BYTES:
            sample.documents.append(document)
            sample.text += size
        elif unit.size is None:
            # Where the size of a data set is unknown, the rest of the unit says nothing.
            return None
        unit_text += size
    sample.seconds += time.perf_counter() - began
    return unit_text


def _tokenizer(recipe: Recipe, samples: Sequence[Sample], notes: list[str]) -> Tokenizer | None:
    """The recipe's; None where it is out of reach. `samples`: of its sources, then of those of
    validation."""
    spec = recipe.tokenizer
    try:
        if spec.train is None:
            return load_tokenizer(str(spec.path), spec.kind, spec.eos)
        training = samples[: len(recipe.sources)]
        texts = [text for sample in training for text in sample.documents]
        with tempfile.TemporaryDirectory() as folder:
            return train_sentencepiece(texts, spec.train.vocab_size, folder)
    except DataError as error:
        published = all(sample.published is not None for sample in samples)
        if spec.train is None and not published:
            raise
        notes.append(f"tokens are not counted here: {error.what} ({error.where})")
        return None


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[float, float] | tuple[None, None]:
    """Tokens for each UTF-8 byte, and bytes/s on one thread."""
    size = sum(len(text.encode("utf-8", "replace")) for text in texts)
    if not size:
        return None, None
    began = time.perf_counter()
    tokens = sum(len(tokenizer.encode_document(text)) + 1 for text in texts)
    return tokens / size, size / (time.perf_counter() - began)


def _row(source: SourceBase, sample: Sample, tokens_per_byte: float | None) -> dict[str, Any]:
    text = sample.expected_text
    tokens = text * tokens_per_byte if text is not None and tokens_per_byte else sample.published
    return {
        "source": _label(source),
        "disk": sample.disk,
        "text": None if text is None else text * source.weight,
        "tokens": None if tokens is None else tokens * source.weight,
    }


def _label(source: SourceBase) -> str:
    """Its path or name as the recipe has it, else its kind."""
    values = source.model_dump()
    return next(str(values[key]) for key in ("path", "name", "kind") if values.get(key))


def _total(values: Iterable[Number | None]) -> Number | None:
    """The sum; None where a part of it is unknown."""
    listed = list(values)
    known = [value for value in listed if value is not None]
    return sum(known) if len(known) == len(listed) else None


def _free(folder: Path) -> int:
    """Bytes free on the disk of a directory, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
