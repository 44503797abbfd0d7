"""What is evaluated: the model of a run, a checkpoint or an export, with its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from archscale.checkpoint.target import Target, find_target
from archscale.config import load_config
from archscale.config.sections import DataConfig
from archscale.data.split import TokenSplit
from archscale.data.tokenizer import Tokenizer, load_tokenizer
from archscale.errors import CheckpointError, ConfigError
from archscale.evaluation.exported import TransformersScores
from archscale.evaluation.perplexity import LossModel
from archscale.export.fast_tokenizer import HARD_TEXTS
from archscale.files import CONFIG, TOKENIZER
from archscale.inference.exported import TransformersModel, is_exported, load_exported
from archscale.inference.scoring import TransformerScores
from archscale.inference.task_model import TaskModel
from archscale.inference.text_model import TextModel
from archscale.model import Transformer
from archscale.train.loading import load_model, text_model

EXPORT_BATCH = 8  # sequences of a forward pass, where no config says how many


@dataclass(frozen=True)
class Subject:
    """A model that is evaluated.

    Attributes:
        model: its losses and logits.
        text: as it continues texts.
        batch_size: sequences of a forward pass, unless another number is asked for.
        native: the model itself, and the checkpoint that it comes from; None for an export.
    """

    path: Path
    model: LossModel
    text: TextModel
    batch_size: int
    native: tuple[Transformer, Target] | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        return self.text.tokenizer

    @property
    def task_model(self) -> TaskModel:
        """The model as tasks use it."""
        return TaskModel(self.text, self.model)

    @property
    def data(self) -> DataConfig | None:
        """What the run says of its data now; None for an export."""
        if self.native is None:
            return None
        return load_config(self.native[1].run_dir / CONFIG).data

    def check_data(self, split: TokenSplit, path: str) -> None:
        """Raises ConfigError where ids of the data may mean other texts than the model's."""
        other = bool(split.fingerprint) and split.fingerprint != self.tokenizer.fingerprint
        if other and self.native is None:  # the tokenizer of an export is a copy in another format
            theirs = load_tokenizer(path)
            other = any(theirs.encode(text) != self.tokenizer.encode(text) for text in HARD_TEXTS)
        if not other and split.vocab_size <= self.model.vocab_size:
            return
        own = self.path if self.native is None else self.native[1].run_dir / TOKENIZER
        raise ConfigError(
            f"the data were made with another tokenizer, of {split.vocab_size} ids, than the"
            f" model's, of {self.tokenizer.vocab_size}",
            path,
            f"prepare them with the one in {own}, or give their text with --text",
        )


def load_subject(path: Path, device: torch.device) -> Subject:
    """The model that a path names, on the device.

    Raises:
        CheckpointError: there is none, it is damaged, or its run had diverged.
        DataError: its tokenizer is gone, damaged or another one.
    """
    if not path.is_dir():
        problem = "not a directory" if path.exists() else "no such directory"
        raise CheckpointError(
            problem, str(path), "name a run directory, a checkpoint in one, or an exported model"
        )
    if is_exported(path):
        text = load_exported(path, device)
        assert isinstance(text.model, TransformersModel)
        return Subject(path, TransformersScores(text.model, str(path), device), text, EXPORT_BATCH)
    target = find_target(path)
    config = target.config
    model = load_model(target, device)
    assert config.model.vocab_size is not None, "a resolved config"
    scores = TransformerScores(
        model, str(path), config.model.context, config.model.vocab_size, device
    )
    batch = config.training.micro_batch
    return Subject(path, scores, text_model(target, model), batch, (model, target))
