"""The text that a tokenizer is trained on: chosen by content, so that it depends on what documents
there are and never on their order, nor on which process read them."""

import hashlib
import heapq
from typing import Self

SAMPLE_BYTES = 10_000_000  # more hardly changes a BPE
_DOCUMENT_CHARS = 1_000_000  # of a document are used at most


class TrainingSample:
    """SAMPLE_BYTES of text in whole documents (long ones cut): those with the lowest hashes. It
    takes no more memory than they do.

    Args:
        seed: another seed chooses other documents, where there are more than are used.
        deduplicate: equal documents count once.
    """

    def __init__(self, seed: int = 0, deduplicate: bool = True):
        self.seed, self.deduplicate = seed, deduplicate
        self._heap: list[tuple[int, str]] = []  # (-hash, text): the highest hash goes first
        self._ranks: set[int] = set()
        self._held = 0  # bytes

    def add(self, text: str) -> None:
        text = text[:_DOCUMENT_CHARS]
        encoded = text.encode()
        rank = int.from_bytes(hashlib.sha256(b"%d:" % self.seed + encoded).digest()[:8])
        self._add(rank, text, len(encoded))

    def _add(self, rank: int, text: str, size: int) -> None:
        if self._held >= SAMPLE_BYTES and rank >= -self._heap[0][0]:
            return
        if self.deduplicate and rank in self._ranks:
            return
        self._ranks.add(rank)
        heapq.heappush(self._heap, (-rank, text))
        self._held += size
        while len(self._heap) > 1:
            highest, last = self._heap[0]
            size = len(last.encode())
            if self._held - size < SAMPLE_BYTES:
                break
            heapq.heappop(self._heap)
            self._ranks.discard(-highest)
            self._held -= size

    def merge(self, other: Self) -> None:
        """Adds what another process has sampled: the result is the sample of both's documents."""
        for negative, text in other._heap:
            self._add(-negative, text, len(text.encode()))

    def texts(self) -> list[str]:
        """The documents, in the order of their hashes."""
        return [text for _, text in sorted(self._heap, reverse=True)]
