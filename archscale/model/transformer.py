"""Pre-norm transformer language model with a float32 residual stream.

Shapes: B batch, T time, D width, V vocabulary, L layers, E routed experts.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from archscale.model.attention import Attention, attention_mask, rope_table
from archscale.model.layers import Embedding, FeedForward, Probe, RMSNorm
from archscale.model.loss import cross_entropy_sum
from archscale.model.moe import MoE, Routing

if TYPE_CHECKING:
    from archscale.config import ModelConfig

EMBEDDING_STD = 1e-4  # HyperP; a tied embedding takes the head's
HEAD_STD = 0.02


class Block(nn.Module):
    """x + a · attention(norm(x)), then x + a · mlp(norm(x)); a = 1/√(2L) under Depth-μP, else 1.
    The MLP is dense or `MoE`."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, router_logit_scale: float = 1.0):
        super().__init__()
        self.multiplier = 1 / math.sqrt(2 * config.depth) if config.depth_mup else 1.0
        self.attention_norm = RMSNorm(config.width, dtype)
        self.attention = Attention(
            config.width,
            config.heads,
            config.kv_heads,
            config.head_dim,
            qk_norm=config.qk_norm,
            gated=config.gated_attention,
            dtype=dtype,
        )
        self.mlp_norm = RMSNorm(config.width, dtype)
        self.mlp: FeedForward | MoE
        if config.moe is None:
            self.mlp = FeedForward(config.width, config.mlp_hidden, config.mlp)
        else:
            self.mlp = MoE(
                config.width,
                config.mlp_hidden // config.moe.top_k,
                config.mlp,
                *config.expert_counts,
                shared=config.moe.shared_expert,
                sqrt_gate=config.moe.sqrt_gate,
                logit_scale=router_logit_scale,
            )

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        probe: Probe | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """x (B, T, D) → the same; with experts their load and mass, (B, E) as of `MoE`; with a
        probe its sums, (6,): attention, router (NaN without experts), Σ h² of attention and MLP,
        outliers of attention and MLP."""
        h, attention_seen = self.attention(self.attention_norm(x), rope, mask, probe)
        x = torch.add(x, h, alpha=self.multiplier)
        load = mass = router_seen = None
        if isinstance(self.mlp, MoE):
            y, load, mass, router_seen = self.mlp(self.mlp_norm(x), probe)
        else:
            y = self.mlp(self.mlp_norm(x))
        x = torch.add(x, y, alpha=self.multiplier)
        if probe is None:
            return x, load, mass, None
        assert attention_seen is not None
        logits = torch.stack(
            [attention_seen, attention_seen * math.nan if router_seen is None else router_seen]
        )
        outputs = torch.stack(
            [probe.branch(h, self.multiplier), probe.branch(y, self.multiplier)], 1
        )
        return x, load, mass, torch.cat([logits.float(), outputs.flatten()])


class Output(NamedTuple):
    """What a forward pass returns where more than the loss is asked for."""

    loss: Tensor | None
    routing: Routing | None
    seen: Tensor | None
    """Sums of a probe, (L, 6) as of `Block`."""


class Head(nn.Module):
    """Final norm and output matrix (V, D): logits, or the summed cross-entropy when targets are
    given.

    A tied head has no matrix of its own and is given the embedding's at every call.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, scale: float):
        super().__init__()
        self.scale = scale
        self.norm = RMSNorm(config.width, dtype)
        assert config.vocab_size is not None
        if not config.tied_embeddings:
            self.weight = nn.Parameter(torch.empty(config.vocab_size, config.width))
            self.parameter_roles = {"weight": {"role": "head", "init": ("normal", HEAD_STD)}}

    def forward(self, x: Tensor, targets: Tensor | None, tied: Tensor | None) -> Tensor:
        h = self.norm(x)
        if self.scale != 1:
            h = h * self.scale
        weight = (self.weight if tied is None else tied).to(h.dtype)
        if targets is None:
            return (h @ weight.mT).float()
        return cross_entropy_sum(h.flatten(0, 1), weight, targets.flatten())


class Transformer(nn.Module):
    """A decoder-only language model.

    Args:
        config: the `model` section, with `vocab_size` set.
        dtype: of matrix products and activations (parameters and residual stream stay float32).
        eos_id: token that separates documents; given, attention stays within a document.
        recompute: keep only block inputs for the backward pass (activation checkpointing).
        logit_scale: multiplies the logits (μP). router_logit_scale: those of the routers.
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
        std = HEAD_STD if config.tied_embeddings else EMBEDDING_STD
        self.embedding = Embedding(config.vocab_size, config.width, std, dtype)
        self.blocks = nn.ModuleList(
            Block(config, dtype, router_logit_scale) for _ in range(config.depth)
        )
        self.head = Head(config, dtype, logit_scale)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        routing: bool = False,
        probe: Probe | None = None,
    ) -> Tensor | Output:
        """Summed loss in nats over targets that count, or logits (B, T, V) without targets.

        Args:
            tokens, targets: (B, T) int64; targets of `loss.IGNORE` do not count.
            routing: return an `Output` with what the experts' routers did; without targets no head
                runs and its loss is None.
            probe: return an `Output` with what this sees.
        """
        rope = rope_table(
            tokens.shape[1], self.config.head_dim, self.config.rope_theta, tokens.device
        )
        mask = attention_mask(tokens, self.config.window, self.eos_id, self.dtype)
        x = self.embedding(tokens)
        layers = []
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                x, *layer = checkpoint(block, x, rope, mask, probe, use_reentrant=False)
            else:
                x, *layer = block(x, rope, mask, probe)
            layers.append(layer)
        tied = self.embedding.weight if self.config.tied_embeddings else None
        if not routing and probe is None:
            return self.head(x, targets, tied)
        loss = None if targets is None and routing else self.head(x, targets, tied)
        loads, masses, seen = zip(*layers)
        return Output(
            loss,
            Routing(torch.stack(loads), torch.stack(masses)) if routing else None,
            None if probe is None else torch.stack(seen),
        )
