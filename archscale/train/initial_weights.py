"""What a run starts with in place of random weights (`training.init_from`): those of a run, of a
checkpoint in any layout, or of a Hugging Face directory. Weights alone: optimizer, schedule and
data start new.

All of it computes what it computed where it comes from: factors that the two parameterizations have
otherwise are multiplied into the weights.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from archscale.checkpoint.choosing import load_newest
from archscale.checkpoint.directory import checkpoint_id, read_state
from archscale.checkpoint.history import Start, absolute, identity, saved_config, warn
from archscale.checkpoint.place import STATE, Place, checkpoints_of, place_of
from archscale.checkpoint.saving import load_checkpoint, verified, verify_together
from archscale.checkpoint.target import refuse_diverged
from archscale.config import Config, ModelConfig
from archscale.data.stored import run_tokenizer
from archscale.data.training_data import TrainingData
from archscale.distributed import (
    Fragment,
    agree,
    gather_objects,
    on_rank_zero,
    same_everywhere,
)
from archscale.errors import CheckpointError, ConfigError, show
from archscale.files import CONFIG
from archscale.huggingface.architecture import CLASSES, CUSTOM, square_root_gates
from archscale.huggingface.model_section import CONFIG_JSON, HuggingFaceModel, read_model
from archscale.huggingface.safetensors_reader import StoredTensors
from archscale.huggingface.same_tokenizer import Unknown, other_tokenizer
from archscale.huggingface.weights import Factors, change_factors, factors, sources, take_back
from archscale.parallel.engine import Engine
from archscale.plan.transfer import transfer_of
from archscale.train.continuing import fingerprints

KEY = "training.init_from"


class InitialWeights(Protocol):
    """Weights to start with.

    Attributes:
        model: the architecture that they belong to.
    """

    @property
    def model(self) -> ModelConfig: ...

    @property
    def name(self) -> str:
        """What they are, for people."""

    def check_tokenizer(self, config: Config, data: TrainingData) -> None:
        """ConfigError where the data have other ids; a warning where that cannot be known."""

    def load(self, weights: Mapping[str, Fragment], config: Config) -> list[str]:
        """Fill what this rank holds of the weights of a run of `config`; all ranks together.
        Returns what was scaled, in sentences."""

    def record(self) -> dict[str, Any]:
        """What the run's checkpoints say of where it started."""


def initial_weights(start: Start, config: Config, data: TrainingData) -> InitialWeights | None:
    """What a run starts with; None where it goes on from a checkpoint, or at random. All ranks
    together.

    Args:
        config: resolved.

    Raises:
        ConfigError: they belong to another model or vocabulary, or `init_from` names nothing.
        CheckpointError: damaged or diverged.
    """
    path = config.training.init_from
    if path is None or start.checkpoint is not None:
        return None
    found = _open(path)
    on_rank_zero(lambda: _check(found, config, data))
    return found


def _open(path: str) -> InitialWeights:
    """All ranks together: every byte of a checkpoint is compared with its checksum, on one rank."""
    place = place_of(path)
    kind = on_rank_zero(lambda: _kind(place))
    if kind == "directory":
        return HuggingFaceDirectory(Path(path), on_rank_zero(lambda: read_model(Path(path))))
    checkpoint: Place | None = place
    if kind == "run":
        # What is damaged is passed over with a warning, as where a run resumes.
        checkpoint = load_newest(checkpoints_of(Path(path)), sys.maxsize, warn, verified)
        problem = None if checkpoint else "the run has no whole checkpoint"
    else:
        damage = verify_together(place)
        problem = damage and f"the checkpoint is damaged: {damage}"
    if problem or checkpoint is None:
        raise same_everywhere(CheckpointError(str(problem), path, f"name another one as {KEY}"))
    return on_rank_zero(lambda: _read_checkpoint(checkpoint))


def _kind(place: Place) -> str:
    for kind, file in {"checkpoint": STATE, "run": CONFIG, "directory": CONFIG_JSON}.items():
        if (place / file).is_file():
            return kind
    raise ConfigError(
        f"{place} is no run, no checkpoint and no Hugging Face directory",
        KEY,
        "name one that is here, such as runs/<name>; of the hub: hf download NAME --local-dir DIR",
    )


