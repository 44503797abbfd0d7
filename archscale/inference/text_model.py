"""A model with its tokenizer, as tasks and samples use it: text in, text out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from archscale.data.tokenizer import Tokenizer
from archscale.inference.scoring import LogitsModel


@dataclass(frozen=True)
class Continuation:
    """How a prompt is continued.

    Attributes:
        max_tokens: most new ones; fewer where the document ends.
        stop: texts before which the answer ends.
        temperature: 0: always the likeliest token.
        top_k, top_p: tokens that are drawn from; None: all.
    """

    max_tokens: int
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None


Write = Callable[[Sequence[Sequence[int]], Continuation, int], list[str]]


@dataclass(frozen=True)
class TextModel:
    """A model with its tokenizer.

    Attributes:
        scores: its logits.
        write: continues prompts (token ids) in batches of at most a number; every rank has all
            answers.
        prefix: ids in front of every text, as in training.
    """

    scores: LogitsModel
    tokenizer: Tokenizer
    write: Write
    prefix: Sequence[int]

    @property
    def start_id(self) -> int:
        """The token that the first one of a text is predicted from."""
        return self.prefix[-1] if self.prefix else self.tokenizer.eos_id
