"""A model of transformers, scored as a native one is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from archscale.data.windows import IGNORE
from archscale.inference.exported import TransformersModel
from archscale.inference.scoring import LOGITS


class TransformersScores:
    """A `perplexity.LossModel`.

    Args:
        model: in evaluation mode.
        where: its name, for messages.
    """

    def __init__(self, model: TransformersModel, where: str, device: torch.device):
        self._model = model.model
        self.where, self.device, self.context = where, device, model.context
        self.vocab_size = int(model.model.config.get_text_config().vocab_size)

    def logits(self, tokens: Tensor) -> Tensor:
        return self._model(input_ids=tokens, use_cache=False).logits.float()

    def nats(self, tokens: Tensor, targets: Tensor) -> Tensor:
        rows = max(1, LOGITS // (tokens.shape[1] * self.vocab_size))
        total = torch.zeros((), device=tokens.device)
        for inputs, wanted in zip(tokens.split(rows), targets.split(rows)):
            logits = self.logits(inputs).flatten(0, 1)
            total += F.cross_entropy(logits, wanted.flatten(), ignore_index=IGNORE, reduction="sum")
        return total
