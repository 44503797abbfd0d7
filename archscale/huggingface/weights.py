"""Our parameters as those of transformers, and back: names, parts of fused matrices, and constant
factors of training, which become part of the weights of an export and are divided out again.

Shapes: D width, V vocabulary, H query heads, G key-value heads, C channels of a head, F hidden
features of a feed-forward or of one expert, E routed experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from archscale.config import ModelConfig
from archscale.distributed import Fragment

CHUNK = 1 << 24  # numbers that are read and divided at a time
Read = Callable[[str, int, int], Tensor]
"""(name, lo, hi) → elements [lo, hi) of the row-major flattened weight of that name, as it is
stored, on the CPU."""


@dataclass(frozen=True)
class Piece:
    """A weight of the export: `factor` times some rows of a weight of ours.

    Attributes:
        name: in the export.
        rows: (first, end) of the matrix; None: all.
        expert: which matrix of a stack (E, …); None: not a stack.
    """

    name: str
    rows: tuple[int, int] | None = None
    expert: int | None = None
    factor: float = 1.0

    def take(self, weight: Tensor) -> Tensor:
        part = weight if self.expert is None else weight[self.expert]
        part = part if self.rows is None else part[slice(*self.rows)]
        return part if self.factor == 1 else part * self.factor

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the piece, where our weight has the shape `stored`."""
        shape = stored if self.expert is None else stored[1:]
        return shape if self.rows is None else (self.rows[1] - self.rows[0], *shape[1:])


