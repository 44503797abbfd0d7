"""Short float32 training curves on one process, from recorded tokens.

Parity tests compare our layouts with each other and cannot see an error that all of them share;
recorded curves can.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from archscale.config import Config
from tests.data.conftest import write_dataset
from tests.train.routing import smallest_gaps
from tests.train.tiny import config, run

FOLDER = Path(__file__).resolve().parent
STEPS = 20
VOCAB = 300
# 8 routed experts, of which a token passes 2, and a shared one; with this seed no token's choice
# comes near a tie.
EXPERTS = {"model": {"moe": {"sparsity": 3, "top_k": 3}}, "seed": 1}
# File name → (rule of the matrices, sections of the config).
CASES: dict[str, tuple[str, dict]] = {
    "muonh_dense": ("muonh", {}),
    "orscale_lm_dense": ("orscale_lm", {}),
    "adamw_dense": ("adamw", {}),
    "lion_dense": ("lion", {"parameterization": {"base": {"lr": 0.001}}}),
    "lamb_dense": ("lamb", {}),
    "moonlight_experts": ("moonlight", EXPERTS),
}
LEARNING_RATE = 0.003


def data(folder: Path) -> str:
    """The dataset of all curves: tokens that sentencepiece once made of `tests.train.tiny`'s text.

    That text makes the curves well-conditioned. With tokens drawn evenly the first gradients
    nearly cancel, and weights perturbed by 1e-6 move the loss by 2e-3 within 20 steps.
    """
    ids = np.array(json.loads((FOLDER / "tokens.json").read_text()))
    return str(write_dataset(folder / "tokens", [ids[:-200]], [ids[-200:]], VOCAB))


def made(data: str, name: str, **changes: Any) -> Config:
    """The config of a curve."""
    rule, sections = CASES[name]
    base = {"parameterization": {"base": {"lr": LEARNING_RATE}}, "telemetry": {"every": 1}}
    sections = base | sections | changes
    return config(data, rule, STEPS, **sections)


def curve(data: str, name: str, run_dir: str, **changes: Any) -> dict:
    """Loss and gradient norm of every step; with experts also the smallest gap of their routing."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with smallest_gaps() as gap:
            lines = run(made(data, name, **changes), run_dir)
    finally:
        torch.set_num_threads(threads)
    found: dict = {key: [line[key] for line in lines] for key in ("loss", "grad_norm")}
    return found | ({"smallest_gap": gap[0]} if math.isfinite(gap[0]) else {})


def recorded(name: str) -> dict:
    """What `curve` gave when it was last recorded."""
    return json.loads((FOLDER / f"{name}.json").read_text())
