"""A recipe → a dataset directory: read, drop duplicates, split by content, train or load a
tokenizer, encode.

The output directory appears in one rename when everything in it is on disk.
"""

import fcntl
import hashlib
import io
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from archscale.data.places import Place, locate
from archscale.data.preparing.recipe import Recipe, load_recipe
from archscale.data.preparing.sample import TrainingSample
from archscale.data.shards import (
    DATASET_VERSION,
    MANIFEST,
    SPLITS,
    TOKEN_BYTES,
    Manifest,
    ShardEntry,
    ShardWriter,
    SplitEntry,
    TokenizerEntry,
    open_shard,
    read_manifest,
    verify_shard,
)
from archscale.data.stored import inspect_stored, verify_stored
from archscale.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from archscale.errors import DataError, explain_os_error
from archscale.files import sync, write_atomically

SHARD_TOKENS = 100_000_000  # per file: 200 MB of uint16
_BATCH_CHARS = 4_000_000  # text encoded at a time
_EXCERPT_TOKENS = 100

Say = Callable[[str], None]


class Document(NamedTuple):
    """Text, its split, and its UTF-8 length in bytes."""

    text: str
    split: str
    bytes: int


def _share(digest: bytes, part: int) -> float:
    """A number in [0, 1) from 53 bits of a content hash: as many as a float holds, or the highest
    would round to 1."""
    return (int.from_bytes(digest[8 * part : 8 * part + 8]) >> 11) / 2**53


def documents(recipe: Recipe, dropped: Counter) -> Iterator[Document]:
    """The recipe's documents. Whether one is taken, and into which split, depends on its content
    alone.

    `dropped` counts: empty, duplicate (exact), unweighted (left out by a source's weight); and,
    though these are kept, repaired (half of a surrogate pair, which UTF-8 cannot hold, became
    U+FFFD).
    """
    seen: set[bytes] = set()
    for source in recipe.sources:
        for text in source.documents():
            try:
                encoded = text.encode()
            except UnicodeEncodeError:
                text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
                encoded = text.encode()
                dropped["repaired"] += 1
            digest = hashlib.sha256(encoded).digest()
            if not encoded:
                dropped["empty"] += 1
            elif _share(digest, 1) >= source.weight:
                dropped["unweighted"] += 1
            elif digest[16:] in seen:
                dropped["duplicate"] += 1
            else:
                if recipe.deduplicate:
                    seen.add(digest[16:])  # 128 bits: no accidental equality
                yield Document(text, SPLITS[_share(digest, 0) < recipe.validation], len(encoded))


class _SplitWriter:
    """The shards of one split, cut at `shard_tokens`."""

    def __init__(self, directory: Path, split: str, tokenizer: Tokenizer, shard_tokens: int):
        self.directory, self.split, self.tokenizer, self.shard_tokens = (
            directory,
            split,
            tokenizer,
            shard_tokens,
        )
        self.entry = SplitEntry(shards=[], tokens=0, documents=0, bytes=0)
        self._shard: ShardWriter | None = None

    def write(self, ids: list[int], text_bytes: int) -> None:
        """One document's ids, the end-of-document token included."""
        rest = np.array(ids, np.int64)
        self.entry.documents += 1
        self.entry.bytes += text_bytes
        self.entry.tokens += len(rest)
        while len(rest):
            if self._shard is None:
                path = self.directory / f"{self.split}_{len(self.entry.shards):05d}.bin"
                self._shard = ShardWriter(
                    path, self.tokenizer.vocab_size, self.tokenizer.fingerprint
                )
            room = self.shard_tokens - self._shard.tokens
            self._shard.write(rest[:room])
            rest = rest[room:]
            if self._shard.tokens == self.shard_tokens:
                self.close()

    def close(self) -> None:
        if self._shard is not None:
            self._shard.close()
            self.entry.shards.append(
                ShardEntry(file=self._shard.path.name, tokens=self._shard.tokens)
            )
            self._shard = None


