"""Hyperparameter transfer: from the base model's learning rate to every role's at another size (REFERENCE 3).

    η(role) = base.lr · lr_ratio · width · depth · tokens · batch

    width    (w / w0)^e, e by parameterization and rule: `WIDTH_EXPONENTS`
    depth    √(d0 / d), with Depth-μP (`model.depth_mup`), which also scales every residual branch by 1/√(2d)
    tokens   (T / T0)^(−x), x = 0.32 under hyperp, 0 under mup++, or `parameterization.token_exponent`
    batch    √(B / B0)

`standard` transfers nothing: every factor is 1. All functions are pure.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from archscale.config import Config
from archscale.config_model import ModelConfig, ParameterizationConfig
from archscale.config_sections import OptimizerConfig
from archscale.errors import ConfigError
from archscale.model.counting import published_parameters

# The one table of which matrix rules go with which parameterization, and how their learning rate follows the width. On the
# sphere a step of muonh or adamh has relative length η whatever the width. orscale_lm_sphere is muonh at η/c with
# 1/c ≈ 0.2 √(3 fan_in), and the other rules with Moonlight's factor keep ‖step‖₂ / ‖W‖₂ in the same way. AdamW is μP's.
WIDTH_EXPONENTS: dict[str, dict[str, float]] = {
    "hyperp": {"muonh": 0.0, "orscale_lm_sphere": -0.5, "adamh": 0.0},
    "mup++": {"muon": 0.0, "muon_spectral": 0.0, "orscale": 0.0, "moonlight": -0.5, "orscale_lm": -0.5, "adamw": -1.0},
}
TOKEN_EXPONENTS = {"hyperp": 0.32, "mup++": 0.0}
SOURCES = {"hyperp": "HyperP", "mup++": "μP++", "standard": "no transfer"}


@dataclass(frozen=True)
class Factor:
    """One factor of a learning rate: `name` (width, depth, tokens, batch, lr_ratio), its value and how it came about."""

    name: str
    value: float
    formula: str


@dataclass(frozen=True)
class RoleSettings:
    """What the optimizer does with the parameters of one role."""

    rule: str
    lr: float  # peak, of the full batch
    weight_decay: float
    factors: tuple[Factor, ...]


@dataclass(frozen=True)
class Transfer:
    """Everything that a parameterization decides about one run."""

    roles: dict[str, RoleSettings]  # by role: matrix, embedding, head (untied only), vector
    logit_scale: float  # multiplies the head's input
    router_logit_scale: float
    batch_exponent: float  # the learning rate follows (batch / full batch) to this power while the batch grows


def problems(
    model: ModelConfig, parameterization: ParameterizationConfig, optimizer: OptimizerConfig
) -> Iterator[ConfigError]:
    """Combinations outside the table, each with its remedy."""
    kind, matrix, element = parameterization.kind, optimizer.matrix, optimizer.element
    if kind == "standard":
        return
    known = WIDTH_EXPONENTS[kind]
    if matrix.rule not in known:
        others = [other for other, rules in WIDTH_EXPONENTS.items() if matrix.rule in rules]
        yield ConfigError(
            f"{kind} does not know how {matrix.rule} transfers", "optimizer.matrix.rule",
            f"set it to {' or '.join(known)}, or parameterization.kind to {' or '.join([*others, 'standard'])}",
        )  # fmt: skip
    elif kind == "hyperp" and matrix.clip and matrix.rule != "orscale_lm_sphere":
        yield ConfigError(
            f"clip {list(matrix.clip)} would bind at every step of {matrix.rule}: its ratio ‖W‖/‖Q‖ is small by itself",
            "optimizer.matrix.clip", "set it to null",
        )  # fmt: skip
    if element.kind != "adamw":
        yield ConfigError(
            f"{kind} knows how adamw transfers, not {element.kind}", "optimizer.element.kind",
            "set it to adamw, or parameterization.kind to standard",
        )  # fmt: skip


def transfer(
    model: ModelConfig,
    parameterization: ParameterizationConfig,
    optimizer: OptimizerConfig,
    tokens: int,
    batch_tokens: int,
) -> Transfer:
    """The settings of every role of `model`, trained on `tokens` with `batch_tokens` a step.

    Raises:
        ConfigError: a combination that is not in the table.
    """
    for problem in problems(model, parameterization, optimizer):
        raise problem
    kind, base = parameterization.kind, parameterization.base
    rule, element, decay = optimizer.matrix.rule, optimizer.element, optimizer.weight_decay
    common = _common_factors(model, parameterization, tokens, batch_tokens)
    ratio = [Factor("lr_ratio", element.lr_ratio, "optimizer.element.lr_ratio")] if element.lr_ratio != 1 else []

    def settings(role_rule: str, width: list[Factor], weight_decay: float, own: list[Factor]) -> RoleSettings:
        factors = (*width, *common, *own)
        return RoleSettings(role_rule, base.lr * math.prod(f.value for f in factors), weight_decay, factors)

    w0_w = base.width / model.width
    width: list[Factor] = []
    matrix_decay, others_decay = decay, decay
    if kind != "standard":
        exponent = WIDTH_EXPONENTS[kind][rule]
        formula = {0.0: "1", -0.5: f"√({base.width}/{model.width})", -1.0: f"{base.width}/{model.width}"}[exponent]
        width = [Factor("width", w0_w**-exponent, formula)]
        others_decay = 0.0
        if kind == "mup++" and rule != "adamw":
            matrix_decay = decay * base.depth / model.depth
    roles = {
        "matrix": settings(rule, width, matrix_decay, []),
        "embedding": settings(element.kind, [], others_decay, ratio),
        "head": settings("adamh" if kind == "hyperp" else element.kind, [], others_decay, ratio),
        "vector": settings(element.kind, [], 0.0, ratio),
    }
    if model.tied_embeddings:
        del roles["head"]
    scale = w0_w if kind == "mup++" and rule == "adamw" else 1.0
    return Transfer(roles, scale, scale, 0.0 if kind == "standard" else 0.5)


def transfer_of(config: Config) -> Transfer:
    """`transfer` of a resolved config."""
    return transfer(config.model, config.parameterization, config.optimizer, config.tokens, config.batch_tokens)


def _common_factors(
    model: ModelConfig, parameterization: ParameterizationConfig, tokens: int, batch_tokens: int
) -> list[Factor]:
    """The factors that all roles share."""
    kind, base = parameterization.kind, parameterization.base
    if kind == "standard":
        return []
    factors = []
    if model.depth_mup:
        factors.append(Factor("depth", math.sqrt(base.depth / model.depth), f"√({base.depth}/{model.depth})"))
    exponent = parameterization.token_exponent
    exponent = TOKEN_EXPONENTS[kind] if exponent is None else exponent
    if exponent:
        factors.append(
            Factor("tokens", (tokens / base.tokens) ** -exponent, f"({tokens:.4g}/{base.tokens:.4g})^−{exponent:g}")
        )
    factors.append(
        Factor("batch", math.sqrt(batch_tokens / base.batch_tokens), f"√({batch_tokens}/{base.batch_tokens})")
    )
    return factors


def budget(model: ModelConfig, parameterization: ParameterizationConfig) -> int:
    """Tokens of `training.tokens: auto`: T0 · N / N0 rounded down, N the published parameter count; T0 under `standard`.

    Raises:
        ConfigError: the vocabulary is not known, or the base's heads cannot be derived.
    """
    base = parameterization.base
    if parameterization.kind == "standard":
        return base.tokens
    if model.vocab_size is None:
        raise ConfigError(
            "the token budget follows the parameters, and the vocabulary is not known", "training.tokens",
            "give model.vocab_size, prepare data.train, or give a number of tokens",
        )  # fmt: skip
    heads, rest = divmod(model.heads * base.width, model.width)
    if base.heads is None and rest:
        raise ConfigError(
            f"{model.heads} heads at width {model.width} are no whole number at the base's width {base.width}",
            "parameterization.base.heads", "give it, or a number for training.tokens",
        )  # fmt: skip
    heads = base.heads or heads
    kv_heads = base.kv_heads or (heads if model.kv_heads == model.heads else model.kv_heads)
    n0 = published_parameters(model, depth=base.depth, width=base.width, heads=heads, kv_heads=kv_heads)
    return base.tokens * published_parameters(model) // n0


def resolve(config: Config) -> Config:
    """`config` with `training.tokens` and `training.batch_tokens` as numbers.

    Raises:
        ConfigError: as `budget`, or a schedule that does not fit into the budget.
    """
    training = config.training
    numbers = {"batch_tokens": config.batch_tokens}
    numbers["tokens"] = budget(config.model, config.parameterization) if training.tokens == "auto" else training.tokens
    if {key: getattr(training, key) for key in numbers} == numbers:
        return config
    return Config.from_dict({**config.resolved(), "training": {**config.resolved()["training"], **numbers}})
