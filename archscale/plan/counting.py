"""Parameters and FLOPs of a model, from its structure.

`weights` lists what the transformer stores; parameters, FLOPs, memory and communication all follow
from that list. The published formulas stand beside the exact ones, for comparison with published
curves only.

D width, H query heads, G key-value heads, K head size, F hidden size, V vocabulary, T context, L
blocks, E routed experts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from archscale.rules import Views

if TYPE_CHECKING:
    from archscale.config import ModelConfig
    from archscale.config.sections import MatrixOptimizerConfig


@dataclass(frozen=True)
class Weight:
    """One stored parameter, and how often it occurs.

    Attributes:
        name: as in the state dict, with `*` for the number of the block.
        part: what it computes: embedding, projections, mlp (dense), shared_expert, experts, router,
            head or norm.
        role: what the optimizer takes it for: matrix, embedding, head or vector.
        copies: how many of it there are; L, or 1 outside the blocks.
        shape: of one copy; (E, fan_out, fan_in) for a stack of experts.
        blocks: (name, rows) of the logical matrices of a fused projection; empty: one matrix.
        active: matrices of a stack that one token passes.
    """

    name: str
    part: str
    role: str
    copies: int
    shape: tuple[int, ...]
    blocks: tuple[tuple[str, int], ...] = ()
    active: int = 1

    @property
    def numel(self) -> int:
        """Elements of one copy."""
        return math.prod(self.shape)

    @property
    def in_blocks(self) -> bool:
        """Whether each block has one."""
        return "*" in self.name

    @property
    def elements(self) -> int:
        """Elements of all copies."""
        return self.copies * self.numel

    @property
    def stack(self) -> int:
        """Matrices of one copy that are stored as a stack; 1 without one."""
        return self.shape[0] if len(self.shape) == 3 else 1

    @property
    def active_elements(self) -> int:
        """Elements of all copies that one token uses."""
        return self.elements // self.stack * self.active

    def matrices(self, views: Views) -> list[tuple[int, int, int]]:
        """(count, rows, cols) of the logical matrices of all copies, each orthogonalized on its
        own."""
        *_, rows, cols = self.shape
        parts = Counter(size for _, size in views.matrices(self.blocks) or [("", rows)])
        return [(self.copies * self.stack * count, size, cols) for size, count in parts.items()]


@dataclass(frozen=True)
class Parameters:
    """Stored elements. `total` = embedding + head + matrix + vector; `router` is part of
    `matrix`."""

    total: int
    active: int  # without the experts that a token does not pass
    embedding: int
    head: int  # 0 when tied: the embedding serves as head
    matrix: int
    vector: int
    router: int


def vocabulary(model: ModelConfig) -> int:
    """V. ValueError while the data that decides it is unknown."""
    if model.vocab_size is None:
        raise ValueError(
            "model.vocab_size is not set, so nothing can be counted: take it from the data set, or"
            " set model.vocab_size"
        )
    return model.vocab_size


def weights(model: ModelConfig) -> list[Weight]:
    """Every stored parameter of the transformer, in storage order."""
    V, D, L, K = vocabulary(model), model.width, model.depth, model.head_dim
    query, key = model.heads * K, model.kv_heads * K
    qkv = (("q", query), ("k", key), ("v", key)) + (
        (("gate", model.heads),) if model.gated_attention else ()
    )
    stored = [
        Weight("embedding.weight", "embedding", "embedding", 1, (V, D)),
        Weight("blocks.*.attention_norm.weight", "norm", "vector", L, (D,)),
        Weight(
            "blocks.*.attention.qkv.weight",
            "projections",
            "matrix",
            L,
            (sum(n for _, n in qkv), D),
            qkv,
        ),
        Weight("blocks.*.attention.out.weight", "projections", "matrix", L, (D, query)),
    ]
    if model.qk_norm:
        stored += [
            Weight(f"blocks.*.attention.{n}_norm.weight", "norm", "vector", L, (K,))
            for n in ("q", "k")
        ]
    stored.append(Weight("blocks.*.mlp_norm.weight", "norm", "vector", L, (D,)))
    if model.moe is None:
        stored += _feed_forward(model, "mlp", model.mlp_hidden)
    else:
        hidden = model.mlp_hidden // model.moe.top_k
        E, active = model.expert_counts
        stored.append(Weight("blocks.*.mlp.router.weight", "router", "matrix", L, (E, D)))
        stored += _feed_forward(model, "experts", hidden, E, active)
        if model.moe.shared_expert:
            stored += _feed_forward(model, "shared_expert", hidden)
    stored.append(Weight("head.norm.weight", "norm", "vector", 1, (D,)))
    if not model.tied_embeddings:
        stored.append(Weight("head.weight", "head", "head", 1, (V, D)))
    return stored


def _feed_forward(
    model: ModelConfig, part: str, hidden: int, E: int | None = None, active: int = 1
) -> list[Weight]:
    """Up (gate and up fused under SwiGLU) and down, dense or as a stack of E."""
    stack = () if E is None else (E,)
    name = {
        "mlp": "blocks.*.mlp",
        "experts": "blocks.*.mlp.experts",
        "shared_expert": "blocks.*.mlp.shared",
    }[part]
    blocks = (("gate", hidden), ("up", hidden)) if model.mlp == "swiglu" else ()
    up, down = (matrices_of_mlp(model.mlp) - 1) * hidden, hidden
    return [
        Weight(
            f"{name}.up.weight",
            part,
            "matrix",
            model.depth,
            (*stack, up, model.width),
            blocks,
            active,
        ),
        Weight(
            f"{name}.down.weight",
            part,
            "matrix",
            model.depth,
            (*stack, model.width, down),
            (),
            active,
        ),
    ]


def views_of(model: ModelConfig, matrix: MatrixOptimizerConfig) -> Views:
    """The matrices that the config's optimizer sees in fused projections."""
    fused = [("q", "k", "v")] * matrix.fused_qkv + [("gate", "up")] * matrix.fused_gate_up
    return Views(model.head_dim if matrix.per_head else None, tuple(fused))


