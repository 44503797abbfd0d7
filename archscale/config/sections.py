"""The sections of the YAML schema: every key, its unit, its default, and what may stand in it.

Those of the model are in `archscale.config.model`; the whole is `archscale.config.Config`.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StrictBool, model_validator
from pydantic_core import PydanticCustomError

from archscale.config.explain import PROBLEMS
from archscale.config.values import (
    BelowOne,
    BelowOnePair,
    Bounds,
    Count,
    CountOrAuto,
    CountOrZero,
    NonNegative,
    Positive,
    PositiveShare,
    Share,
    SourceName,
    Text,
)
from archscale.errors import ConfigError
from archscale.rules import RULES

MATRIX_RULES = tuple(RULES)
SPHERE_RULES = tuple(name for name, rule in RULES.items() if rule.sphere)
PLAIN_RULES = tuple(name for name, rule in RULES.items() if not rule.has_trust_ratio)
CALIBRATED_RULES = tuple(name for name, rule in RULES.items() if rule.calibrated)
ELEMENT_RULES = tuple(name for name, rule in RULES.items() if rule.elementwise and not rule.sphere)
if TYPE_CHECKING:
    MatrixRule = str
    ElementRule = str
else:
    MatrixRule = Literal[MATRIX_RULES]
    ElementRule = Literal[ELEMENT_RULES]
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


class MatrixOptimizerConfig(Section):
    """The optimizer of matrices: projections, experts, router."""

    rule: MatrixRule = "muonh"
    """Update rule, a row of the table in the main README."""
    momentum: BelowOne = 0.95
    """Momentum decay per step."""
    nesterov: StrictBool = True
    """Orthogonalize the momentum's look-ahead instead of the momentum."""
    orthogonalizer: Literal["polar_express", "quintic", "quintic_tuned", "exact"] = "polar_express"
    """Scheme of the orthogonalization; exact is a float64 SVD."""
    per_head: StrictBool = False
    """Orthogonalize attention projections head by head."""
    fused_qkv: StrictBool = False
    """Take queries, keys and values of a block for one matrix; false: each is its own."""
    fused_gate_up: StrictBool = False
    """Take gate and up projection of a SwiGLU, or of each expert's, for one matrix."""
    clip: Bounds | None = None
    """[least, greatest] trust ratio; null: the rule's own bounds."""
    ratio_exponent: Positive = 1.0
    """Exponent of the trust ratio, before its bounds."""
    calibration: Positive | None = None
    """c of a calibrated rule; null: set once for each matrix, so that its first ratio is 1."""
    compute_dtype: Dtype = "auto"
    """Orthogonalization arithmetic; auto: float32 under `training.precision: fp32`, otherwise
    bfloat16."""
    wire_dtype: Dtype = "auto"
    """What ranks exchange; auto: as for `compute_dtype`."""
    momentum_dtype: Literal["float32", "bfloat16"] = "float32"
    """Storage of the momentum."""

    def problems(self) -> Iterator[ConfigError]:
        for key, neutral in (("clip", None), ("ratio_exponent", 1.0)):
            if getattr(self, key) != neutral and self.rule in PLAIN_RULES:
                yield ConfigError(
                    f"{self.rule} has no trust ratio",
                    f"optimizer.matrix.{key}",
                    f"set it to {'null' if neutral is None else neutral}",
                )
        for key in ("fused_qkv", "fused_gate_up"):
            if getattr(self, key) and not RULES[self.rule].per_matrix:
                yield ConfigError(
                    f"{self.rule} sees no matrices, so {key} does nothing",
                    f"optimizer.matrix.{key}",
                    "set it to false",
                )
        if self.per_head and self.fused_qkv:
            yield ConfigError(
                "per_head cuts queries, keys and values into heads, and fused_qkv takes them"
                " together",
                "optimizer.matrix.fused_qkv",
                "set one of them to false",
            )
        if self.calibration is not None and self.rule not in CALIBRATED_RULES:
            yield ConfigError(
                f"{self.rule} is not calibrated",
                "optimizer.matrix.calibration",
                f"set it to null, or choose {' or '.join(CALIBRATED_RULES)}",
            )
        if self.clip and self.clip[0] > self.clip[1]:
            low, high = self.clip
            yield ConfigError(
                f"the lower bound {low} is above the upper bound {high}",
                "optimizer.matrix.clip",
                f"write [{high}, {low}]",
            )


