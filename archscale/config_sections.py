"""The sections of the YAML schema: every key, its unit, its default, and what may stand in it.

Frozen; what a section can work out by itself (`model.width`, `heads`, `kv_heads`) is filled in when it is built, so that a
resolved config loads as an equal one. The whole is `archscale.config.Config`.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, StrictBool, model_validator
from pydantic_core import PydanticCustomError

from archscale.config_io import (
    PROBLEMS,
    BelowOne,
    BelowOnePair,
    Bounds,
    Count,
    CountOrAuto,
    CountOrZero,
    Derived,
    NonNegative,
    Positive,
    PositiveShare,
    Share,
    Text,
    choice,
    divisors,
)
from archscale.errors import ConfigError

MatrixRule = Literal[
    "muon", "muon_spectral", "moonlight", "orscale", "orscale_lm", "muonh", "orscale_lm_sphere",
    "hybrid_shape", "hybrid_momentum", "hybrid_decoupled", "adamh", "adamw", "lion", "sgd", "lamb",
]  # fmt: skip
MATRIX_RULES: tuple[str, ...] = get_args(MatrixRule)
SPHERE_RULES = ("muonh", "orscale_lm_sphere", "adamh")  # rules that hold every matrix at its initial norm
PLAIN_RULES = ("muon", "muon_spectral", "moonlight", "adamw", "lion", "sgd")  # without a trust ratio
Dtype = Literal["auto", "float32", "bfloat16"]


class Section(BaseModel):
    """Base of all sections: frozen, no unknown keys, and its own cross-field checks."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def problems(self) -> Iterator[ConfigError]:
        """What is wrong between the keys of this section; `where` is the dotted key alone."""
        yield from ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = list(self.problems())
        if problems:
            text = "; ".join(str(problem) for problem in problems)
            raise PydanticCustomError(PROBLEMS, "{text}", {"text": text, "problems": problems})
        return self


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
    """Combine experts with the square roots of the gates, which keeps the output RMS independent of top_k."""
    balance: Literal["global", "sequence"] = "global"
    """Scope of the load-balance loss: the whole batch of a step, or each sequence."""
    balance_weight: NonNegative = 0.1
    """Weight of the load-balance loss in the training loss."""

    def problems(self) -> Iterator[ConfigError]:
        if self.shared_expert and self.top_k < 2:
            yield ConfigError(
                "with a shared expert, top_k 1 leaves no routed one", "model.moe.top_k",
                "set top_k of at least 2, or shared_expert: false",
            )  # fmt: skip


