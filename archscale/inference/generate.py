"""Many texts continued at once, token by token.

Nothing depends on what else is in the batch: a row reads its own positions only, and its draws come
from a generator of its own. So a prompt has the same continuation alone and among others, up to a
tie that rounding decides.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from archscale.data.tokenizer_base import Tokenizer
from archscale.inference.sampling import NOT_FINITE, Sampling, choose_tokens
from archscale.inference.text import TextStream


class Rows(Protocol):
    """What a model has read of several texts."""

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these, and put them in this order."""

    def join(self, other: Any) -> None:
        """Append the rows of another one."""


R = TypeVar("R", bound=Rows)


class LanguageModel(Protocol[R]):
    """What continues texts (`NativeModel`, `TransformersModel`).

    Attributes:
        context: tokens that it reads at most.
    """

    context: int

    def read(self, rows: Sequence[Sequence[int]], capacity: int) -> tuple[Tensor, R]:
        """Read each row from its start, at least one token and at most `capacity`; returns the
        logits of what follows, (B, V) float32, and what was read, with room for `capacity`
        tokens."""

    def step(self, tokens: Sequence[int], rows: R) -> Tensor:
        """Read one more token of each row; returns the logits of what follows, (B, V)."""


@dataclass(frozen=True)
class Request:
    """A text to continue.

    Attributes:
        tokens: of the text, at least one, also where it is empty: the end of the document before.
        max_tokens: to add at most.
        stop: texts that end it, and are no part of it.
        seed: of its draws.
    """

    tokens: Sequence[int]
    max_tokens: int
    stop: Sequence[str] = ()
    seed: int = 0


@dataclass(frozen=True)
class Continuation:
    """What was added to a text.

    Attributes:
        text: up to the stop text.
        tokens: all that were drawn, those of the stop text too; not the end of the document.
        ended: by `max_tokens`, a stop text, or the end of the document.
    """

    text: str
    tokens: list[int]
    ended: Literal["length", "stop", "document"]


class NotFiniteError(ArithmeticError):
    """The weights give logits that are not finite."""


def window_start(count: int, context: int) -> int:
    """The first of `count` tokens that a model of this context reads for the next one.

    All, while they fit. Then it moves by a quarter of the context at a time: what is cached stays
    of use for that long, and at least three quarters of the context are seen. A function of the
    count alone, so a text goes on as if it had never been interrupted.
    """
    stride = max(1, context // 4)
    return -(-max(0, count - context) // stride) * stride


def generate(
    model: LanguageModel[R],
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    sampling: Sampling,
    *,
    batch: int = 8,
    ends: frozenset[int] | None = None,
    on_text: Callable[[int, str], None] | None = None,
) -> list[Continuation]:
    """The continuation of every request, in their order.

    Args:
        batch: texts that are continued at a time; where one ends, the next takes its place.
        ends: tokens that end a document; None: the tokenizer's.
        on_text: called with the number of a request and text that has been added to it, in whole
            characters, as soon as it is known.

    Raises:
        NotFiniteError: the model's logits are not finite.
    """
    ends = frozenset({tokenizer.eos_id}) if ends is None else ends
    longest = max((len(each.tokens) + each.max_tokens for each in requests), default=0)
    capacity = min(model.context, longest)
    waiting = deque(_Row(number, each, tokenizer) for number, each in enumerate(requests))
    done: dict[int, Continuation] = {}
    running = _Running(model, capacity)
    while running.going() or waiting:
        free = batch - len(running.going())
        fresh = [waiting.popleft() for _ in range(min(len(waiting), free))]
        logits = running.advance(fresh)[:, : tokenizer.vocab_size]
        draws = [row.random.random() for row in running.rows]
        for row, token in zip(running.rows, choose_tokens(logits, sampling, draws).tolist()):
            if token == NOT_FINITE:
                raise NotFiniteError(f"after {len(row.tokens)} tokens of text {row.number}")
            text = row.add(token, ends)
            if text and on_text is not None:
                on_text(row.number, text)
            if row.ended is not None:
                done[row.number] = Continuation(row.stream.text, row.added, row.ended)
    return [done[number] for number in range(len(requests))]


class _Row:
    """A text while it is continued.

    Attributes:
        tokens: all that there are. added: those that were drawn.
        start: the first of them that the model has read; None: it has read nothing.
    """

    def __init__(self, number: int, request: Request, tokenizer: Tokenizer):
        self.number, self._request = number, request
        self.tokens = list(request.tokens)
        self.added: list[int] = []
        self.stream = TextStream(tokenizer, self.tokens, request.stop)
        self.random = random.Random(request.seed)
        self.start: int | None = None
        self.ended: Literal["length", "stop", "document"] | None = None

    def add(self, token: int, ends: frozenset[int]) -> str:
        """Take in a token that was drawn; returns the text that it makes known."""
        if token in ends:
            self.ended = "document"
            return self.stream.finish()
        self.tokens.append(token)
        self.added.append(token)
        text = self.stream.add(token)
        if self.stream.stopped:
            self.ended = "stop"
        elif len(self.added) == self._request.max_tokens:
            text += self.stream.finish()
            # What the decoder held back may complete a stop text.
            self.ended = "stop" if self.stream.stopped else "length"
        return text


class _Running(Generic[R]):
    """The texts that are continued at the moment, and what the model has read of them."""

    def __init__(self, model: LanguageModel[R], capacity: int):
        self.rows: list[_Row] = []
        self._model, self._capacity = model, capacity
        self._read: R | None = None  # of `rows`, in their order

    def going(self) -> list[_Row]:
        """The texts that have not ended."""
        return [row for row in self.rows if row.ended is None]

    def advance(self, fresh: list[_Row]) -> Tensor:
        """Drop the texts that have ended, add those that are `fresh`, read what is new of each;
        returns the logits of what follows, (B, V), in the order that `rows` has afterwards."""
        moved = {id(row) for row in self.going() if row.start != self._start(row)}
        anew = [row for row in self.rows if id(row) in moved] + fresh
        self._keep([row for row in self.going() if id(row) not in moved])
        logits = []
        if self._read is not None:
            logits.append(self._model.step([row.tokens[-1] for row in self.rows], self._read))
        if anew:
            for row in anew:
                row.start = self._start(row)
            windows = [row.tokens[row.start :] for row in anew]
            first_logits, read = self._model.read(windows, self._capacity)
            logits.append(first_logits)
            if self._read is None:
                self._read = read
            else:
                self._read.join(read)
            self.rows += anew
        return torch.cat(logits)

    def _start(self, row: _Row) -> int:
        return window_start(len(row.tokens), self._model.context)

    def _keep(self, rows: list[_Row]) -> None:
        if not rows:
            self._read = None
        elif len(rows) < len(self.rows):
            assert self._read is not None
            kept = {id(row) for row in rows}
            self._read.keep([place for place, row in enumerate(self.rows) if id(row) in kept])
        self.rows = rows
