"""Token shards on disk, and the dataset directory made of them.

A shard is a 128-byte header and `count` little-endian token ids, uint16 where the vocabulary fits
and uint32 where it does not. A dataset directory is

    dataset.json       the manifest, written last: a directory without it was never finished
    tokenizer/         the tokenizer the ids came from
    token_bytes.npy    int32 [vocab_size]: UTF-8 bytes each id stands for, 0 for special tokens
    sources.json       name, size, mtime_ns and sha256 of each local file that it was made from;
                       name and mark (ETag or the like) of each remote one
    train_00000.bin …  validation_00000.bin …

Every way in which such a file can be wrong is a `DataError` that names the file.
"""

import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Annotated, NamedTuple, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError, model_validator

from archscale.data.missing import how_to_make
from archscale.data.places import Place, Tokens, locate, map_tokens, read_start
from archscale.data.remote_tokens import RemoteTokens
from archscale.errors import DataError, explain_os_error
from archscale.files import sync

MAGIC = b"ARCHTOK1"
SHARD_VERSION = 1
DATASET_VERSION = 1
MANIFEST = "dataset.json"
TOKEN_BYTES = "token_bytes.npy"
SOURCE_FILES = "sources.json"
SPLITS = ("train", "validation")
DTYPES: dict[int, np.dtype] = {1: np.dtype("<u2"), 2: np.dtype("<u4")}

# magic, version, dtype code, tokens, highest id, tokenizer fingerprint, payload sha256; then the
# sha256 of these 96 bytes, without which a flipped bit in the highest id would pass for a sound
# file.
_FIELDS = struct.Struct("<8sIIQQ32s32s")
HEADER_BYTES = _FIELDS.size + 32
_CHUNK = 1 << 24  # bytes hashed at a time

# `prepare` finds a directory that has a manifest made already, so that preparing again needs
# another one.
AGAIN = (
    "`archscale data prepare RECIPE --set output=DIR` makes the data set again, in another"
    " directory"
)
DAMAGED = f"copy the file again from where it is whole, or prepare anew: {AGAIN}"
GIVE_PREPARED = "give the directory of a prepared data set, as `archscale data prepare` makes it"


def token_dtype(vocab_size: int) -> np.dtype:
    """The type of a vocabulary's token ids on disk."""
    return DTYPES[1 if vocab_size <= 1 << 16 else 2]


class ShardHeader(NamedTuple):
    """What a shard says of itself.

    Attributes:
        dtype: of the payload.
        tokens: their number.
        max_id: the highest token id; 0 in an empty shard.
        fingerprint: sha256 of the tokenizer, hexadecimal.
        checksum: sha256 of the payload, hexadecimal.
    """

    dtype: np.dtype
    tokens: int
    max_id: int
    fingerprint: str
    checksum: str


def _pack(header: ShardHeader) -> bytes:
    code = next(code for code, dtype in DTYPES.items() if dtype == header.dtype)
    fields = _FIELDS.pack(
        MAGIC,
        SHARD_VERSION,
        code,
        header.tokens,
        header.max_id,
        bytes.fromhex(header.fingerprint),
        bytes.fromhex(header.checksum),
    )
    return fields + hashlib.sha256(fields).digest()