class ElementOptimizerConfig(Section):
    """The optimizer of what is not a matrix: embedding, norms, biases, and the head."""

    kind: ElementRule = "adamw"
    """Elementwise update rule."""
    betas: BelowOnePair = (0.9, 0.95)
    """Decay per step of the first and the second moment."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""
    lr_ratio: Positive = 1.0
    """Learning rate relative to that of the matrices."""
    weight_decay: NonNegative | None = None
    """Decay of embedding, vectors, and an untied head that is on no sphere; null: as the
    parameterization has it, which is `optimizer.weight_decay` for embedding and head under
    `standard`, and 0 otherwise."""


class OptimizerConfig(Section):
    """Both optimizers, weight decay and gradient clipping."""

    matrix: MatrixOptimizerConfig = MatrixOptimizerConfig()
    """Matrices: projections, experts, router."""
    element: ElementOptimizerConfig = ElementOptimizerConfig()
    """Everything else: embedding, norms, biases, and the head."""
    weight_decay: NonNegative = 0.0
    """Decay per step and unit of learning rate; coupled or decoupled as the rule says."""
    independent_decay: StrictBool = False
    """Weight decay is per step at the peak rate, whatever that rate is, and follows the schedule
    (arXiv 1711.05101); false: it is multiplied by the rate."""
    grad_clip: Positive | None = 1.0
    """Greatest global gradient norm; null: no clipping."""

    def problems(self) -> Iterator[ConfigError]:
        if self.weight_decay > 0 and self.matrix.rule in SPHERE_RULES:
            yield ConfigError(
                f"weight decay {self.weight_decay} does nothing under {self.matrix.rule}: norms are"
                " fixed",
                "optimizer.weight_decay",
                "set it to 0, or choose a rule without the sphere, such as orscale_lm",
            )
        if self.independent_decay and not (self.weight_decay or self.element.weight_decay):
            yield ConfigError(
                "nothing decays, so independent_decay does nothing",
                "optimizer.independent_decay",
                "set it to false, or give optimizer.weight_decay",
            )
        for rule, key in ((self.matrix.rule, "matrix.rule"), (self.element.kind, "element.kind")):
            if self.independent_decay and RULES[rule].decay == "coupled":
                yield ConfigError(
                    f"the decay of {rule} is part of the direction that its ratio measures, so it"
                    " is not independent of the rate",
                    f"optimizer.{key}",
                    "set optimizer.independent_decay to false, or choose a rule whose decay is"
                    " decoupled",
                )


class ScheduleConfig(Section):
    """Learning rate over the run, as a share of its peak."""

    kind: Literal["linear", "cosine", "wsd", "constant"] = "linear"
    """Decay to `final_ratio`: linear, cosine, warmup-stable-decay (wsd), or none."""
    warmup_tokens: CountOrZero = 0
    """Linear warm-up in tokens; 0: none."""
    final_ratio: Share = 0.1
    """Learning rate at the end, relative to its peak."""
    decay_ratio: PositiveShare = 2 / 7
    """Share of the tokens over which wsd decays, at the end (2/7); other kinds do not use it."""
    decay_share_of: Literal["run", "after_warmup"] = "run"
    """Tokens that `decay_ratio` is a share of: all of the run's, or those that follow the
    warm-up."""
    batch_ramp_tokens: CountOrZero = 0
    """Tokens over which the batch grows to its full size; 0: it has that size from the start."""
    batch_ramp_stages: Count = 4
    """Batch sizes of the ramp: batch / stages, 2 batch / stages, …, batch."""

    @property
    def tokens_before_share(self) -> int:
        """Tokens at the beginning that `decay_ratio` is no share of."""
        return self.warmup_tokens if self.decay_share_of == "after_warmup" else 0

    def decayed_share(self, tokens: float) -> float:
        """Share of a run of `tokens` over which wsd decays."""
        return self.decay_ratio * max(0.0, 1 - self.tokens_before_share / tokens)

    def problems(self) -> Iterator[ConfigError]:
        if self.decay_share_of != "run" and self.kind != "wsd":
            yield ConfigError(
                f"{self.kind} has no decay at the end, so decay_share_of does nothing",
                "schedule.decay_share_of",
                "set it to run, or schedule.kind to wsd",
            )


class MixtureEntry(Section):
    """One source of a data mixture."""

    name: SourceName
    """Its name, in `val_loss/<name>` and in the seed of its order."""
    path: Text
    """Directory of token shards; several sources may read the same."""
    weight: Positive
    """Share of the tokens, relative to the other entries."""


class DataConfig(Section):
    """Directories of token shards from `archscale data prepare`, or token files of other projects
    (directory, pattern or file); relative to the working directory, or URLs: `train`, or a
    `mixture` in its place."""

    train: Text | None = None
    """Directory, files or URL whose training split is read; required unless there is a mixture."""
    val: Text | None = None
    """The same, whose validation split `val_loss` is of; null: no evaluation, or that of the
    mixture's sources, weighted as they are."""
    mixture: Annotated[list[MixtureEntry], Field(min_length=1)] | None = None
    """Several training sources by weight, in place of `train`."""
    tokenizer: Text | None = None
    """Tokenizer of other projects' files: file, directory, URL or Hugging Face name; null: the data
    set's own."""
    document_mask: StrictBool = False
    """Attention does not cross document boundaries."""
    packing: Literal["concatenate", "best_fit"] = "concatenate"
    """How training documents fill windows: one after another, cut where a window ends; or packed
    (best_fit), cut only where they are longer. Validation text is always concatenated."""

    def problems(self) -> Iterator[ConfigError]:
        if self.train is None and self.mixture is None:
            yield ConfigError("data.train is missing", "data.train", "add `train`, or `mixture`")
        if self.train is not None and self.mixture is not None:
            yield ConfigError(
                "data.mixture stands in place of data.train, and both are given",
                "data.mixture",
                "set one of them to null",
            )
        names = [entry.name for entry in self.mixture or ()]
        for name in dict.fromkeys(names):
            if names.count(name) > 1:
                yield ConfigError(
                    f"{names.count(name)} sources are named {name}",
                    "data.mixture",
                    "give each a name of its own; they may have the same path",
                )

    @property
    def training_paths(self) -> list[str]:
        """Directories whose training splits are read."""
        if self.mixture is not None:
            return list(dict.fromkeys(entry.path for entry in self.mixture))
        return [] if self.train is None else [self.train]


