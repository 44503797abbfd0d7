"""lm-eval's view of a model: texts in, likelihoods and texts out. Needs the package lm_eval.

Every rank is given all requests and has all answers; how they are spread over ranks is not
lm-eval's matter (`shared_out`), so that a model whose forward pass takes all ranks works as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.model import LM

from archscale.errors import ConfigError
from archscale.inference.scoring import log_likelihoods, windows
from archscale.inference.text_model import Continuation, TextModel

MAX_NEW_TOKENS = 256  # where a task does not say, as everywhere in lm-eval


class HarnessModel(LM):
    """A `TextModel` for lm-eval.

    A text starts with the model's own prefix; one without any words before it is predicted from
    the end of a document.

    Args:
        batch_size: sequences of one forward pass.
    """

    def __init__(self, model: TextModel, batch_size: int):
        super().__init__()
        self._model, self._batch_size = model, batch_size
        self._encode = model.tokenizer.encode

    @property
    def tokenizer_name(self) -> str:
        return self._model.tokenizer.fingerprint

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(ln of the probability, whether it is the likeliest) of each request's (context,
        continuation)."""
        pairs = [self._pair(*request.args) for request in requests]
        return [tuple(each) for each in self._score(pairs)]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """ln of the probability of whole texts, in windows as long as the context."""
        pairs: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        context = self._model.scores.context
        for number, request in enumerate(requests):
            ids = [self._model.start_id, *self._encode(request.args[0])]
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
        alike: dict[Continuation, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(_continuation(request.args[1]), []).append(number)
        for how, numbers in alike.items():
            room = self._model.scores.context - how.max_tokens
            if room < 1:
                raise ConfigError(
                    f"a task asks for {how.max_tokens} new tokens, and the model's context is"
                    f" {self._model.scores.context}",
                    self._model.scores.where,
                    "set max_gen_toks in the task's generation_kwargs, or leave the task out",
                )
            prompts = [
                [*self._model.prefix, *self._encode(requests[number].args[0])][-room:]
                or [self._model.start_id]
                for number in numbers
            ]
            for number, text in zip(numbers, self._model.write(prompts, how, self._batch_size)):
                answers[number] = text
        return answers

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Any]:
        return log_likelihoods(self._model.scores, pairs, self._batch_size)

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens that are given, and tokens that follow. Both texts are encoded together, as they
        would stand in a document; white space between them belongs to what follows."""
        kept = context.rstrip()
        continuation = context[len(kept) :] + continuation
        given, both = self._encode(kept), self._encode(kept + continuation)
        # Nothing is left where a token reaches across.
        following = both[len(given) :] or self._encode(continuation)
        start = self._model.prefix if kept else [self._model.start_id]
        return [*start, *given] or [self._model.start_id], following


def _continuation(told: Mapping[str, Any]) -> Continuation:
    """How a task wants its texts: its `generation_kwargs`."""
    until = told.get("until") or []
    until = [until] if isinstance(until, str) else until
    names = ("max_gen_toks", "max_new_tokens", "max_tokens")
    most = next((told[name] for name in names if told.get(name)), MAX_NEW_TOKENS)
    temperature = float(told.get("temperature") or 0.0) if told.get("do_sample") else 0.0
    top_k, top_p = told.get("top_k"), told.get("top_p")
    return Continuation(
        max_tokens=int(most),
        stop=tuple(text for text in until if text),
        temperature=temperature,
        top_k=int(top_k) if top_k else None,
        top_p=float(top_p) if top_p else None,
    )
