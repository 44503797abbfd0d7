"""Documents packed into windows, so that they are cut no more than they must be: best-fit
decreasing (arXiv 2404.10830).

Token t of the split is the target of the token before it. The targets of a document are its tokens
with the token that ends it; what it is cut into, pieces of at most a window, is packed whole.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import NamedTuple

import numpy as np


class Pieces(NamedTuple):
    """Ranges of targets, none longer than a window.

    Attributes:
        starts, lengths: int64 [n], ascending by start.
    """

    starts: np.ndarray
    lengths: np.ndarray


def cut(ends: np.ndarray, tokens: int, context: int) -> Pieces:
    """Documents cut into pieces of `context` targets and one of what is left.

    Args:
        ends: positions of the tokens that end a document, ascending, int64.
        tokens: of the stretch that they are in; what follows the last end is a document, too.
    """
    stops = ends + 1
    if tokens and (not len(stops) or stops[-1] < tokens):
        stops = np.append(stops, tokens)
    begins = np.concatenate([np.zeros(min(1, len(stops)), np.int64), stops[:-1]])
    counts = -(-(stops - begins) // context)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.repeat(begins, counts) + (np.arange(len(first)) - first) * context
    return Pieces(starts, np.minimum(np.repeat(stops, counts) - starts, context))


def best_fit(lengths: np.ndarray, context: int) -> np.ndarray:
    """The window of each piece, int64 [n], counted from 0: the longest piece first, each goes where
    it leaves the least room, and into a new window where it fits nowhere.

    Pieces of one length are placed together, and windows of one room are alike. A window that gets
    a piece and has room for another has the least that is enough, so it is filled before the next:
    a round costs O(log context) and places at least one piece.

    Args:
        lengths: of the pieces, in [1, context].
    """
    order = np.argsort(-lengths, kind="stable")
    placed = np.empty(len(lengths), np.int64)  # in this order
    open_windows: dict[int, list[int]] = {}  # by their room
    rooms: list[int] = []  # of these, ascending
    windows = done = 0

    def leave(numbers: list[int], room: int) -> None:
        if not room or not numbers:
            return
        if room not in open_windows:
            open_windows[room] = []
            insort(rooms, room)
        open_windows[room] += numbers

    values, counts = np.unique(lengths, return_counts=True)
    for length, count in zip(values[::-1].tolist(), counts[::-1].tolist()):
        while count:
            at = bisect_left(rooms, length)
            room = rooms[at] if at < len(rooms) else context
            each = room // length
            needed = -(-count // each)
            if at < len(rooms):
                taken = open_windows[room][-needed:]
                del open_windows[room][-needed:]
                if not open_windows[room]:
                    del open_windows[room], rooms[at]
            else:
                taken = list(range(windows, windows + needed))
                windows += needed
            here = min(count, each * len(taken))
            last = here - each * (len(taken) - 1)
            placed[done : done + here] = np.repeat(taken, each)[:here]
            leave(taken[:-1], room - each * length)
            leave(taken[-1:], room - last * length)
            done, count = done + here, count - here
    window = np.empty_like(placed)
    window[order] = placed
    return window


class Packing(NamedTuple):
    """The windows of a stretch of tokens.

    Attributes:
        offsets: int64 [windows + 1]; window w has pieces offsets[w] … offsets[w + 1] - 1.
        starts, lengths: uint32 [pieces]: targets from the start of the stretch, ascending within a
            window.
    """

    offsets: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray


def pack(ends: np.ndarray, tokens: int, context: int) -> Packing:
    """A stretch of fewer than 2^32 tokens in windows of `context` targets; arguments as of
    `cut`."""
    pieces = cut(ends, tokens, context)
    window = best_fit(pieces.lengths, context)
    order = np.argsort(window, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(window))]).astype(np.int64)
    return Packing(
        offsets, pieces.starts[order].astype(np.uint32), pieces.lengths[order].astype(np.uint32)
    )