class TrainingConfig(Section):
    """Length, batch and numerics of the run."""

    tokens: CountOrAuto = "auto"
    """Training tokens; auto: `base.tokens` × N / N of the base (N the published parameter count),
    and `base.tokens` under `standard`."""
    batch_tokens: CountOrAuto = "auto"
    """Tokens per step over all ranks, a multiple of `model.context`; auto: `base.batch_tokens` to
    the nearest multiple."""
    micro_batch: Count = 8
    """Sequences per device and forward pass; accumulation makes up the rest of the batch."""
    precision: Literal["auto", "bf16", "fp32"] = "bf16"
    """Arithmetic of forward and backward; fp32 makes the optimizer's auto dtypes float32. auto:
    bf16 on a GPU or processor that has units for it, otherwise fp32; what the first process finds
    is kept in the run's config and holds for every resumption."""
    compile: StrictBool = True
    """Compile the model; needs a C++ compiler."""
    activation_checkpoint: Literal["none", "block"] = "none"
    """What the backward pass recomputes: nothing, or each block."""
    init_from: Text | None = None
    """Weights to start with: a run directory, a checkpoint or a Hugging Face directory; null: drawn
    by `seed`. Optimizer, schedule and data start anew; read at a run's first start only."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of a running average of the weights, such as 0.999: after update t it is
    min(ema, (1 + t) / (10 + t)). In checkpoints, and evaluated as `val_loss_ema`; null: none."""


class ParallelConfig(Section):
    """How ranks share the work: world size = replicate × shard."""

    engine: Literal["native", "deepspeed"] = "native"
    """native: DDP, FSDP2 or HSDP by the sizes below; deepspeed: ZeRO over all ranks."""
    replicate: Count = 1
    """Replica groups: ranks over which parameters are copied."""
    shard: CountOrAuto = "auto"
    """Ranks over which parameters are sharded; 1 is DDP; auto: world size / replicate."""
    reshard_after_forward: StrictBool = True
    """Free gathered parameters after the forward pass and gather again; false: more memory, less
    traffic."""
    expert: Count = 1
    """Ranks over which experts are spread; divides shard."""
    zero_stage: Literal[1, 2, 3] = 1
    """ZeRO stage of the deepspeed engine; the native engine takes 1 only."""
    offload_optimizer: StrictBool = False
    """Float32 weights and optimizer state in host memory, and the update there; deepspeed engine,
    zero_stage 2 or 3."""
    deepspeed: Text | None = None
    """DeepSpeed JSON whose keys are added to the generated ones; null: none. Keys that the config
    decides are refused by name."""

    def problems(self) -> Iterator[ConfigError]:
        if self.engine == "native" and self.zero_stage != 1:
            yield ConfigError(
                f"zero_stage {self.zero_stage} means nothing to the native engine",
                "parallel.zero_stage",
                "remove it; parallel.shard is what shards parameters",
            )
        if self.engine == "native":
            for key in ("offload_optimizer", "deepspeed"):
                if value := getattr(self, key):
                    yield ConfigError(
                        f"{key} {value} means nothing to the native engine",
                        f"parallel.{key}",
                        "remove it, or set parallel.engine: deepspeed",
                    )
        else:
            yield from self._zero_problems()
        if self.shard != "auto" and self.shard % self.expert:
            yield ConfigError(
                f"expert {self.expert} does not divide shard {self.shard}",
                "parallel.expert",
                "set it to a divisor of parallel.shard",
            )

    def _zero_problems(self) -> Iterator[ConfigError]:
        if self.expert > 1:
            yield ConfigError(
                f"experts cannot be spread over {self.expert} ranks by the deepspeed engine",
                "parallel.expert",
                "set it to 1, or parallel.engine: native",
            )
        if self.replicate > 1:
            yield ConfigError(
                f"the deepspeed engine shards over all ranks, not over 1/{self.replicate} of them",
                "parallel.replicate",
                "set it to 1, or parallel.engine: native",
            )
        if not self.reshard_after_forward:
            yield ConfigError(
                "reshard_after_forward false means nothing to the deepspeed engine",
                "parallel.reshard_after_forward",
                "remove it; zero_stage 2 gathers no parameters",
            )
        if self.offload_optimizer and self.zero_stage == 1:
            yield ConfigError(
                "zero_stage 1 keeps its optimizer state on the device",
                "parallel.offload_optimizer",
                "set parallel.zero_stage: 2 or 3",
            )