class ShardWriter:
    """Streams token ids into one shard. The file gets its name only when it is complete and on
    disk.

    As a context manager it closes on success and leaves nothing behind on an exception.

    Args:
        path: of the finished shard.
        vocab_size: decides the dtype; an id at or above it is refused.
        fingerprint: sha256 of the tokenizer, hexadecimal.
    """

    def __init__(self, path: str | Path, vocab_size: int, fingerprint: str):
        self.path, self.vocab_size, self.fingerprint = Path(path), vocab_size, fingerprint
        self.dtype = token_dtype(vocab_size)
        self.tokens, self.max_id = 0, 0
        self._hash = hashlib.sha256()
        self._temporary = self.path.with_name(self.path.name + ".tmp")
        self._file = open(self._temporary, "wb")  # noqa: SIM115 (lives as long as the writer)
        self._file.write(bytes(HEADER_BYTES))

    def write(self, ids: np.ndarray) -> None:
        """Appends token ids [n], any integer dtype. An id outside the vocabulary is a DataError."""
        if len(ids) == 0:
            return
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.vocab_size:
            wrong = low if low < 0 else high
            raise DataError(
                f"token id {wrong} is outside the vocabulary of {self.vocab_size}",
                str(self.path),
                "the tokenizer and its declared vocab_size do not belong together",
            )
        payload = ids.astype(self.dtype).tobytes()
        self._hash.update(payload)
        self._file.write(payload)
        self.tokens += len(ids)
        self.max_id = max(self.max_id, high)

    def close(self) -> ShardHeader:
        """Writes the header, waits for the disk, and gives the file its name."""
        header = ShardHeader(
            self.dtype, self.tokens, self.max_id, self.fingerprint, self._hash.hexdigest()
        )
        self._file.seek(0)
        self._file.write(_pack(header))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self.path)
        sync(self.path.parent)
        return header

    def abort(self) -> None:
        """Leaves no file."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def read_header(path: str | Place) -> ShardHeader:
    """The header of a shard, its size held against it. DataError if the file is missing, foreign,
    damaged, truncated."""
    try:
        raw, size = read_start(locate(path), HEADER_BYTES)
    except OSError as error:
        cause, remedy = explain_os_error(error, DAMAGED)
        raise DataError(f"cannot read the shard: {cause}", str(path), remedy) from error
    if raw[: len(MAGIC)] != MAGIC:
        raise DataError("foreign file: it does not begin like a token shard", str(path), DAMAGED)
    if len(raw) < HEADER_BYTES:
        raise DataError(f"truncated shard: {size} bytes, less than a header", str(path), DAMAGED)
    _, version, code, tokens, max_id, fingerprint, checksum = _FIELDS.unpack(raw[: _FIELDS.size])
    if version != SHARD_VERSION:
        raise DataError(
            f"shard format {version}, but this archscale reads {SHARD_VERSION}",
            str(path),
            f"use the archscale that wrote it, or this one: {AGAIN}",
        )
    if hashlib.sha256(raw[: _FIELDS.size]).digest() != raw[_FIELDS.size :] or code not in DTYPES:
        raise DataError("damaged shard: the header does not match its checksum", str(path), DAMAGED)
    expected = HEADER_BYTES + tokens * DTYPES[code].itemsize
    if size != expected:
        word = "truncated shard" if size < expected else "foreign bytes after the tokens"
        raise DataError(
            f"{word}: {size} bytes where {tokens} tokens need {expected}", str(path), DAMAGED
        )
    return ShardHeader(DTYPES[code], tokens, max_id, fingerprint.hex(), checksum.hex())


def open_shard(path: str | Place) -> Tokens:
    """The tokens of a shard, [tokens] uint16 or uint32; of a local one memory-mapped and read-only.
    Errors as `read_header`."""
    return map_shard(path, read_header(path))


def map_shard(path: str | Place, header: ShardHeader) -> Tokens:
    """As `open_shard`, for a header that is known."""
    return map_tokens(locate(path), header.dtype, HEADER_BYTES, header.tokens, verify_shard)


def verify_shard(path: str | Place) -> ShardHeader:
    """Reads the whole shard: its checksum and its highest id must be those of the header, else
    DataError."""
    header = read_header(path)
    tokens = map_shard(path, header)
    digest, max_id, step = hashlib.sha256(), 0, _CHUNK // header.dtype.itemsize
    for start in range(0, header.tokens, step):
        chunk = tokens[start : start + step]
        digest.update(chunk.data)
        max_id = max(max_id, int(chunk.max()))
    if digest.hexdigest() != header.checksum:
        problem = "damaged shard: the tokens do not match their checksum"
        if isinstance(tokens, RemoteTokens) and tokens.copied:
            raise DataError(
                f"damaged copy of {path}: the tokens do not match their checksum",
                str(tokens.copied),
                "delete that file: the shard is copied again",
            )
        raise DataError(problem, str(path), DAMAGED)
    if max_id != header.max_id:
        raise DataError(
            f"the highest id is {max_id}, the header says {header.max_id}",
            str(path),
            DAMAGED,
        )
    return header


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid")


FileName = Annotated[str, StringConstraints(pattern=r"^[^\x00]+$")]


class ShardEntry(_Entry):
    """`checksum` is that of the shard's header; None in data sets made before it was kept."""

    file: FileName
    tokens: int
    checksum: str | None = None


