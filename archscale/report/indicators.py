"""What each metric is called and means, in which section it stands, and how keys come apart.

A metric that is not in the table is drawn all the same, under its own key.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

SECTIONS = {
    "loss": "Loss",
    "training": "Learning rate, gradient, speed",
    "stability": "Stability indicators",
    "optimizer": "Optimizer",
    "spectrum": "Spectra",
    "moe": "Experts",
    "other": "Other metrics",
}
ABOUT = {
    "stability": (
        "Means over layers as curves, every layer as a row of a map. They should stay bounded and"
        " not grow with training."
    ),
    "optimizer": (
        "The update is W ← (1 − η λ_d) W − η r̂ D, with trust ratio r = ‖W‖ / (c ‖D‖ + ε) and r̂ ="
        " clip(r). Norms are Frobenius norms."
    ),
    "spectrum": (
        "Singular values σ_1 ≥ σ_2 ≥ … of M̂, the momentum that is orthogonalized, or of gradients"
        " where it says so: means over matrices as curves, every matrix as a row of a map."
    ),
    "moe": (
        "Loads count the step's routed tokens over all layers' experts. An even load is the aim of"
        " the balance loss."
    ),
}
# metric (last parts of its key) → title, definition
INDICATORS = {
    "loss": (
        "Training loss",
        "mean cross-entropy of the step's target tokens, nats per token, without the balance loss",
    ),
    "val_loss": ("Validation loss", "mean cross-entropy on held-out text, nats per token"),
    "val_bits_per_byte": (
        "Validation bits per byte",
        "held-out cross-entropy in bits per UTF-8 byte, the same for every tokenizer",
    ),
    "aux_loss": (
        "Balance loss",
        "weighted auxiliary loss that evens the experts' load; beside the training loss, not in it",
    ),
    "lr": ("Learning rate", "of the matrices"),
    "grad_norm": ("Gradient norm", "global L2 norm of all gradients, before clipping"),
    "tokens_per_second": ("Tokens per second", "over all processes, mean of a reading group"),
    "step_seconds": ("Seconds per step", "mean of a reading group"),
    "mfu": ("MFU", "model FLOPs utilization: useful training FLOP/s over the devices' peak"),
    "attention_z": (
        "Attention Z-value",
        "mean of LSE², LSE = log-sum-exp of the scaled attention logits",
    ),
    "router_z": ("Router Z-value", "mean over tokens of LSE² of the router logits"),
    "attention_output_rms": (
        "Attention output RMS",
        "√mean(h²) of the attention branch's output h, after the depth multiplier",
    ),
    "mlp_output_rms": (
        "MLP output RMS",
        "√mean(h²) of the MLP or expert branch's output h, after the depth multiplier",
    ),
    "attention_outlier_pct": (
        "Attention outliers",
        (
            "per cent of entries of the attention output with |h − mean| > 5 std, per token over"
            " features"
        ),
    ),
    "mlp_outlier_pct": (
        "MLP outliers",
        "per cent of entries of the MLP output with |h − mean| > 5 std, per token over features",
    ),
    "trust_ratio": ("Trust ratio", "r = ‖W‖ / (c ‖D‖ + ε), before the clip"),
    "clipped_ratio": ("Clipped trust ratio", "r̂ = clip(r), what the update uses"),
    "clipped": ("Clipped", "1 where the trust ratio was outside its bounds"),
    "clip_fraction": (
        "Share clipped",
        "share of matrices whose trust ratio was outside its bounds",
    ),
    "calibration": ("Calibration", "c, set at a matrix's first step so that its first ratio is 1"),
    "effective_decay": (
        "Effective decay",
        "η r̂ λ, the share of a weight that decay takes in a step",
    ),
    "relative_update": ("Relative update", "‖ΔW‖ / ‖W‖ of a step"),
    "weight_norm": ("Weight norm", "‖W‖"),
    "norm_drift": ("Weight norm drift", "‖W‖ / ‖W₀‖ − 1, W₀ at initialization"),
    "weight_norm_drift": ("Weight norm drift", "largest |‖W‖ / ‖W₀‖ − 1| over matrices"),
    "orthogonality_residual": (
        "Orthogonality residual",
        "‖QQᵀ − I‖ / √m of the short side m: how far Q is from orthogonal",
    ),
    "sigma_max": ("Largest singular value", "σ_max"),
    "sigma_mean": (
        "Mean singular value",
        "σ̄ = ‖·‖_* / rank; the largest stable step of an orthogonalized update follows it",
    ),
    "effective_rank": ("Effective rank", "‖·‖_*² / ‖·‖²: how many directions carry the matrix"),
    "flattening_gain": (
        "Flattening gain",
        "σ_max / σ̄: how much larger steps orthogonalization allows",
    ),
    "nuclear_norm": ("Nuclear norm", "Σ ‖G‖_* over matrices: OrScale's criterion of convergence"),
    "heterogeneity_gain": (
        "Heterogeneity gain",
        "what a step size for each matrix would gain over one for all; 1 where all σ̄ are equal",
    ),
    "wait_seconds": (
        "Wait for the slowest rank",
        (
            "seconds a step that another rank waits in the first collective for the one that"
            " arrives last"
        ),
    ),
    "rank": ("Slowest rank", "the one that arrives last"),
    "max_violation": (
        "Largest load violation",
        "largest load / mean load − 1, mean over layers; 0 is even",
    ),
    "load_entropy": (
        "Load entropy",
        "−Σ f ln f over the shares f of the experts, nats; ln(experts) is even",
    ),
    "load": ("Expert load", "share of the routed tokens that each expert takes"),
}
_SECTION_OF = {
    "loss": "loss",
    "val_loss": "loss",
    "val_bits_per_byte": "loss",
    "aux_loss": "moe",
    **dict.fromkeys(("lr", "grad_norm", "tokens_per_second", "step_seconds", "mfu"), "training"),
}
_QUALIFIERS = {
    "gradient",
    "matrix",
}  # parts of a key that say what kind of thing follows, not which one


@dataclass(frozen=True)
class Key:
    """A metrics key taken apart: `stability/layer_03/attention_z` is metric attention_z of element
    layer_03.

    `pattern` has `*` in place of the element; the key is `pattern.replace("*", element)`.
    """

    section: str
    pattern: str
    element: str | None
    metric: str

    @property
    def title(self) -> str:
        gradient = "gradient/" in self.pattern and "gradient" not in self.metric
        return self._known()[0] + (" of the gradient" if gradient else "")

    @property
    def definition(self) -> str:
        return self._known()[1]

    def _known(self) -> tuple[str, str]:
        if self.metric in INDICATORS:
            return INDICATORS[self.metric]
        stem, _, statistic = self.metric.rpartition("_")
        if statistic in ("mean", "min", "max") and stem in INDICATORS:
            word = {"mean": "mean", "min": "smallest", "max": "largest"}[statistic]
            return f"{INDICATORS[stem][0]}, {word}", f"{INDICATORS[stem][1]}; {word} over matrices"
        return self.metric.replace("_", " "), ""


def parse_key(key: str) -> Key:
    parts = key.split("/")
    group = parts[0] if len(parts) > 1 else ""
    section = (
        group
        if group in SECTIONS and group != "other"
        else _SECTION_OF.get(key, "other")
        if not group
        else "other"
    )
    middle = parts[1:-1]
    if middle and middle[-1] not in _QUALIFIERS:
        return Key(section, "/".join([group, *middle[:-1], "*", parts[-1]]), middle[-1], parts[-1])
    return Key(section, key, None, parts[-1])


def order(key: Key) -> tuple[int, str]:
    """Place within a section: as in the table, then by name."""
    names = list(INDICATORS)
    stem = key.metric if key.metric in INDICATORS else key.metric.rpartition("_")[0]
    return (names.index(stem) if stem in INDICATORS else len(names)), key.pattern


_INDEX = re.compile(r"(?<=[._\[])\d+|^\d+")


def family(element: str) -> tuple[str, tuple[int, ...]]:
    """What an element is one of, and its numbers: `blocks.3.mlp.up.weight[7]` →
    (`blocks.*.mlp.up.weight[*]`, (3, 7))."""
    return _INDEX.sub("*", element), tuple(int(found) for found in _INDEX.findall(element))


def short(name: str) -> str:
    """A family for a narrow label: `blocks.*.attention.qkv.weight.q` → `attention qkv q`."""
    name = name.replace("[*]", "").removeprefix("blocks.*.").replace(".weight", "")
    return name.replace("_*", "").replace(".*", "").replace(".", " ") or name
