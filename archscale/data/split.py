"""One split of a dataset directory, cut into windows of `context` tokens."""

import functools
from bisect import bisect_right
from pathlib import Path

import numpy as np

from archscale.data.shards import (
    DAMAGED,
    MANIFEST,
    TOKEN_BYTES,
    ShardHeader,
    open_shard,
    read_header,
    read_manifest,
    verify_shard,
)
from archscale.errors import DataError


class TokenSplit:
    """One split of a dataset, cut into windows of `context` tokens; memory-mapped, so its size does
    not matter.

    Window i is tokens[i * context : i * context + context + 1]: its last token is the next one's
    first, so every token but the very first is a target exactly once.

    Args:
        path: dataset directory.
        split: "train" or "validation".
        context: tokens per window.

    Attributes:
        num_tokens, num_samples: tokens, and whole windows, in the split.
        vocab_size, eos_id, fingerprint: of the tokenizer.
    """

    def __init__(self, path: str | Path, split: str, context: int):
        if context < 1:
            raise ValueError(f"context must be positive, not {context}")
        self.path, self.split, self.context = Path(path), split, context
        self.manifest = read_manifest(path)
        if split not in self.manifest.splits:
            there = ", ".join(self.manifest.splits)
            raise DataError(f"no split {split!r}", str(path), f"use one of: {there}")
        entry, tokenizer = self.manifest.splits[split], self.manifest.tokenizer
        self.vocab_size, self.eos_id = tokenizer.vocab_size, tokenizer.eos_id
        self.fingerprint = tokenizer.fingerprint
        self._shards = entry.shards
        self._ends = np.cumsum([shard.tokens for shard in self._shards], dtype=np.int64).tolist()
        self.num_tokens = self._ends[-1] if self._ends else 0
        self.num_samples = max(0, self.num_tokens - 1) // context
        if self.num_samples == 0:
            raise DataError(
                f"split {split!r} has {self.num_tokens} tokens, less than one window of"
                f" {context} + 1",
                str(path),
                "shorten model.context or prepare more text",
            )
        # A mapped file holds a file descriptor: keep the number below the usual limit of 1,024 for
        # a process.
        self._open = functools.lru_cache(maxsize=256)(self._open_uncached)

    def _header(self, number: int) -> ShardHeader:
        shard = self._shards[number]
        path = self.path / shard.file
        header = read_header(path)
        if header.tokens != shard.tokens:
            problem = f"the shard has {header.tokens} tokens, {MANIFEST} says {shard.tokens}"
            raise DataError(problem, str(path), DAMAGED)
        if header.fingerprint != self.fingerprint:
            ours, theirs = self.fingerprint[:12], header.fingerprint[:12]
            problem = f"the shard was made with tokenizer {theirs}, the dataset with {ours}"
            raise DataError(problem, str(path), DAMAGED)
        return header

    def _open_uncached(self, number: int) -> np.ndarray:
        self._header(number)
        # A plain view of the map: np.memmap's own slicing costs more than copying a window.
        return open_shard(self.path / self._shards[number].file).view(np.ndarray)

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        """int32 [vocab_size]: UTF-8 bytes each token id stands for, 0 for special tokens."""
        path = self.path / TOKEN_BYTES
        try:
            table = np.load(path)
        except (OSError, ValueError) as error:
            raise DataError(
                f"cannot read the token lengths: {error}", str(path), DAMAGED
            ) from error
        if table.shape != (self.vocab_size,):
            problem = f"{table.shape} token lengths for a vocabulary of {self.vocab_size}"
            raise DataError(problem, str(path), DAMAGED)
        return table

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """int64 [stop - start]: the tokens of the split from position `start`, across shard
        borders."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start}:{stop} of {self.num_tokens}")
        out = np.empty(stop - start, np.int64)
        number, done = bisect_right(self._ends, start), 0
        while done < len(out):
            begin = self._ends[number] - self._shards[number].tokens
            part = self._open(number)[start + done - begin : stop - begin]
            out[done : done + len(part)] = part
            done, number = done + len(part), number + 1
        return out

    def sample(self, index: int) -> np.ndarray:
        """int64 [context + 1]: window `index`; inputs are all but the last token, targets all but
        the first."""
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        start = int(index) * self.context
        return self.tokens(start, start + self.context + 1)

    def check(self, vocab_size: int, verify_up_to_bytes: int = 2**30) -> None:
        """Everything that can be known before step 1; DataError names the first bad file.

        Args:
            vocab_size: of the model: every shard's highest id must be below it.
            verify_up_to_bytes: a split no larger than this on disk is read whole and held against
                its checksums.
        """
        headers = [self._header(number) for number in range(len(self._shards))]
        whole = (
            sum(header.tokens * header.dtype.itemsize for header in headers) <= verify_up_to_bytes
        )
        for shard, header in zip(self._shards, headers):
            path = self.path / shard.file
            if header.max_id >= vocab_size:
                raise DataError(
                    f"token id {header.max_id} does not fit a vocabulary of {vocab_size}",
                    str(path),
                    f"set model.vocab_size to {self.vocab_size} or null, or use another dataset",
                )
            if whole:
                verify_shard(path)
