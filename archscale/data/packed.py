"""A split whose documents are packed into windows."""

from __future__ import annotations

import functools

import numpy as np

from archscale.config.sections import DataConfig
from archscale.data.packing_index import PackingIndex, total_size
from archscale.data.places import Place
from archscale.data.split import TokenSplit
from archscale.data.stored import open_stored
from archscale.data.windows import IGNORE, Windows, refuse_unknown_ids
from archscale.errors import ConfigError


class PackedSplit:
    """Windows of whole documents, as far as they fit; a `WindowReader`.

    Every token of the split is a target exactly once. Its input is the token before it in the
    split: at the beginning of a document the end of the one before, as generation starts, too; of
    the very first token, which has none before it, an end of document. Padding stands at the end of
    windows; its inputs are ends of documents.

    Args:
        split: whose tokens are read.
        index: how the same split is packed, with windows of the split's context.
        documents: whether the windows are to say which document each position belongs to.

    Attributes:
        num_samples: windows of all shards.
        size: how full they are.

    Raises:
        DataError: shards cannot be read, or their packing cannot be written.
    """

    def __init__(self, split: TokenSplit, index: PackingIndex, documents: bool):
        self._split, self._index, self._documents = split, index, documents
        sizes = index.make()
        self._ends = np.cumsum([size.windows for size in sizes])
        self.num_samples = int(self._ends[-1])
        self.size = total_size(sizes)
        # A mapped file holds a descriptor: stay below the usual limit of 1,024 for a process.
        self._open = functools.lru_cache(maxsize=256)(self._index.open)

    def windows(self, indices: np.ndarray) -> Windows:
        """These windows [n]: the pieces of each in the order of the split, then padding.

        An end of document belongs to the document before it, of which nothing else is here, so that
        training, validation and generation show a document the same tokens.
        """
        assert self._split.eos_id is not None
        shape = len(indices), self._split.context
        inputs = np.full(shape, self._split.eos_id, np.int64)
        targets = np.full(shape, IGNORE, np.int64)
        begins = np.zeros(shape, bool)
        for row, index in enumerate(indices.tolist()):
            at = 0
            for start, stop in self.pieces(index):
                ids = self._split.tokens(max(0, start - 1), stop)
                refuse_unknown_ids(self._split, ids)
                after = at + stop - start
                targets[row, at:after] = ids[-(stop - start) :]
                first = at if start else at + 1
                inputs[row, first:after] = ids[:-1]
                begins[row, at] = True
                at = after
            begins[row, at : at + 1] = True
        if not self._documents:
            return Windows(inputs, targets)
        ended = (inputs == self._split.eos_id) & (targets != IGNORE)
        begins[:, 1:] |= ended[:, :-1]
        return Windows(inputs, targets, begins.cumsum(1, dtype=np.int32) - 1)

    def pieces(self, index: int) -> list[tuple[int, int]]:
        """First and last, exclusive, position in the split of each piece of a window's targets."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        packing = self._open(number)
        window = index - (int(self._ends[number - 1]) if number else 0)
        pieces = slice(*packing.offsets[window : window + 2].tolist())
        starts = self._index.stretches[number].begin + packing.starts[pieces].astype(np.int64)
        stops = starts + packing.lengths[pieces]
        return list(zip(starts.tolist(), stops.tolist()))


def open_packing(
    data: DataConfig, path: str | Place, context: int, vocab_size: int | None
) -> PackingIndex:
    """How the training split at a path is packed; nothing is packed yet.

    Args:
        vocab_size: of the model, for files that do not say theirs.

    Raises:
        ConfigError: it is not known how documents end.
        DataError: the split cannot be read.
    """
    stored = open_stored(path, "train", data.tokenizer, vocab_size)
    check_packing(data, stored.eos_id)
    return PackingIndex(stored, context)


def check_packing(data: DataConfig, eos_id: int | None) -> None:
    """ConfigError if documents are to be packed and their ends are unknown."""
    if data.packing == "best_fit" and eos_id is None:
        raise ConfigError(
            "the data do not say which token ends a document",
            "data.packing",
            "give the tokenizer as data.tokenizer, or set it to concatenate",
        )
