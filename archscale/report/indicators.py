"""The registry of metrics: what each is called, means, is measured in, and in which section it
stands; and how keys come apart.

A metric that is not in the table is drawn all the same, under its own key.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

SECTIONS = {
    "loss": "Loss",
    "eval": "Tasks",
    "training": "Learning rate, gradient, speed",
    "stability": "Stability indicators",
    "optimizer": "Optimizer",
    "spectrum": "Spectra",
    "moe": "Experts",
    "other": "Other metrics",
}
STATISTICS = {"mean": "mean", "min": "smallest", "max": "largest"}


# Key | section where it is drawn | title | unit, then what it means. `*` stands for a layer or a
# matrix where only they have it; endings in braces are statistics over matrices.
_TABLE = """
loss | loss | Training loss | nats per token
    mean cross-entropy of the step's target tokens, without the balance loss
val_loss | loss | Validation loss | nats per token
    mean cross-entropy on held-out text
val_loss_ema | loss | Validation loss of the averaged weights | nats per token
    mean cross-entropy on held-out text of the running average that training.ema keeps
val_bits_per_byte | loss | Validation bits per byte | bits
    held-out cross-entropy per UTF-8 byte, the same for every tokenizer
aux_loss | moe | Balance loss
    weighted auxiliary loss that evens the experts' load; beside the training loss, not in it
lr | training | Learning rate
    of the matrices
grad_norm | training | Gradient norm
    global L2 norm of all gradients, before clipping
tokens_per_second | training | Tokens per second
    over all processes, mean of a reading group
step_seconds | training | Step time | seconds
    mean of a reading group
mfu | training | MFU
    model FLOPs utilization: useful training FLOP/s over the devices' peak
peak_memory_bytes | training | Peak memory | bytes
    the most that any rank has held: on a GPU in tensors, on a CPU all of the process
stability/attention_z | stability | Attention Z-value
    mean of LSE², LSE = log-sum-exp of the scaled attention logits
stability/router_z | stability | Router Z-value
    mean over tokens of LSE² of the router logits
stability/attention_output_rms | stability | Attention output RMS
    √mean(h²) of the attention branch's output h, after the depth multiplier
stability/mlp_output_rms | stability | MLP output RMS
    √mean(h²) of the MLP or expert branch's output h, after the depth multiplier
stability/attention_outlier_pct | stability | Attention outliers | per cent
    entries of the attention output with |h − mean| > 5 std, per token over features
stability/mlp_outlier_pct | stability | MLP outliers | per cent
    entries of the MLP output with |h − mean| > 5 std, per token over features
optimizer/trust_ratio_{mean,min,max} | optimizer | Trust ratio
    r = ‖W‖ / (c ‖D‖ + ε), before the clip
optimizer/matrix/*/clipped_ratio | optimizer | Clipped trust ratio
    r̂ = clip(r), what the update uses
optimizer/matrix/*/clipped | optimizer | Clipped
    1 where the trust ratio was outside its bounds
optimizer/clip_fraction | optimizer | Share clipped
    share of matrices whose trust ratio was outside its bounds
optimizer/calibration_{mean} | optimizer | Calibration
    c, set at a matrix's first step so that its first ratio is 1
optimizer/effective_decay | optimizer | Effective decay
    η r̂ λ, the share of a weight that decay takes in a step
optimizer/relative_update_{mean,max} | optimizer | Relative update
    ‖ΔW‖ / ‖W‖ of a step
optimizer/matrix/*/weight_norm | optimizer | Weight norm
    ‖W‖
optimizer/matrix/*/norm_drift | optimizer | Weight norm drift
    ‖W‖ / ‖W₀‖ − 1, W₀ at initialization
optimizer/weight_norm_drift | optimizer | Weight norm drift
    largest |‖W‖ / ‖W₀‖ − 1| over matrices
optimizer/orthogonality_residual | optimizer | Orthogonality residual
    ‖QQᵀ − I‖ / √m of the short side m: how far Q is from orthogonal
spectrum/sigma_max | spectrum | Largest singular value
    σ_max
spectrum/sigma_mean | spectrum | Mean singular value
    σ̄ = ‖·‖_* / rank; the largest stable step of an orthogonalized update follows it
spectrum/effective_rank | spectrum | Effective rank
    ‖·‖_*² / ‖·‖²: how many directions carry the matrix
spectrum/flattening_gain | spectrum | Flattening gain
    σ_max / σ̄: how much larger steps orthogonalization allows
spectrum/gradient/nuclear_norm | spectrum | Nuclear norm
    Σ ‖G‖_* over matrices: OrScale's criterion of convergence
spectrum/gradient/heterogeneity_gain | spectrum | Heterogeneity gain
    what a step size for each matrix would gain over one for all; 1 where all σ̄ are equal
