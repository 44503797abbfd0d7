"""What a run starts with in place of random weights (`training.init_from`): those of a run, of a
checkpoint in any layout, or of a Hugging Face directory. Weights alone: optimizer, schedule and
data start new.

All of it computes what it computed where it comes from: factors that the two parameterizations have
otherwise are multiplied into the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from archscale.checkpoint.choosing import load_newest
from archscale.checkpoint.directory import checkpoint_id, newest_valid, read_state
from archscale.checkpoint.history import Start, absolute, identity, saved_config, warn
from archscale.checkpoint.place import STATE, Place, StorePath, checkpoints_of, place_of
from archscale.checkpoint.saving import load_checkpoint
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


@dataclass(frozen=True)
class Loaded:
    """What has been loaded.

    Attributes:
        name: what it is, for people.
        record: what the run's checkpoints say of it.
        scaled: what was multiplied into the weights, in sentences.
    """

    name: str
    record: dict[str, Any]
    scaled: list[str]


class InitialWeights(Protocol):
    """Weights to start with.

    Attributes:
        model: the architecture that they belong to.
        name: what they are, for people.
    """

    @property
    def model(self) -> ModelConfig: ...

    @property
    def name(self) -> str: ...

    def check_tokenizer(self, config: Config, data: TrainingData) -> None:
        """ConfigError where the data have other ids; a warning where that cannot be known."""

    def load(self, weights: Mapping[str, Fragment], config: Config) -> Loaded:
        """Fill what this rank holds of the weights of a run of `config`; all ranks together.
        CheckpointError where they cannot be read; parts of them may have been."""


def initial_weights(start: Start, config: Config, data: TrainingData) -> InitialWeights | None:
    """What a run starts with; None where it goes on from a checkpoint, or at random. All ranks
    together.

    Args:
        config: resolved.

    Raises:
        ConfigError: they belong to another model or vocabulary, or `init_from` names nothing.
        CheckpointError: there are none, or they have diverged.
    """
    path = config.training.init_from
    if path is None or start.checkpoint is not None:
        return None

    def checked() -> InitialWeights:
        weights = _find(path)
        _check(weights, config, data)
        return weights

    checked_weights: InitialWeights = on_rank_zero(checked)
    return checked_weights


def _find(path: str) -> InitialWeights:
    place = place_of(path)
    kind = _kind(place)
    if kind == "directory":
        return HuggingFaceDirectory(Path(path), read_model(Path(path)))
    if kind == "checkpoint":
        return _checkpoint(place)
    folder = checkpoints_of(Path(path))
    newest = newest_valid(folder, warn)
    if newest is None:
        raise _nothing_whole(path)
    return _checkpoint(newest, folder)


def _nothing_whole(path: str) -> CheckpointError:
    return CheckpointError("the run has no whole checkpoint", path, f"name another one as {KEY}")


def _kind(place: Place) -> str:
    if isinstance(place, StorePath):
        if (place / STATE).is_file():
            return "checkpoint"
        raise ConfigError(
            f"{place} is no checkpoint; runs and Hugging Face directories must be local paths",
            KEY,
            "name a local path, or a checkpoint in a store by itself, such as URL/step_00001000",
        )
    for kind, file in {"checkpoint": STATE, "run": CONFIG, "directory": CONFIG_JSON}.items():
        if (place / file).is_file():
            return kind
    raise ConfigError(
        f"{place} is no run, no checkpoint and no Hugging Face directory",
        KEY,
        "name one that is here, such as runs/<name>; of the hub: hf download NAME --local-dir DIR",
    )


def _checkpoint(place: Place, folder: Place | None = None) -> Checkpoint:
    state = read_state(place)
    refuse_diverged(state, place)
    return Checkpoint(place, state, saved_config(place, state), folder)


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a checkpoint, whatever layout wrote it.

    Attributes:
        config: that it was written with.
        folder: with the older checkpoints that are taken where it is damaged; None: that one or
            none.
    """

    place: Place
    state: dict[str, Any]
    config: Config
    folder: Place | None

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

    def load(self, weights: Mapping[str, Fragment], config: Config) -> Loaded:
        def load(place: Place) -> Checkpoint:
            state = load_checkpoint(place, weights)
            # An older one than was looked at before, where that turned out to be damaged.
            on_rank_zero(lambda: refuse_diverged(state, place))
            return Checkpoint(place, state, saved_config(place, state), self.folder)

        if self.folder is None:
            return load(self.place)._scaled(weights, config)
        # What is damaged is passed over with a warning, as where a run resumes.
        loaded = load_newest(self.folder, self.state["step"] + 1, warn, load)
        if loaded is None:
            raise same_everywhere(_nothing_whole(str(self.folder)))
        return loaded._scaled(weights, config)

    def _scaled(self, weights: Mapping[str, Fragment], config: Config) -> Loaded:
        before, now = _factors(self.config), _factors(config)
        record = {
            "path": absolute(self.place),
            "run": self.config.name,
            "step": self.state["step"],
            "id": checkpoint_id(self.state),
        }
        if before == now:
            return Loaded(self.name, record, [])
        model = config.model
        change_factors(weights, [*sources(model, CUSTOM, before)], [*sources(model, CUSTOM, now)])
        said = "other constants of training: the weights are scaled to compute the same"
        return Loaded(self.name, record, [said])


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

    def load(self, weights: Mapping[str, Fragment], config: Config) -> Loaded:
        by = _factors(config)
        parts = [*sources(config.model, self.theirs.model_type, by)]

        def fill() -> None:
            stored = StoredTensors(self.path)
            stored.check(parts, config.model.tied_embeddings)
            take_back(weights, parts, stored.read)

        agree(fill)
        record = {"path": absolute(self.path), "model_type": self.theirs.model_type}
        return Loaded(self.name, record, [f"divided out: {said}" for said in by.sentences()])