class SplitEntry(_Entry):
    """One split; `bytes` are UTF-8 bytes of text."""

    shards: list[ShardEntry]
    tokens: int
    documents: int
    bytes: int


class TokenizerEntry(_Entry):
    """The tokenizer of a dataset; `file` is relative to the directory, `fingerprint` a hexadecimal
    sha256."""

    kind: str
    file: FileName
    fingerprint: str
    vocab_size: int
    eos_id: int


class SkippedEntry(_Entry):
    """What could not be read and was left out: counts by cause, and the first messages."""

    counts: dict[str, int]
    examples: list[str]


class Manifest(_Entry):
    """`dataset.json`. `origin` identifies recipe, source files and tokenizer file; `dropped` counts
    documents; `fidelity` has counts of text that the tokens do not stand for."""

    format_version: int
    name: str
    tokenizer: TokenizerEntry
    splits: dict[str, SplitEntry]
    recipe: dict
    origin: str
    dropped: dict[str, int]
    skipped: SkippedEntry | None = None
    fidelity: dict[str, int] | None = None

    @model_validator(mode="after")
    def _has_both_splits(self) -> Self:
        for split in SPLITS:
            entry = self.splits.get(split)
            if entry is None or not entry.shards or entry.tokens < 1:
                raise ValueError(f"split {split!r} is {'missing' if entry is None else 'empty'}")
        return self


def disagreements(header: ShardHeader, shard: ShardEntry, tokenizer: TokenizerEntry) -> list[str]:
    """How a shard is not the one that the manifest lists, a line each."""
    problems = []
    if header.tokens != shard.tokens:
        problems.append(f"the shard has {header.tokens} tokens, {MANIFEST} says {shard.tokens}")
    if header.fingerprint != tokenizer.fingerprint:
        ours, theirs = tokenizer.fingerprint[:12], header.fingerprint[:12]
        problems.append(
            f"the shard was made with another tokenizer, {theirs}, than the data set, {ours}"
        )
    if not problems and shard.checksum not in (None, header.checksum):
        problems.append(f"the shard has other tokens than the one that {MANIFEST} lists")
    return problems


def read_manifest(directory: str | Place) -> Manifest:
    """The manifest of a dataset directory. DataError if the directory is missing, half prepared or
    foreign."""
    directory = locate(directory)
    if isinstance(directory, Path) and not directory.is_dir():
        if directory.exists():
            raise DataError("no data set: not a directory", str(directory), GIVE_PREPARED)
        raise DataError(
            "no data set", str(directory), f"{how_to_make(directory)}, or correct the path"
        )
    path = directory / MANIFEST
    try:
        raw = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        problem = f"this directory is not a prepared data set: it has no {MANIFEST}"
        raise DataError(problem, str(directory), GIVE_PREPARED) from error
    except OSError as error:
        cause, remedy = explain_os_error(error, GIVE_PREPARED)
        raise DataError(f"cannot read the manifest: {cause}", str(path), remedy) from error
    except ValueError as error:
        raise DataError(f"the manifest is not JSON: {error}", str(path), DAMAGED) from error
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if version != DATASET_VERSION:
        problem = f"dataset format {version}, but this archscale reads {DATASET_VERSION}"
        remedy = (
            f"use the archscale that wrote it, or this one: {AGAIN}" if version else GIVE_PREPARED
        )
        raise DataError(problem, str(path), remedy)
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key, message = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
        problem = f"foreign manifest: {key}: {message}" if key else f"foreign manifest: {message}"
        raise DataError(problem, str(path), GIVE_PREPARED) from error
