"""The sections of the YAML schema that describe the model: architecture, and how hyperparameters
transfer to its size.

Frozen; what `ModelConfig` can work out by itself (`width`, `heads`, `kv_heads`) is filled in when
it is built.
"""

import math
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, StrictBool

from archscale.config.explain import choice, divisors
from archscale.config.sections import Section
from archscale.config.values import Count, Derived, NonNegative, Positive, Share
from archscale.errors import ConfigError

BASE_HEAD_DIM = 128  # head size at which μP's attention scale is the usual 1/√head_dim
_LATER: Any = None  # filled in when the section is built


class MoEConfig(Section):
    """Fine-grained mixture of experts: sparsity × top_k slots of hidden size mlp_hidden / top_k."""

    sparsity: Count = 8
    """Expert slots per active one."""
    top_k: Count = 8
    """Active experts per token, the shared one included: the granularity."""
    shared_expert: StrictBool = True
    """One slot is dense: every token passes it."""
    sqrt_gate: StrictBool = True
    """Combine experts with the square roots of the gates, which keeps the output RMS independent of
    top_k."""
    router_init: Literal["model", "normal"] = "model"
    """Start of the router: as `model.init` has it for projections, or N(0, 0.02)."""
    balance: Literal["global", "sequence"] = "global"
    """Scope of the load-balance loss: a whole batch, or each sequence."""
    balance_scope: Literal["step", "micro", "previous"] = "step"
    """Batch of the global balance loss: the step's, for whose loads all its micro-batches pass the
    blocks once more before the first backward pass; each micro-batch's on all ranks, so that the
    curve depends on `training.micro_batch` and on the number of ranks; or the previous step's."""
    balance_weight: NonNegative = 0.1
    """Weight of the load-balance loss in the training loss."""

    @property
    def routed_experts(self) -> int:
        """Slots but the shared one."""
        return self.sparsity * self.top_k - self.shared_expert

    @property
    def routed_per_token(self) -> int:
        """Routed experts that a token passes."""
        return self.top_k - self.shared_expert

    @property
    def counts_first(self) -> bool:
        """Whether the balance loss needs all of a step's routing decisions before the first
        backward pass."""
        return self.balance_scope == "step" and self.balances_globally

    @property
    def balances_globally(self) -> bool:
        """Whether there is a balance loss of whole batches."""
        return self.balance == "global" and self.balance_weight > 0

    def problems(self) -> Iterator[ConfigError]:
        if self.shared_expert and self.top_k < 2:
            yield ConfigError(
                "with a shared expert, top_k 1 leaves no routed one",
                "model.moe.top_k",
                "set top_k of at least 2, or shared_expert: false",
            )
        elif self.routed_per_token == 1 and self.balance_weight == 0:
            yield ConfigError(
                "one routed expert a token has a constant gate, so without a balance loss nothing"
                " trains the router",
                "model.moe.balance_weight",
                f"set it above 0, or top_k to at least {self.top_k + 1}",
            )
        if self.balance_scope != "step" and not self.balances_globally:
            cause = "each sequence has its own loads" if self.balance_weight else "nothing balances"
            yield ConfigError(
                f"{cause}, so balance_scope does nothing",
                "model.moe.balance_scope",
                "set it to step, or balance: global with a balance_weight above 0",
            )


