"""A model and its tokenizer, as whoever has text uses them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from archscale.data.tokenizer_base import Tokenizer
from archscale.inference.generate import LanguageModel


@dataclass(frozen=True)
class TextModel:
    """A model that continues text.

    Attributes:
        before: tokens that stand before every text. empty: those of an empty text; at least one.
        ends: tokens that end a document.
        name: where it comes from, for messages.
    """

    model: LanguageModel[Any]
    tokenizer: Tokenizer
    before: tuple[int, ...]
    empty: tuple[int, ...]
    ends: frozenset[int]
    name: str

    @classmethod
    def of_run(cls, model: LanguageModel[Any], tokenizer: Tokenizer, name: str) -> Self:
        """A model as runs are trained: a document starts after the end of the one before."""
        end = tokenizer.eos_id
        return cls(model, tokenizer, (end,), (end,), frozenset({end}), name)

    def tokens(self, text: str) -> list[int]:
        """What the model reads of a text that begins a document."""
        return [*self.before, *self.tokenizer.encode(text)] or list(self.empty)