class ModelConfig(Section):
    """A decoder-only transformer.

    `width` null is aspect × depth. A width alone sets the aspect, if depth divides it; two that are written must agree.
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
    depth_mup: StrictBool = False
    """Scale every residual branch by 1 / sqrt(2 depth)."""
    moe: MoEConfig | None = None
    """Mixture of experts in place of the MLP; null: dense."""

    @property
    def mlp_hidden(self) -> int:
        """Hidden features of the feed-forward (dense, or all active experts together)."""
        return round(self.width * self.mlp_ratio)

    def _fill(self, key: str, value: int | None) -> None:  # frozen for users; only while the section is being built
        self.__dict__[key] = value

    def problems(self) -> Iterator[ConfigError]:
        if self.width is None:
            if self.aspect is None:
                yield ConfigError("width and aspect are both null", "model.width", "give one of them")
                return
            self._fill("width", self.aspect * self.depth)
        elif "aspect" not in self.model_fields_set or self.aspect is None:
            self._fill("aspect", self.width // self.depth if self.width % self.depth == 0 else None)
        elif self.width != self.aspect * self.depth:
            yield ConfigError(
                f"width {self.width} is not aspect {self.aspect} × depth {self.depth}", "model.width",
                "set model.width or model.aspect to null: the other one then decides",
            )  # fmt: skip
        if self.head_dim % 2:
            yield ConfigError(
                f"head_dim {self.head_dim} is odd, rotary embeddings turn pairs", "model.head_dim",
                f"set it to {self.head_dim + 1}",
            )  # fmt: skip
        if self.heads is None:
            if self.width % self.head_dim:
                yield self._indivisible_width()
                return
            self._fill("heads", self.width // self.head_dim)
        if self.kv_heads is None:
            self._fill("kv_heads", self.heads)
        if self.heads % self.kv_heads:
            yield ConfigError(
                f"kv_heads {self.kv_heads} does not divide heads {self.heads}", "model.kv_heads",
                f"set it to {choice(divisors(self.heads), self.kv_heads)}",
            )  # fmt: skip
        if abs(self.width * self.mlp_ratio - self.mlp_hidden) > 1e-6 or self.mlp_hidden < 1:
            yield ConfigError(
                f"mlp_ratio {self.mlp_ratio} × width {self.width} is not a whole number", "model.mlp_ratio",
                f"set it to {max(self.mlp_hidden, 1) / self.width}",
            )  # fmt: skip
        elif self.moe and self.mlp_hidden % self.moe.top_k:
            works = divisors(self.mlp_hidden)
            yield ConfigError(
                f"top_k {self.moe.top_k} does not divide {self.mlp_hidden} hidden features", "model.moe.top_k",
                f"set it to {choice(works, self.moe.top_k)}",
            )  # fmt: skip

    def _indivisible_width(self) -> ConfigError:
        dims = [dim for dim in divisors(self.width) if dim % 2 == 0]
        below = self.width // self.head_dim * self.head_dim
        widths = choice([size for size in (below, below + self.head_dim) if size], self.width)
        options = f"model.width: {widths}, or give model.heads"
        return ConfigError(
            f"heads is null, but head_dim {self.head_dim} does not divide width {self.width}", "model.head_dim",
            f"set model.head_dim: {choice(dims, self.head_dim)}, or {options}" if dims else f"set {options}",
        )  # fmt: skip


class BaseConfig(Section):
    """The base model: the size at which the learning rate was tuned."""

    depth: Count = 8
    """Number of blocks."""
    width: Count = 1024
    """Features of the residual stream."""
    lr: Positive = 0.01
    """Learning rate of every role at the base size, per step."""
    tokens: Count = 10_400_000_000
    """Training tokens of the base run."""
    batch_tokens: Count = 2_097_152
    """Tokens per optimizer step of the base run."""


class ParameterizationConfig(Section):
    """How hyperparameters transfer from the base model to this one."""

    kind: Literal["hyperp", "mup++", "standard"] = "standard"
    """Transfer rules; standard transfers nothing: the learning rate is base.lr."""
    base: BaseConfig = BaseConfig()
    """The base model."""


class MatrixOptimizerConfig(Section):
    """The optimizer of matrices: projections, experts, router."""

    rule: MatrixRule = "muonh"
    """Update rule, one of MATRIX_RULES."""
    momentum: BelowOne = 0.95
    """Momentum decay per step."""
    nesterov: StrictBool = True
    """Orthogonalize the momentum's look-ahead instead of the momentum."""
    orthogonalizer: Literal["polar_express", "quintic", "quintic_tuned", "exact"] = "polar_express"
    """Scheme of the orthogonalization; exact is a float64 SVD."""
    per_head: StrictBool = False
    """Orthogonalize attention projections head by head."""
    clip: Bounds | None = None
    """[least, greatest] trust ratio; null: the rule's own bounds."""
    compute_dtype: Dtype = "auto"
    """Orthogonalization arithmetic; auto: float32 under training.precision fp32, otherwise bfloat16."""
    wire_dtype: Dtype = "auto"
    """What ranks exchange; auto as for compute_dtype."""
    momentum_dtype: Literal["float32", "bfloat16"] = "float32"
    """Storage of the momentum."""

    def problems(self) -> Iterator[ConfigError]:
        if self.clip and self.rule in PLAIN_RULES:
            yield ConfigError(f"{self.rule} has no trust ratio to clip", "optimizer.matrix.clip", "set it to null")
        if self.clip and self.clip[0] > self.clip[1]:
            low, high = self.clip
            yield ConfigError(
                f"the lower bound {low} is above the upper bound {high}", "optimizer.matrix.clip",
                f"write [{high}, {low}]",
            )  # fmt: skip


