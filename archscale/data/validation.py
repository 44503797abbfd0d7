"""What a run is validated on: one split, or those of a mixture's sources; and its batches.

B is a micro-batch, T the context.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from archscale.config.sections import DataConfig
from archscale.data.loader import Batch
from archscale.data.split import TokenSplit
from archscale.data.stored import describe, refuse_training_files
from archscale.data.training_data import TrainingData, Vocabulary
from archscale.data.windows import IGNORE, read_windows


@dataclass(frozen=True)
class ValidationSet:
    """One split that is evaluated.

    Attributes:
        name: of the source, and of its own `val_loss/<name>`; empty for `data.val`.
        weight: in the run's `val_loss`; they add up to 1.
    """

    name: str
    split: TokenSplit
    weight: float


def validation_sets(data: DataConfig, training: TrainingData) -> list[ValidationSet]:
    """What is evaluated: `data.val`, which then alone is the run's `val_loss`, and every source of
    a mixture whose validation split holds a window. Without `data.val` these sources count as they
    are weighted in the mixture, renormalised over those that have such a split.

    Raises:
        ConfigError: `data.val` was made with another tokenizer than the training data, or files
            are both trained on and held out.
        DataError: `data.val` is missing or too short.
    """
    sets = []
    if data.val is not None:
        split = _open(data, data.val, training)
        refuse_training_files("data.val", split.files, training.files, data.val)
        vocabulary = Vocabulary.of("data.val", data.val, split, training.vocab_size)
        vocabulary.check_same(training.vocabulary)
        sets.append(ValidationSet("", split, 1.0))
    if data.mixture is None:
        return sets
    held = {
        source.name: _open(data, source.path, training)
        for source in training.sources
        if _holds_a_window(data, source.path, training)
    }
    total = sum(training.shares[name] for name in held)
    for name, split in held.items():
        owner = f"source {name} of data.mixture"
        refuse_training_files(owner, split.files, training.files, str(split.path))
        weight = 0.0 if data.val is not None else float(training.shares[name] / total)
        sets.append(ValidationSet(name, split, weight))
    return sets


def _open(data: DataConfig, path: str, training: TrainingData) -> TokenSplit:
    return TokenSplit(path, "validation", training.context, data.tokenizer, training.vocab_size)


def _holds_a_window(data: DataConfig, path: str, training: TrainingData) -> bool:
    """Whether the data set of a source has a validation split of at least one window."""
    facts = describe(path, data.tokenizer, training.vocab_size)
    return facts.tokens.get("validation", 0) > training.context


def validation_batches(
    split: TokenSplit, batches: int, batch_size: int, rank: int = 0, world: int = 1
) -> Iterator[Batch]:
    """The first `batches * batch_size` windows of the split, or all if there are fewer, in order,
    over the ranks.

    Every window is yielded by exactly one rank. Every rank yields the same number of batches of the
    same shape, so that collectives line up; rows without a window have all targets -100, so sum the
    loss and divide by the number of targets that are not, over all ranks.

    Args:
        batches, batch_size: how many windows, and how many of them (B) make a batch.

    Yields:
        inputs, targets: int64 [B, T].
    """
    total = min(batches * batch_size, split.num_samples)
    for first in range(0, total, batch_size * world):
        # may lie past the end: then this rank pads the whole batch
        begin = first + rank * batch_size
        indices = np.arange(begin, min(begin + batch_size, total))
        inputs = torch.full((batch_size, split.context), split.eos_id or 0, dtype=torch.int64)
        targets = torch.full((batch_size, split.context), IGNORE, dtype=torch.int64)
        if len(indices):
            held = Batch.of_windows(read_windows(split, indices))
            inputs[: len(indices)], targets[: len(indices)] = held.inputs, held.targets
        yield Batch(inputs, targets)
