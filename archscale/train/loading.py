"""From a checkpoint to its model."""

from __future__ import annotations

import torch

from archscale.checkpoint.saving import load_checkpoint
from archscale.checkpoint.target import Target
from archscale.distributed import fragment
from archscale.model import Transformer
from archscale.plan.transfer import transfer_of
from archscale.train.build import build_model


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