class ElementOptimizerConfig(Section):
    """The optimizer of what is not a matrix: embedding, norms, biases, and the head."""

    kind: Literal["adamw", "lion", "sgd", "lamb"] = "adamw"
    """Elementwise update rule."""
    betas: BelowOnePair = (0.9, 0.95)
    """Decay per step of the first and the second moment."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""
    lr_ratio: Positive = 1.0
    """Learning rate relative to that of the matrices."""


class OptimizerConfig(Section):
    """Both optimizers, weight decay and gradient clipping."""

    matrix: MatrixOptimizerConfig = MatrixOptimizerConfig()
    """Matrices."""
    element: ElementOptimizerConfig = ElementOptimizerConfig()
    """Everything else."""
    weight_decay: NonNegative = 0.0
    """Decay per step and unit of learning rate; coupled or decoupled as the rule says."""
    grad_clip: Positive | None = 1.0
    """Greatest global gradient norm; null: no clipping."""

    def problems(self) -> Iterator[ConfigError]:
        if self.weight_decay > 0 and self.matrix.rule in SPHERE_RULES:
            yield ConfigError(
                f"weight decay {self.weight_decay} does nothing under {self.matrix.rule}: norms are fixed",
                "optimizer.weight_decay",
                "set it to 0, or choose a rule without the sphere, such as orscale_lm",
            )


class ScheduleConfig(Section):
    """Learning rate over the run, as a share of its peak."""

    kind: Literal["linear", "cosine", "wsd", "constant"] = "linear"
    """Decay to final_ratio: linear, cosine, warmup-stable-decay, or none."""
    warmup_tokens: CountOrZero = 0
    """Linear warm-up in tokens; 0: none."""
    final_ratio: Share = 0.1
    """Learning rate at the end, relative to its peak."""
    decay_ratio: PositiveShare = 2 / 7
    """Share of the tokens over which wsd decays, at the end; other kinds do not use it."""


class MixtureEntry(Section):
    """One source of a data mixture."""

    path: Text
    """Directory of token shards."""
    weight: Positive
    """Share of the tokens, relative to the other entries."""


class DataConfig(Section):
    """Directories of token shards from `archscale data prepare`, relative to the working directory."""

    train: Text
    """Directory whose training split is read."""
    val: Text | None = None
    """Directory whose validation split is read; null: no evaluation, whatever `eval` says."""
    mixture: Annotated[list[MixtureEntry], Field(min_length=1)] | None = None
    """Several training sources by weight; null: `train` alone."""
    document_mask: StrictBool = False
    """Attention does not cross document boundaries."""


class TrainingConfig(Section):
    """Length, batch and numerics of the run."""

    tokens: CountOrAuto = "auto"
    """Training tokens; auto: by the parameterization."""
    batch_tokens: CountOrAuto = "auto"
    """Tokens per step over all ranks, a multiple of model.context; auto: by the parameterization."""
    micro_batch: Count = 8
    """Sequences per device and forward pass; accumulation makes up the rest of the batch."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Arithmetic of forward and backward; fp32 makes the optimizer's auto dtypes float32."""
    compile: StrictBool = True
    """Compile the model."""
    activation_checkpoint: Literal["none", "block"] = "none"
    """What the backward pass recomputes: nothing, or each block."""


class ParallelConfig(Section):
    """How ranks share the work: world size = replicate × shard."""

    engine: Literal["native", "deepspeed"] = "native"
    """native: DDP, FSDP2 or HSDP by the sizes below; deepspeed: ZeRO."""
    replicate: Count = 1
    """Replica groups: ranks over which parameters are copied."""
    shard: CountOrAuto = "auto"
    """Ranks over which parameters are sharded; 1 is DDP; auto: world size / replicate."""
    reshard_after_forward: StrictBool = True
    """Free gathered parameters after the forward pass and gather again; false: more memory, less traffic."""
    expert: Count = 1
    """Ranks over which experts are spread; divides shard."""
    zero_stage: Literal[1, 2, 3] = 1
    """ZeRO stage of the deepspeed engine; the native engine takes the default only."""

    def problems(self) -> Iterator[ConfigError]:
        if self.engine == "native" and self.zero_stage != 1:
            yield ConfigError(
                f"zero_stage {self.zero_stage} means nothing to the native engine", "parallel.zero_stage",
                "remove it; parallel.shard is what shards parameters",
            )  # fmt: skip
        if self.shard != "auto" and self.shard % self.expert:
            yield ConfigError(
                f"expert {self.expert} does not divide shard {self.shard}", "parallel.expert",
                "set it to a divisor of parallel.shard",
            )  # fmt: skip


class CheckpointConfig(Section):
    """When checkpoints are written and how many stay."""

    every: Count = 1000
    """Optimizer steps between checkpoints."""
    keep: Count = 3
    """Newest checkpoints that stay."""
    async_: StrictBool = Field(default=False, alias="async")
    """Write while training goes on. In Python `async_`, because `async` is a keyword."""


class WandbConfig(Section):
    """Weights & Biases."""

    mode: Literal["auto", "online", "offline", "disabled"] = "disabled"
    """auto: online where a key is configured, otherwise offline."""
    project: Text = "archscale"
    """Project that runs are filed under."""


class TelemetryConfig(Section):
    """What is measured while training."""

    every: Count = 10
    """Optimizer steps between readings of the device; every step has its line, the last of a reading `optimizer/*` too."""
    per_layer: StrictBool = False
    """Stability indicators per layer beside their means."""
    spectrum_every: CountOrZero = 0
    """Optimizer steps between spectral diagnostics; 0: never."""
    wandb: WandbConfig = WandbConfig()
    """Weights & Biases."""


class EvalConfig(Section):
    """Validation during training; without data.val there is none."""

    every: Count = 1000
    """Optimizer steps between evaluations."""
    batches: Count = 50
    """Batches per evaluation."""