class ModelConfig(Section):
    """A decoder-only transformer.

    `width` null is aspect × depth. A width alone sets the aspect, if depth divides it; two that are
    written must agree.
    """

    depth: Count = 8
    """Number of blocks (attention + MLP)."""
    aspect: Count | None = 128
    """Width per block of depth, in features."""
    width: Derived = Field(default=_LATER)
    """Features of the residual stream; null: aspect × depth."""
    head_dim: Count = 128
    """Features per attention head; even, because rotary embeddings turn pairs."""
    heads: Derived = Field(default=_LATER)
    """Query heads per block; null: width / head_dim."""
    kv_heads: Derived = Field(default=_LATER)
    """Key and value heads per block, a divisor of heads; null: heads."""
    mlp: Literal["swiglu", "relu2"] = "swiglu"
    """Feed-forward: gated SiLU (three matrices) or squared ReLU (two)."""
    mlp_ratio: Positive = 4.0
    """Hidden features of the feed-forward per feature of width."""
    context: Count = 1024
    """Sequence length in tokens."""
    qk_norm: StrictBool = True
    """RMS-normalize queries and keys per head."""
    attention_scale: Literal["mup", "standard"] = "mup"
    """Factor of the attention logits: √128 / head_dim (μP), or 1 / √head_dim; the same at a head
    size of 128."""
    norm_eps: Positive = 1e-5
    """ε of every RMSNorm, added to the mean square."""
    gated_attention: StrictBool = True
    """Sigmoid gate per head on the head's output, before the output projection."""
    window: Count | None = None
    """Sliding attention window in tokens; null: the whole context."""
    rope_theta: Positive = 10000.0
    """Base period of the rotary embeddings, in tokens."""
    tied_embeddings: StrictBool = False
    """Share the embedding with the output head."""
    vocab_size: Count | None = None
    """Rows of the embedding; null: from the data."""
    init: Literal["fan_in", "fan_in_tied", "normal"] = "fan_in"
    """Start of the matrices: `fan_in` U(±1/√fan_in), the embedding N(0, 1e-4), an untied head and a
    tied embedding N(0, 0.02); `fan_in_tied`, with tied embeddings, the same with attention's
    projections and the last one of the MLP or of each expert divided by √(2 depth); `normal`
    N(0, 0.02) for all, the last projection of every branch divided by √(2 depth)."""
    depth_mup: StrictBool = False
    """Scale every residual branch by 1 / sqrt(2 depth)."""
    moe: MoEConfig | None = None
    """Mixture of experts in place of the MLP; null: dense."""

    @property
    def mlp_hidden(self) -> int:
        """Hidden features of the feed-forward (dense, or all active experts together)."""
        return round(self.width * self.mlp_ratio)

    @property
    def expert_counts(self) -> tuple[int, int]:
        """(routed experts, of which a token passes): S k and k, each less one when a slot is the
        shared expert; 0, 0 if dense."""
        return (self.moe.routed_experts, self.moe.routed_per_token) if self.moe else (0, 0)

    @property
    def attention_logit_scale(self) -> float:
        """What `attention_scale` stands for."""
        if self.attention_scale == "standard":
            return 1 / math.sqrt(self.head_dim)
        return math.sqrt(BASE_HEAD_DIM) / self.head_dim

    def _fill(
        self, key: str, value: int | None
    ) -> None:  # frozen for users; only while the section is being built
        self.__dict__[key] = value

    def problems(self) -> Iterator[ConfigError]:
        if self.width is None:
            if self.aspect is None:
                yield ConfigError(
                    "width and aspect are both null", "model.width", "give one of them"
                )
                return
            self._fill("width", self.aspect * self.depth)
        elif "aspect" not in self.model_fields_set or self.aspect is None:
            self._fill("aspect", self.width // self.depth if self.width % self.depth == 0 else None)
        elif self.width != self.aspect * self.depth:
            yield ConfigError(
                f"width {self.width} is not aspect {self.aspect} × depth {self.depth}",
                "model.width",
                "set model.width or model.aspect to null: the other one then decides",
            )
        if self.head_dim % 2:
            yield ConfigError(
                f"head_dim {self.head_dim} is odd, rotary embeddings turn pairs",
                "model.head_dim",
                f"set it to {self.head_dim + 1}",
            )
        if self.init == "fan_in_tied" and not self.tied_embeddings:
            yield ConfigError(
                "fan_in_tied is the start of a model with tied embeddings",
                "model.init",
                "set it to fan_in, or model.tied_embeddings to true",
            )
        if self.heads is None:
            if self.width % self.head_dim:
                yield self._indivisible_width()
                return
            self._fill("heads", self.width // self.head_dim)
        if self.kv_heads is None:
            self._fill("kv_heads", self.heads)
        if self.heads % self.kv_heads:
            yield ConfigError(
                f"kv_heads {self.kv_heads} does not divide heads {self.heads}",
                "model.kv_heads",
                f"set it to {choice(divisors(self.heads), self.kv_heads)}",
            )
        yield from self._feed_forward_problems()

    def _feed_forward_problems(self) -> Iterator[ConfigError]:
        if abs(self.width * self.mlp_ratio - self.mlp_hidden) > 1e-6 or self.mlp_hidden < 1:
            yield ConfigError(
                f"mlp_ratio {self.mlp_ratio} × width {self.width} is not a whole number",
                "model.mlp_ratio",
                f"set it to {max(self.mlp_hidden, 1) / self.width}",
            )
        elif self.moe and self.mlp_hidden % self.moe.top_k:
            works = divisors(self.mlp_hidden)
            yield ConfigError(
                f"top_k {self.moe.top_k} does not divide {self.mlp_hidden} hidden features",
                "model.moe.top_k",
                f"set it to {choice(works, self.moe.top_k)}",
            )

    def _indivisible_width(self) -> ConfigError:
        dims = [dim for dim in divisors(self.width) if dim % 2 == 0]
        below = self.width // self.head_dim * self.head_dim
        widths = choice([size for size in (below, below + self.head_dim) if size], self.width)
        options = f"model.width: {widths}, or give model.heads"
        return ConfigError(
            f"heads is null, but head_dim {self.head_dim} does not divide width {self.width}",
            "model.head_dim",
            (
                f"set model.head_dim: {choice(dims, self.head_dim)}, or {options}"
                if dims
                else f"set {options}"
            ),
        )


TOKEN_EXPONENTS = {"hyperp": 0.32, "mup++": 0.0}  # of the kinds that transfer


class BaseConfig(Section):
    """The base model: the size at which the learning rate was tuned."""

    depth: Count = 8
    """Number of blocks."""
    width: Count = 1024
    """Features of the residual stream."""
    heads: Count | None = None
    """Query heads; null: as many per feature of width as the model has."""
    kv_heads: Count | None = None
    """Key and value heads; null: as many as the model, or `heads` if the model has no grouped
    queries."""
    lr: Positive = 0.01
    """Learning rate of every role at the base size; `optimizer.element.lr_ratio` scales it for all
    but the matrices."""
    tokens: Count = 10_400_000_000
    """Training tokens of the base run."""
    batch_tokens: Count = 2_097_152
    """Tokens per optimizer step of the base run."""


class ParameterizationConfig(Section):
    """How hyperparameters transfer from the base model to this one."""

    kind: Literal["hyperp", "mup++", "standard"] = "standard"
    """Transfer rules; standard transfers nothing: the learning rate is `base.lr`."""
    token_exponent: Share | None = None
    """Learning rate ∝ tokens^(−exponent); null: 0.32 under `hyperp`, 0 under `mup++`; refused under
    `standard`."""
    scale_logits: Literal["rule", "always"] = "rule"
    """Under `mup++`, logits × base width / width: where the matrix rule's transfer has it, which
    `adamw` alone does, or under every rule; a router's logits where the rule has it."""
    planned_tokens: Count | None = None
    """Tokens that the learning rates are planned for, such as those of a shorter run at whose rates
    this one goes on; null: `training.tokens`; refused where the rates do not follow tokens."""
    base: BaseConfig = BaseConfig()
    """The base model: the size at which the learning rate was tuned."""

    @property
    def applied_token_exponent(self) -> float:
        """The x of learning rate ∝ tokens^(−x); 0 where tokens do not matter."""
        if self.token_exponent is not None:
            return self.token_exponent
        return TOKEN_EXPONENTS.get(self.kind, 0.0)

    def problems(self) -> Iterator[ConfigError]:
        if self.kind == "standard" and self.token_exponent is not None:
            yield ConfigError(
                "standard transfers nothing, so token_exponent does nothing",
                "parameterization.token_exponent",
                "set it to null, or choose the kind hyperp or mup++",
            )
        if self.scale_logits != "rule" and self.kind != "mup++":
            yield ConfigError(
                f"{self.kind} scales no logits, so scale_logits does nothing",
                "parameterization.scale_logits",
                "set it to rule, or choose the kind mup++",
            )
        if self.planned_tokens is not None and not self.applied_token_exponent:
            yield ConfigError(
                f"no rate follows tokens under {self.kind}, so planned_tokens does nothing",
                "parameterization.planned_tokens",
                "set it to null",
            )
        needed = ("depth", "width", "lr", "tokens", "batch_tokens")
        missing = [key for key in needed if key not in self.base.model_fields_set]
        if self.kind != "standard" and missing:
            yield ConfigError(
                f"{self.kind} transfers from a base, and {', '.join(missing)} of it"
                f" {'is' if len(missing) == 1 else 'are'} missing",
                "parameterization.base",
                f"give {', '.join(needed)} of the size at which the learning rate was tuned",
            )
