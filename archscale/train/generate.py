"""Continue a prompt with the newest checkpoint of a run."""

from __future__ import annotations

from pathlib import Path

import torch

from archscale.checkpoint.directory import read_state
from archscale.checkpoint.saving import load_checkpoint
from archscale.config import Config, load_config
from archscale.data.shards import read_manifest
from archscale.data.tokenizer import Tokenizer, load_kept_tokenizer, load_tokenizer
from archscale.distributed import fragment
from archscale.errors import CheckpointError, DataError
from archscale.files import CHECKPOINTS, CONFIG, TOKENIZER, checkpoint_steps, step_directory
from archscale.model import Transformer
from archscale.plan.transfer import transfer_of
from archscale.train.build import build_model


def load_run(run_dir: Path) -> tuple[Config, Transformer, Tokenizer]:
    """Config, model with the newest checkpoint's weights, and tokenizer of a run directory.

    Raises:
        CheckpointError: not a run directory, or one without a checkpoint.
        DataError: the run's tokenizer is gone, damaged or another one.
    """
    steps = checkpoint_steps(run_dir / CHECKPOINTS)
    if not (run_dir / CONFIG).is_file() or not steps:
        raise CheckpointError(
            "no run with a checkpoint",
            str(run_dir),
            "name a run directory, such as runs/<name>, that train has filled",
        )
    config = load_config(run_dir / CONFIG)
    checkpoint = step_directory(run_dir / CHECKPOINTS, steps[-1])
    tokenizer = _tokenizer_of(run_dir, config, read_state(checkpoint)["data"]["tokenizer"])
    model = build_model(config, tokenizer.eos_id, transfer_of(config))
    weights = {name: fragment(parameter) for name, parameter in model.named_parameters()}
    load_checkpoint(checkpoint, weights)
    return config, model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def _tokenizer_of(run_dir: Path, config: Config, fingerprint: str) -> Tokenizer:
    """The tokenizer that a run has kept, or, where it was started before runs kept theirs, that of
    its data directory; `fingerprint` is the one that the run was trained with."""
    kept = load_kept_tokenizer(run_dir / TOKENIZER)
    place = str(run_dir / TOKENIZER) if kept else config.data.train
    there = kept.fingerprint if kept else read_manifest(place).tokenizer.fingerprint
    if there != fingerprint:
        raise DataError(
            f"tokenizer {there[:12]} is there, but the run was trained with {fingerprint[:12]}",
            place,
            "copy the run's own back to there"
            if kept
            else f"name a data directory that has it as data.train in {run_dir / CONFIG}",
        )
    return kept or load_tokenizer(place)


@torch.no_grad()
def generate(
    run_dir: Path, prompt: str, *, max_tokens: int, temperature: float, top_k: int | None, seed: int
) -> str:
    """`prompt` and its continuation, up to `max_tokens` tokens or the end of the document.

    Every token reads the last `context` tokens anew.
    """
    config, model, tokenizer = load_run(run_dir)
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    ids = tokenizer.encode(prompt)
    given = [tokenizer.eos_id, *ids]  # a document starts after the end of the one before
    produced: list[int] = []
    for _ in range(max_tokens):
        window = torch.tensor([(given + produced)[-config.model.context :]], device=device)
        logits = model(window).logits[0, -1, : tokenizer.vocab_size]
        if temperature == 0:
            token = int(logits.argmax())
        else:
            if top_k is not None:
                logits[logits < logits.topk(min(top_k, len(logits))).values[-1]] = -torch.inf
            token = int(
                torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator)
            )
        if token == tokenizer.eos_id:
            break
        produced.append(token)
    return tokenizer.decode(ids + produced)
