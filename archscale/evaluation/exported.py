"""A model in the files of transformers, scored as a native one is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from archscale.data.tokenizer import Tokenizer, load_tokenizer
from archscale.data.windows import IGNORE
from archscale.errors import CheckpointError, ConfigError, one_line
from archscale.files import CONFIG
from archscale.inference.scoring import LOGITS

MODEL_CONFIG = "config.json"
SENTENCEPIECE = "tokenizer.model"
GIVE_ANOTHER = "export the checkpoint again, or name another directory"


def is_export(path: Path) -> bool:
    """Whether a directory looks like a model of transformers, and not like a run."""
    return (path / MODEL_CONFIG).is_file() and not (path / CONFIG).is_file()


class ExportedModel:
    """A causal language model of transformers as a `perplexity.LossModel`.

    Attributes:
        prefix: ids that its tokenizer puts in front of every text.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        prefix: list[int],
        where: str,
        device: torch.device,
    ):
        self.model, self.tokenizer, self.prefix = model, tokenizer, prefix
        self.where, self.device = where, device
        self.context = int(model.config.max_position_embeddings)
        self.vocab_size = int(model.config.vocab_size)

    def logits(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens, use_cache=False).logits.float()

    def nats(self, tokens: Tensor, targets: Tensor) -> Tensor:
        rows = max(1, LOGITS // (tokens.shape[1] * self.vocab_size))
        total = torch.zeros((), device=tokens.device)
        for some, wanted in zip(tokens.split(rows), targets.split(rows)):
            logits = self.logits(some).flatten(0, 1)
            total += F.cross_entropy(logits, wanted.flatten(), ignore_index=IGNORE, reduction="sum")
        return total


def load_export(path: Path, device: torch.device) -> ExportedModel:
    """The model of a local directory, in the dtype of its weights, with its own code where it has
    some.

    Raises:
        CheckpointError: transformers cannot load it, or weights are missing in it.
        ConfigError: transformers is not installed.
        DataError: it has no tokenizer that can be read.
    """
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        problem = "the package 'transformers' is not installed"
        raise ConfigError(problem, str(path), "pip install archscale[export]") from error
    try:
        # Its code is trusted because the user has it here: no name of the hub comes this far.
        model, info = AutoModelForCausalLM.from_pretrained(
            str(path),
            dtype="auto",
            trust_remote_code=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # of files, of the code beside them: all the same to the user
        problem = f"transformers cannot load the model: {one_line(str(error))[:200]}"
        raise CheckpointError(problem, str(path), GIVE_ANOTHER) from error
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    if wrong:
        raise CheckpointError(
            f"the weights are not those of its config: {len(wrong)} differ, such as {wrong[0]}",
            str(path),
            GIVE_ANOTHER,
        )
    tokenizer, prefix = _tokenizer(path)
    return ExportedModel(model.to(device).eval(), tokenizer, prefix, str(path), device)


def _tokenizer(path: Path) -> tuple[Tokenizer, list[int]]:
    """The tokenizer beside a model, and the ids that it puts in front of a text."""
    if not (path / "tokenizer.json").is_file() and (path / SENTENCEPIECE).is_file():
        # An export whose tokenizer has no fast twin; its config says how texts start.
        start = json.loads((path / MODEL_CONFIG).read_bytes()).get("bos_token_id")
        return load_tokenizer(path / SENTENCEPIECE), [] if start is None else [start]
    tokenizer = load_tokenizer(path, "huggingface")
    from transformers import AutoTokenizer

    with_start = AutoTokenizer.from_pretrained(str(path))("a")["input_ids"]
    count = len(with_start) - len(tokenizer.encode("a"))
    return tokenizer, with_start[:1] if count > 0 else []
