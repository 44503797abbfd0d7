"""The packing of a split, kept on disk: made once for each shard and context, and a function of
these alone.

An index lies in the data set's directory, under `packing/`, or where that cannot be written, and
for files of other projects and remote ones, in `packing/` of the cache directory. Its name is a
hash of all that it follows from. Processes that make the same one write the same bytes.
"""

from __future__ import annotations

import hashlib
import os
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from archscale.data.cache import DIRECTORY
from archscale.data.packing import Packing, pack
from archscale.data.places import locate
from archscale.data.prepared import PreparedSplit
from archscale.data.remote import RemotePath
from archscale.data.shards import read_header, verify_shard
from archscale.data.stored import StoredSplit
from archscale.errors import DataError, explain_os_error
from archscale.files import write_atomically

FOLDER = "packing"
_MAGIC, _VERSION = b"ARCHPACK", 1  # another version has other names, and packs anew
# Magic, key, windows, pieces, targets, sha256 of what follows the header; then sha256 of these.
_FIELDS = struct.Struct("<8s32sQQQ32s")
_HEADER_BYTES = 256
_LONGEST = 1 << 28  # tokens that are packed together: bounds memory where one file is the data set
_CHUNK = 1 << 24  # tokens read at a time
_LONG_WORK = 1 << 30  # tokens from which on people are told what they wait for


class Stretch(NamedTuple):
    """Tokens that are packed together: a shard, or a part of a very long one.

    Attributes:
        shard, start: where it begins.
        begin: its first token's position in the split.
        tokens: how many.
        key: sha256 of all that its packing follows from.
    """

    shard: int
    start: int
    begin: int
    tokens: int
    key: bytes


class PackedSize(NamedTuple):
    """How full windows are.

    Attributes:
        windows: how many, of `context` positions each.
        context: positions of a window.
        pieces: of documents, in all windows.
        targets: positions that have one; the others are padding.
    """

    windows: int
    context: int
    pieces: int
    targets: int

    @property
    def padding(self) -> float:
        """Share of the positions."""
        return 1 - self.targets / (self.windows * self.context)


def total_size(sizes: list[PackedSize]) -> PackedSize:
    """The size of several stretches of one context together."""
    return PackedSize(
        sum(size.windows for size in sizes),
        sizes[0].context,
        sum(size.pieces for size in sizes),
        sum(size.targets for size in sizes),
    )


class PackingIndex:
    """The packings of a split's stretches.

    Args:
        stored: the split; it says how documents end.
        context: targets of a window.

    Attributes:
        stretches: in the order of the split.
    """

    def __init__(self, stored: StoredSplit, context: int):
        assert stored.eos_id is not None, "who packs has checked that documents have ends"
        self._stored, self._context, self._eos_id = stored, context, stored.eos_id
        self.stretches = _stretches(stored, context)
        self._folders = _folders(stored)

    def sizes(self) -> list[PackedSize] | None:
        """The size of every stretch; None where one is not packed yet."""
        sizes = []
        for stretch in self.stretches:
            size = self._size(stretch)
            if size is None:
                return None
            sizes.append(size)
        return sizes

    def make(self) -> list[PackedSize]:
        """Packs the stretches that are not packed yet; the sizes of all. Processes that do so at
        the same time share the work: each takes the stretches in an order of its own.

        Raises:
            DataError: tokens cannot be read, or an index cannot be written.
        """
        missing = [stretch for stretch in self.stretches if self._size(stretch) is None]
        tokens = sum(stretch.tokens for stretch in missing)
        if tokens >= _LONG_WORK:
            print(
                f"packing the documents of {tokens:,} tokens into windows of {self._context}, once"
                " for each context",
                file=sys.stderr,
                flush=True,
            )
        for place in np.random.default_rng().permutation(len(missing)):
            if self._size(missing[place]) is None:
                self._make(missing[place])
        sizes = self.sizes()
        assert sizes is not None, "all are made"
        return sizes

    def open(self, number: int) -> Packing:
        """The packing of a stretch, memory-mapped and held against its checksum; a damaged one is
        made again."""
        stretch = self.stretches[number]
        path = self._path(stretch)
        if path is None or not _payload_is_whole(path):
            path = self._make(stretch)
        size = _read_size(path, stretch.key, self._context)
        assert size is not None
        content = np.memmap(path, np.uint8, "r").view(np.ndarray)
        offsets = _HEADER_BYTES + 8 * (size.windows + 1)
        starts = offsets + 4 * size.pieces
        return Packing(
            content[_HEADER_BYTES:offsets].view(np.int64),
            content[offsets:starts].view(np.uint32),
            content[starts:].view(np.uint32),
        )

    def _path(self, stretch: Stretch) -> Path | None:
        """Where its index is."""
        for folder in self._folders:
            path = folder / _name(stretch)
            if _read_size(path, stretch.key, self._context) is not None:
                return path
        return None

    def _size(self, stretch: Stretch) -> PackedSize | None:
        path = self._path(stretch)
        return None if path is None else _read_size(path, stretch.key, self._context)

    def _make(self, stretch: Stretch) -> Path:
        self._refuse_damaged(stretch.shard)
        tokens, ends = self._stored.open(stretch.shard), [np.empty(0, np.int64)]
        for start in range(0, stretch.tokens, _CHUNK):
            stop = stretch.start + min(start + _CHUNK, stretch.tokens)
            ends.append(
                start + np.flatnonzero(tokens[stretch.start + start : stop] == self._eos_id)
            )
        packing = pack(np.concatenate(ends), stretch.tokens, self._context)
        payload = b"".join(part.tobytes() for part in packing)
        fields = _FIELDS.pack(
            _MAGIC,
            stretch.key,
            len(packing.offsets) - 1,
            len(packing.starts),
            stretch.tokens,
            hashlib.sha256(payload).digest(),
        )
        header = fields + hashlib.sha256(fields).digest()
        return _write(self._folders, _name(stretch), header.ljust(_HEADER_BYTES, b"\0") + payload)

    def _refuse_damaged(self, shard: int) -> None:
        """An index is named after the tokens that a shard should have; that of a remote one is
        read as the ids in it are."""
        place = locate(self._stored.files[shard])
        if isinstance(self._stored, PreparedSplit) and isinstance(place, Path):
            verify_shard(place)


