"""Whether tokens stand for the text they were made from: a tokenizer may fold, drop or replace what
it does not know, and bits per byte divide by the bytes that its tokens are said to stand for."""

import zlib
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np

from archscale.data.tokenizer import Tokenizer
from archscale.errors import DataError

LIMIT = 0.01  # of the text may be lost
# White space may come back as other white space to a larger share: prose loses its line breaks,
# which are one or two bytes in a hundred, where code would lose all of its form.
WHITE_SPACE_LIMIT = 0.05
_FIRST_BYTES = 20_000  # of documents that are decoded whatever they are
_EVERY = 64  # of the others, one in so many is decoded, chosen by its content
_PIECE = 1 << 18  # tokens whose bytes are counted at a time
_EXCERPT = 100_000  # characters of a document that are decoded at most


@dataclass
class Fidelity:
    """Counts over documents, which add up over processes.

    Attributes:
        documents: encoded.
        text_bytes, token_bytes: UTF-8 bytes of their text, and those that their tokens stand for.
        missing_bytes: by which the tokens of a document stand for less than its text, summed.
        decoded_bytes: of text that was decoded again.
        changed_bytes: of these, characters that did not come back, white space apart.
        blank_bytes: white space that did not come back.
    """

    documents: int = 0
    text_bytes: int = 0
    token_bytes: int = 0
    missing_bytes: int = 0
    decoded_bytes: int = 0
    changed_bytes: int = 0
    blank_bytes: int = 0

    def add(self, text: str, text_bytes: int, ids: np.ndarray, tokenizer: Tokenizer) -> None:
        """One document.

        Args:
            text: of the document.
            text_bytes: its length in UTF-8.
            ids: what `tokenizer.encode_document(text)` gave.
            tokenizer: that made them.
        """
        # In pieces, as numbers of bytes take more memory than a long text.
        token_bytes = sum(
            int(tokenizer.lengths[ids[start : start + _PIECE]].sum())
            for start in range(0, len(ids), _PIECE)
        )
        self.documents += 1
        self.text_bytes += text_bytes
        self.token_bytes += token_bytes
        self.missing_bytes += max(0, text_bytes - token_bytes)
        excerpt = text[:_EXCERPT]
        if self.decoded_bytes >= _FIRST_BYTES and zlib.crc32(excerpt.encode()) % _EVERY:
            return
        if len(excerpt) < len(text):
            ids, text_bytes = tokenizer.encode_document(excerpt), len(excerpt.encode())
        self.decoded_bytes += text_bytes
        decoded = tokenizer.decode(ids.tolist())
        if decoded != excerpt:
            changed, blank = _difference(excerpt, decoded)
            self.changed_bytes += changed
            self.blank_bytes += blank

    def merge(self, other: Self) -> None:
        """Adds the counts of other documents."""
        for name, count in asdict(other).items():
            setattr(self, name, getattr(self, name) + count)

    def to_json(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def from_json(cls, counts: dict[str, Any]) -> Self:
        return cls(**counts)

    @property
    def lost_share(self) -> float:
        """Share of the text that cannot be had back from the tokens: of its bytes where tokens
        stand for fewer than there are, or of the documents that were decoded."""
        missing = self.missing_bytes / max(1, self.text_bytes)
        return max(missing, self.changed_bytes / max(1, self.decoded_bytes))

    @property
    def blank_share(self) -> float:
        """Share of the decoded text that is white space and came back as other white space, or
        not at all."""
        return self.blank_bytes / max(1, self.decoded_bytes)

    def report(self) -> str | None:
        """One line when tokens and text differ."""
        lines = []
        if self.lost_share:
            lines.append(f"the tokenizer loses {_percent(self.lost_share)} of the text")
        if self.blank_share:
            lines.append(
                f"white space, {_percent(self.blank_share)} of the text, comes back otherwise"
            )
        if self.token_bytes == 0 and self.text_bytes:
            lines.append("its tokens stand for no text, so there is no val_bits_per_byte")
        elif self.token_bytes != self.text_bytes:
            off = self.text_bytes / self.token_bytes - 1
            lines.append(
                f"the tokens count {self.token_bytes:,} bytes where the text has"
                f" {self.text_bytes:,}; val_bits_per_byte is off by {_percent(off, sign=True)}"
            )
        return "; ".join(lines) or None

    def refuse(self, lossy: bool) -> None:
        """Refuses a tokenizer that loses more than LIMIT of the text, or WHITE_SPACE_LIMIT in white
        space, unless that is wanted.

        Raises:
            DataError: it does.
        """
        much = self.lost_share > LIMIT or self.blank_share > WHITE_SPACE_LIMIT
        if much and not lossy:
            raise DataError(
                str(self.report()),
                "tokenizer",
                "give another tokenizer, or accept the loss with lossy: true in the recipe",
            )


def _difference(text: str, decoded: str) -> tuple[int, int]:
    """UTF-8 bytes of the characters of either that the other has not: (others, white space).
    Together at least 1, also where only their order differs."""
    before, after = Counter(text), Counter(decoded)
    others = blanks = 0
    for surplus in (before - after, after - before):
        sizes = {
            white: sum(
                len(character.encode()) * count
                for character, count in surplus.items()
                if character.isspace() == white
            )
            for white in (False, True)
        }
        others, blanks = max(others, sizes[False]), max(blanks, sizes[True])
    return (others, blanks) if others or blanks else (1, 0)


def _percent(share: float, sign: bool = False) -> str:
    """A share as text, with a digit that counts however small it is."""
    return f"{share:{'+' if sign else ''}.{1 if abs(share) >= 0.001 else 4}%}"
