"""A model as tasks use it: it scores texts, and continues them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from archscale.distributed import same_everywhere, shared_out
from archscale.inference.generate import NotFiniteError, Request, generate
from archscale.inference.sampling import Sampling
from archscale.inference.scoring import Diverged, LogitsModel, not_finite
from archscale.inference.text_model import TextModel


@dataclass(frozen=True)
class TaskModel:
    """A model with its tokenizer.

    Attributes:
        text: as it continues texts.
        scores: as it scores them.
        together: whether all ranks take part in every forward pass, so that all of them have to
            continue the same texts.
    """

    text: TextModel
    scores: LogitsModel
    together: bool = False

    def write(self, requests: Sequence[Request], sampling: Sampling, batch: int) -> list[str]:
        """The text that continues each request; all ranks together, and each has all texts.

        Args:
            batch: texts that a rank continues at a time.

        Raises:
            Diverged: logits are not finite.
        """
        model, tokenizer, ends = self.text.model, self.text.tokenizer, self.text.ends

        def written(some: Sequence[Request]) -> list[str]:
            try:
                done = generate(model, tokenizer, some, sampling, batch=batch, ends=ends)
            except NotFiniteError as error:
                raise not_finite(self.text.name) from error
            return [each.text for each in done]

        if self.together:
            try:
                return written(requests)
            except Diverged as error:  # the logits are the same on all ranks
                same_everywhere(error)
                raise
        parts = [requests[first : first + batch] for first in range(0, len(requests), batch)]
        return [text for part in shared_out(parts, written) for text in part]
