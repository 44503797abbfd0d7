"""A tiny data set, a tiny config, and a run in the present process (of a pool, or alone)."""

import json
from pathlib import Path

import numpy as np
import torch

from archscale.checkpoint.place import checkpoints_of
from archscale.config import Config
from archscale.data.preparing.prepare import prepare
from archscale.data.training_data import open_training_data
from archscale.data.validation import validation_sets
from archscale.distributed import rank, world_size
from archscale.plan.passes import source_tokens
from archscale.plan.plan import make_plan
from archscale.telemetry.profiling import ProfiledSteps
from archscale.train import trainer
from archscale.train.continuing import AS_BEFORE, Wishes
from archscale.train.ownership import owned_with

RULES = ["muon", "moonlight", "orscale", "orscale_lm", "muonh", "orscale_lm_sphere", "adamw"]
LAYOUTS: dict[str, tuple[int, dict]] = {  # name → (processes, sections of the config)
    "ddp2": (2, {"parallel": {"replicate": 2, "shard": 1}}),
    "fsdp2": (2, {}),
    "fsdp3": (3, {"training": {"micro_batch": 8}}),
    "hsdp4": (4, {"parallel": {"replicate": 2, "shard": 2}}),
}


def tiny_data(folder: Path) -> str:
    """A prepared data set of a few hundred short made-up documents; vocabulary 300."""
    generator = np.random.default_rng(0)
    words = ["".join(generator.choice(list("abcdefgh"), 4)) for _ in range(60)]
    (folder / "text").mkdir()
    for i in range(200):
        line = " ".join(words[int(w)] for w in generator.zipf(1.3, 60) % 60)
        (folder / "text" / f"{i:03d}.txt").write_text(line + "\n")
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"name: tiny\nsources: [{{kind: text, path: '{folder}/text/*.txt'}}]\n"
        "tokenizer: {kind: sentencepiece, train: {vocab_size: 300}}\n"
        f"validation: 0.1\noutput: {folder}/tokens\n"
    )
    prepare(recipe)
    return str(folder / "tokens")


def config(data: str, /, rule: str = "muonh", steps: int = 10, **sections) -> Config:
    """24 sequences of 16 tokens a step: divisible by 1, 2, 3 and 4 processes.

    Tied, because the untied embedding of standard deviation 1e-4 gives early gradients so
    ill-conditioned that their orthogonalization amplifies float32 rounding, on one process as on
    many (up to 2e-5 over 50 steps instead of 3e-7).
    """
    base = {
        "name": "tiny",
        "model": {
            "depth": 2,
            "width": 24,
            "head_dim": 8,
            "kv_heads": 1,
            "context": 16,
            "tied_embeddings": True,
        },
        "parameterization": {"base": {"lr": 0.003}},
        "optimizer": {
            "matrix": {"rule": rule},
            "weight_decay": 0.0 if rule in ("muonh", "orscale_lm_sphere") else 0.1,
        },
        "data": {"train": data, "val": data},
        "training": {
            "tokens": steps * 24 * 16,
            "batch_tokens": 24 * 16,
            "micro_batch": 6,
            "precision": "fp32",
            "compile": False,
        },
        "checkpoint": {"every": 1000},
        "eval": {"every": 1000, "batches": 2},
        "telemetry": {"every": 5},
    }
    for section, values in sections.items():
        base[section] = {**base.get(section, {}), **values} if isinstance(values, dict) else values
    return Config.from_dict(base)


def run(
    config: Config,
    run_dir: str,
    resume: str = "auto",
    wishes: Wishes = AS_BEFORE,
    profiled: ProfiledSteps | None = None,
) -> list[dict]:
    """Train in this process, in the process group it is in; returns the metrics lines (on every
    rank)."""
    data = open_training_data(config.data, config.model.context, config.seed)
    validation = validation_sets(config.data, data)
    plan = make_plan(
        config.with_vocab(data.vocab_size), world_size=world_size(), sources=source_tokens(data)
    )
    folder, checkpoints = Path(run_dir), checkpoints_of(Path(run_dir), config.checkpoint)

    def make() -> trainer.Run:
        return trainer.Run(plan, folder, data, validation, torch.device("cpu"), profiled)

    with trainer.sole_owner(folder, *owned_with(folder, checkpoints)):
        trainer.run_from_newest(folder, resume, wishes, plan, data, make)
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


def losses(data: str, run_dir: str, rule: str, steps: int, /, **sections) -> list[float]:
    """The loss of every step, then the validation loss."""
    lines = run(config(data, rule, steps, **sections), run_dir)
    return [line["loss"] for line in lines] + [lines[-1]["val_loss"]]


def crash_after(config: Config, run_dir: str, step: int, resume: str = "auto") -> None:
    """Train `step` steps and stop without any clean-up, as a crash would."""

    class Crash(Exception):
        pass

    original, taken = trainer.train_step, [0]

    def stopping(*args, **kwargs):
        taken[0] += 1
        if taken[0] > step:
            raise Crash
        return original(*args, **kwargs)

    trainer.train_step = stopping
    try:
        run(config, run_dir, resume)
    except Crash:
        return
    finally:
        trainer.train_step = original
    raise AssertionError(f"rank {rank()} was meant to crash")