data/padding | other | Padding
    share of the step's positions that have no target: what packed documents leave of windows
straggler/wait_seconds | other | Wait for the slowest rank | seconds
    how long another rank waits a step in the first collective for the one that arrives last
straggler/rank | other | Slowest rank
    the one that arrives last
moe/max_violation | moe | Largest load violation
    largest load / mean load − 1, mean over layers; 0 is even
moe/load_entropy | moe | Load entropy | nats
    −Σ f ln f over the shares f of the experts; ln(experts) is even
moe/*/load | moe | Expert load
    share of the routed tokens that each expert takes
"""


@dataclass(frozen=True)
class Metric:
    """A row of the registry; `keys` are those of metrics.jsonl that it is about."""

    name: str
    keys: tuple[str, ...]
    section: str
    title: str
    unit: str
    meaning: str

    @property
    def definition(self) -> str:
        return f"{self.meaning}; {self.unit}" if self.unit else self.meaning


def _registry() -> tuple[Metric, ...]:
    metrics = []
    for row in re.findall(r"^(\S.*)\n    (.*)$", _TABLE, re.MULTILINE):
        key, section, title, unit = [*row[0].split(" | "), ""][:4]
        stem, _, endings = key.rstrip("}").partition("_{")
        keys = tuple(f"{stem}_{ending}" for ending in endings.split(",")) if endings else (key,)
        metrics.append(Metric(stem.rpartition("/")[2], keys, section, title, unit, row[1]))
    return tuple(metrics)


REGISTRY = _registry()
BY_NAME = {metric.name: metric for metric in REGISTRY}
_PLACE = {metric.name: place for place, metric in enumerate(REGISTRY)}
_QUALIFIERS = {"gradient", "matrix"}  # parts of a key that say what kind of thing follows


@dataclass(frozen=True)
class Key:
    """A metrics key taken apart: `stability/layer_03/attention_z` is metric attention_z of element
    layer_03.

    `pattern` has `*` in place of the element; the key is `pattern.replace("*", element)`. `source`
    is that of a data mixture: `val_loss/web` is metric val_loss of web.
    """

    section: str
    pattern: str
    element: str | None
    metric: str
    source: str = ""

    @property
    def known(self) -> tuple[Metric | None, str]:
        """The registry's row and the statistic of it, if any."""
        if metric := BY_NAME.get(self.metric):
            return metric, ""
        stem, _, statistic = self.metric.rpartition("_")
        return (BY_NAME.get(stem), statistic) if statistic in STATISTICS else (None, "")

    @property
    def title(self) -> str:
        metric, statistic = self.known
        title = metric.title if metric else self.metric.replace("_", " ")
        title += f", {STATISTICS[statistic]}" if metric and statistic else ""
        gradient = "gradient/" in self.pattern and "gradient" not in self.metric
        by_source = " by source of the data mixture" if self.source else ""
        return title + (" of the gradient" if gradient else "") + by_source

    @property
    def definition(self) -> str:
        metric, statistic = self.known
        over = f"; {STATISTICS[statistic]} over matrices" if statistic else ""
        return metric.definition + over if metric else ""

    @property
    def order(self) -> tuple[int, str]:
        """Place within a section: as in the registry, then by name."""
        metric, _ = self.known
        return (_PLACE[metric.name] if metric else len(REGISTRY)), self.pattern


def parse_key(key: str) -> Key:
    *above, metric = key.split("/")
    if len(above) == 1 and above[0] in BY_NAME and BY_NAME[above[0]].section == "loss":
        return Key("loss", key, None, above[0], metric)
    if above[:1] == ["eval"]:  # of a task: eval/<task>/<metric>
        return Key("eval", key, None, key.partition("/")[2])
    section = above[0] if above else BY_NAME[key].section if key in BY_NAME else "other"
    section = section if section in SECTIONS else "other"
    if len(above) > 1 and above[-1] not in _QUALIFIERS:
        return Key(section, "/".join([*above[:-1], "*", metric]), above[-1], metric)
    return Key(section, key, None, metric)


_INDEX = re.compile(r"(?<=[._\[])\d+|^\d+")


def family(element: str) -> tuple[str, tuple[int, ...]]:
    """What an element is one of, and its numbers: `blocks.3.mlp.up.weight[7]` →
    (`blocks.*.mlp.up.weight[*]`, (3, 7))."""
    return _INDEX.sub("*", element), tuple(int(index) for index in _INDEX.findall(element))


def short(name: str) -> str:
    """A family for a narrow label: `blocks.*.attention.qkv.weight.q` → `attention qkv q`."""
    name = name.replace("[*]", "").removeprefix("blocks.*.").replace(".weight", "")
    return name.replace("_*", "").replace(".*", "").replace(".", " ") or name
