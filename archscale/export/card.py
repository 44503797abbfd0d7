"""The model card: what was trained and how to load it, nothing that the run does not say."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from archscale.checkpoint.history import trained_samples
from archscale.checkpoint.place import Place
from archscale.config import Config
from archscale.export.fast_tokenizer import TokenizerFiles
from archscale.files import ABANDONED, ENVIRONMENT, METRICS
from archscale.huggingface.architecture import CLASSES, Architecture
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
        state: what the checkpoint says of itself.
        ema: whether the weights are the running average that the run has kept.
        dtype: of the weights, as torch names it.
        folded: constants that became part of the weights.
        tokenizer: what is written for it.
    """

    run_dir: Path
    checkpoint: Place
    state: Mapping[str, Any]
    ema: bool
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
    tokens = trained_samples(facts.state) * model.context
    yield f"step {facts.state['step']:,}: {tokens:,} tokens of {config.tokens:,} planned"
    yield from _which_weights(config, facts)
    yield f"data: {_data(config)}"
    yield from _losses(facts)
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


def _which_weights(config: Config, facts: CardFacts) -> Iterator[str]:
    """What the weights are, where they are not those of one step, and what they began as."""
    if facts.ema:
        decay = config.training.ema
        limit = "" if decay is None else f", of decay {decay:g} at most"
        yield f"these are the running average of the weights{limit}, not the weights of that step"
    if averaged := facts.state.get("averaged"):
        parts = ", ".join(f"step {entry['step']:,} of {entry['run']}" for entry in averaged)
        yield f"these are the mean of the weights of {len(averaged)} checkpoints: {parts}"
    if origin := facts.state.get("initialized_from"):
        # As of the data, its own name alone.
        name = PurePosixPath(re.split(r"[?#]", origin["path"])[0]).name
        source = (
            f"{CLASSES.get(origin['model_type'], origin['model_type'])} in {name}"
            if "model_type" in origin
            else f"step {origin['step']:,} of {origin['run']}"
        )
        yield f"training began with the weights of {source}"


def _losses(facts: CardFacts) -> Iterator[str]:
    """Losses of the weights that are exported, as far as the run has measured them."""
    measured = {
        "loss": "training loss of that step, nats per token",
        "val_loss": "validation loss, nats per token",
        "val_bits_per_byte": "validation bits per byte",
    }
    if facts.ema:  # the other ones are of other weights
        measured = {"val_loss_ema": "validation loss of the running average, nats per token"}
    at = {} if "averaged" in facts.state else _metrics(facts)
    for key, meaning in measured.items():
        if key in at:  # what was not finite is null there
            finite = at[key] is not None and math.isfinite(at[key])
            yield f"{meaning}: {at[key]:.4f}" if finite else f"{meaning}: not finite"


def _metrics(facts: CardFacts) -> dict[str, Any]:
    """What was measured at the checkpoint's step; empty where the run has kept nothing of it."""
    path, folder = facts.run_dir / METRICS, facts.checkpoint.parent
    if isinstance(folder, Path) and folder.parent.name == ABANDONED:
        # What was moved aside has its own lines beside it: the run's are of another trajectory.
        path = folder / METRICS
    with contextlib.suppress(OSError):
        lines, step = read_lines(path), facts.state["step"]
        return next((line for line in reversed(lines) if line["step"] == step), {})
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
