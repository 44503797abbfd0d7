"""lm-eval's view of a model: texts in, likelihoods and texts out. Needs the package lm_eval.

Every rank is given all requests and has all answers; how they are spread over ranks is not
lm-eval's matter (`shared_out`), so that a model whose forward pass takes all ranks works as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.model import LM

from archscale.inference.generate import Request
from archscale.inference.sampling import Sampling
from archscale.inference.scoring import Likelihood, check_lengths, log_likelihoods, windows
from archscale.inference.task_model import TaskModel

MAX_NEW_TOKENS = 256  # where a task does not say, as everywhere in lm-eval


class HarnessModel(LM):
    """A `TaskModel` for lm-eval.

    A text starts as the model's texts do. One without any words before it is predicted from what
    stands for an empty text.

    Attributes:
        where: the model's name, for messages.

    Args:
        batch_size: sequences of one forward pass.
    """

    def __init__(self, model: TaskModel, batch_size: int):
        super().__init__()
        self._model, self._batch_size = model, batch_size
        self.where = model.text.name
        self._text, self._encode = model.text, model.text.tokenizer.encode

    @property
    def tokenizer_name(self) -> str:
        return self._text.tokenizer.fingerprint

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(ln of the probability, whether it is the likeliest) of each request's (context,
        continuation)."""
        pairs = [self._pair(*request.args) for request in requests]
        return [(each.log_probability, each.greedy) for each in self._score(pairs)]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """ln of the probability of whole texts, in windows as long as the context."""
        pairs: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        context = self._model.scores.context
        for number, request in enumerate(requests):
            ids = [self._text.empty[-1], *self._encode(request.args[0])]
            for first, stop, counted in windows(len(ids), context, context):
                start = stop - counted + 1
                pairs.append((ids[first:start], ids[start : stop + 1]))
                owners.append(number)
        sums = [0.0] * len(requests)
        for owner, likelihood in zip(owners, self._score(pairs)):
            sums[owner] += likelihood.log_probability
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The texts that follow, each up to its first stop string."""
        answers = [""] * len(requests)
        alike: dict[Sampling, list[tuple[int, Request]]] = {}
        for number, request in enumerate(requests):
            prompt, generation = request.args
            limits = Request(
                self._text.tokens(prompt), _max_tokens(generation), _stop(generation), number
            )
            alike.setdefault(_sampling(generation), []).append((number, limits))
        for sampling, asked in alike.items():
            texts = self._write([each for _, each in asked], sampling)
            for (number, _), text in zip(asked, texts):
                answers[number] = text
        return answers

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Likelihood]:
        return log_likelihoods(self._model.scores, pairs, self._batch_size)

    def _write(self, requests: Sequence[Request], sampling: Sampling) -> list[str]:
        return self._model.write(requests, sampling, self._batch_size)

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens that are given, and tokens that follow. Both texts are encoded together, as they
        would stand in a document; white space between them belongs to what follows."""
        kept = context.rstrip()
        continuation = context[len(kept) :] + continuation
        given, both = self._encode(kept), self._encode(kept + continuation)
        # Nothing is left where a token reaches across.
        following = both[len(given) :] or self._encode(continuation)
        return [*(self._text.before if given else self._text.empty), *given], following


class Rehearsal(HarnessModel):
    """Asks nothing of the model: every token has the probability 1/V, and no text is continued.
    What cannot be asked is an error as of the model itself."""

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Likelihood]:
        check_lengths(self._model.scores, pairs)
        nats = math.log(self._model.scores.vocab_size)
        return [Likelihood(-nats * len(following), False) for _, following in pairs]

    def _write(self, requests: Sequence[Request], sampling: Sampling) -> list[str]:
        return [""] * len(requests)


# --- what a task says of its answers: its `generation_kwargs`


def _max_tokens(generation: Mapping[str, Any]) -> int:
    names = ("max_gen_toks", "max_new_tokens", "max_tokens")
    return int(next((generation[name] for name in names if generation.get(name)), MAX_NEW_TOKENS))


def _stop(generation: Mapping[str, Any]) -> tuple[str, ...]:
    until = generation.get("until") or ()
    return tuple(filter(None, (until,) if isinstance(until, str) else until))


def _sampling(generation: Mapping[str, Any]) -> Sampling:
    """The likeliest tokens, unless the task says that they are drawn."""
    if not generation.get("do_sample") or not generation.get("temperature", 1.0):
        return Sampling(temperature=0.0, top_k=None)
    top_k = int(generation.get("top_k") or 0)
    top_p = float(generation.get("top_p") or 1.0)
    return Sampling(float(generation.get("temperature", 1.0)), top_k or None, top_p)
