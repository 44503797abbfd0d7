"""A decoder-only transformer language model, dense or with experts: embedding, blocks, head.

    x = embedding(tokens)                                      # float32 residual stream
    for each block:  x = x + a · attention(norm(x));  x = x + a · mlp(norm(x))
    logits = head(norm(x))

Shapes: B batch, T time, D width, V vocabulary, L layers, E routed experts.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from archscale.model.layers import (
    Attention,
    BlockCache,
    Cache,
    Embedding,
    FeedForward,
    Probe,
    RMSNorm,
    attention_mask,
    rope_table,
)
from archscale.model.loss import cross_entropy_sum
from archscale.model.moe import MoE, Routing
from archscale.model.segments import (
    Segments,
    device_takes_segments,
    segment_bounds,
    sequence_bounds,
)

if TYPE_CHECKING:
    from archscale.config import ModelConfig

EMBEDDING_STD = 1e-4  # HyperP (arXiv 2603.28743); a tied embedding takes the head's
NORMAL_STD = 0.02


class ModelOutput(NamedTuple):
    """What a forward pass of the model returns."""

    logits: Tensor | None
    """(B, T, V) float32, where no targets are given."""
    loss: Tensor | None
    """Summed cross-entropy in nats over the targets that count; scalar, where targets are given."""
    routing: Routing | None
    """What the layers routed, (L, B, E); None in a dense model."""
    probed: tuple[Any, ...] | None
    """What the probe made of each of the L blocks; None without a probe."""


class Transformer(nn.Module):
    """The whole model.

    Args:
        config: the `model` section, with `vocab_size` set.
        dtype: of matrix products and activations. Parameters and the residual stream stay float32:
            L blocks add up in it, and a bf16 sum would lose what is small beside it.
        eos_id: token that separates documents; given, attention stays within a document.
        recompute: keep only block inputs for the backward pass (arXiv 1604.06174).
        logit_scale: multiplies the logits (μP). router_logit_scale: those of the routers.

    Raises:
        ValueError: `vocab_size` is not set.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype = torch.float32,
        eos_id: int | None = None,
        recompute: bool = False,
        logit_scale: float = 1.0,
        router_logit_scale: float = 1.0,
    ):
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("model.vocab_size is not set: take it from the data set")
        self.config, self.dtype, self.eos_id, self.recompute = config, dtype, eos_id, recompute
        small = config.init == "fan_in" and not config.tied_embeddings
        std = EMBEDDING_STD if small else NORMAL_STD
        self.embedding = Embedding(config.vocab_size, config.width, std, dtype)
        self.blocks = nn.ModuleList(
            Block(config, dtype, router_logit_scale) for _ in range(config.depth)
        )
        self.head = Head(config, dtype, logit_scale)

    def compile_parts(self) -> None:
        """Compile each block, the last norm, and the softmax of the loss. Not the whole model:
        FSDP2 gathers between the blocks, and that would break its graph."""
        for block in self.blocks:
            block.compile()
        self.head.norm.compile()
        self.head.compiled_loss = True

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        documents: Tensor | Segments | None = None,
        *,
        probe: Probe | None = None,
        head: bool = True,
        cache: Cache | None = None,
        at: Tensor | None = None,
    ) -> ModelOutput:
        """Loss where targets are given, logits where they are not.

        Args:
            tokens, targets: (B, T) int64; targets of `loss.IGNORE` do not count.
            documents: number of each position's document, (B, T): attention stays within it. None:
                documents are told apart by `eos_id`, if it is given. Segments: as `separate` gives
                them.
            probe: looks into the blocks.
            head: False: run the blocks alone, to see what they route; then there are neither logits
                nor a loss.
            cache: what the model has read before; the tokens go on from there, and are added to it.
                Without gradient, and without `documents`.
            at: (B,), the one position of each row whose logits are needed: they are (B, 1, V).
        """
        # Once for all blocks.
        config = self.config
        mask: Tensor | Segments | None
        if cache is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
            mask = self._mask(tokens, documents)
        else:
            positions = cache.start(tokens)
            mask = cache.mask(config.window, self.eos_id, self.dtype)
        rope = rope_table(positions, config.head_dim, config.rope_theta)
        x = self.embedding(tokens)
        # Not a list of `BlockOutput`: it would keep every layer's residual stream.
        routed: list[Routing] = []
        probed: list[Any] = []
        for number, block in enumerate(self.blocks):
            if cache is not None:
                layer = block(x, rope, mask, probe, cache.block(number))
            elif self.recompute and torch.is_grad_enabled():
                layer = checkpoint(block, x, rope, mask, probe, use_reentrant=False)
            else:
                layer = block(x, rope, mask, probe)
            x = layer.stream
            probed.append(layer.probed)
            if layer.routing is not None:
                routed.append(layer.routing)
        logits = loss = None
        if at is not None:
            x = x[torch.arange(len(x), device=x.device), at].unsqueeze(1)
        if head:
            tied = self.embedding.weight if self.config.tied_embeddings else None
            if targets is None:
                logits = self.head(x, None, tied)
            else:
                loss = self.head(x, targets, tied)
        return ModelOutput(
            logits,
            loss,
            Routing(*map(torch.stack, zip(*routed))) if routed else None,
            None if probe is None else tuple(probed),
        )

    def separate(
        self, tokens: Tensor, documents: Tensor | None, device: torch.device
    ) -> Tensor | Segments | None:
        """What `forward` on `device` is best given as the documents of a batch that is on the host:
        segments where the device's attention takes them, `documents` itself elsewhere. Their bounds
        are on the host.

        Args:
            tokens, documents: as of `forward`.
        """
        alone = documents is None and self.eos_id is None
        if alone or not device_takes_segments(device, self.dtype, self.config.head_dim):
            return documents
        bounds = segment_bounds(tokens, self.eos_id, documents)
        return Segments(bounds, tokens.shape[1], self.config.window)

    def _mask(
        self, tokens: Tensor, documents: Tensor | Segments | None
    ) -> Tensor | Segments | None:
        """What tells attention where positions may look; None: at everything before them."""
        if isinstance(documents, Segments):
            # A batch of more documents must not compile the blocks anew.
            torch._dynamo.maybe_mark_dynamic(documents.bounds, 0)
            return documents
        window = self.config.window
        alone = documents is None and self.eos_id is None
        if (
            alone
            and window is not None
            and device_takes_segments(tokens.device, self.dtype, self.config.head_dim)
        ):
            batch, context = tokens.shape
            return Segments(sequence_bounds(batch, context, tokens.device), context, window)
        return attention_mask(tokens, window, self.eos_id, self.dtype, documents)


