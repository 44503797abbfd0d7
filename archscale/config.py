"""The YAML schema: every key, its unit, its default, and what may stand in it.

    config = load_config("configs/tiny.yaml", ["training.micro_batch=4"])

Sections are frozen; unknown keys are errors. What a section can work out by itself is filled in when it is
built (`model.width`, `heads`, `kv_heads` are always numbers), so a resolved config loads as an equal one.
Building a section in Python raises pydantic's ValidationError; `load_config` and `Config.from_dict` raise
ConfigError. Reading files, kinds of values and the wording of errors are in `archscale.config_io`.

The file is long because it is the whole schema in one place, each key with its meaning and unit.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError, model_validator
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
    Layer,
    NonNegative,
    Positive,
    PositiveShare,
    Share,
    Text,
    explain,
    merge,
    read_layers,
    write_yaml,
)
from archscale.errors import ConfigError

MatrixRule = Literal[
    "muon", "moonlight", "orscale", "orscale_lm", "muonh", "orscale_lm_sphere",
    "hybrid_shape", "hybrid_momentum", "hybrid_decoupled", "adamw", "lion", "sgd", "lamb",
]  # fmt: skip
MATRIX_RULES: tuple[str, ...] = get_args(MatrixRule)
SPHERE_RULES = ("muonh", "orscale_lm_sphere")  # rules that hold every matrix at its initial norm
Dtype = Literal["auto", "float32", "bfloat16"]


# --- sections -----------------------------------------------------------------------------------------------


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

    `width` null is aspect × depth. A width without an aspect sets the aspect (null where depth does not
    divide the width); when both are written they must agree.
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

    def _fill(self, key: str, value: int | None) -> None:
        self.__dict__[key] = value  # frozen for users; only while the section is being built

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
            works = _divisors(self.heads)
            yield ConfigError(
                f"kv_heads {self.kv_heads} does not divide heads {self.heads}", "model.kv_heads",
                f"set it to {_choice(works, self.kv_heads)}",
            )  # fmt: skip
        if abs(self.width * self.mlp_ratio - self.mlp_hidden) > 1e-6 or self.mlp_hidden < 1:
            yield ConfigError(
                f"mlp_ratio {self.mlp_ratio} × width {self.width} is not a whole number", "model.mlp_ratio",
                f"set it to {max(self.mlp_hidden, 1) / self.width}",
            )  # fmt: skip
        elif self.moe and self.mlp_hidden % self.moe.top_k:
            works = _divisors(self.mlp_hidden)
            yield ConfigError(
                f"top_k {self.moe.top_k} does not divide {self.mlp_hidden} hidden features",
                "model.moe.top_k",
                f"set it to {_choice(works, self.moe.top_k)}",
            )  # fmt: skip

    def _indivisible_width(self) -> ConfigError:
        dims = [dim for dim in _divisors(self.width) if dim % 2 == 0]
        below = self.width // self.head_dim * self.head_dim
        widths = _choice([size for size in (below, below + self.head_dim) if size], self.width)
        options = f"model.width: {widths}, or give model.heads"
        return ConfigError(
            f"heads is null, but head_dim {self.head_dim} does not divide width {self.width}",
            "model.head_dim",
            f"set model.head_dim: {_choice(dims, self.head_dim)}, or {options}" if dims else f"set {options}",
        )  # fmt: skip


def _divisors(value: int) -> list[int]:
    small = [divisor for divisor in range(1, math.isqrt(value) + 1) if value % divisor == 0]
    return [*small, *(value // divisor for divisor in small)]


def _choice(values: Sequence[int], target: int) -> str:
    """The values nearest to the target on either side, as "a" or "a or b"."""
    around = [
        max((v for v in values if v <= target), default=None),
        min((v for v in values if v >= target), default=None),
    ]
    return " or ".join(str(value) for value in dict.fromkeys(around) if value is not None)


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
        if self.clip and self.clip[0] > self.clip[1]:
            low, high = self.clip
            yield ConfigError(
                f"the lower bound {low} is above the upper bound {high}", "optimizer.matrix.clip",
                f"write [{high}, {low}]",
            )  # fmt: skip


class ElementOptimizerConfig(Section):
    """The optimizer of what is not a matrix: embedding, norms, biases, and the head under most rules."""

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
    """auto: online where a key is configured, otherwise disabled."""
    project: Text = "archscale"
    """Project that runs are filed under."""


class TelemetryConfig(Section):
    """What is measured while training."""

    every: Count = 10
    """Optimizer steps between lines of metrics.jsonl."""
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


# --- the whole ----------------------------------------------------------------------------------------------


class NotYet(NamedTuple):
    """A value that the schema has and the code does not: refused, never ignored."""

    key: str
    refused: Callable[[Any], bool]
    what: str
    remedy: str


# Whoever builds a feature deletes its row.
NOT_YET = [
    NotYet("model.moe", lambda v: v is not None, "a mixture of experts", "set it to null"),
    NotYet(
        "parameterization.kind", lambda v: v != "standard", "hyperparameter transfer", "set it to standard"
    ),
    NotYet(
        "training.tokens", lambda v: v == "auto", "a budget of auto", "give a number of tokens, such as 1e9"
    ),
    NotYet(
        "training.batch_tokens",
        lambda v: v == "auto",
        "a batch of auto",
        "give a number of tokens, such as 524288",
    ),
    NotYet("parallel.engine", lambda v: v == "deepspeed", "the deepspeed engine", "set it to native"),
    NotYet("parallel.expert", lambda v: v > 1, "expert parallelism", "set it to 1"),
    NotYet("checkpoint.async", lambda v: v, "asynchronous checkpointing", "set it to false"),
    NotYet("telemetry.wandb.mode", lambda v: v != "disabled", "W&B logging", "set it to disabled"),
    NotYet("telemetry.per_layer", lambda v: v, "telemetry per layer", "set it to false"),
    NotYet("telemetry.spectrum_every", lambda v: v > 0, "spectral telemetry", "set it to 0"),
    NotYet("data.mixture", lambda v: v is not None, "a data mixture", "set it to null and give data.train"),
]


class Config(Section):
    """One run."""

    name: Text
    """Name of the run and of its directory, runs/<name>."""
    seed: CountOrZero = 0
    """Seed of the initialization and of the data order."""
    model: ModelConfig = ModelConfig()
    """Architecture."""
    parameterization: ParameterizationConfig = ParameterizationConfig()
    """Transfer of hyperparameters."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizers."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Learning rate over time."""
    data: DataConfig = Field(default_factory=dict, validate_default=True)
    """Token shards."""
    training: TrainingConfig = TrainingConfig()
    """Length, batch and numerics."""
    parallel: ParallelConfig = ParallelConfig()
    """Distribution over ranks."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""
    telemetry: TelemetryConfig = TelemetryConfig()
    """Measurements."""
    eval: EvalConfig = EvalConfig()
    """Validation."""

    def problems(self) -> Iterator[ConfigError]:
        if self.name.startswith(".") or any(c in "/\\" or not c.isprintable() for c in self.name):
            yield ConfigError(
                f"{self.name!r} cannot name a directory",
                "name",
                "leave out slashes, control characters, leading dots",
            )
        values = self.resolved()
        for key, refused, what, remedy in NOT_YET:
            value: Any = values
            for part in key.split("."):
                value = value[part]
            if refused(value):
                yield ConfigError(f"{what} is not available yet", key, remedy)
        tokens, batch, context = self.training.tokens, self.training.batch_tokens, self.model.context
        if batch != "auto" and batch % context:
            works = [size for size in (batch // context * context, (batch // context + 1) * context) if size]
            yield ConfigError(
                f"batch_tokens {batch} is not a multiple of model.context {context}", "training.batch_tokens",
                f"set it to {_choice(works, batch)}",
            )  # fmt: skip
        if tokens != "auto":
            decay = self.schedule.decay_ratio if self.schedule.kind == "wsd" else 0.0
            room = math.floor(tokens * (1 - decay))
            if self.schedule.warmup_tokens > room:
                before = "before the wsd decay" if decay else "of training.tokens"
                yield ConfigError(
                    f"warmup_tokens {self.schedule.warmup_tokens} exceeds the {room} tokens {before}",
                    "schedule.warmup_tokens", f"set it to {room} or less",
                )  # fmt: skip

    # Derived numbers.

    @property
    def tokens(self) -> int:
        """Training tokens, as a number."""
        assert self.training.tokens != "auto", "refused by NOT_YET"
        return self.training.tokens

    @property
    def batch_tokens(self) -> int:
        """Tokens per optimizer step, as a number."""
        assert self.training.batch_tokens != "auto", "refused by NOT_YET"
        return self.training.batch_tokens

    @property
    def batch_size(self) -> int:
        """Sequences per optimizer step, over all ranks."""
        return self.batch_tokens // self.model.context

    @property
    def steps(self) -> int:
        """Optimizer steps: tokens / batch_tokens to the nearest whole number (half rounds up), at least 1."""
        return max(1, (2 * self.tokens + self.batch_tokens) // (2 * self.batch_tokens))

    @property
    def compute_dtype(self) -> str:
        """Orthogonalization arithmetic: float32 or bfloat16."""
        return self._dtype(self.optimizer.matrix.compute_dtype)

    @property
    def wire_dtype(self) -> str:
        """What ranks exchange: float32 or bfloat16."""
        return self._dtype(self.optimizer.matrix.wire_dtype)

    def _dtype(self, dtype: str) -> str:
        if dtype != "auto":
            return dtype
        return "float32" if self.training.precision == "fp32" else "bfloat16"

    def shard_size(self, world_size: int) -> int:
        """Ranks over which parameters are sharded."""
        replicate, shard = self.parallel.replicate, self.parallel.shard
        if shard == "auto":
            if world_size % replicate:
                works = _divisors(world_size)
                raise ConfigError(
                    f"replicate {replicate} does not divide the {world_size} ranks", "parallel.replicate",
                    f"set it to {_choice(works, replicate)}",
                )  # fmt: skip
            shard = world_size // replicate
        if replicate * shard != world_size:
            raise ConfigError(
                f"replicate {replicate} × shard {shard} is {replicate * shard}, not the {world_size} ranks",
                "parallel.shard", f"start {replicate * shard} ranks, or set parallel.shard: auto",
            )  # fmt: skip
        return shard

    def accumulation(self, world_size: int) -> int:
        """Forward passes per optimizer step on each rank.

        A batch that the ranks cannot divide is refused: rounding it would change the trajectory.
        """
        micro, batch, context = self.training.micro_batch, self.batch_size, self.model.context
        if batch % (micro * world_size) == 0:
            return batch // (micro * world_size)
        whole = _nearest_multiple(batch, micro * world_size) * context
        if batch % world_size == 0:
            per_rank = batch // world_size
            raise ConfigError(
                f"micro_batch {micro} does not divide the {per_rank} sequences of each of {world_size} ranks",
                "training.micro_batch",
                f"set it to {_largest_divisor(per_rank, micro)}, or training.batch_tokens: {whole}",
            )
        close = _nearest_multiple(batch, world_size)
        smaller = _largest_divisor(close // world_size, micro)
        other = (
            f", or {close * context} with training.micro_batch: {smaller}" if close * context != whole else ""
        )
        raise ConfigError(
            f"{batch} sequences per step cannot be divided over {world_size} ranks", "training.batch_tokens",
            f"set training.batch_tokens: {whole}{other}",
        )  # fmt: skip

    def with_vocab(self, size: int) -> Self:
        """A copy whose vocabulary holds `size` tokens. A larger one stays: its rest is padding."""
        wanted = self.model.vocab_size
        if wanted is not None and wanted < size:
            raise ConfigError(
                f"vocab_size {wanted} is smaller than the data's {size} tokens", "model.vocab_size",
                f"set it to null, or to at least {size}",
            )  # fmt: skip
        return self.model_copy(update={"model": self.model.model_copy(update={"vocab_size": wanted or size})})

    # To and from plain data.

    def resolved(self) -> dict[str, Any]:
        """Everything filled in, as plain data."""
        return self.model_dump(mode="json", by_alias=True)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Raises ConfigError, as `load_config` does."""
        return cls._from_layers([Layer("the given dictionary", dict(data))])

    @classmethod
    def _from_layers(cls, layers: Sequence[Layer]) -> Self:
        try:
            return cls.model_validate(merge(layers))
        except ValidationError as error:
            raise explain(error, cls, layers) from None


def _nearest_multiple(value: int, of: int) -> int:
    return max(1, (2 * value + of) // (2 * of)) * of


def _largest_divisor(value: int, limit: int) -> int:
    return next(divisor for divisor in range(min(limit, value), 0, -1) if value % divisor == 0)


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """The file, over what it inherits by `base:`, under the overrides `section.key=value` (in YAML)."""
    return Config._from_layers(read_layers(path, overrides))


def dump_config(config: Config, path: str | os.PathLike[str]) -> None:
    """Writes the resolved config as YAML, atomically; loading it gives an equal Config."""
    write_yaml(config.resolved(), path)