def _factors(config: Config) -> Factors:
    transfer = transfer_of(config)
    return factors(config.model, transfer.logit_scale, transfer.router_logit_scale)


def _short(tokenizers: set[str]) -> str:
    return ", ".join(sorted(each[:12] for each in tokenizers))


def _warn_of_unknown(reason: str) -> None:
    warn(f"{KEY}: it is not known whether weights and data share a tokenizer: {reason}")


# --- loading


def load(initial: InitialWeights, engine: Engine, config: Config) -> Loaded:
    """Fill the weights of an engine; all ranks together.

    Raises:
        CheckpointError: they cannot be read, or are not finite.
    """
    weights = engine.weights()
    loaded = initial.load(weights, config)
    not_finite = [name for name, held in weights.items() if not held.data.isfinite().all()]
    if names := [name for of_rank in gather_objects(not_finite) for name in of_rank]:
        raise same_everywhere(
            CheckpointError(
                f"weight {names[0]} is not finite", loaded.name, "start with other weights"
            )
        )
    engine.weights_changed()
    return loaded


# --- the model


def _check(initial: InitialWeights, config: Config, data: TrainingData) -> None:
    there = initial.model.vocab_size
    assert there is not None
    if data.vocab_size > there:
        raise ConfigError(
            f"the data have {data.vocab_size} token ids, the weights {there} rows for them",
            KEY,
            "prepare the data with the tokenizer that the weights were trained with",
        )
    initial.check_tokenizer(config, data)
    differing = differing_keys(config.model, initial.model)
    if differing:
        what = ", ".join(f"{key} is {show(mine)}" for key, (mine, _) in differing.items())
        settings = [f"{key}={show(theirs)}" for key, (_, theirs) in differing.items()]
        if "model.width" in differing:  # an aspect that is written has to agree with the width
            settings.append("model.aspect=null")
        raise ConfigError(
            f"the weights are of another model ({initial.name}): {what}",
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
        *("gated_attention", "window", "rope_theta", "norm_eps", "tied_embeddings", "vocab_size"),
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
    initial = _find(path)
    section = initial.model.model_dump(mode="json")
    if isinstance(initial, HuggingFaceDirectory):
        section = initial.theirs.section
    name = Path(path).resolve().name if "://" not in path else path.rstrip("/").rsplit("/")[-1]
    return {"name": f"from_{name}", "model": section, "training": {"init_from": path}}