def _read_checkpoint(checkpoint: Place) -> Checkpoint:
    state = read_state(checkpoint)
    refuse_diverged(state, checkpoint)
    return Checkpoint(checkpoint, state, saved_config(checkpoint, state))


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a checkpoint, whatever layout wrote it.

    Attributes:
        config: that it was written with.
    """

    place: Place
    state: dict[str, Any]
    config: Config

    @property
    def model(self) -> ModelConfig:
        return self.config.model

    @property
    def name(self) -> str:
        return f"step {self.state['step']} of {self.config.name} ({self.place})"

    def check_tokenizer(self, config: Config, data: TrainingData) -> None:
        theirs, ours = fingerprints(self.state["data"]), fingerprints(identity(data))
        if not theirs or not ours:
            _warn_of_unknown("the data of one of them do not name theirs")
        elif theirs != ours:
            raise ConfigError(
                f"the data were made with tokenizer {_short(ours)}, the weights were trained with"
                f" {_short(theirs)}",
                KEY,
                f"prepare the data with the tokenizer of {self.config.name}",
            )

    def load(self, weights: Mapping[str, Fragment], config: Config) -> list[str]:
        load_checkpoint(self.place, weights, verified=True)
        before, now = _factors(self.config), _factors(config)
        if before == now:
            return []
        model = config.model
        change_factors(weights, [*sources(model, CUSTOM, before)], [*sources(model, CUSTOM, now)])
        return ["other constants of training: the weights are scaled to compute the same"]

    def record(self) -> dict[str, Any]:
        step, identifier = self.state["step"], checkpoint_id(self.state)
        return {
            "path": absolute(self.place),
            "run": self.config.name,
            "step": step,
            "id": identifier,
        }


@dataclass(frozen=True)
class HuggingFaceDirectory:
    """The weights of a directory that transformers has written, or an export."""

    path: Path
    theirs: HuggingFaceModel

    @property
    def model(self) -> ModelConfig:
        return self.theirs.config

    @property
    def name(self) -> str:
        return f"{CLASSES[self.theirs.model_type]} in {self.path}"

    def check_tokenizer(self, config: Config, data: TrainingData) -> None:
        known = fingerprints(identity(data))
        try:
            problem = other_tokenizer(self.path, known, lambda: run_tokenizer(config.data))
        except Unknown as reason:
            return _warn_of_unknown(str(reason))
        if problem:
            raise ConfigError(
                f"the tokenizer beside the weights is not that of the data: {problem}",
                KEY,
                f"prepare the data with `tokenizer: {{kind: huggingface, path: {self.path}}}`",
            )

    def load(self, weights: Mapping[str, Fragment], config: Config) -> list[str]:
        by = _factors(config)
        parts = [*sources(config.model, self.theirs.model_type, by)]

        def fill() -> None:
            stored = StoredTensors(self.path)
            stored.check(parts, config.model.tied_embeddings)
            take_back(weights, parts, stored.read)

        agree(fill)
        return [f"divided out: {sentence}" for sentence in by.sentences()]

    def record(self) -> dict[str, Any]:
        return {"path": absolute(self.path), "model_type": self.theirs.model_type}


def _factors(config: Config) -> Factors:
    transfer = transfer_of(config)
    return factors(config.model, transfer.logit_scale, transfer.router_logit_scale)


def _short(tokenizers: set[str]) -> str:
    return ", ".join(sorted(each[:12] for each in tokenizers))


def _warn_of_unknown(reason: str) -> None:
    warn(f"{KEY}: it is not known whether weights and data share a tokenizer: {reason}")


# --- loading


def load(found: InitialWeights, engine: Engine, config: Config) -> list[str]:
    """Fill the weights of an engine; all ranks together. Returns what was scaled, in sentences.

    Raises:
        CheckpointError: they cannot be read, or are not finite.
    """
    weights = engine.weights()
    scaled = found.load(weights, config)
    not_finite = [name for name, held in weights.items() if not held.data.isfinite().all()]
    if names := [name for of_rank in gather_objects(not_finite) for name in of_rank]:
        raise same_everywhere(
            CheckpointError(
                f"weight {names[0]} is not finite", found.name, "start with other weights"
            )
        )
    engine.weights_changed()
    return scaled


# --- the model


def _check(found: InitialWeights, config: Config, data: TrainingData) -> None:
    there = found.model.vocab_size
    assert there is not None
    if data.vocab_size > there:
        raise ConfigError(
            f"the data have {data.vocab_size} token ids, the weights {there} rows for them",
            KEY,
            "prepare the data with the tokenizer that the weights were trained with",
        )
    found.check_tokenizer(config, data)
    differing = differing_keys(config.model, found.model)
    if differing:
        what = ", ".join(f"{key} is {show(mine)}" for key, (mine, _) in differing.items())
        settings = [f"{key}={show(theirs)}" for key, (_, theirs) in differing.items()]
        if "model.width" in differing:  # an aspect that is written has to agree with the width
            settings.append("model.aspect=null")
        raise ConfigError(
            f"the weights are of another model ({found.name}): {what}",
            KEY,
            f"set {' '.join(settings)}, as `archscale config from` prints them",
        )


def differing_keys(ours: ModelConfig, theirs: ModelConfig) -> dict[str, tuple[Any, Any]]:
    """Dotted keys by which weights of one model are not weights of the other, with both values.

    The context and what only training reads may differ, and so may factors (`depth_mup`).
    """
    mine, wanted = _computed(ours), _computed(theirs)
    if (ours.moe is None) != (theirs.moe is None):
        section = None if theirs.moe is None else theirs.moe.model_dump(mode="json")
        mine["model.moe"], wanted["model.moe"] = ours.moe and "experts", section
    differing = {
        key: (mine.get(key), wanted[key]) for key in wanted if mine.get(key) != wanted[key]
    }
    if ours.mlp_hidden * theirs.width == theirs.mlp_hidden * ours.width:  # of another width alone
        differing.pop("model.mlp_ratio", None)
    return differing


def _computed(model: ModelConfig) -> dict[str, Any]:
    keys = (
        *("depth", "width", "head_dim", "heads", "kv_heads", "mlp", "mlp_ratio", "qk_norm"),
        *("gated_attention", "window", "rope_theta", "tied_embeddings", "vocab_size"),
    )
    values = {f"model.{key}": getattr(model, key) for key in keys}
    if model.moe is not None:
        moe = model.moe
        values |= {
            "model.moe.sparsity": moe.sparsity,
            "model.moe.top_k": moe.top_k,
            "model.moe.shared_expert": moe.shared_expert,
            "model.moe.sqrt_gate": square_root_gates(model),
        }
    return values


def starting_config(path: str) -> dict[str, Any]:
    """A config that starts with the weights at a path, but for the data: its name, its model and
    `training.init_from`.

    Raises:
        ConfigError, CheckpointError: as `initial_weights`.
    """
    found = _open(path)
    section = found.model.model_dump(mode="json")
    if isinstance(found, HuggingFaceDirectory):
        section = found.theirs.section
    name = Path(path).resolve().name if "://" not in path else path.rstrip("/").rsplit("/")[-1]
    return {"name": f"from_{name}", "model": section, "training": {"init_from": path}}
