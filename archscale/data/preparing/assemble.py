"""Encoded units → the shards of both splits.

Where each document's tokens go is known from the tables alone, so that shards are written side by
side, each by itself.
"""

import itertools
import os
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from archscale.data.preparing.encode import EncodedUnit, read_table, tokens_file
from archscale.data.preparing.jobs import Report
from archscale.data.preparing.preparation import Preparation
from archscale.data.shards import (
    SPLITS,
    ShardEntry,
    ShardWriter,
    SplitEntry,
    TokenizerEntry,
    read_header,
    token_dtype,
)

_CHUNK_TOKENS = 1 << 21  # copied at a time


@dataclass(frozen=True)
class Choice:
    """Which documents belong to a split.

    Attributes:
        kept: a .npy file, bool [documents of all units].
        validation: training documents with a share below this go to validation.
    """

    kept: Path
    validation: float

    def of_unit(self, table: np.ndarray, first: int, held_out: bool, split: str) -> np.ndarray:
        """bool [rows of the table]: the documents of a unit in a split.

        Args:
            table: of the unit.
            first: number of its first document among those of all units.
            held_out: whether it belongs to a validation source.
        """
        kept = np.load(self.kept, mmap_mode="r")[first : first + len(table)]
        is_validation = table["share"] < self.validation if not held_out else True
        return kept & (np.equal(is_validation, split == SPLITS[1]))


@dataclass(frozen=True)
class Stretch:
    """The documents of one unit in one split.

    Attributes:
        stem: of the encoded unit.
        first: number of its first document among those of all units.
        held_out: whether it belongs to a validation source.
        start, stop: tokens of the split.
    """

    stem: Path
    first: int
    held_out: bool
    start: int
    stop: int


@dataclass(frozen=True)
class WriteShard:
    """A job: one shard of a split, of tokens `start` to `stop`, from the stretches that reach into
    it."""

    result: Path
    split: str
    start: int
    stop: int
    stretches: tuple[Stretch, ...]
    choice: Choice
    vocab_size: int
    fingerprint: str

    @property
    def name(self) -> str:
        return self.result.name

    @property
    def size(self) -> int:
        return (self.stop - self.start) * token_dtype(self.vocab_size).itemsize

    def run(self, report: Report) -> None:
        # A name of its own: a killed process may not have ended yet.
        temporary = self.result.with_name(f".{uuid.uuid4().hex}")
        with ShardWriter(temporary, self.vocab_size, self.fingerprint) as writer:
            for stretch in self.stretches:
                for tokens in self._tokens(stretch):
                    writer.write(tokens)
                    report(tokens.nbytes)
        os.replace(temporary, self.result)

    def _tokens(self, stretch: Stretch) -> Iterator[np.ndarray]:
        """The tokens of a stretch that belong to the shard, in pieces."""
        table = read_table(stretch.stem)
        chosen = self.choice.of_unit(table, stretch.first, stretch.held_out, self.split)
        lengths = table["tokens"].astype(np.int64)
        stops = np.cumsum(lengths)[chosen]
        starts = stops - lengths[chosen]
        # Where each document goes in the split, and how much of it the shard's borders leave.
        goes_to = stretch.start + np.cumsum(stops - starts) - (stops - starts)
        starts, stops = (
            np.maximum(starts, starts + self.start - goes_to),
            np.minimum(stops, starts + self.stop - goes_to),
        )
        inside = starts < stops
        dtype = token_dtype(self.vocab_size)
        with open(tokens_file(stretch.stem), "rb") as file:
            for start, stop in _joined(starts[inside], stops[inside]):
                file.seek(start * dtype.itemsize)
                for at in range(start, stop, _CHUNK_TOKENS):
                    yield np.fromfile(file, dtype, min(_CHUNK_TOKENS, stop - at))


def _joined(starts: np.ndarray, stops: np.ndarray) -> Iterator[tuple[int, int]]:
    """Neighbouring ranges as one."""
    if len(starts):
        gaps = starts[1:] != stops[:-1]
        yield from zip(
            starts[np.r_[True, gaps]].tolist(), stops[np.r_[gaps, True]].tolist(), strict=True
        )


def split_entries(
    units: Sequence[EncodedUnit], choice: Choice
) -> tuple[dict[str, SplitEntry], dict[str, list[Stretch]]]:
    """The size of each split, with no shards yet, and what it is made of."""
    entries = {split: SplitEntry(shards=[], tokens=0, documents=0, bytes=0) for split in SPLITS}
    stretches: dict[str, list[Stretch]] = {split: [] for split in SPLITS}
    first = 0
    for unit in units:
        table, held_out = unit.table(), unit.unit.held_out
        for split, entry in entries.items():
            rows = table[choice.of_unit(table, first, held_out, split)]
            start = entry.tokens
            entry.documents += len(rows)
            entry.tokens += int(rows["tokens"].sum())
            entry.bytes += int(rows["bytes"].sum())
            if len(rows):
                stretch = Stretch(unit.stem, first, held_out, start, entry.tokens)
                stretches[split].append(stretch)
        first += unit.documents
    return entries, stretches


def write_shards(
    preparation: Preparation,
    entries: dict[str, SplitEntry],
    stretches: dict[str, list[Stretch]],
    choice: Choice,
    tokenizer: TokenizerEntry,
    directory: Path,
) -> None:
    """Writes all shards into `directory`, and lists them in `entries`, with their checksums."""
    jobs = []
    for split, entry in entries.items():
        borders = [*range(0, entry.tokens, preparation.shard_tokens), entry.tokens]
        for number, (start, stop) in enumerate(itertools.pairwise(borders)):
            file = f"{split}_{number:05d}.bin"
            entry.shards.append(ShardEntry(file=file, tokens=stop - start))
            reach = tuple(s for s in stretches[split] if s.start < stop and s.stop > start)
            jobs.append(
                WriteShard(
                    result=directory / file,
                    split=split,
                    start=start,
                    stop=stop,
                    stretches=reach,
                    choice=choice,
                    vocab_size=tokenizer.vocab_size,
                    fingerprint=tokenizer.fingerprint,
                )
            )
    preparation.run_light("written to shards:", jobs)
    for entry in entries.values():
        for shard in entry.shards:
            shard.checksum = read_header(directory / shard.file).checksum
