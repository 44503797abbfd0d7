"""One split of a dataset directory, as `archscale data prepare` makes it."""

import hashlib
import io

import numpy as np

from archscale.data.places import Place, Tokens
from archscale.data.shards import (
    DAMAGED,
    TOKEN_BYTES,
    Manifest,
    ShardEntry,
    ShardHeader,
    disagreements,
    map_shard,
    read_header,
    verify_shard,
)
from archscale.errors import DataError


class PreparedSplit:
    """One split of a dataset directory; a `StoredSplit`.

    Args:
        directory: that holds the shards.
        manifest: of the directory.
        split: "train" or "validation".
    """

    def __init__(self, directory: Place, manifest: Manifest, split: str):
        if split not in manifest.splits:
            there = ", ".join(manifest.splits)
            raise DataError(f"no split {split!r}", str(directory), f"use one of: {there}")
        self._directory, self._shards = directory, manifest.splits[split].shards
        self._tokenizer = tokenizer = manifest.tokenizer
        self.vocab_size = tokenizer.vocab_size
        self.eos_id: int | None = tokenizer.eos_id
        self.fingerprint = tokenizer.fingerprint
        self.origin = _origin(manifest, self._shards)
        self.sizes = [shard.tokens for shard in self._shards]
        self.files = [str(directory / shard.file) for shard in self._shards]

    def open(self, number: int) -> Tokens:
        return map_shard(self._directory / self._shards[number].file, self._header(number))

    def _header(self, number: int) -> ShardHeader:
        shard = self._shards[number]
        path = self._directory / shard.file
        header = read_header(path)
        for problem in disagreements(header, shard, self._tokenizer):
            raise DataError(problem, str(path), DAMAGED)
        return header

    def token_bytes(self) -> np.ndarray | None:
        path = self._directory / TOKEN_BYTES
        try:
            table = np.load(io.BytesIO(path.read_bytes()))
        except (OSError, ValueError, EOFError) as error:
            raise DataError(
                f"cannot read the token lengths: {error}", str(path), DAMAGED
            ) from error
        if table.shape != (self.vocab_size,):
            problem = f"{table.shape} token lengths for a vocabulary of {self.vocab_size}"
            raise DataError(problem, str(path), DAMAGED)
        return table

    def check(self, vocab_size: int, verify_up_to_bytes: int) -> None:
        headers = [self._header(number) for number in range(len(self._shards))]
        whole = (
            sum(header.tokens * header.dtype.itemsize for header in headers) <= verify_up_to_bytes
        )
        for shard, header in zip(self._shards, headers):
            path = self._directory / shard.file
            if header.max_id >= vocab_size:
                raise DataError(
                    f"token id {header.max_id} does not fit a vocabulary of {vocab_size}",
                    str(path),
                    f"set model.vocab_size to {self.vocab_size} or null, or use another dataset",
                )
            if whole:
                verify_shard(path)


def _origin(manifest: Manifest, shards: list[ShardEntry]) -> str:
    """A mark of recipe, sources and tokenizer, and of the split's tokens where the manifest has
    their checksums."""
    checksums = [shard.checksum for shard in shards if shard.checksum]
    if not checksums:
        return manifest.origin
    return hashlib.sha256("\n".join([manifest.origin, *checksums]).encode()).hexdigest()
