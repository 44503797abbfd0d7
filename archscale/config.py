"""One run as a config: the schema's sections together, what must hold across them, and the numbers that follow.

    config = load_config("configs/quickstart.yaml", ["training.micro_batch=4"])

Building a section in Python raises pydantic's ValidationError; `load_config` and `Config.from_dict` raise ConfigError. The
sections are in `archscale.config_sections`; reading files and the wording of errors are in `archscale.config_io`.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

from pydantic import Field, ValidationError

from archscale.config_io import CountOrZero, Layer, Text, choice, divisors, explain, merge, read_layers, write_yaml
from archscale.config_sections import (
    MATRIX_RULES,
    SPHERE_RULES,
    BaseConfig,
    CheckpointConfig,
    DataConfig,
    ElementOptimizerConfig,
    EvalConfig,
    MatrixOptimizerConfig,
    MatrixRule,
    MixtureEntry,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    ParallelConfig,
    ParameterizationConfig,
    ScheduleConfig,
    Section,
    TelemetryConfig,
    TrainingConfig,
    WandbConfig,
)
from archscale.errors import ConfigError

__all__ = [
    "MATRIX_RULES",
    "NOT_YET",
    "SPHERE_RULES",
    "BaseConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "ElementOptimizerConfig",
    "EvalConfig",
    "MatrixOptimizerConfig",
    "MatrixRule",
    "MixtureEntry",
    "MoEConfig",
    "ModelConfig",
    "NotYet",
    "OptimizerConfig",
    "ParallelConfig",
    "ParameterizationConfig",
    "ScheduleConfig",
    "Section",
    "TelemetryConfig",
    "TrainingConfig",
    "WandbConfig",
    "dump_config",
    "load_config",
]


class NotYet(NamedTuple):
    """A value that the schema has and the code does not: refused, never ignored."""

    key: str
    refused: Callable[[Any], bool]
    what: str
    remedy: str


# Whoever builds a feature deletes its row.
NOT_YET = [
    NotYet("model.moe", lambda v: v is not None, "a mixture of experts", "set it to null"),
    NotYet("parameterization.kind", lambda v: v != "standard", "hyperparameter transfer", "set it to standard"),
    NotYet("training.tokens", lambda v: v == "auto", "a budget of auto", "give a number of tokens, such as 1e9"),
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
                f"set it to {choice(works, batch)}",
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
                works = divisors(world_size)
                raise ConfigError(
                    f"replicate {replicate} does not divide the {world_size} ranks", "parallel.replicate",
                    f"set it to {choice(works, replicate)}",
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
        other = f", or {close * context} with training.micro_batch: {smaller}" if close * context != whole else ""
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
