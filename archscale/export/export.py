"""A checkpoint as a directory that transformers reads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from archscale.checkpoint.directory import read_state
from archscale.checkpoint.reading import StoredWeights
from archscale.checkpoint.target import find_target
from archscale.config import Config
from archscale.data.tokenizer import Tokenizer
from archscale.errors import ConfigError
from archscale.export.card import CardFacts, model_card
from archscale.export.fast_tokenizer import TokenizerFiles, tokenizer_files
from archscale.export.safetensors_files import (
    NEEDED_BY,
    check_weights,
    size_in_bytes,
    write_weights,
)
from archscale.files import TOKENIZER, free_directory, new_directory
from archscale.huggingface.architecture import Architecture, choose, config_json
from archscale.huggingface.safetensors_reader import PACKAGES, import_safetensors
from archscale.huggingface.weights import factors, sources
from archscale.plan.transfer import transfer_of

CODE = ("configuration_archscale.py", "modeling_archscale.py")
LAST = "config.json"  # without it a directory is no model to anyone
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}  # precision of training → dtype of weights


@dataclass(frozen=True)
class Exported:
    """What an export has written.

    Attributes:
        directory: absolute.
        dtype: of the weights, as torch names it.
        files: of weights.
        warning: what goes out in place of a fast tokenizer, and why; "": there is one.
    """

    directory: Path
    step: int
    architecture: Architecture
    dtype: str
    files: int
    warning: str


def export(
    target: Path, out: Path, *, dtype: str | None = None, shard_size: str, ema: bool = False
) -> Exported:
    """Write a run's newest checkpoint, or the checkpoint named, to the directory `out`: all of it
    or nothing.

    Args:
        target: run directory, or a checkpoint `step_…` in one.
        out: a directory that does not exist or is empty.
        dtype: of the weights, as torch names it; None: that of the products in training. What is
            rounded to bfloat16 then is what training rounded wherever it used a weight.
        shard_size: of a file of weights, such as 5GB.
        ema: the running average that `training.ema` has kept, in place of the weights.

    Raises:
        CheckpointError: not a run or checkpoint; damaged, of another config, or diverged.
        ConfigError: a package is missing, `out` is in use, or the size is none.
        DataError: the run's tokenizer is gone, damaged or another one.
    """
    shard_bytes = size_in_bytes(shard_size)
    import_safetensors(NEEDED_BY)
    out = free_directory(out, "export")
    chosen = find_target(target)
    config, where = chosen.config, chosen.checkpoint
    transfer = transfer_of(config)
    architecture = choose(config.model)
    by = factors(config.model, transfer.logit_scale, transfer.router_logit_scale)
    parts = list(sources(config.model, architecture.model_type, by))
    stored = StoredWeights(where, ema=ema)
    check_weights(stored, parts, where)
    tokenizer = tokenizer_files(
        chosen.tokenizer,
        config.model.context,
        not config.data.document_mask,
        str(chosen.run_dir / TOKENIZER),
    )
    dtype = dtype or DTYPES[config.training.precision]
    state = read_state(where)
    facts = CardFacts(chosen.run_dir, where, state, ema, dtype, by.sentences(), tokenizer)
    texts: dict[str, bytes] = dict(tokenizer.files)
    content = config_json(config.model, architecture, dtype, tokenizer.bos_id, tokenizer.eos_id)
    texts["config.json"] = _json(content)
    texts["generation_config.json"] = _json(_generation(config, chosen.tokenizer, tokenizer))
    texts["README.md"] = model_card(config, architecture, transfer, facts).encode()
    if not architecture.stock:
        texts |= {name: (Path(__file__).parent / name).read_bytes() for name in CODE}
    with new_directory(out, "export", LAST) as partial:
        files = write_weights(stored, parts, getattr(torch, dtype), shard_bytes, partial, where)
        for name, text in texts.items():
            (partial / name).write_bytes(text)
    return Exported(out, chosen.step, architecture, dtype, files, tokenizer.warning)


def _generation(config: Config, tokenizer: Tokenizer, files: TokenizerFiles) -> dict[str, Any]:
    """The content of `generation_config.json`."""
    content: dict[str, Any] = {"eos_token_id": files.eos_id, "pad_token_id": files.pad_id}
    # An empty text is continued from the end of a document also where attention stays within one.
    content["bos_token_id"] = tokenizer.eos_id
    assert config.model.vocab_size is not None
    if config.model.vocab_size > tokenizer.vocab_size:  # ids that stand for no text
        content["suppress_tokens"] = list(range(tokenizer.vocab_size, config.model.vocab_size))
    return content


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def push(directory: Path, repo_id: str) -> str:
    """Upload an export to the Hugging Face hub, into a private repository if there is none of that
    name yet; returns its address.

    Raises:
        ConfigError: huggingface_hub is missing, or refuses.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise ConfigError(
            "the package 'huggingface_hub' is not installed",
            "--push",
            PACKAGES,
        ) from error
    api = HfApi()
    try:
        address = api.create_repo(repo_id, private=True, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=directory)
    except Exception as error:  # of the network, of the hub, of the name: all the same to the user
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"the export is in {directory}, but the hub did not take it: {first}",
            f"--push {repo_id}",
            "log in with `hf auth login`, check the name, and upload the directory",
        ) from error
    return str(address)
