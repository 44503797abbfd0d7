"""Generating beside `transformers.generate`, which reads an export of the same checkpoint.

Both continue the same prompts with the likeliest tokens, as many as asked for, from a cache.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from archscale.bench.table import Row, markdown
from archscale.bench.timing import machine, paired_ratio, spread, synchronize
from archscale.errors import ConfigError
from archscale.export.export import export
from archscale.inference.exported import TransformersModel, load_exported
from archscale.inference.generate import Request, generate
from archscale.inference.sampling import Sampling
from archscale.inference.text_model import TextModel
from archscale.train.loading import load_text_model

Tokens = list[list[int]]
NAMES = ("archscale", "transformers")


def bench_generate(
    target: Path,
    *,
    batches: Sequence[int],
    prompt: int,
    new: int,
    rounds: int,
    device: torch.device,
) -> list[Row]:
    """A row for each batch: tokens per second of both, and their ratio.

    Args:
        target: run, or checkpoint in one.
        batches: texts at a time.
        prompt, new: tokens of each text that are given, and added.

    Raises:
        ConfigError: the texts do not fit the context.
        CheckpointError, DataError, ConfigError: as `load_text_model` and `export`.
    """
    ours = load_text_model(target, device)
    if prompt + new > ours.model.context:
        raise ConfigError(
            f"{prompt} + {new} tokens are more than the context of {ours.model.context}",
            "archscale bench generate",
            "give a smaller --prompt-tokens or --new-tokens",
        )
    with tempfile.TemporaryDirectory() as folder:
        export(target, Path(folder) / "export", shard_size="5GB")
        theirs = load_exported(Path(folder) / "export", device).model
    assert isinstance(theirs, TransformersModel)
    theirs.model.generation_config.eos_token_id = None  # or a text might end before `new` tokens
    return [_row(ours, theirs, batch, prompt, new, rounds, device) for batch in batches]


def _row(
    ours: TextModel,
    theirs: TransformersModel,
    batch: int,
    prompt: int,
    new: int,
    rounds: int,
    device: torch.device,
) -> Row:
    made = random.Random(0)
    choice = [i for i in range(ours.tokenizer.vocab_size) if i not in ours.ends]
    texts = [[*ours.empty, *made.choices(choice, k=prompt - 1)] for _ in range(batch)]

    def with_ours() -> Tokens:
        requests = [Request(text, new) for text in texts]
        sampling = Sampling(temperature=0.0)
        results = generate(
            ours.model, ours.tokenizer, requests, sampling, batch=batch, ends=frozenset()
        )
        return [result.tokens for result in results]

    def with_theirs() -> Tokens:
        ids = torch.tensor(texts, device=device)
        output: Tensor = theirs.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
        )
        return output[:, prompt:].tolist()

    arms = dict(zip(NAMES, (with_ours, with_theirs)))
    seconds, tokens = _interleaved(arms, rounds, device)
    ratio, low, high = paired_ratio(seconds["transformers"], seconds["archscale"])
    both = [
        ours == theirs
        for pair in zip(*tokens.values(), strict=True)
        for ours, theirs in zip(*pair, strict=True)
    ]
    row: Row = {"batch": batch}
    for name in NAMES:
        row[f"{name}, tokens/s"] = batch * new / statistics.median(seconds[name])
        row[f"{name}, spread"] = spread(seconds[name])
    return row | {"ratio": ratio, "low": low, "high": high, "equal tokens": sum(both) / len(both)}


def _interleaved(
    arms: dict[str, Callable[[], Tokens]], rounds: int, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, Tokens]]:
    """Seconds of every round, and what came out, by arm; in each round in another order."""
    tokens = {name: run() for name, run in arms.items()}  # also warms up
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(sorted(arms), len(arms)):
            synchronize(device)
            began = time.perf_counter()
            arms[name]()
            synchronize(device)
            seconds[name].append(time.perf_counter() - began)
    return seconds, tokens


def report(
    target: Path, *, batches: Sequence[int], prompt: int, new: int, rounds: int, as_json: bool
) -> str:
    """The table as text, or as JSON."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = bench_generate(
        target, batches=batches, prompt=prompt, new=new, rounds=rounds, device=device
    )
    if as_json:
        return json.dumps({"machine": machine(device), "rows": rows}, indent=1)
    what = f"{new} tokens after {prompt}, {rounds} rounds; spread is (P90 - P10) / median"
    return "\n".join([machine(device), what, "", markdown(rows)])