def _stretches(stored: StoredSplit, context: int) -> list[Stretch]:
    stretches, begin = [], 0
    for shard, size in enumerate(stored.sizes):
        mark = _mark(stored, shard)
        for start in range(0, size, _LONGEST):
            tokens = min(_LONGEST, size - start)
            text = f"{_VERSION}\n{mark}\n{start} {tokens} {context} {stored.eos_id}"
            key = hashlib.sha256(text.encode()).digest()
            stretches.append(Stretch(shard, start, begin + start, tokens, key))
        begin += size
    return stretches


def _mark(stored: StoredSplit, shard: int) -> str:
    """Tells the tokens of a shard from others: their checksum, or what stands for it where there is
    none."""
    place = locate(stored.files[shard])
    if isinstance(stored, PreparedSplit):
        return read_header(place).checksum
    if isinstance(place, RemotePath):
        version = place.version()
        return f"{stored.origin}\n{place.url}\n{version.size}\n{version.tag}"
    state = place.stat()
    return f"{stored.origin}\n{place.resolve()}\n{state.st_size}\n{state.st_mtime_ns}"


def _folders(stored: StoredSplit) -> list[Path]:
    """Where indices may lie, the best place first. Directories that other projects made stay as
    they are."""
    cache = Path(os.environ.get(DIRECTORY) or "~/.cache/archscale").expanduser() / FOLDER
    first = locate(stored.files[0])
    if isinstance(stored, PreparedSplit) and isinstance(first, Path):
        return [first.parent / FOLDER, cache]
    return [cache]


def _name(stretch: Stretch) -> str:
    return stretch.key.hex()[:32]


def _read_size(path: Path, key: bytes, context: int) -> PackedSize | None:
    """What an index says of itself; None where there is none, or one that is not whole or of
    something else."""
    try:
        with open(path, "rb") as file:
            raw = file.read(_HEADER_BYTES)
            size = os.fstat(file.fileno()).st_size
    except OSError:
        return None
    fields = raw[: _FIELDS.size]
    if len(raw) < _HEADER_BYTES or not raw[_FIELDS.size :].startswith(
        hashlib.sha256(fields).digest()
    ):
        return None
    _, written, windows, pieces, targets, _ = _FIELDS.unpack(fields)
    if written != key or size != _HEADER_BYTES + 8 * (windows + 1) + 8 * pieces:
        return None
    return PackedSize(windows, context, pieces, targets)


def _payload_is_whole(path: Path) -> bool:
    content = np.memmap(path, np.uint8, "r").view(np.ndarray)
    checksum = _FIELDS.unpack(content[: _FIELDS.size].tobytes())[-1]
    return hashlib.sha256(content[_HEADER_BYTES:].data).digest() == checksum


def _write(folders: Sequence[Path], name: str, content: bytes) -> Path:
    """Into the first directory that takes it."""
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / name, content)
        except OSError as error:
            problem, place = error, folder
        else:
            return folder / name
    cause, remedy = explain_os_error(problem, f"name another directory in {DIRECTORY}")
    raise DataError(f"cannot write how documents are packed: {cause}", str(place), remedy)
