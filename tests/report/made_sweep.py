"""Sweep directories as `archscale sweep` leaves them, without training: last metrics come from a
formula."""

from __future__ import annotations

import json
import math
import random
import zlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from archscale.config import Config, dump_config
from archscale.config.layers import write_yaml
from archscale.plan.counting import training_flops
from archscale.plan.transfer import resolve
from archscale.sweep.grid import read_grid

LR = "parameterization.base.lr"
BASE = {
    "name": "made",
    "model": {
        "depth": 2,
        "width": 32,
        "head_dim": 8,
        "kv_heads": 1,
        "context": 16,
        "vocab_size": 300,
    },
    "parameterization": {
        "kind": "hyperp",
        "base": {"depth": 2, "width": 32, "lr": 0.02, "tokens": 7680, "batch_tokens": 384},
    },
    "data": {"train": "nowhere", "val": "nowhere"},
    "training": {
        "tokens": 7680,
        "batch_tokens": 384,
        "micro_batch": 6,
        "precision": "fp32",
        "compile": False,
    },
}
Formula = Callable[[Config], Mapping[str, Any]]


def write_grid(folder: Path, base: Mapping[str, Any] = BASE, **keys: Any) -> Path:
    """A grid file and its base in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_yaml(dict(base), folder / "base.yaml")
    (folder / "grid.yaml").write_text(
        yaml.safe_dump({"name": "made", "base": "base.yaml", **keys}, sort_keys=False)
    )
    return folder / "grid.yaml"


def planted(made: Config) -> dict[str, Any]:
    """A bowl whose optimum falls as 1/√width, loss and indicators as power laws of the FLOPs, noise
    by seed."""
    rng = random.Random(zlib.crc32(made.name.encode()))
    flops = training_flops(made.model) * made.tokens
    worse = {"muonh": 1.0, "adamw": 1.06}.get(made.optimizer.matrix.rule, 1.03)
    best = 0.02 * math.sqrt(64 / made.model.width)
    loss = (
        worse * 6.0 * (flops / 1e8) ** -0.05
        + 0.1 * math.log(made.parameterization.base.lr / best) ** 2
    )
    found = {
        "loss": loss,
        "val_loss": loss + 0.004 * rng.gauss(0, 1),
        "stability/attention_z": 4.0 * (flops / 1e8) ** 0.02 * math.exp(0.02 * rng.gauss(0, 1)),
        "stability/mlp_output_rms": 0.3 * math.exp(0.02 * rng.gauss(0, 1)),
        "stability/layer_00/attention_z": 4.0,
        "optimizer/clip_fraction": 0.0,
    }
    if made.model.moe:
        found |= {
            "moe/max_violation": 0.2 * made.model.moe.top_k,
            "moe/load_entropy": 2.0,
            "stability/router_z": 1.0,
        }
    return found


def make_sweep(
    directory: Path,
    grid_file: Path,
    formula: Formula = planted,
    overrides: Collection[str] = (),
    *,
    failed: Mapping[str, str] | None = None,
    unfinished: Collection[str] = (),
    missing: Collection[str] = (),
) -> Path:
    """Runs by name: `failed` with a reason, `unfinished` at half of their steps, `missing` not
    started."""
    grid = read_grid(grid_file, list(overrides))
    runs = grid.runs()
    content = grid.content.model_dump(mode="json")
    directory.mkdir(parents=True, exist_ok=True)
    write_yaml(content | {"runs": {run.name: run.values for run in runs}}, directory / "sweep.yaml")
    log: list[dict[str, Any]] = [{"time": 0.0, "event": "sweep", "runs": len(runs)}]
    for run in runs:
        if run.name in missing:
            continue
        log.append({"time": 0.0, "event": "started", "run": run.name, "attempt": 1})
        if failed and run.name in failed:
            log.append(
                {
                    "event": "failed",
                    "run": run.name,
                    "attempt": 1,
                    "reason": failed[run.name],
                    "again": False,
                }
            )
            continue
        config = resolve(run.config)
        steps = config.steps // 2 if run.name in unfinished else config.steps
        line = {
            "step": steps,
            "tokens": steps * config.batch_tokens,
            "time": 1.8e9,
            **formula(config),
        }
        dump_config(config, directory / run.name / "config.yaml")
        (directory / run.name / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        environment = {
            "torch": "2.13.0",
            "device": "cpu",
            "git": "abc",
            "hostname": f"host{run.name[-1]}",
        }
        (directory / run.name / "environment.json").write_text(json.dumps(environment))
        if run.name not in unfinished:
            log.append({"time": 0.0, "event": "finished", "run": run.name, "attempt": 1})
    (directory / "sweep.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    return directory
