"""A file of token ids that another project wrote."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from archscale.data.places import Place, Tokens, map_tokens, read_range
from archscale.errors import DataError

COPY_AGAIN = "copy the file again from where it is whole, or write it anew"
_IDS = 1 << 22  # read at a time
# For a file's identity: few, since each is a request where the file is remote.
_BLOCKS, _BLOCK = 5, 1 << 14


@dataclass(frozen=True)
class ForeignFile:
    """What is known of a file without reading its ids.

    Attributes:
        place: where the ids are.
        kind: the project's name for such files.
        size: bytes of the file.
        dtype: of an id, little-endian.
        offset: bytes before the first id.
        tokens: how many ids.
        documents: how many documents; None: the file does not say.
        tokenizer: its name; None: the file does not say.
        start: the first bytes of the file, and of an index beside it.
        verify: reads the index beside the file whole; DataError where it is wrong; None: there is
            no index.
    """

    place: Place
    kind: str
    size: int
    dtype: np.dtype
    offset: int
    tokens: int
    start: bytes
    documents: int | None = None
    tokenizer: str | None = None
    verify: Callable[[], None] | None = None

    def excerpts(self) -> bytes:
        """What tells the file from others of its size without reading it whole: blocks from its
        beginning to its end, or all of it if it is small. OSError if it cannot be read."""
        last = max(0, self.size - _BLOCK)
        starts = sorted({last * number // (_BLOCKS - 1) for number in range(_BLOCKS)})
        return b"".join(
            read_range(self.place, start, min(start + _BLOCK, self.size)) for start in starts
        )

    def open(self) -> Tokens:
        return map_tokens(self.place, self.dtype, self.offset, self.tokens)

    def chunks(self) -> Iterator[np.ndarray]:
        """All ids in order, some millions at a time."""
        tokens = self.open()
        for start in range(0, self.tokens, _IDS):
            yield tokens[start : start + _IDS]

    def check_ids(self, vocab_size: int | None) -> None:
        """Reads the file. DataError for an id that is negative, or outside the vocabulary where
        that is known."""
        for ids in self.chunks():
            self.check_some(ids, vocab_size)

    def check_some(self, ids: np.ndarray, vocab_size: int | None) -> None:
        """As `check_ids`, of some ids of the file [n], n > 0."""
        low, high = int(ids.min()), int(ids.max())
        if low < 0:
            raise DataError(f"token id {low} is negative", str(self.place), COPY_AGAIN)
        if vocab_size is not None and high >= vocab_size:
            raise DataError(
                f"token id {high} does not fit a vocabulary of {vocab_size}",
                str(self.place),
                "give the tokenizer that the file was made with as data.tokenizer, or the size of"
                " its vocabulary as model.vocab_size",
            )


def whole_tokens(place: Place, size: int, offset: int, dtype: np.dtype) -> int:
    """Ids in a file of `size` bytes. DataError if the last one is cut."""
    tokens, rest = divmod(size - offset, dtype.itemsize)
    if rest:
        raise DataError(
            f"truncated: {size - offset} bytes of ids are no multiple of {dtype.itemsize}",
            str(place),
            COPY_AGAIN,
        )
    return tokens


def count_problem(place: Place, size: int, tokens: int, expected: int) -> DataError:
    """A file whose size is not that of the tokens it announces."""
    if tokens < 0:
        return DataError(f"damaged: it announces {tokens} tokens", str(place), COPY_AGAIN)
    word = "truncated" if size < expected else "foreign bytes after the tokens"
    return DataError(
        f"{word}: {size} bytes where {tokens} tokens need {expected}", str(place), COPY_AGAIN
    )


def disagree(index: Place, place: Place, problem: str) -> DataError:
    """An index that is not of the file beside it."""
    return DataError(
        f"{index.name} and {place.name} do not belong together: {problem}",
        str(index),
        "copy both files again from where they are whole, or write them anew",
    )