def matrices_of_mlp(kind: str) -> int:
    """Matrices (D, F) of a feed-forward: gate, up and down, or up and down."""
    return 3 if kind == "swiglu" else 2


def parameters(model: ModelConfig) -> Parameters:
    """Exact count of what is stored."""
    stored = weights(model)
    by_role = {
        role: sum(w.elements for w in stored if w.role == role)
        for role in ("embedding", "head", "matrix", "vector")
    }
    return Parameters(
        total=sum(by_role.values()),
        active=sum(w.active_elements for w in stored),
        router=sum(w.elements for w in stored if w.part == "router"),
        **by_role,
    )


# --- published formulas


def published_parameters(model: ModelConfig) -> int:
    """N of HyperP, from which its token budgets follow: 12 w² d + 2 w V + 2 w d n_head d_head + 2 w
    d n_kv d_head.

    12 = 3 matrices × ratio 4 of SwiGLU; here matrices × mlp_ratio. Embedding and head always count,
    tied or not; norms, gates and the router do not; of experts only the active ones.
    """
    d, w = model.depth, model.width
    attention = (model.heads + model.kv_heads) * model.head_dim
    mlp_per_width = matrices_of_mlp(model.mlp) * model.mlp_ratio
    return round(mlp_per_width * w * w * d) + 2 * w * vocabulary(model) + 2 * w * d * attention


def published_flops_per_token(model: ModelConfig) -> int:
    """Training FLOPs of a token on the published curves: 3 (2 N + 4 L n_head d_head T), attention
    in full (HyperP)."""
    attention = 4 * model.depth * model.heads * model.head_dim * model.context
    return 3 * (2 * published_parameters(model) + attention)


# --- structural FLOPs


def visible_keys(context: int, window: int | None = None) -> float:
    """Mean over positions of the keys that causal attention sees, itself included."""
    w = min(window or context, context)
    return w - w * (w - 1) / (2 * context)


def forward_flops(model: ModelConfig, *, causal: bool = True) -> dict[str, float]:
    """FLOPs of a token's forward pass by part, matrix products only, 2 per multiply-add.

    Parts: projections, attention (scores and values), mlp, experts (active), shared_expert, router,
    head; those that occur.

    Args:
        causal: count the keys that are visible (MFU); False: all of them, which is what kernels
            without a causal path do and what the published formula counts.
    """
    keys = visible_keys(model.context, model.window) if causal else model.context
    flops: dict[str, float] = {}
    for w in weights(model):
        if w.role == "matrix":
            flops[w.part] = flops.get(w.part, 0.0) + 2.0 * w.active_elements
    flops["attention"] = 4.0 * model.depth * model.heads * model.head_dim * keys
    flops["head"] = 2.0 * vocabulary(model) * model.width  # tied or not
    return flops


def training_flops(
    model: ModelConfig, *, causal: bool = True, recompute: bool = False, counting_pass: bool = False
) -> float:
    """FLOPs of a token's forward and backward pass: the backward is two products for each of the
    forward.

    MFU takes the defaults: useful work only.

    Args:
        recompute: the blocks run forward a second time (activation checkpointing).
        counting_pass: they run once more without gradients, to know the experts' global load before
            the first backward.
    """
    forward = forward_flops(model, causal=causal)
    total = sum(forward.values())
    return 3 * total + (recompute + counting_pass) * (total - forward["head"])


def optimizer_flops(
    model: ModelConfig,
    *,
    orthogonal: Collection[str] = ("matrix",),
    views: Views = Views(),  # noqa: B008  frozen
) -> int:
    """Nominal FLOPs of orthogonalizing every matrix once, on all ranks together: Σ 5 (4 m² n + 2
    m³), m ≤ n.

    The direct form of five iterations; symmetric products and the Gram form do less.

    Args:
        orthogonal: roles whose rule orthogonalizes; none for AdamW and the like.
        views: which matrices the blocks of a fused projection are.
    """
    total = 0
    for weight in weights(model):
        if weight.role in orthogonal:
            for count, rows, cols in weight.matrices(views):
                m, n = sorted((rows, cols))
                total += count * 5 * (4 * m * m * n + 2 * m**3)
    return total
