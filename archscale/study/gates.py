"""SqrtGate at initialization (arXiv 2603.28743): output RMS of a mixture of experts over its
granularity k."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F

from archscale.model import initialize
from archscale.model.moe import MoE
from archscale.report.plot import INK, Panel
from archscale.study.config import GateStudy
from archscale.study.output import Results, Row, curve, groups, mean_and_spread


def run_gates(study: GateStudy, say: Callable[[str], None]) -> Results:
    """Fresh layers without a shared expert, under both gates, on tokens of RMS 1."""
    runs: list[Row] = []
    for k in study.granularities:
        say(f"k = {k}: {study.sparsity * k} experts of {study.hidden // k} hidden features")
        runs += [{"k": k, "seed": seed, **_measure(study, k, seed)} for seed in study.seeds]
    summary = []
    for (k,), rows in groups(runs, "k").items():
        row = {"k": k}
        for key in ("sqrt_gate", "plain", "plain_predicted"):
            row[key], row[f"{key}_spread"] = mean_and_spread([run[key] for run in rows])
        summary.append(row)
    flat = [row["sqrt_gate"] for row in summary]
    span = (max(flat) - min(flat)) / statistics.mean(flat)
    curves = [
        curve("SqrtGate", summary, "k", "sqrt_gate", line="-", marker="o"),
        curve("plain gate", summary, "k", "plain", line="-", marker="s", color=1),
        curve("√Σ g², relative to k = 1", summary, "k", "plain_predicted", line="--", color=INK),
    ]
    title, x = "Output RMS of a fresh layer", "k, active experts a token"
    caption = "Output RMS by granularity, means and standard deviations over seeds"
    drawn = (
        "Output RMS over granularity under both gates; dashed: what √Σ g² of uncorrelated experts"
        " predicts for the plain gate"
    )
    return Results(
        "SqrtGate at initialization",
        study.model_dump(mode="json"),
        {"runs": runs, "rms": summary},
        {"rms": f"{caption}; SqrtGate spans {span:.1%}"},
        {"rms": (drawn, [Panel(title, x, "RMS", curves, log_y=True)])},
    )


@torch.no_grad()
def _measure(study: GateStudy, k: int, seed: int) -> Row:
    """Output RMS under both gates, and what uncorrelated experts of the SqrtGate layer's RMS would
    give the plain one."""
    generator, width = torch.Generator().manual_seed(seed), study.width
    x = F.rms_norm(torch.randn(1, study.tokens, width, generator=generator), (width,))
    rms: Row = {}
    for name, sqrt_gate in (("sqrt_gate", True), ("plain", False)):
        hidden, experts = study.hidden // k, study.sparsity * k
        layer = MoE(width, hidden, study.mlp, experts, k, shared=False, sqrt_gate=sqrt_gate)
        initialize(layer, seed)
        rms[name] = math.sqrt(layer(x).hidden.square().mean().item())
        gates = layer.router(x[0]).topk(k).values.softmax(-1)
    rms["plain_predicted"] = rms["sqrt_gate"] * math.sqrt(gates.square().sum(-1).mean().item())
    return rms
