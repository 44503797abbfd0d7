"""One run as a config: the schema's sections together, what must hold across them, and the numbers
that follow.

    config = load_config("configs/quickstart.yaml", ["training.micro_batch=4"])

Building a section in Python raises pydantic's ValidationError; `load_config` and `Config.from_dict`
raise ConfigError.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Self

from pydantic import Field, ValidationError

from archscale.config.batch import BatchSchedule
from archscale.config.explain import choice, divisors, explain
from archscale.config.layers import Layer, merge, read_layers, write_yaml
from archscale.config.model import ModelConfig, ParameterizationConfig
from archscale.config.sections import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
    Section,
    TelemetryConfig,
    TrainingConfig,
)
from archscale.config.values import CountOrZero, Text
from archscale.errors import ConfigError


class NotYet(NamedTuple):
    """A value that the schema has and the code does not: refused, never ignored."""

    key: str
    refused: Callable[[Any], bool]
    what: str
    remedy: str


# Whoever builds a feature deletes its row.
NOT_YET: list[NotYet] = []


class Config(Section):
    """One run."""

    name: Text
    """Name of the run and of its directory, `runs/<name>`."""
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
        if self.optimizer.matrix.fused_gate_up and self.model.mlp != "swiglu":
            yield ConfigError(
                f"{self.model.mlp} has no gate, so fused_gate_up does nothing",
                "optimizer.matrix.fused_gate_up",
                "set it to false",
            )
        tokens, batch, context = (
            self.training.tokens,
            self.training.batch_tokens,
            self.model.context,
        )
        schedule = self.schedule
        if batch != "auto" and batch % context:
            works = [
                size
                for size in (batch // context * context, (batch // context + 1) * context)
                if size
            ]
            yield ConfigError(
                f"batch_tokens {batch} is not a multiple of model.context {context}",
                "training.batch_tokens",
                f"set it to {choice(works, batch)}",
            )
        elif schedule.batch_ramp_tokens and (
            schedule.batch_ramp_stages == 1 or schedule.batch_ramp_tokens < self.batch_tokens
        ):
            yield ConfigError(
                f"a ramp over {schedule.batch_ramp_tokens} tokens in {schedule.batch_ramp_stages}"
                " stages changes no batch",
                "schedule.batch_ramp_tokens",
                f"set it to 0, or to at least {self.batch_tokens} with batch_ramp_stages of at"
                " least 2",
            )
        elif schedule.batch_ramp_tokens and self.batch_size % schedule.batch_ramp_stages:
            yield ConfigError(
                f"{schedule.batch_ramp_stages} stages do not divide a batch of {self.batch_size}"
                " sequences",
                "schedule.batch_ramp_stages",
                f"set it to {choice(divisors(self.batch_size), schedule.batch_ramp_stages)}",
            )
        if tokens != "auto":
            yield from self._schedule_problems(tokens)

    def _schedule_problems(self, tokens: int) -> Iterator[ConfigError]:
        """Parts of the schedule that are longer than a run of `tokens`."""
        schedule = self.schedule
        decay = schedule.decayed_share(tokens) if schedule.kind == "wsd" else 0.0
        for key in ("warmup_tokens", "batch_ramp_tokens"):
            share = decay if key == "warmup_tokens" else 0.0
            room, given = int(tokens * (1 - share)), getattr(schedule, key)
            if given > room:
                before = "before the wsd decay" if share else "of training.tokens"
                yield ConfigError(
                    f"{key} {given} exceeds the {room} tokens {before}",
                    f"schedule.{key}",
                    f"set it to {room} or less",
                )

    def unavailable(self) -> Iterator[ConfigError]:
        """What the schema has and the code has not: can be planned, is refused by training."""
        values = self.resolved()
        for key, refused, feature, remedy in NOT_YET:
            value: Any = values
            for part in key.split("."):
                value = value[part]
            if refused(value):
                yield ConfigError(f"{feature} is not available yet", key, remedy)

    # Derived numbers.

    @property
    def tokens(self) -> int:
        """Training tokens, as a number: the config must be resolved
        (`archscale.plan.transfer.resolve`) if it says auto."""
        assert self.training.tokens != "auto", "resolve() the config first"
        return self.training.tokens

    @property
    def batch_tokens(self) -> int:
        """Tokens per optimizer step, as a number; auto is that of the base, to the nearest multiple
        of the context."""
        if self.training.batch_tokens == "auto":
            return nearest_multiple(self.parameterization.base.batch_tokens, self.model.context)
        return self.training.batch_tokens

    @property
    def batch_size(self) -> int:
        """Sequences per optimizer step, over all ranks, once the batch has grown."""
        return self.batch_tokens // self.model.context

    @property
    def batches(self) -> BatchSchedule:
        """Sequences of every step."""
        ramp = self.schedule.batch_ramp_tokens // self.model.context
        return BatchSchedule(self.batch_size, ramp, self.schedule.batch_ramp_stages)

    @property
    def steps(self) -> int:
        """Optimizer steps: as many whole ones as come closest to `tokens`, at least 1."""
        return self.batches.steps(self.tokens / self.model.context)

    @property
    def precision(self) -> Literal["bf16", "fp32"]:
        """Arithmetic of forward and backward; auto must have been resolved."""
        assert self.training.precision != "auto", "with_precision() the config first"
        return self.training.precision

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
        return "float32" if self.precision == "fp32" else "bfloat16"

    def shard_size(self, world_size: int) -> int:
        """Ranks over which parameters are sharded."""
        replicate, shard = self.parallel.replicate, self.parallel.shard
        if shard == "auto":
            if world_size % replicate:
                works = divisors(world_size)
                raise ConfigError(
                    f"replicate {replicate} does not divide the {world_size} ranks",
                    "parallel.replicate",
                    f"set it to {choice(works, replicate)}",
                )
            shard = world_size // replicate
        if replicate * shard != world_size:
            raise ConfigError(
                f"replicate {replicate} × shard {shard} is {replicate * shard}, not the"
                f" {world_size} ranks",
                "parallel.shard",
                f"start {replicate * shard} ranks, or set parallel.shard: auto",
            )
        moe, expert = self.model.moe, self.parallel.expert
        routed = moe.routed_experts if moe else 0
        for total, counted in (
            (shard, f"the {shard} ranks of a shard group"),
            (routed, f"the {routed} routed experts"),
        ):
            if expert > 1 and (not total or total % expert):
                works = [divisor for divisor in divisors(math.gcd(shard, routed)) if routed]
                raise ConfigError(
                    (
                        f"expert {expert} does not divide {counted}"
                        if total
                        else "a model without experts has none to spread"
                    ),
                    "parallel.expert",
                    f"set it to {choice(works, expert)}" if works else "set it to 1",
                )
        return shard

    def accumulation(self, world_size: int) -> int:
        """Forward passes on each rank per optimizer step of the full batch.

        A batch that the ranks cannot divide is refused: rounding it would change the trajectory.
        """
        micro, batch, context = self.training.micro_batch, self.batch_size, self.model.context
        smallest = self.batches.sizes[0]
        if batch % (micro * world_size) == 0 and smallest % (micro * world_size):
            works = [n for n in divisors(batch // (micro * world_size)) if n > 1]
            remedy = (
                f"set it to {choice(works, self.schedule.batch_ramp_stages)}"
                if works
                else "set batch_ramp_tokens: 0"
            )
            raise ConfigError(
                f"the ramp's smallest batch of {smallest} sequences cannot be divided over"
                f" {world_size} ranks × micro_batch {micro}",
                "schedule.batch_ramp_stages",
                remedy,
            )
        if batch % (micro * world_size) == 0:
            return batch // (micro * world_size)
        whole = nearest_multiple(batch, micro * world_size) * context
        if batch % world_size == 0:
            per_rank = batch // world_size
            raise ConfigError(
                f"micro_batch {micro} does not divide the {per_rank} sequences of each of"
                f" {world_size} ranks",
                "training.micro_batch",
                f"set it to {_largest_divisor(per_rank, micro)}, or training.batch_tokens: {whole}",
            )
        close = nearest_multiple(batch, world_size)
        smaller = _largest_divisor(close // world_size, micro)
        other = (
            f", or {close * context} with training.micro_batch: {smaller}"
            if close * context != whole
            else ""
        )
        raise ConfigError(
            f"{batch} sequences per step cannot be divided over {world_size} ranks, but over"
            f" {choice(sorted(divisors(batch)), world_size)}",
            "training.batch_tokens",
            f"set training.batch_tokens: {whole}{other}",
        )

    def world_sizes(self) -> list[int]:
        """Numbers of ranks over which the batches can be divided and which `parallel` allows,
        in order; the micro-batch may have to be that of `for_world_size`."""

        def allowed(size: int) -> bool:
            try:
                self.shard_size(size)
            except ConfigError:
                return False
            return True

        return [n for n in sorted(set(divisors(math.gcd(*self.batches.sizes)))) if allowed(n)]

    def for_world_size(self, world_size: int) -> Self:
        """A copy with the largest micro-batch, up to the present one, that divides the sequences of
        each rank: the same trajectory. Itself where there is nothing to change, or no choice that
        would help."""
        smallest, micro = math.gcd(*self.batches.sizes), self.training.micro_batch
        if smallest % world_size or smallest % (world_size * micro) == 0:
            return self
        fits = {"micro_batch": _largest_divisor(smallest // world_size, micro)}
        return self.model_copy(update={"training": self.training.model_copy(update=fits)})

    def with_numbers(self, tokens: int, batch_tokens: int) -> Self:
        """A copy with these in place of `auto`; itself where nothing changes.

        Raises:
            ConfigError: a schedule that does not fit into so many tokens.
        """
        numbers = {"tokens": tokens, "batch_tokens": batch_tokens}
        training = self.training.model_copy(update=numbers)
        if training == self.training:
            return self
        if problems := list(self._schedule_problems(tokens)):
            raise ConfigError.several(problems)
        return self.model_copy(update={"training": training})

    def with_precision(self, precision: Literal["bf16", "fp32"]) -> Self:
        """A copy with this in place of `auto`; itself where the config says which."""
        if self.training.precision != "auto":
            return self
        training = self.training.model_copy(update={"precision": precision})
        return self.model_copy(update={"training": training})

    def with_vocab(self, size: int) -> Self:
        """A copy whose vocabulary holds `size` tokens. A larger one stays: its rest is padding."""
        wanted = self.model.vocab_size
        if wanted is not None and wanted < size:
            raise ConfigError(
                f"vocab_size {wanted} is smaller than the data's {size} tokens",
                "model.vocab_size",
                f"set it to null, or to at least {size}",
            )
        return self.model_copy(
            update={"model": self.model.model_copy(update={"vocab_size": wanted or size})}
        )

    # To and from plain data.

    def resolved(self) -> dict[str, Any]:
        """Everything filled in, as plain data."""
        return self.model_dump(mode="json", by_alias=True)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Raises ConfigError, as `load_config` does."""
        return cls.from_layers([Layer("the given dictionary", dict(data))])

    @classmethod
    def from_layers(cls, layers: Sequence[Layer]) -> Self:
        """Later layers win. Raises ConfigError, which names the layer that a key comes from."""
        try:
            return cls.model_validate(merge(layers))
        except ValidationError as error:
            raise explain(error, cls, layers) from None


def nearest_multiple(value: int, factor: int) -> int:
    return max(1, (2 * value + factor) // (2 * factor)) * factor


def _largest_divisor(value: int, limit: int) -> int:
    return next(divisor for divisor in range(min(limit, value), 0, -1) if value % divisor == 0)


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """The file, over what it inherits by `base:`, under the overrides `section.key=value` (in
    YAML)."""
    return Config.from_layers(read_layers(path, overrides))


def dump_config(config: Config, path: str | os.PathLike[str]) -> None:
    """Writes the resolved config as YAML, atomically; loading it gives an equal Config."""
    write_yaml(config.resolved(), path)
