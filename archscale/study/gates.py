"""SqrtGate at initialization (HyperP; REFERENCE 4): output RMS of a mixture of experts over its
granularity k."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F

from archscale.model import initialize
from archscale.model.moe import MoE
from archscale.study.config import GateStudy
from archscale.study.output import Panel, Results, Row, Series, mean_and_spread


def run_gates(study: GateStudy, say: Callable[[str], None]) -> Results:
    """Fresh layers without a shared expert, under both gates, on tokens of RMS 1."""
    rows: list[Row] = []
    for k in study.granularities:
        say(f"k = {k}: {study.sparsity * k} experts of {study.hidden // k} hidden features")
        rows += [{"k": k, "seed": seed, **_measure(study, k, seed)} for seed in study.seeds]
    summary = []
    for k in study.granularities:
        chosen = [row for row in rows if row["k"] == k]
        of: Row = {"k": k}
        for key in ("sqrt_gate", "plain", "plain_predicted"):
            of[key], of[f"{key}_spread"] = mean_and_spread([row[key] for row in chosen])
        summary.append(of)
    flat = [row["sqrt_gate"] for row in summary]
    spread = (max(flat) - min(flat)) / statistics.mean(flat)
    lines = [
        Series("SqrtGate", study.granularities, flat, "o-", 0),
        Series("plain gate", study.granularities, [row["plain"] for row in summary], "s-", 3),
        Series(
            "√Σ g², relative to k = 1",
            study.granularities,
            [row["plain_predicted"] for row in summary],
            "--",
            "black",
        ),
    ]
    results = Results(
        "SqrtGate at initialization", study.model_dump(mode="json"), {"runs": rows, "rms": summary}
    )
    results.shown = {
        "rms": (
            "Output RMS by granularity, means and standard deviations over seeds; SqrtGate spans"
            f" {spread:.1%}"
        )
    }
    panel = Panel(
        "Output RMS of a fresh layer", "k, active experts a token", "RMS", lines, log_x=True
    )
    results.figures = {
        "rms": (
            (
                "Output RMS over granularity under both gates; dashed: what √Σ g² of uncorrelated"
                " experts predicts for the plain gate"
            ),
            [panel],
        )
    }
    return results


@torch.no_grad()
def _measure(study: GateStudy, k: int, seed: int) -> Row:
    """Output RMS under both gates, and what uncorrelated experts of the SqrtGate layer's RMS would
    give the plain one."""
    generator = torch.Generator().manual_seed(seed)
    x = F.rms_norm(torch.randn(1, study.tokens, study.width, generator=generator), (study.width,))
    found: Row = {}
    for name, sqrt_gate in (("sqrt_gate", True), ("plain", False)):
        layer = MoE(
            study.width,
            study.hidden // k,
            study.mlp,
            study.sparsity * k,
            k,
            shared=False,
            sqrt_gate=sqrt_gate,
        )
        initialize(layer, seed)
        found[name] = math.sqrt(layer(x).hidden.square().mean().item())
        gates = layer.router(x[0]).topk(k).values.softmax(-1)
    found["plain_predicted"] = found["sqrt_gate"] * math.sqrt(gates.square().sum(-1).mean().item())
    return found