@dataclass(frozen=True)
class Source:
    """One of our parameters and what becomes of it: one after another the pieces are the whole of
    its row-major flattening."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Factors:
    """The constants that training multiplies by, and that the export has in its weights.

    Attributes:
        branch: of both branches of every block (Depth-μP).
        attention: of the attention logits, over the usual 1/√C.
        logits, router_logits: μP.
        expert: of the routed and of the shared expert's output.
    """

    branch: float
    attention: float
    logits: float
    router_logits: float
    expert: float

    def sentences(self) -> list[str]:
        """What was folded into which weights, for people; factors of 1 are left out."""
        folded = {
            "depth multiplier into `o_proj` and `down_proj`": self.branch,
            "attention scale into `q_norm` or `q_proj`": self.attention,
            "logit scale into the final norm": self.logits,
            "router's logit scale into its matrix": self.router_logits,
            "√½ of routed and shared experts into their `down_proj`": self.expert,
        }
        return [f"{what}: {factor:.6g}" for what, factor in folded.items() if factor != 1]


def factors(model: ModelConfig, logit_scale: float, router_logit_scale: float) -> Factors:
    """What a model under a parameterization (`plan.transfer`) multiplies."""
    moe = model.moe
    halved = moe is not None and moe.shared_expert and moe.sqrt_gate
    return Factors(
        branch=1 / math.sqrt(2 * model.depth) if model.depth_mup else 1.0,
        attention=(
            1.0
            if model.attention_scale == "standard"
            else model.attention_logit_scale * math.sqrt(model.head_dim)
        ),
        logits=logit_scale,
        router_logits=router_logit_scale if moe else 1.0,
        expert=math.sqrt(0.5) if halved else 1.0,
    )


def sources(model: ModelConfig, model_type: str, by: Factors) -> Iterator[Source]:
    """All parameters of `model`, in the order in which the export has them."""
    D, V = model.width, model.vocab_size
    assert V is not None
    yield Source("embedding.weight", (V, D), (Piece("model.embed_tokens.weight"),))
    for number in range(model.depth):
        ours, theirs = f"blocks.{number}", f"model.layers.{number}"
        norm = Piece(f"{theirs}.input_layernorm.weight")
        yield Source(f"{ours}.attention_norm.weight", (D,), (norm,))
        yield from _attention(model, f"{ours}.attention", f"{theirs}.self_attn", by)
        norm = Piece(f"{theirs}.post_attention_layernorm.weight")
        yield Source(f"{ours}.mlp_norm.weight", (D,), (norm,))
        if model.moe is None:
            names = (f"{ours}.mlp", f"{theirs}.mlp")
            yield from _feed_forward(model, model.mlp_hidden, *names, _FEED_FORWARD, by.branch)
        else:
            yield from _experts(model, f"{ours}.mlp", theirs, model_type, by)
    yield Source("head.norm.weight", (D,), (Piece("model.norm.weight", factor=by.logits),))
    if not model.tied_embeddings:
        yield Source("head.weight", (V, D), (Piece("lm_head.weight"),))


def _attention(model: ModelConfig, ours: str, theirs: str, by: Factors) -> Iterator[Source]:
    D, C = model.width, model.head_dim
    queries, keys = model.heads * C, model.kv_heads * C
    parts = [("q_proj", queries), ("k_proj", keys), ("v_proj", keys)]
    if model.gated_attention:
        parts.append(("gate_proj", model.heads))
    pieces, first = [], 0
    for name, rows in parts:
        # With QK-norm a factor of the rows would be normalized away.
        factor = by.attention if name == "q_proj" and not model.qk_norm else 1.0
        pieces.append(Piece(f"{theirs}.{name}.weight", (first, first + rows), factor=factor))
        first += rows
    yield Source(f"{ours}.qkv.weight", (first, D), tuple(pieces))
    if model.qk_norm:
        piece = Piece(f"{theirs}.q_norm.weight", factor=by.attention)
        yield Source(f"{ours}.q_norm.weight", (C,), (piece,))
        yield Source(f"{ours}.k_norm.weight", (C,), (Piece(f"{theirs}.k_norm.weight"),))
    piece = Piece(f"{theirs}.o_proj.weight", factor=by.branch)
    yield Source(f"{ours}.out.weight", (D, queries), (piece,))


_FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


def _feed_forward(
    model: ModelConfig,
    hidden: int,
    ours: str,
    theirs: str,
    names: tuple[str, str, str],
    factor: float,
    experts: int | None = None,
) -> Iterator[Source]:
    """One feed-forward, or a stack of them.

    Args:
        theirs: name in the export, with `{}` for the number of the expert in a stack.
        names: of the gate's, the upper and the lower matrix in the export.
        factor: of the output.
        experts: how many the stack has; None: no stack.
    """
    gate, up, down = names
    upper = [(gate, (0, hidden)), (up, (hidden, 2 * hidden))]
    if model.mlp == "relu2":
        upper = [(up, (0, hidden))]
    numbers: list[int | None] = [None] if experts is None else [*range(experts)]
    stack = () if experts is None else (experts,)
    yield Source(
        f"{ours}.up.weight",
        (*stack, len(upper) * hidden, model.width),
        tuple(
            Piece(f"{theirs.format(number)}.{name}.weight", part, number)
            for number in numbers
            for name, part in upper
        ),
    )
    yield Source(
        f"{ours}.down.weight",
        (*stack, model.width, hidden),
        tuple(
            Piece(f"{theirs.format(number)}.{down}.weight", None, number, factor)
            for number in numbers
        ),
    )


def _experts(
    model: ModelConfig, ours: str, theirs: str, model_type: str, by: Factors
) -> Iterator[Source]:
    assert model.moe is not None
    experts = model.expert_counts[0]
    hidden = model.mlp_hidden // model.moe.top_k
    mixtral = model_type == "mixtral"
    theirs += ".block_sparse_moe" if mixtral else ".mlp"
    names = ("w1", "w3", "w2") if mixtral else _FEED_FORWARD
    router = Piece(f"{theirs}.gate.weight", factor=by.router_logits)
    yield Source(f"{ours}.router.weight", (experts, model.width), (router,))
    factor = by.branch * by.expert
    stack = f"{theirs}.experts.{{}}"
    yield from _feed_forward(model, hidden, f"{ours}.experts", stack, names, factor, experts)
    if model.moe.shared_expert:
        name = f"{theirs}.shared_expert"
        yield from _feed_forward(model, hidden, f"{ours}.shared", name, _FEED_FORWARD, factor)


# --- the way back


def divide_out(stored: Tensor, factor: float) -> Tensor:
    """The float32 weights x of which an export makes `stored`: x · factor, rounded to its dtype, is
    the stored number wherever there is such an x (for all bfloat16 numbers), and otherwise within
    one unit in its last place."""
    wanted = stored.float()
    if factor == 1:
        return wanted
    x = wanted / factor
    # The nearest number to the quotient is the one, but at powers of two, such as the 1 of a norm,
    # where the spacing of numbers changes: there a neighbour may be.
    for direction in (math.inf, -math.inf):
        neighbour = torch.nextafter(x, torch.tensor(direction))
        wrong = (x * factor).to(stored.dtype) != stored
        right = (neighbour * factor).to(stored.dtype) == stored
        x = torch.where(wrong & right, neighbour, x)
    return x


@torch.no_grad()
def take_back(weights: Mapping[str, Fragment], parts: Sequence[Source], read: Read) -> None:
    """Fill what this rank holds of our parameters from the weights of an export, reading no more
    than that, `CHUNK` numbers at a time."""
    for source in parts:
        for piece, held, lo, hi in _held_pieces(weights, source):
            held.copy_(divide_out(read(piece.name, lo, hi), piece.factor))


@torch.no_grad()
def change_factors(
    weights: Mapping[str, Fragment], before: Sequence[Source], now: Sequence[Source]
) -> None:
    """Scale weights that were trained under the factors of `before` so that under those of `now`
    the model computes the same; where a factor stays, its weights do."""
    for old, new in zip(before, now, strict=True):
        factors_before = {piece.name: piece.factor for piece in old.pieces}
        for piece, held, _, _ in _held_pieces(weights, new):
            if (factor := factors_before[piece.name]) != piece.factor:
                held.copy_(divide_out(held.cpu() * factor, piece.factor))


def _held_pieces(
    weights: Mapping[str, Fragment], source: Source
) -> Iterator[tuple[Piece, Tensor, int, int]]:
    """The pieces of which this rank holds something, in parts of at most `CHUNK` numbers: the
    memory of each part, 1-D, and where it lies in the row-major flattened piece."""
    fragment, start = weights[source.name], 0
    end = fragment.lo + fragment.data.numel()
    for piece in source.pieces:
        size = math.prod(piece.shape(source.shape))
        lo, hi = max(fragment.lo, start), min(end, start + size)
        for first in range(lo, hi, CHUNK):
            last = min(first + CHUNK, hi)
            held = fragment.data[first - fragment.lo : last - fragment.lo]
            yield piece, held, first - start, last - start
        start += size
