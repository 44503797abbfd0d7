"""Hyperparameter transfer: from the base model's learning rate to every role's at another size
(HyperP, arXiv 2603.28743; μP).

    η(role) = base.lr · lr_ratio · width · depth · tokens · batch

    width    (w / w0)^e, e by parameterization and rule: `TABLE`
    depth    √(d0 / d), with Depth-μP (`model.depth_mup`), which also scales every residual branch
             by 1/√(2d)
    tokens   (T / T0)^(−x), x = 0.32 under hyperp, 0 under mup++, or
             `parameterization.token_exponent`; T is `training.tokens`, or
             `parameterization.planned_tokens`
    batch    √(B / B0)

`standard` transfers nothing: every factor is 1. All functions are pure.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from archscale.config import Config
from archscale.config.model import ModelConfig, ParameterizationConfig
from archscale.config.sections import OptimizerConfig
from archscale.errors import ConfigError
from archscale.plan.counting import published_parameters
from archscale.rules import RULES


@dataclass(frozen=True)
class TransferRule:
    """How one matrix rule goes with one parameterization.

    Attributes:
        width: exponent of w/w0 in the matrices' learning rate, and where that comes from.
        clip: whether `optimizer.matrix.clip` may replace the rule's own bounds.
        head: rule of an untied head.
        decay: what decays: nothing, matrices, or matrices by λ d0/d.
        logits: exponent of w/w0 in the scale of logits and router logits.
    """

    width: float
    source: str
    clip: bool = True
    head: str = "adamw"
    decay: Literal["nothing", "matrices", "matrices by depth"] = "nothing"
    logits: float = 0.0


def _mup(width: float, source: str) -> TransferRule:
    return TransferRule(width, source, decay="matrices by depth")


# THE table of what goes together; README.md of this folder shows it. Rules with Moonlight's factor
# keep ‖step‖₂ / ‖W‖₂ by √(w0/w).
TABLE: dict[str, dict[str, TransferRule]] = {
    "hyperp": {
        "muonh": TransferRule(0.0, "HyperP: a relative step", clip=False, head="adamh"),
        "adamh": TransferRule(0.0, "HyperP: a relative step", clip=False, head="adamh"),
        "orscale_lm_sphere": TransferRule(
            -0.5, "MuonH at η/c, 1/c ≈ 0.2 √(3 fan_in)", head="adamh"
        ),
    },
    "mup++": {
        "muon": _mup(0.0, "spectral norm of a step"),
        "muon_spectral": _mup(0.0, "spectral norm of a step"),
        "muon_plain": _mup(0.0, "spectral norm of a step"),
        "orscale": _mup(0.0, "spectral norm of a step"),
        "moonlight": _mup(-0.5, "spectral norm of a step"),
        "orscale_lm": _mup(-0.5, "spectral norm of a step"),
        "adamw": TransferRule(-1.0, "μP", decay="matrices", logits=-1.0),
    },
}


@dataclass(frozen=True)
class Factor:
    """One factor of a learning rate: `name` (width, depth, tokens, batch, lr_ratio), its value, how
    and whence."""

    name: str
    value: float
    formula: str
    source: str


@dataclass(frozen=True)
class RoleSettings:
    """What the optimizer does with the parameters of one role."""

    rule: str
    lr: float  # peak, of the full batch
    weight_decay: float  # λ, which the optimizer multiplies by the rate of the step
    factors: tuple[Factor, ...]


@dataclass(frozen=True)
class Transfer:
    """Everything that a parameterization decides about one run."""

    roles: dict[str, RoleSettings]  # by role: matrix, embedding, head (untied only), vector
    logit_scale: float  # multiplies the head's input
    router_logit_scale: float
    batch_exponent: (
        float  # the learning rate follows (batch / full batch) to this power while the batch grows
    )


def problems(
    parameterization: ParameterizationConfig, optimizer: OptimizerConfig
) -> Iterator[ConfigError]:
    """Combinations outside the table, each with its remedy."""
    kind, matrix, element = parameterization.kind, optimizer.matrix, optimizer.element
    if kind == "standard":
        return
    known = TABLE[kind]
    if matrix.rule not in known:
        others = [other for other, rules in TABLE.items() if matrix.rule in rules]
        yield ConfigError(
            f"{kind} does not know how {matrix.rule} transfers",
            "optimizer.matrix.rule",
            f"set it to {' or '.join(known)}, or parameterization.kind to"
            f" {' or '.join([*others, 'standard'])}",
        )
    elif matrix.clip and not known[matrix.rule].clip:
        yield ConfigError(
            f"{kind} runs {matrix.rule} without a clip: its ratio ‖W‖ / ‖Q‖ is small by itself",
            "optimizer.matrix.clip",
            "set it to null",
        )
    for key, own in (("ratio_exponent", 1.0), ("calibration", None)):
        if matrix.rule in known and getattr(matrix, key) != own:
            yield ConfigError(
                f"{kind} knows how {matrix.rule} transfers with its own ratio, not with another",
                f"optimizer.matrix.{key}",
                f"set it to {'null' if own is None else own}, or parameterization.kind to standard",
            )
    if element.kind != "adamw":
        yield ConfigError(
            f"{kind} knows how adamw transfers, not {element.kind}",
            "optimizer.element.kind",
            "set it to adamw, or parameterization.kind to standard",
        )


def transfer(
    model: ModelConfig,
    parameterization: ParameterizationConfig,
    optimizer: OptimizerConfig,
    tokens: int,
    batch_tokens: int,
) -> Transfer:
    """The settings of every role of `model`, trained on `tokens` (unless the rates are planned for
    another number) with `batch_tokens` a step.

    Raises:
        ConfigError: a combination that is not in the table.
    """
    for problem in problems(parameterization, optimizer):
        raise problem
    kind, base = parameterization.kind, parameterization.base
    rule, element, decay = optimizer.matrix.rule, optimizer.element, optimizer.weight_decay
    common = _common_factors(model, parameterization, tokens, batch_tokens)
    ratio = (
        [Factor("lr_ratio", element.lr_ratio, "", "optimizer.element.lr_ratio")]
        if element.lr_ratio != 1
        else []
    )

    def settings(
        role_rule: str, width: list[Factor], weight_decay: float, own: list[Factor]
    ) -> RoleSettings:
        factors = (*width, *common, *own)
        lr = base.lr * math.prod(f.value for f in factors)
        if RULES[role_rule].sphere:
            weight_decay = 0.0
        elif optimizer.independent_decay:
            weight_decay /= lr  # which the optimizer multiplies by the rate of the step
        return RoleSettings(role_rule, lr, weight_decay, factors)

    w_w0 = model.width / base.width
    head: str
    if kind == "standard":
        head, matrix_decay, others_decay, logits, width = element.kind, decay, decay, 0.0, []
    else:
        row = TABLE[kind][rule]
        head, others_decay, logits = row.head, 0.0, row.logits
        matrix_decay = {
            "nothing": 0.0,
            "matrices": decay,
            "matrices by depth": decay * base.depth / model.depth,
        }[row.decay]
        formula = {
            0.0: "1",
            -0.5: f"√({base.width}/{model.width})",
            -1.0: f"{base.width}/{model.width}",
        }[row.width]
        width = [Factor("width", w_w0**row.width, formula, row.source)]
    vectors_decay = 0.0
    if element.weight_decay is not None:
        others_decay = vectors_decay = element.weight_decay
    roles = {
        "matrix": settings(rule, width, matrix_decay, []),
        "embedding": settings(element.kind, [], others_decay, ratio),
        "head": settings(head, [], others_decay, ratio),
        "vector": settings(element.kind, [], vectors_decay, ratio),
    }
    if model.tied_embeddings:
        del roles["head"]
    head_logits = -1.0 if parameterization.scale_logits == "always" else logits
    return Transfer(roles, w_w0**head_logits, w_w0**logits, 0.0 if kind == "standard" else 0.5)


def transfer_of(config: Config) -> Transfer:
    """`transfer` of a resolved config."""
    return transfer(
        config.model, config.parameterization, config.optimizer, config.tokens, config.batch_tokens
    )


def _common_factors(
    model: ModelConfig, parameterization: ParameterizationConfig, tokens: int, batch_tokens: int
) -> list[Factor]:
    """The factors that all roles share."""
    kind, base = parameterization.kind, parameterization.base
    if kind == "standard":
        return []
    factors = []
    if model.depth_mup:
        root = math.sqrt(base.depth / model.depth)
        factors.append(Factor("depth", root, f"√({base.depth}/{model.depth})", "Depth-μP"))
    exponent = parameterization.applied_token_exponent
    source = (
        "HyperP" if parameterization.token_exponent is None else "parameterization.token_exponent"
    )
    if parameterization.planned_tokens is not None:
        tokens = parameterization.planned_tokens
        source += "; parameterization.planned_tokens"
    if exponent:
        formula = f"({tokens:.4g}/{base.tokens:.4g})^−{exponent:g}"
        factors.append(Factor("tokens", (tokens / base.tokens) ** -exponent, formula, source))
    root = math.sqrt(batch_tokens / base.batch_tokens)
    factors.append(
        Factor("batch", root, f"√({batch_tokens}/{base.batch_tokens})", "noise scale, as HyperP")
    )
    return factors


def budget(model: ModelConfig, parameterization: ParameterizationConfig) -> int:
    """Tokens of `training.tokens: auto`: T0 · N / N0 rounded down, N the published parameter count;
    T0 under `standard`.

    Raises:
        ConfigError: the vocabulary is not known, or the base's heads cannot be derived.
    """
    base = parameterization.base
    if parameterization.kind == "standard":
        return base.tokens
    if model.vocab_size is None:
        raise ConfigError(
            "the token budget follows the parameters, and the vocabulary is not known",
            "training.tokens",
            "give model.vocab_size, prepare data.train, or give a number of tokens",
        )
    heads, rest = divmod(model.heads * base.width, model.width)
    if base.heads is None and rest:
        raise ConfigError(
            f"the base's heads are not given, and {model.heads} heads at width {model.width} scale"
            f" to {model.heads * base.width / model.width:.3g} heads at base width {base.width}",
            "parameterization.base.heads",
            f"give them, such as {max(1, base.width // model.head_dim)}, or a number for"
            " training.tokens",
        )
    heads = base.heads or heads
    kv_heads = base.kv_heads or (heads if model.kv_heads == model.heads else model.kv_heads)
    size = {"depth": base.depth, "width": base.width, "heads": heads, "kv_heads": kv_heads}
    n0 = published_parameters(model.model_copy(update=size))
    return base.tokens * published_parameters(model) // n0


def resolve(config: Config) -> Config:
    """`config` with `training.tokens` and `training.batch_tokens` as numbers.

    Raises:
        ConfigError: as `budget`, or a schedule that does not fit into the budget.
    """
    training = config.training
    tokens = (
        budget(config.model, config.parameterization)
        if training.tokens == "auto"
        else training.tokens
    )
    return config.with_numbers(tokens, config.batch_tokens)