def _batched(stream: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in stream:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _tokenizer(recipe: Recipe, out_dir: Path, say: Say) -> Tokenizer:
    spec = recipe.tokenizer
    out_dir.mkdir()
    if spec.train is None:
        tokenizer = load_tokenizer(str(spec.path), spec.kind, spec.eos)
        (out_dir / tokenizer.file).write_bytes(tokenizer.content)
        return tokenizer
    say(f"training a tokenizer of {spec.train.vocab_size} pieces")
    # Not on the validation documents: their compression is part of what validation measures.
    sample = TrainingSample(spec.train.seed, recipe.deduplicate)
    for document in documents(recipe, Counter()):
        if document.split == SPLITS[0]:
            sample.add(document.text)
    eos = spec.eos or "<eos>"
    return train_sentencepiece(sample.texts(), spec.train.vocab_size, out_dir, eos)


def _partial_of(output: Path) -> Path:
    return output.with_name(f".{output.name}.partial")


@contextmanager
def _partial(output: Path) -> Iterator[Path]:
    """A sibling of `output` to build in, removed if the block fails; what a killed process left
    there is cleared."""
    partial = _partial_of(output)
    partial.mkdir(parents=True, exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise DataError(
            "another process is preparing this dataset", str(partial), "wait for it to end"
        ) from error
    try:
        for entry in partial.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _summary(output: Place, manifest: Manifest, already: bool) -> dict:
    return {
        "name": manifest.name,
        "output": str(output),
        "already_there": already,
        "vocab_size": manifest.tokenizer.vocab_size,
        "fingerprint": manifest.tokenizer.fingerprint,
        "dropped": manifest.dropped,
        **{
            split: {
                "tokens": entry.tokens,
                "documents": entry.documents,
                "bytes": entry.bytes,
                "bytes_per_token": round(entry.bytes / entry.tokens, 3),
                "shards": len(entry.shards),
            }
            for split, entry in manifest.splits.items()
        },
    }


def prepare(
    recipe_path: str | Path,
    overrides: Sequence[str] = (),
    shard_tokens: int = SHARD_TOKENS,
    say: Say = lambda _: None,
) -> dict:
    """Makes the dataset of a recipe, or finds it made.

    Args:
        recipe_path: YAML; relative paths in it start at the current directory.
        overrides: "dotted.key=value".
        shard_tokens: tokens per shard file.
        say: receives lines of progress.

    Returns:
        A summary: name, output, already_there, vocab_size, fingerprint, dropped, and per split
        tokens,
            documents, bytes, bytes_per_token, shards.

    Raises:
        DataError: a bad recipe or source; an empty split; or `output` holds something else.
    """
    recipe = load_recipe(recipe_path, overrides)
    output, origin = Path(recipe.output), recipe.origin()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        remedy = "prepare into another directory with --set output=DIR"
        if not (output / MANIFEST).is_file():
            problem = f"output exists and is not a prepared data set: it has no {MANIFEST}"
            raise DataError(problem, str(output), remedy)
        manifest = read_manifest(output)
        if manifest.origin != origin:
            problem = (
                "output holds a dataset made from another recipe, or its source files changed since"
            )
            raise DataError(problem, str(output), remedy)
        say(f"{output} is already there, made from this recipe and these sources")
        return _summary(output, manifest, already=True)
    try:
        with _partial(output) as partial:
            manifest = _build(recipe, origin, partial, shard_tokens, say)
            os.replace(partial, output)
        sync(output.parent)
    except OSError as error:
        where = Path(error.filename or output)
        if where.is_relative_to(_partial_of(output)) or output.is_relative_to(where):
            elsewhere = "prepare into another directory with --set output=DIR"
            cause, remedy = explain_os_error(error, elsewhere, vanished=True)
        else:  # a file that a source reads
            cause, remedy = explain_os_error(error, "check the path")
        raise DataError(f"cannot prepare: {cause}", str(where), remedy) from error
    return _summary(output, manifest, already=False)


def _build(recipe: Recipe, origin: str, directory: Path, shard_tokens: int, say: Say) -> Manifest:
    tokenizer = _tokenizer(recipe, directory / "tokenizer", say)
    writers = {split: _SplitWriter(directory, split, tokenizer, shard_tokens) for split in SPLITS}
    dropped: Counter = Counter(empty=0, duplicate=0, unweighted=0, repaired=0)
    for batch in _batched(documents(recipe, dropped)):
        for document, ids in zip(
            batch, tokenizer.encode_batch([document.text for document in batch])
        ):
            writers[document.split].write([*ids, tokenizer.eos_id], document.bytes)
        say(f"encoded {sum(w.entry.bytes for w in writers.values()) / 1e6:,.1f} MB")
    for split, writer in writers.items():
        writer.close()
        if writer.entry.documents == 0:
            total = sum(w.entry.documents for w in writers.values())
            problem = f"split {split!r} is empty: {total} documents, validation {recipe.validation}"
            raise DataError(
                problem, recipe.name, "change validation, or give more and smaller documents"
            )
    table = io.BytesIO()
    np.save(table, tokenizer.token_bytes())
    write_atomically(directory / TOKEN_BYTES, table.getvalue())
    manifest = Manifest(
        format_version=DATASET_VERSION,
        name=recipe.name,
        tokenizer=TokenizerEntry(
            kind=tokenizer.kind,
            file=f"tokenizer/{tokenizer.file}",
            fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
        ),
        splits={split: writer.entry for split, writer in writers.items()},
        recipe=recipe.model_dump(mode="json"),
        origin=origin,
        dropped=dict(dropped),
    )
    write_atomically(directory / MANIFEST, manifest.model_dump_json(indent=2).encode())
    return manifest


def inspect(directory: str | Place, tokenizer: str | None = None) -> dict:
    """A summary as `prepare` returns it, without `already_there`; and tokenizer, recipe, and a
    decoded `excerpt`. Of another project's files as `inspect_foreign`.

    Args:
        tokenizer: of such files, as `data.tokenizer`.
    """
    if (foreign := inspect_stored(directory, tokenizer)) is not None:
        return foreign
    directory = locate(directory)
    manifest = read_manifest(directory)
    summary = _summary(directory, manifest, already=True)
    del summary["already_there"]
    ids = open_shard(directory / manifest.splits[SPLITS[0]].shards[0].file)[:_EXCERPT_TOKENS]
    excerpt = load_tokenizer(directory).decode(ids.tolist())
    return summary | {
        "tokenizer": manifest.tokenizer.kind,
        "recipe": manifest.recipe,
        "excerpt": excerpt,
    }


def verify(directory: str | Place, tokenizer: str | None = None) -> list[str]:
    """Reads every byte of a dataset, or of another project's files. One line for each problem,
    naming the file; none means that it is whole. Arguments as for `inspect`."""
    if (foreign := verify_stored(directory, tokenizer)) is not None:
        return foreign
    directory, problems = locate(directory), []
    try:
        manifest = read_manifest(directory)
    except DataError as error:
        return [str(error)]
    try:
        table = load_tokenizer(directory).token_bytes()
        path = directory / TOKEN_BYTES
        if not path.is_file() or not np.array_equal(np.load(io.BytesIO(path.read_bytes())), table):
            problems.append(f"token lengths are missing or not those of the tokenizer ({path})")
    except (DataError, OSError, ValueError) as error:
        problems.append(str(error))
    for entry in manifest.splits.values():
        if sum(shard.tokens for shard in entry.shards) != entry.tokens:
            problems.append(
                f"shards and split disagree on the number of tokens ({directory / MANIFEST})"
            )
        for shard in entry.shards:
            path = directory / shard.file
            try:
                header = verify_shard(path)
                if header.tokens != shard.tokens:
                    problems.append(
                        f"{header.tokens} tokens where {MANIFEST} says {shard.tokens} ({path})"
                    )
                if header.fingerprint != manifest.tokenizer.fingerprint:
                    problems.append(f"made with another tokenizer ({path})")
                if header.max_id >= manifest.tokenizer.vocab_size:
                    problems.append(f"token id {header.max_id} is outside the vocabulary ({path})")
            except DataError as error:
                problems.append(str(error))
    return problems
