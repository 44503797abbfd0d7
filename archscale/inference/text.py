"""Text of tokens that come one by one."""

from __future__ import annotations

from collections.abc import Sequence

from archscale.data.tokenizer_base import Tokenizer

REPLACED = "\ufffd"  # how a decoder shows bytes that are no character, or not yet
CONTEXT = 8  # tokens before a text: some decoders put or drop a space where their input begins


class TextStream:
    """The text that continues another: whole characters, as soon as they are known, up to the first
    stop text.

    Args:
        before: tokens of the text that is continued.
        stop: texts that end it, and are no part of it. Of several the one counts that is complete
            first, and of these the longest.

    Attributes:
        text: what is known so far.
        stopped: whether a stop text has come.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int], stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        # Tokens whose text is not known yet, behind those that the decoder needs before them.
        self._tokens = list(before[-CONTEXT:])
        self._known = len(self._tokens)
        self._held = ""  # text that may be the start of a stop text
        self.text = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Take in a token; returns what has become known of the text."""
        self._tokens.append(token)
        before, now = self._decoded()
        # The last character may not be whole. Once it is, it is released for good, though a decoder
        # that falls back to bytes would replace a whole run of them where an invalid one follows.
        if len(now) <= len(before) or now.endswith(REPLACED):
            return ""
        self._tokens = self._tokens[self._known :]
        self._known = len(self._tokens)
        return self._release(now[len(before) :], final=False)

    def finish(self) -> str:
        """The rest of the text, when no token comes any more."""
        if self.stopped:
            return ""
        before, now = self._decoded()
        self._known = len(self._tokens)
        return self._release(now[len(before) :], final=True)

    def _decoded(self) -> tuple[str, str]:
        decode = self._tokenizer.decode
        return decode(self._tokens[: self._known]), decode(self._tokens)

    def _release(self, new: str, *, final: bool) -> str:
        waiting = self._held + new
        place = first_stop(waiting, self._stop)
        if place is not None:
            released, self._held, self.stopped = waiting[:place], "", True
        else:
            held = 0 if final else longest_start(waiting, self._stop)
            released = waiting[: len(waiting) - held]
            self._held = waiting[len(released) :]
        self.text += released
        return released


def first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the stop text begins that is complete first, and of several the longest."""
    places = [(text.find(each), each) for each in stop]
    ends = [(place + len(each), place) for place, each in places if place >= 0]
    return min(ends)[1] if ends else None


def longest_start(text: str, stop: Sequence[str]) -> int:
    """Characters at the end of a text that a stop text begins with: the most there are."""
    lengths = (
        length
        for each in stop
        for length in range(1, min(len(each), len(text) + 1))
        if text.endswith(each[:length])
    )
    return max(lengths, default=0)
