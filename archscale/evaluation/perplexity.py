"""Nats per token, perplexity and bits per byte of any text, at several context lengths."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from archscale.data.split import TokenSplit
from archscale.data.tokenizer import Tokenizer
from archscale.data.windows import IGNORE, refuse_unknown_ids
from archscale.distributed import same_everywhere, shared_out
from archscale.errors import DataError, explain_os_error
from archscale.inference.scoring import LogitsModel, Window, not_finite, windows


class LossModel(LogitsModel, Protocol):
    """What also gives losses."""

    def nats(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Summed over the targets (B, T) that count: not `IGNORE`; scalar."""


@dataclass(frozen=True)
class TokenText:
    """A text as token ids, wherever they lie.

    Attributes:
        kind: "data" or "text".
        name: in results.
        label: in names of metrics: the end of its path, and a digest that tells it from others.
        where: for messages.
        tokens: their number; the first is only read, to predict the second.
        read: the ids of positions [start, stop), int64.
        lengths: UTF-8 bytes that each id stands for; None where that is not known.
        size: UTF-8 bytes of all but the first token, where that is known by itself.
        cut: whether the text has more tokens.
    """

    kind: str
    name: str
    label: str
    where: str
    tokens: int
    read: Callable[[int, int], np.ndarray]
    lengths: np.ndarray | None = None
    size: int | None = None
    cut: bool = False


@dataclass(frozen=True)
class Measured:
    """What a model makes of one text at one context length.

    Attributes:
        tokens: that were counted.
        nats: −ln of their probability, summed.
        size: UTF-8 bytes that they stand for; None where that is not known.
        cut: whether the text has more tokens.
    """

    kind: str
    name: str
    label: str
    context: int
    stride: int
    tokens: int
    nats: float
    size: int | None
    cut: bool

    def figures(self) -> dict[str, float]:
        """By their names."""
        mean = self.nats / self.tokens
        figures = {
            "nats_per_token": mean,
            # A float has no place for e^710.
            "perplexity": math.exp(mean) if mean < 700 else math.inf,
        }
        if self.size:
            figures["bits_per_byte"] = self.nats / self.size / math.log(2)
        return figures

    def key(self, context: int) -> str:
        """The name that tells it from others of the same model, whose context is given."""
        usual = self.context == context and self.stride == context
        stride = "" if self.stride == self.context else f"s{self.stride}"
        settings = "" if usual else f"{self.context}{stride}"
        settings += f"n{self.tokens}" if self.cut else ""
        return f"{self.label}@{settings}" if settings else self.label


def _label(path: str, content: bytes) -> str:
    """The end of a path, and a digest of what lies there: files of one name are many."""
    name = path.rstrip("/").rpartition("/")[2] or path
    return f"{name}-{hashlib.sha256(content).hexdigest()[:6]}"


def read_text(
    path: Path, name: str, tokenizer: Tokenizer, start_id: int, most: int | None
) -> TokenText:
    """A file of UTF-8 text, as one document after the token `start_id`.

    Args:
        most: tokens from its start that are counted; None: all.

    Raises:
        DataError: it cannot be read, is not UTF-8, or is empty.
    """
    remedy = "give a file of UTF-8 text"
    try:
        content = path.read_bytes()
    except OSError as error:
        cause, remedy = explain_os_error(error, remedy)
        raise DataError(f"cannot read the text: {cause}", str(path), remedy) from error
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        problem = f"byte {error.start + 1} is not UTF-8"
        raise DataError(problem, str(path), "convert the file, for example with iconv") from error
    ids = np.concatenate([[start_id], tokenizer.encode_document(text)]).astype(np.int64)
    if len(ids) < 2:
        raise DataError("there is no text in it", str(path), remedy)
    label = _label(str(path), content)
    count = len(ids) if most is None else min(len(ids), most + 1)
    cut = count < len(ids)
    # Of a part the bytes are known by its tokens only.
    lengths, size = (tokenizer.token_bytes(), None) if cut else (None, len(content))

    def read(start: int, stop: int) -> np.ndarray:
        return ids[start:stop]

    return TokenText("text", name, label, str(path), count, read, lengths, size, cut)


def read_data(
    path: str, name: str, tokenizer: str | None, vocab_size: int, most: int | None
) -> tuple[TokenText, TokenSplit]:
    """The validation split of a prepared data set, or token files of another project.

    Args:
        tokenizer: as `data.tokenizer`, for files that do not say theirs.
        vocab_size: of the model.
        most: tokens from its start that are counted; None: all.

    Raises:
        DataError: it is missing or damaged, or has too few tokens.
    """
    split = TokenSplit(path, "validation", 1, tokenizer, vocab_size)
    count = split.num_tokens if most is None else min(split.num_tokens, most + 1)

    def read(start: int, stop: int) -> np.ndarray:
        ids = split.tokens(start, stop)
        refuse_unknown_ids(split, ids)
        return ids

    label, cut = _label(path, split.origin.encode()), count < split.num_tokens
    text = TokenText("data", name, label, path, count, read, split.token_bytes, cut=cut)
    return text, split


def measure(
    model: LossModel, text: TokenText, context: int, stride: int, batch_size: int
) -> Measured:
    """Score a text; all ranks together, and each has the result. It is bitwise the same on any
    number of them.

    Args:
        context, stride: of `windows`. batch_size: windows of one forward pass.

    Raises:
        Diverged: the loss is not finite.
        DataError: the data cannot be read, or have an id outside the vocabulary.
    """
    cut = list(windows(text.tokens, context, stride))
    batches = [cut[first : first + batch_size] for first in range(0, len(cut), batch_size)]

    def score(batch: Sequence[Window]) -> tuple[float, int]:
        inputs, targets = _tensors(text, batch)
        size = 0
        if text.lengths is not None:
            counted = targets[targets != IGNORE]
            size = int(text.lengths[counted.numpy()].sum(dtype=np.int64))
        with torch.no_grad():
            nats = model.nats(inputs.to(model.device), targets.to(model.device))
        return nats.item(), size

    parts = shared_out(batches, score)
    nats = math.fsum(part for part, _ in parts)  # exact, in whatever order
    if not math.isfinite(nats):
        raise same_everywhere(not_finite(model.where))
    size = text.size if text.lengths is None else sum(part for _, part in parts)
    tokens = text.tokens - 1
    return Measured(text.kind, text.name, text.label, context, stride, tokens, nats, size, text.cut)


def _tensors(text: TokenText, batch: Sequence[Window]) -> tuple[Tensor, Tensor]:
    """Inputs and targets (B, T) of windows, filled up on the right; targets that do not count are
    `IGNORE`."""
    width = max(window.stop - window.first for window in batch)
    inputs = torch.zeros((len(batch), width), dtype=torch.int64)
    targets = torch.full((len(batch), width), IGNORE, dtype=torch.int64)
    for row, (first, stop, counted) in enumerate(batch):
        ids = torch.from_numpy(text.read(first, stop + 1))
        inputs[row, : stop - first] = ids[:-1]
        targets[row, stop - first - counted : stop - first] = ids[1 + stop - first - counted :]
    return inputs, targets
