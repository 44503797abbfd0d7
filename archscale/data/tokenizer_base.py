"""What every tokenizer here can do, and what holds for all of them.

Text is data: no text becomes the token that ends a document. A long document is encoded in pieces,
cut where no token can reach across, so that the memory it takes does not grow with its length.
"""

import functools
import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from archscale.errors import DataError

PIECE_CHARS = 100_000  # of a long document are encoded at a time


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        kind: "sentencepiece" or "huggingface".
        file: name that `content` is saved under.
        content: the tokenizer, serialized.
        fingerprint: sha256 of `content`, hexadecimal.
        vocab_size: ids are in [0, vocab_size).
        eos_id: the token after every document.
        eos_text: text that would be read as that token if nothing prevented it.
    """

    kind: str
    file: str

    def __init__(self, content: bytes, vocab_size: int, eos_id: int, eos_text: str):
        self.content, self.vocab_size = content, vocab_size
        self.eos_id, self.eos_text = eos_id, eos_text
        self.fingerprint = hashlib.sha256(content).hexdigest()

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """The text; special tokens stand for nothing, bytes that are not UTF-8 become U+FFFD."""

    @abstractmethod
    def token_bytes(self) -> np.ndarray:
        """int32 [vocab_size]: UTF-8 bytes each id stands for, 0 for special tokens."""

    @abstractmethod
    def _encode_texts(self, texts: list[str]) -> list[list[int]]:
        """Token ids of whole documents, on all cores."""

    @abstractmethod
    def _encode_piece(self, text: str, first: bool) -> list[int]:
        """Token ids of a piece of a document, in this thread. Only the `first` piece gets the space
        that some tokenizers put before a document."""

    @abstractmethod
    def _cut(self, text: str, position: int) -> int:
        """The first place from `position` on that no token reaches across and where the sides do
        not change each other's tokens; the end of the text if none is known."""

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """`token_bytes`, kept."""
        return self.token_bytes()

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, on all cores; no special tokens are added."""
        batch = self._encode_texts(texts)
        for number, ids in enumerate(batch):
            if self.eos_id in ids:
                batch[number] = self._encode_around_eos(texts[number], True)
        return batch

    def encode(self, text: str) -> list[int]:
        """Token ids of one text; no special tokens are added."""
        return self.encode_document(text).tolist()

    def encode_document(self, text: str) -> np.ndarray:
        """uint32 [tokens]: the ids that `encode` gives, from this thread alone, in memory of a few
        bytes for each byte of the text."""
        if len(text) <= PIECE_CHARS:
            return self._encode_guarded(text, True)
        ids = bytearray()
        for start, stop in self._pieces(text):
            ids += self._encode_guarded(text[start:stop], start == 0).tobytes()
        return np.frombuffer(ids, np.uint32)

    def _pieces(self, text: str) -> Iterator[tuple[int, int]]:
        """(start, stop) of pieces of about PIECE_CHARS, which together are the text."""
        start = 0
        while start < len(text):
            stop = start + PIECE_CHARS
            stop = self._cut(text, stop) if stop < len(text) else len(text)
            yield start, stop
            start = stop

    def _encode_guarded(self, text: str, first: bool) -> np.ndarray:
        ids = np.array(self._encode_piece(text, first), np.uint32)
        if (ids == self.eos_id).any():
            ids = np.array(self._encode_around_eos(text, first), np.uint32)
        return ids

    def _encode_around_eos(self, text: str, first: bool) -> list[int]:
        """Token ids of a text that spells the end of a document: cut inside each spelling, or,
        where a normalizer makes the spelling, between all characters.

        Raises:
            DataError: a single character is the end of a document.
        """
        spelled = re.compile(f"(?={re.escape(self.eos_text)})")  # matches may overlap
        inside = [match.start() + 1 for match in spelled.finditer(text)]
        for cuts in (inside, range(1, len(text))):
            ids: list[int] = []
            for start, stop in pairwise([0, *cuts, len(text)]):
                ids += self._encode_piece(text[start:stop], first and start == 0)
            if self.eos_id not in ids:
                return ids
        raise DataError(
            f"a document has the text {self.eos_text!r}, which this tokenizer can only write as its"
            " end-of-document token",
            "tokenizer.eos",
            "name a token there that is not in the text, or give another tokenizer",
        )


def inner_pairs(pieces: Iterator[str]) -> frozenset[str]:
    """Two neighbouring characters, for all that stand inside a piece of the vocabulary. A BPE
    cannot join what lies on the two sides of any other pair."""
    return frozenset(piece[at : at + 2] for piece in pieces for at in range(len(piece) - 1))