class BlockOutput(NamedTuple):
    """What a `Block` returns."""

    stream: Tensor
    """The residual stream, (B, T, D) float32."""
    routing: Routing | None
    """What its experts' router did, (B, E); None in a dense block."""
    probed: Any
    """What the probe made of the block; None without a probe."""


class Block(nn.Module):
    """x + a · attention(norm(x)), then x + a · mlp(norm(x)), the MLP dense or `MoE`.

    Norms stand before the branches (arXiv 2002.04745), so the residual stream is a plain sum.
    a = 1/√(2L) under Depth-μP (arXiv 2310.02244): its 2L branches then add up to the same size at
    every depth. Otherwise a = 1.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, router_logit_scale: float = 1.0):
        super().__init__()
        self.multiplier = 1 / math.sqrt(2 * config.depth) if config.depth_mup else 1.0
        norm = partial(RMSNorm, dtype=dtype, eps=config.norm_eps)
        self.attention_norm = norm(config.width)
        self.attention = Attention(
            config.width,
            config.heads,
            config.kv_heads,
            config.head_dim,
            norm=norm if config.qk_norm else None,
            gated=config.gated_attention,
            scale=config.attention_logit_scale,
        )
        self.mlp_norm = norm(config.width)
        self.mlp: FeedForward | MoE
        if config.moe is None:
            self.mlp = FeedForward(config.width, config.mlp_hidden, config.mlp)
        else:
            # K experts of 1/K of the hidden features each: as much work as the dense MLP.
            self.mlp = MoE(
                config.width,
                config.mlp_hidden // config.moe.top_k,
                config.mlp,
                *config.expert_counts,
                shared=config.moe.shared_expert,
                sqrt_gate=config.moe.sqrt_gate,
                logit_scale=router_logit_scale,
            )
        self._start_as(config)

    def _start_as(self, config: ModelConfig) -> None:
        """Give the matrices the start that `model.init` names in place of U(±1/√fan_in)."""
        mlp = self.mlp
        parts: list[Any] = [mlp.experts, mlp.shared] if isinstance(mlp, MoE) else [mlp]
        inputs: list[nn.Module] = [self.attention.qkv]
        outputs: list[nn.Module] = [self.attention.out]
        for part in filter(None, parts):
            inputs.append(part.up)
            outputs.append(part.down)
        routers: list[nn.Module] = [mlp.router] if isinstance(mlp, MoE) else []
        drawn_normal = [*inputs, *outputs, *routers] if config.init == "normal" else []
        if config.moe is not None and config.moe.router_init == "normal":
            drawn_normal += routers
        for module in drawn_normal:
            _start(module)["init"] = "normal", NORMAL_STD
        divided: list[nn.Module] = {
            "fan_in": [],
            "fan_in_tied": [self.attention.qkv, *outputs],
            "normal": outputs,
        }[config.init]
        for module in divided:
            distribution, scale = _start(module)["init"]
            _start(module)["init"] = distribution, scale / math.sqrt(2 * config.depth)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | Segments | None,
        probe: Probe | None = None,
        cache: BlockCache | None = None,
    ) -> BlockOutput:
        """Both branches on the residual stream x (B, T, D); the rest as of `Attention`."""
        attended = self.attention(self.attention_norm(x), rope, mask, probe, cache)
        x = torch.add(x, attended.hidden, alpha=self.multiplier)
        routing = router_probed = None
        if isinstance(self.mlp, MoE):
            hidden, routing, router_probed = self.mlp(self.mlp_norm(x), probe)
        else:
            hidden = self.mlp(self.mlp_norm(x))
        x = torch.add(x, hidden, alpha=self.multiplier)
        probed = None
        if probe is not None:
            assert attended.probed is not None
            probed = probe.block(
                attended.probed, router_probed, attended.hidden, hidden, self.multiplier
            )
        return BlockOutput(x, routing, probed)


def _start(module: nn.Module) -> dict[str, Any]:
    """What a layer with one matrix says of it."""
    roles: Any = module.parameter_roles
    return roles["weight"]


class Head(nn.Module):
    """Final norm and output matrix W (V, D): logits (B, T, V) float32, or the summed cross-entropy
    where targets are given.

    A tied head has no matrix of its own and is given the embedding's at every call.

    Args:
        scale: multiplies the logits (μP).
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, scale: float):
        super().__init__()
        self.scale, self.compiled_loss = scale, False
        self.norm = RMSNorm(config.width, dtype, config.norm_eps)
        assert config.vocab_size is not None
        if not config.tied_embeddings:
            self.weight = nn.Parameter(torch.empty(config.vocab_size, config.width))
            self.parameter_roles = {"weight": {"role": "head", "init": ("normal", NORMAL_STD)}}

    def forward(self, x: Tensor, targets: Tensor | None, tied: Tensor | None) -> Tensor:
        h = self.norm(x)
        if self.scale != 1:
            h = h * self.scale  # and not the logits: (B, T, D) is smaller than (B, T, V)
        weight = (self.weight if tied is None else tied).to(h.dtype)
        if targets is None:
            return (h @ weight.mT).float()
        h, targets = h.flatten(0, 1), targets.flatten()
        return cross_entropy_sum(h, weight, targets, compiled=self.compiled_loss)
