"""Run directories as `archscale train` leaves them, with as many metrics as a run can have."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

MATRICES = (
    "attention.qkv.weight.q",
    "attention.qkv.weight.k",
    "attention.qkv.weight.v",
    "attention.out.weight",
    "mlp.up.weight.gate",
    "mlp.up.weight.up",
    "mlp.down.weight",
)
LAYER_KEYS = (
    "attention_z",
    "router_z",
    "attention_output_rms",
    "mlp_output_rms",
    "attention_outlier_pct",
    "mlp_outlier_pct",
)
MATRIX_KEYS = ("trust_ratio", "clipped_ratio", "relative_update", "norm_drift")
SPECTRUM_KEYS = ("sigma_max", "sigma_mean", "effective_rank")
PLAN: dict[str, Any] = {
    "name": "made_d24",
    "model": {
        "depth": 24,
        "width": 1536,
        "context": 4096,
        "vocab_size": 32768,
        "moe": None,
        "parameters": {"total": 1_000_000, "active": 1_000_000},
    },
    "parameterization": {"kind": "hyperp", "roles": {"matrix": {"rule": "muonh", "lr": 0.02}}},
    "training": {"tokens": 10_000 * 2048, "trained_tokens": 10_000 * 2048, "steps": 10_000},
    "flops": {"training_per_token": 6.0e6, "total": 6.0e6 * 10_000 * 2048},
    "memory": {"peak": 3_000_000_000},
    "checkpoint": {"bytes": 12_000_000},
    "devices": [
        {
            "device": "h100",
            "count": 8,
            "peak_flops": 989.4e12,
            "mfu": 0.4,
            "seconds": 6000.0,
            "step_seconds": 0.6,
        }
    ],
    "problems": [],
    "advice": [],
}


def metrics(
    steps: int, *, layers: int = 24, every: int = 10, experts: int = 0, seed: int = 0
) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl; every `every`-th has the optimizer, each layer, each matrix and each
    expert."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal(steps)
    lines = []
    for step in range(1, steps + 1):
        line: dict[str, Any] = {
            "step": step,
            "tokens": step * 2048,
            "time": 1_800_000_000.0 + 0.5 * step,
            "loss": 2.5 + 8 * step**-0.3 + 0.05 * float(noise[step - 1]),
            "grad_norm": 0.3 + math.exp(noise[step - 1]) / 9,
            "lr": 0.02 * (1 - 0.9 * step / steps),
            "step_seconds": 0.5,
            "tokens_per_second": 4096.0,
        }
        if step % every == 0 or step == steps:
            line |= _reading(step, layers, experts, rng)
        if step % (steps // 5 or 1) == 0:
            line |= {"val_loss": 2.55 + 8 * step**-0.3, "val_bits_per_byte": 1.1 + 3 * step**-0.3}
        lines.append(line)
    return lines


def _reading(step: int, layers: int, experts: int, rng: np.random.Generator) -> dict[str, Any]:
    line: dict[str, Any] = {
        f"optimizer/trust_ratio_{s}": v
        for s, v in (("mean", 1.0), ("min", 0.6), ("max", 1.0 + 1 / step))
    }
    line |= {
        "optimizer/clip_fraction": 0.0,
        "optimizer/relative_update_mean": 0.01,
        "optimizer/weight_norm_drift": 0.0,
    }
    drift = rng.standard_normal((layers, len(LAYER_KEYS))) / 20
    for column, key in enumerate(LAYER_KEYS):
        values = np.exp(drift[:, column]) * (1 + np.arange(layers) / layers) * (1 + step / 20_000)
        line |= {
            f"stability/layer_{layer:02d}/{key}": round(float(v), 6)
            for layer, v in enumerate(values)
        }
        line[f"stability/{key}"] = float(values.mean())
    for layer in range(layers):
        for number, matrix in enumerate(MATRICES):
            name, value = f"blocks.{layer}.{matrix}", 0.5 + number / 10 + float(rng.random()) / 10
            keys = [f"optimizer/matrix/{name}/{key}" for key in MATRIX_KEYS]
            keys += [
                f"spectrum/{kind}{name}/{key}"
                for kind in ("", "gradient/")
                for key in SPECTRUM_KEYS
            ]
            noise = rng.random(len(keys))  # of its own for every key: nothing that compresses well
            line |= {
                key: round(float(value + x / 5) * (1 + layer / layers), 6)
                for key, x in zip(keys, noise)
            }
        if experts:
            share = rng.dirichlet(np.full(experts, 20.0))
            line[f"moe/layer_{layer:02d}/load"] = [round(float(v), 6) for v in share]
    for prefix in ("spectrum/", "spectrum/gradient/"):
        line |= {
            f"{prefix}{key}": 1.0 + i + float(rng.random()) for i, key in enumerate(SPECTRUM_KEYS)
        }
    if experts:
        line |= {
            "aux_loss": 0.2,
            "moe/max_violation": float(rng.random()),
            "moe/load_entropy": math.log(experts) - 0.1,
        }
    return line


def make_run(
    directory: Path, lines: list[dict[str, Any]], plan: dict[str, Any] | None = PLAN, tail: str = ""
) -> Path:
    """A run directory; `tail` follows the last line of its metrics."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + tail
    )
    if plan is not None:
        (directory / "plan.json").write_text(json.dumps(plan))
        (directory / "config.yaml").write_text(
            f"name: {plan['name']}\nseed: 0\nmodel:\n  depth: 24\n"
        )
        manifest = [{"parameter": "embedding.weight", "shape": [1000, 1000], "role": "embedding"}]
        (directory / "manifest.json").write_text(json.dumps(manifest))
        environment = {
            "torch": "2.13.0",
            "device": "NVIDIA H100 80GB HBM3",
            "world_size": 8,
            "git": None,
        }
        (directory / "environment.json").write_text(json.dumps(environment))
    return directory
