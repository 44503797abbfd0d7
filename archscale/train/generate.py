"""Continue a prompt with the newest checkpoint of a run."""

from __future__ import annotations

from pathlib import Path

import torch

from archscale.checkpoint.directory import read_state
from archscale.checkpoint.place import checkpoints_of
from archscale.checkpoint.saving import load_checkpoint
from archscale.config import Config, load_config
from archscale.data.stored import trained_tokenizer
from archscale.data.tokenizer import Tokenizer
from archscale.distributed import fragment
from archscale.errors import CheckpointError, ConfigError
from archscale.files import CONFIG, checkpoint_steps, step_directory
from archscale.model import Transformer
from archscale.plan.transfer import transfer_of
from archscale.train.build import build_model


def load_run(run_dir: Path) -> tuple[Config, Transformer, Tokenizer]:
    """Config, model with the newest checkpoint's weights, and tokenizer of a run directory.

    Raises:
        CheckpointError: not a run directory, or one without a checkpoint.
        DataError: the run's tokenizer is gone, damaged or another one.
    """
    checkpoints = checkpoints_of(run_dir)
    steps = checkpoint_steps(checkpoints)
    if not (run_dir / CONFIG).is_file() or not steps:
        raise CheckpointError(
            "no run with a checkpoint",
            str(run_dir),
            "name a run directory, such as runs/<name>, that train has filled",
        )
    config = load_config(run_dir / CONFIG)
    checkpoint = step_directory(checkpoints, steps[-1])
    tokenizer = trained_tokenizer(run_dir, config.data, read_state(checkpoint)["data"])
    model = build_model(config, tokenizer.eos_id, transfer_of(config))
    weights = {name: fragment(parameter) for name, parameter in model.named_parameters()}
    load_checkpoint(checkpoint, weights)
    return config, model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


@torch.no_grad()
def generate(
    run_dir: Path, prompt: str, *, max_tokens: int, temperature: float, top_k: int | None, seed: int
) -> str:
    """`prompt` and its continuation, up to `max_tokens` tokens or the end of the document.

    Every token reads the last `context` tokens anew.

    Raises:
        ConfigError: the prompt is no text, such as bytes of a command line that are not UTF-8.
        CheckpointError: as `load_run`, or the run has diverged.
        DataError: as `load_run`.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        problem = f"character {error.start + 1} of the prompt is not UTF-8"
        raise ConfigError(problem, "--prompt", "give it as UTF-8 text") from error
    config, model, tokenizer = load_run(run_dir)
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    ids = tokenizer.encode(prompt)
    given = [tokenizer.eos_id, *ids]  # a document starts after the end of the one before
    produced: list[int] = []
    for _ in range(max_tokens):
        window = torch.tensor([(given + produced)[-config.model.context :]], device=device)
        logits = model(window).logits[0, -1, : tokenizer.vocab_size]
        if not logits.isfinite().all():
            raise CheckpointError(
                "the weights of the newest checkpoint give logits that are not finite",
                str(run_dir),
                "name a run that has not diverged",
            )
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