class CheckpointConfig(Section):
    """When checkpoints are written and how many stay."""

    every: Count = 1000
    """Optimizer steps between checkpoints; one is written after the last step too."""
    directory: Text | None = None
    """Where they lie: a directory, or a URL such as `s3://bucket/name/checkpoints`; null:
    `checkpoints` in the run directory."""
    keep: Count = 3
    """Newest checkpoints that stay; the newest one from before a loss that is not finite stays
    too, for which 1 keeps two until the next save."""
    keep_every: Count | None = None
    """Checkpoints of steps that are multiples of it stay for good; null: of none."""
    async_: StrictBool = Field(default=True, alias="async")
    """Write a copy of the state while training goes on; false: training waits, and the copy is not
    made. In Python `async_`, because `async` is a keyword."""


class WandbConfig(Section):
    """Weights & Biases."""

    mode: Literal["auto", "online", "offline", "disabled"] = "disabled"
    """auto: online where a key is configured, otherwise offline."""
    project: Text = "archscale"
    """Project that runs are filed under."""


class GuardConfig(Section):
    """What happens when a step is not finite or spikes."""

    mode: Literal["off", "warn", "act"] = "warn"
    """warn: what is not finite or spikes is an event; act: such a step is also skipped, then an
    older checkpoint, then the end (waits for the device every step)."""
    window: Annotated[int, Field(ge=16)] = 64
    """Steps that loss and gradient norm are compared with."""
    spike: Positive = 12.0
    """Robust standard deviations above the window's median from which on they are a spike."""
    max_skips: CountOrZero = 5
    """Steps in a row that act may skip before it falls back to an older checkpoint."""
    max_fallbacks: CountOrZero = 2
    """Returns to older checkpoints before act stops the run."""


class TelemetryConfig(Section):
    """What is measured while training."""

    every: Count = 10
    """Optimizer steps between readings of the device; every step has its line in `metrics.jsonl`,
    the last of a reading also what was looked into: `stability/*`, `optimizer/*`, `spectrum/*`."""
    per_layer: StrictBool = True
    """Stability indicators and expert loads of each layer, trust ratios and spectra of each matrix,
    beside their means."""
    spectrum_every: CountOrZero = 0
    """Optimizer steps between singular value decompositions of gradients and momenta, at readings;
    0: never."""
    stuck_after: Annotated[NonNegative, Field(le=1e7)] = 900.0
    """Seconds without a finished step, evaluation or checkpoint after which every rank writes its
    stacks and ends; 0: never."""
    guard: GuardConfig = GuardConfig()
    """What happens when a step is not finite or spikes."""
    wandb: WandbConfig = WandbConfig()
    """Weights & Biases."""
    tensorboard: StrictBool = False
    """Write event files for TensorBoard into `tensorboard/` of the run directory."""


class EvalConfig(Section):
    """Evaluations during training; without data.val and without a mixture there is no
    `val_loss`."""

    every: Count = 1000
    """Optimizer steps between evaluations; one follows the last step too."""
    batches: Count = 50
    """Batches of the training size per evaluation, from the start of the validation split."""
    tasks: list[Text] = []
    """Tasks of lm-eval that evaluations score, by name or as YAML files; in `metrics.jsonl` as
    `eval/<task>/acc` and the like."""
    samples: list[str] = []
    """Prompts that evaluations continue, each by the likeliest tokens, 64 at most; the texts go to
    `samples.jsonl`."""
