"""One split of a data set, cut into windows of `context` tokens."""

import functools
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from archscale.data.places import Place, Tokens, locate
from archscale.data.remote import REQUESTS, RemotePath
from archscale.data.stored import open_stored
from archscale.errors import DataError


class TokenSplit:
    """One split of a data set, cut into windows of `context` tokens; memory-mapped or read by
    ranges, so its size does not matter.

    Window i is tokens[i * context : i * context + context + 1]: its last token is the next one's
    first, so every token but the very first is a target exactly once.

    Args:
        path: dataset directory, or files of another project; a URL, too.
        split: "train" or "validation".
        context: tokens per window.
        tokenizer: as `data.tokenizer`: file, directory or hub name, for files of another project.
        vocab_size: of the model, for files that do not say theirs.

    Attributes:
        num_tokens, num_samples: tokens, and whole windows, in the split.
        vocab_size: ids are below it.
        eos_id, fingerprint: of the tokenizer; None and "" where it is unknown.
        origin: tells the data set from others, wherever it lies.
        files: names of the files that hold the split.
    """

    def __init__(
        self,
        path: str | Place,
        split: str,
        context: int,
        tokenizer: str | None = None,
        vocab_size: int | None = None,
    ):
        if context < 1:
            raise ValueError(f"context must be positive, not {context}")
        self.path, self.split, self.context = locate(path), split, context
        self._stored = stored = open_stored(path, split, tokenizer, vocab_size)
        self.vocab_size, self.eos_id = stored.vocab_size, stored.eos_id
        self.fingerprint, self.origin, self.files = stored.fingerprint, stored.origin, stored.files
        ends = np.cumsum(stored.sizes, dtype=np.int64)
        self._ends, self._begins = ends.tolist(), (ends - stored.sizes).tolist()
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
        # a process. A remote one holds none, and costs requests to open.
        remote = isinstance(self.path, RemotePath)
        self._open = functools.lru_cache(maxsize=None if remote else 256)(self._open_uncached)
        self._pool = ThreadPoolExecutor(REQUESTS) if remote else None

    def _open_uncached(self, number: int) -> Tokens:
        return self._stored.open(number)

    @functools.cached_property
    def token_bytes(self) -> np.ndarray | None:
        """int32 [vocab_size]: UTF-8 bytes each token id stands for, 0 for special tokens; None
        where the tokenizer is unknown."""
        return self._stored.token_bytes()

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """int64 [stop - start]: the tokens of the split from position `start`, across shard
        borders."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start}:{stop} of {self.num_tokens}")
        out = np.empty(stop - start, np.int64)
        number, done = bisect_right(self._ends, start), 0
        while done < len(out):
            begin = self._begins[number]
            part = self._open(number)[start + done - begin : stop - begin]
            if len(part) < min(stop, self._ends[number]) - start - done:
                raise DataError(
                    f"the file ends before token {self._ends[number] - begin}",
                    self.files[number],
                    "check that nobody writes there, then give the same command again",
                )
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

    def samples(self, indices: Sequence[int]) -> np.ndarray:
        """int64 [n, context + 1]: several windows; of a remote split many are asked for at once."""
        read = map if self._pool is None else self._pool.map
        return np.stack(list(read(self.sample, indices)))

    def check(self, vocab_size: int, verify_up_to_bytes: int = 2**30) -> None:
        """Everything that can be known before step 1; DataError names the first bad file.

        Args:
            vocab_size: of the model: every id must be below it.
            verify_up_to_bytes: a split no larger than this on disk is read whole, and held against
                checksums where it has some.
        """
        self._stored.check(vocab_size, verify_up_to_bytes)
