"""From the path that a user names to a model to be used."""

from __future__ import annotations

from pathlib import Path

import torch

from archscale.checkpoint.saving import load_checkpoint
from archscale.checkpoint.target import Target, find_target
from archscale.distributed import fragment
from archscale.inference.exported import is_exported, load_exported
from archscale.inference.native import NativeModel
from archscale.inference.text_model import TextModel
from archscale.model import Transformer
from archscale.plan.transfer import transfer_of
from archscale.train.build import build_model


def load_text_model(path: Path, device: torch.device | None = None) -> TextModel:
    """What a path names: a run, a checkpoint in one, or a directory of Hugging Face files.

    Args:
        device: None: a GPU where there is one.

    Raises:
        CheckpointError: none of these, damaged, or its run had diverged.
        DataError: its tokenizer is gone, damaged or another one.
    """
    if is_exported(path):
        return load_exported(path, device)
    target = find_target(path)
    return text_model(target, load_model(target, device))


def text_model(target: Target, model: Transformer) -> TextModel:
    """The model of a checkpoint with its tokenizer."""
    device = next(model.parameters()).device
    native = NativeModel(model, target.config.model.context, device)
    return TextModel.of_run(native, target.tokenizer, str(target.checkpoint))


def load_model(target: Target, device: torch.device | None = None) -> Transformer:
    """The model of a checkpoint with its weights, ready to be used.

    Args:
        device: None: a GPU where there is one.

    Raises:
        CheckpointError: the weights do not fit the config, or cannot be read.
    """
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = target.config
    model = build_model(config, target.tokenizer.eos_id, transfer_of(config))
    weights = {name: fragment(parameter) for name, parameter in model.named_parameters()}
    load_checkpoint(target.checkpoint, weights, verified=True)  # by whoever made the target
    return model.to(device).eval()
