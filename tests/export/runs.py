"""Run directories with weights that were never trained, nor are as they start: a step of training
would move them too little to tell one norm from another."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from archscale.checkpoint.saving import Saver
from archscale.config import Config
from archscale.config.schema import dump_config
from archscale.data.tokenizer import keep_tokenizer, load_tokenizer
from archscale.distributed import fragment
from archscale.files import CHECKPOINTS, CONFIG, METRICS, TOKENIZER
from archscale.model import Transformer, initialize
from archscale.optim.roles import assign_roles
from archscale.plan.plan import make_plan
from archscale.plan.transfer import transfer_of
from archscale.train.build import build_model, build_optimizer
from tests.train.tiny import config

STEP = 7
# A learning rate and a logit scale that transfer: width 24 from width 12.
MUP = {
    "parameterization": {
        "kind": "mup++",
        "base": {
            "lr": 0.003,
            "depth": 1,
            "width": 12,
            "heads": 3,
            "kv_heads": 1,
            "tokens": 3840,
            "batch_tokens": 384,
        },
    }
}


def perturb(model: Transformer, seed: int = 0) -> None:
    """Give every parameter, norms included, weights of its own of an everyday size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            fan_in = parameter.shape[-1] if parameter.ndim > 1 else 25
            parameter.add_(noise if name == "embedding.weight" else noise / fan_in**0.5)


def make_run(
    data: str,
    run_dir: Path,
    rule: str = "muonh",
    /,
    fill: Callable[[Transformer, Config], None] | None = None,
    **sections: Any,
) -> Path:
    """A run directory with one checkpoint; returns it.

    Args:
        fill: gives the model its weights; None: `perturb` does.
    """
    resolved = make_plan(config(data, rule, **sections).with_vocab(300)).config
    tokenizer = load_tokenizer(data)
    transfer = transfer_of(resolved)
    model = build_model(resolved, tokenizer.eos_id, transfer)
    initialize(model, 0)
    if fill is None:
        perturb(model)
    else:
        fill(model, resolved)
    run_dir.mkdir(parents=True)
    dump_config(resolved, run_dir / CONFIG)
    keep_tokenizer(tokenizer, run_dir / TOKENIZER)
    line = {"step": STEP, "tokens": STEP * 384, "loss": 3.25, "val_loss": 3.5}
    (run_dir / METRICS).write_text(json.dumps(line) + "\n")
    optimizer = build_optimizer(resolved, assign_roles(model), transfer.roles)
    weights = {name: fragment(parameter) for name, parameter in model.named_parameters()}
    data_set = {"tokenizer": tokenizer.fingerprint}
    state = {"step": STEP, "config": resolved.resolved(), "data": data_set}
    with Saver(run_dir / CHECKPOINTS, resolved.checkpoint) as saver:
        saver.save(weights, optimizer, state)
    return run_dir
