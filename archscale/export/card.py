"""The model card: what was trained and how to load it, nothing that the run does not say."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from archscale.config import Config
from archscale.export.fast_tokenizer import TokenizerFiles
from archscale.files import ENVIRONMENT, METRICS
from archscale.huggingface.architecture import Architecture
from archscale.plan.counting import parameters
from archscale.plan.transfer import Transfer
from archscale.telemetry.sinks import read_lines

# First version with the class, and the first that any export was read with.
TRANSFORMERS = {"arcee": "4.53"}
OLDEST = "4.51"


@dataclass(frozen=True)
class CardFacts:
    """What the card says beside the run's config.

    Attributes:
        step: of the checkpoint.
        dtype: of the weights, as torch names it.
        folded: constants that became part of the weights.
        tokenizer: what is written for it.
    """

    run_dir: Path
    step: int
    dtype: str
    folded: list[str]
    tokenizer: TokenizerFiles


def model_card(
    config: Config, architecture: Architecture, transfer: Transfer, facts: CardFacts
) -> str:
    """The content of README.md."""
    blocks = [
        _front_matter(),
        f"# {config.name}",
        f"A language model trained with archscale, exported as {architecture.sentence}.",
        "## Loading",
        _loading(config, architecture, facts),
        "## Training",
        "\n".join(f"- {line}" for line in _training(config, transfer, facts)),
        "## What differs from training",
        "\n".join(f"- {line}" for line in _differences(config, architecture, facts)),
    ]
    return "\n\n".join(blocks) + "\n"


def _front_matter() -> str:
    return "\n".join(
        (
            "---",
            "library_name: transformers",
            "pipeline_tag: text-generation",
            "tags:",
            "- archscale",
            "- causal-lm",
            "---",
        )
    )


def _loading(config: Config, architecture: Architecture, facts: CardFacts) -> str:
    trust = "" if architecture.stock else ", trust_remote_code=True"
    version = TRANSFORMERS.get(architecture.model_type, OLDEST)
    problem = facts.tokenizer.problem
    if problem and not facts.tokenizer.files:
        return (
            f"With transformers {version} or newer. The tokenizer is not here ({problem}):\n\n"
            "```python\n"
            "from transformers import AutoModelForCausalLM\n\n"
            "path = '.'  # this directory, or its name on the hub\n"
            f"model = AutoModelForCausalLM.from_pretrained(path{trust})\n"
            "```"
        )
    if problem:
        return (
            f"With transformers {version} or newer; the tokenizer is a SentencePiece model, which"
            f" has no equal among fast tokenizers ({problem}):\n\n"
            "```python\n"
            "from sentencepiece import SentencePieceProcessor\n"
            "from transformers import AutoModelForCausalLM\n\n"
            "path = '.'  # this directory\n"
            'tokenizer = SentencePieceProcessor(f"{path}/tokenizer.model")\n'
            f"model = AutoModelForCausalLM.from_pretrained(path{trust})\n"
            "```"
        )
    return (
        f"With transformers {version} or newer:\n\n"
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        "path = '.'  # this directory, or its name on the hub\n"
        "tokenizer = AutoTokenizer.from_pretrained(path)\n"
        f"model = AutoModelForCausalLM.from_pretrained(path{trust})\n"
        'inputs = tokenizer("A text to continue", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))\n"
        "```"
    )


def _training(config: Config, transfer: Transfer, facts: CardFacts) -> Iterator[str]:
    model = config.model
    count = parameters(model)
    active = f", {count.active:,} of them active" if count.active != count.total else ""
    yield f"parameters: {count.total:,}{active}"
    yield (
        f"shape: depth {model.depth}, width {model.width}, {model.heads} heads of"
        f" {model.head_dim}, {model.kv_heads} key-value heads, vocabulary {model.vocab_size:,},"
        f" context {model.context:,}"
    )
    at = _metrics(facts)
    tokens = f"{at['tokens']:,} tokens" if "tokens" in at else "tokens not recorded"
    yield f"step {facts.step:,}: {tokens} of {config.tokens:,} planned"
    yield f"data: {_data(config)}"
    for key, meaning in {
        "loss": "training loss of that step, nats per token",
        "val_loss": "validation loss, nats per token",
        "val_bits_per_byte": "validation bits per byte",
    }.items():
        if key in at:  # what was not finite is null there
            finite = at[key] is not None and math.isfinite(at[key])
            yield f"{meaning}: {at[key]:.4f}" if finite else f"{meaning}: not finite"
    kind = config.parameterization.kind
    for role, settings in transfer.roles.items():
        yield (
            f"{role}: {settings.rule}, peak learning rate {settings.lr:.4g}, weight decay"
            f" {settings.weight_decay:.4g} ({kind})"
        )
    yield f"precision of the products: {config.training.precision}"
    environment = _environment(facts.run_dir)
    versions = [f"{key} {environment[key]}" for key in ("archscale", "torch") if key in environment]
    if versions:
        yield f"last started with {', '.join(versions)}"


def _data(config: Config) -> str:
    if config.data.mixture is not None:
        total = sum(entry.weight for entry in config.data.mixture)
        shares = (f"{entry.name} {entry.weight / total:.3g}" for entry in config.data.mixture)
        return f"a mixture of {', '.join(shares)}"
    # Its own name alone: where it lies on the machine that trained is nobody's business, nor with
    # which key it was fetched.
    return PurePosixPath(re.split(r"[?#]", config.data.train or "")[0]).name


def _metrics(facts: CardFacts) -> dict[str, Any]:
    """Tokens, losses of the checkpoint's step; empty where the run has kept none."""
    with contextlib.suppress(OSError):
        lines = read_lines(facts.run_dir / METRICS)
        return next((line for line in reversed(lines) if line["step"] == facts.step), {})
    return {}


def _environment(run_dir: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        return dict(json.loads((run_dir / ENVIRONMENT).read_text()))
    return {}


def _differences(config: Config, architecture: Architecture, facts: CardFacts) -> Iterator[str]:
    yield f"weights are {facts.dtype}; training kept them in float32"
    for sentence in facts.folded:
        yield f"folded: {sentence}"
    if config.data.document_mask:
        yield (
            "training kept attention within documents; here all tokens given are one document, and"
            " none stands before it"
        )
    else:
        yield "a text starts with the end of the document before it, as in training"
    if config.model.window is not None:
        yield (
            f"attention sees {config.model.window} tokens, itself included; a program that does"
            " not know sliding windows computes something else beyond them"
        )
    if architecture.stock and config.training.precision == "bf16":
        yield (
            "training kept the residual stream in float32; loaded in bfloat16, this class rounds it"
        )
        if config.model.moe is not None:
            yield (
                "training computed the router's logits in float32; loaded in bfloat16, this class"
                " rounds them, and close ones may choose other experts"
            )
