"""How likely a model finds texts that are given, whatever computes its logits.

All ranks call these together, and each scores a part: which sequences stand in one batch does not
depend on the number of ranks, so neither does any result.

Shapes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from archscale.distributed import shared_out
from archscale.errors import CheckpointError, ConfigError
from archscale.model.transformer import ModelOutput

LOGITS = 1 << 28  # float32 logits that one forward pass may give: 1 GiB


class LogitsModel(Protocol):
    """What gives logits: a plain model, one of transformers, or one that is being trained.

    Attributes:
        where: its name, for messages.
        context: most tokens that it reads at once.
        vocab_size: logits of a position.
        device: where its tokens have to lie.
    """

    where: str
    context: int
    vocab_size: int
    device: torch.device

    def logits(self, tokens: Tensor) -> Tensor:
        """(B, T) int64 → logits of the token after each position, (B, T, V) float32. A position
        sees those before it only, so rows may be padded on the right."""


class Window(NamedTuple):
    """Which tokens of a long text are read at once, and how many of the targets count.

    Attributes:
        first, stop: positions of the tokens that are read; their targets are one further.
        counted: targets at the end of the window; those before them were counted earlier.
    """

    first: int
    stop: int
    counted: int


def windows(tokens: int, context: int, stride: int) -> Iterator[Window]:
    """Windows of up to `context` tokens, `stride` apart, over a text of `tokens`: every token but
    the first is counted once.

    With `stride` = `context` they do not overlap, and the first target of each is predicted from
    one token. A smaller stride gives every target at least context − stride + 1 tokens, where the
    text has so many before it.
    """
    for start in range(0, tokens - 1, stride):
        stop = min(start + stride, tokens - 1)
        yield Window(max(0, start + stride - context), stop, stop - start)


class Likelihood(NamedTuple):
    """How a model finds a continuation.

    Attributes:
        log_probability: ln of its probability, after what is given.
        greedy: whether each of its tokens is the likeliest.
    """

    log_probability: float
    greedy: bool


def log_likelihoods(
    model: LogitsModel, requests: Sequence[tuple[list[int], list[int]]], batch_size: int
) -> list[Likelihood]:
    """How likely the model finds each continuation; on every rank all of them.

    Of a text that is longer than the model's context the beginning is left out.

    Args:
        requests: (tokens that are given, at least one, and tokens that follow).
        batch_size: most sequences of one forward pass.

    Raises:
        ConfigError: a continuation is longer than the context.
        Diverged: logits are not finite.
    """
    check_lengths(model, requests)
    # Answers of one token after the same text share one sequence.
    sharing: dict[tuple[int, ...], list[int]] = {}
    for number, (given, following) in enumerate(requests):
        if not following:
            continue
        row = tuple([*given, *following][-model.context - 1 : -1])
        sharing.setdefault(row, []).append(number)
    # The longest first: what does not fit into memory fails at once.
    rows = sorted(sharing, key=lambda row: (-len(row), row))
    batches = list(batched(rows, batch_size, model))

    def score(batch: Sequence[tuple[int, ...]]) -> dict[int, Likelihood]:
        wanted = [
            (n, requests[number][1], number)
            for n, row in enumerate(batch)
            for number in sharing[row]
        ]
        scored = _continuations(model, batch, [(n, ids) for n, ids, _ in wanted])
        return {number: each for (_, _, number), each in zip(wanted, scored)}

    # No tokens follow with certainty.
    likelihoods = {n: Likelihood(0.0, True) for n, (_, ids) in enumerate(requests) if not ids}
    for part in shared_out(batches, score):
        likelihoods |= part
    return [likelihoods[number] for number in range(len(requests))]


def check_lengths(model: LogitsModel, requests: Sequence[tuple[list[int], list[int]]]) -> None:
    """ConfigError if a continuation is longer than the model's context."""
    longest = max((len(following) for _, following in requests), default=0)
    if longest > model.context:
        raise ConfigError(
            f"a text of {longest} tokens is to be scored at once, and the model's context is"
            f" {model.context}",
            model.where,
            "choose a task with shorter answers, or a model with a longer context",
        )


def batched(
    rows: Sequence[tuple[int, ...]], batch_size: int, model: LogitsModel
) -> Iterator[Sequence[tuple[int, ...]]]:
    """The rows, in order, in batches of at most `batch_size` whose logits fit into memory.

    Args:
        rows: of at least one token each, the longest first.
    """
    first = 0
    while first < len(rows):
        size = max(1, LOGITS // (len(rows[first]) * model.vocab_size))
        count = min(batch_size, size)
        yield rows[first : first + count]
        first += count


def padded(rows: Sequence[Sequence[int]], device: torch.device, filler: int = 0) -> Tensor:
    """Rows of different lengths as one tensor (B, T), filled up on the right."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[filler] * (width - len(row))] for row in rows], device=device)


@torch.no_grad()
def _continuations(
    model: LogitsModel,
    batch: Sequence[tuple[int, ...]],
    wanted: Sequence[tuple[int, list[int]]],
) -> list[Likelihood]:
    """Likelihoods of tokens that follow a row of the batch, its own last ones included: of (row,
    tokens)."""
    logits = model.logits(padded(batch, model.device))
    sums, greedy = [], []
    for number, following in wanted:
        stop = len(batch[number])
        own = logits[number, stop - len(following) : stop].float()
        targets = torch.tensor(following, device=own.device)
        log_probabilities = own.log_softmax(-1).gather(1, targets[:, None]).double()
        sums.append(log_probabilities.sum())
        greedy.append((own.argmax(-1) == targets).all())
    values = torch.stack(sums).tolist()
    if not all(map(math.isfinite, values)):
        raise not_finite(model.where)
    return [Likelihood(value, bool(flag)) for value, flag in zip(values, greedy)]


class Diverged(CheckpointError):
    """Weights give logits that are not finite, and so no probabilities."""


def not_finite(where: str, at: str = "") -> Diverged:
    """What is said of such weights.

    Args:
        at: at which text.
    """
    return Diverged(
        f"the weights give logits that are not finite{at and f', {at}'}",
        where,
        "name a run or checkpoint that has not diverged",
    )


class TransformerScores:
    """A `LogitsModel` of a `Transformer`, or of what an engine calls in its place.

    Args:
        forward: called as the model is. Where it is sharded, all ranks take part in every pass.
        where, context, vocab_size, device: as of `LogitsModel`.
    """

    def __init__(
        self,
        forward: Callable[..., ModelOutput],
        where: str,
        context: int,
        vocab_size: int,
        device: torch.device,
    ):
        self.where, self.context, self.vocab_size = where, context, vocab_size
        self.device, self._forward = device, forward

    def logits(self, tokens: Tensor) -> Tensor:
        # Compiled blocks would be compiled anew for every length.
        with torch.compiler.set_stance("force_eager"):
            logits = self._forward(tokens).logits
        assert logits is not None
        return logits

    def nats(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The loss summed over the targets (B, T) that count, in nats; scalar."""
        loss = self._forward(tokens, targets).loss
        assert loss is not None
        return loss
