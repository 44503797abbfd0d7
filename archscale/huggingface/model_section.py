"""From the `config.json` of a Hugging Face directory to the `model` section that computes the same,
or a refusal that names the key by which none does."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from archscale.config import ModelConfig
from archscale.config.explain import explain
from archscale.config.layers import Layer
from archscale.errors import ConfigError, explain_os_error, show
from archscale.huggingface.architecture import ACTIVATIONS, CLASSES, CUSTOM

CONFIG_JSON = "config.json"
EXPERTS = ("qwen3_moe", "mixtral")
MLP = {activation: mlp for mlp, activation in ACTIVATIONS.items()} | {"swish": "swiglu"}
# What a key means that is not there, where that depends on the class: as transformers has it.
OTHER_DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 128, "num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3_moe": {"num_key_value_heads": 4, "sliding_window": 4096},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "mixtral": {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6},
    "arcee": {"rms_norm_eps": 1e-5, "hidden_act": "relu2"},
    CUSTOM: {"head_dim": 128, "num_key_value_heads": 8, "rms_norm_eps": 1e-5},
}
DEFAULTS: dict[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_window_layers": 28,
    "decoder_sparse_step": 1,
    "qk_norm": True,
    "gated_attention": True,
}


@dataclass(frozen=True)
class HuggingFaceModel:
    """What a Hugging Face directory says of its model.

    Attributes:
        model_type: key of `CLASSES`.
        section: keys of the `model` section that computes the same.
    """

    model_type: str
    section: dict[str, Any]

    @property
    def config(self) -> ModelConfig:
        return ModelConfig(**self.section)


def read_model(directory: Path) -> HuggingFaceModel:
    """The model of a directory.

    Raises:
        ConfigError: no config.json, a class that is not known, or what ours does not compute, by
            its key.
    """
    path = directory / CONFIG_JSON
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        cause, remedy = explain_os_error(error, "give a Hugging Face directory")
        raise ConfigError(f"cannot read the model: {cause}", str(path), remedy) from error
    except ValueError as error:
        problem = f"it is no JSON: {' '.join(str(error).split())}"
        raise ConfigError(problem, str(path), "copy the directory again") from error
    kind = content.get("model_type") if isinstance(content, dict) else None
    if kind not in [*CLASSES]:  # whatever stands there
        raise ConfigError(
            f"model_type is {show(kind)}", str(path), f"archscale starts from {', '.join(CLASSES)}"
        )
    section = _Reading(content, kind, str(path)).section()
    try:
        ModelConfig(**section)
    except ValidationError as error:
        raise explain(error, ModelConfig, [Layer(str(path), section)]) from None
    return HuggingFaceModel(kind, section)


class _Reading:
    """A config.json while it is read.

    Args:
        where: the file, for messages.
    """

    def __init__(self, content: Mapping[str, Any], kind: str, where: str):
        self.content, self.kind, self.where = content, kind, where

    def get(self, key: str) -> Any:
        """The value, or what its absence means."""
        return self.content.get(key, OTHER_DEFAULTS.get(self.kind, {}).get(key, DEFAULTS.get(key)))

    def count(self, key: str) -> int:
        """A number that has to be there."""
        value = self.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.refusal(key, value, "a whole number of at least 1 is needed")
        return value

    def positive(self, key: str) -> float:
        value = self.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise self.refusal(key, value, "a number above 0 is needed")
        return value

    def refusal(self, key: str, value: Any, reason: str) -> ConfigError:
        return ConfigError(
            f"{key} is {show(value)}: {reason}", self.where, "start from a model without that"
        )

    def section(self) -> dict[str, Any]:
        for key, computed in self.computed().items():
            value = self.get(key)
            # 0, False, an empty list and null say the same of what is not there.
            if value != computed and (value or computed):
                raise self.refusal(key, value, f"archscale's model has {show(computed)}")
        heads, width = self.count("num_attention_heads"), self.count("hidden_size")
        activation = self.get("hidden_act")
        own = self.kind == CUSTOM
        if activation not in MLP or (not own and (MLP[activation] == "relu2") != self.squared):
            raise self.refusal("hidden_act", activation, f"not with {CLASSES[self.kind]}")
        hidden, moe = self.feed_forward()
        return {
            "depth": self.count("num_hidden_layers"),
            "width": width,
            "aspect": None,
            "head_dim": self.head_dim(width, heads),
            "heads": heads,
            "kv_heads": self.get("num_key_value_heads") or heads,
            "mlp": MLP[activation],
            "mlp_ratio": hidden / width,
            "context": self.count("max_position_embeddings"),
            "attention_scale": "standard",
            "norm_eps": self.positive("rms_norm_eps"),
            "qk_norm": bool(self.get("qk_norm")) if own else self.kind.startswith("qwen3"),
            "gated_attention": own and bool(self.get("gated_attention")),
            "window": self.window(),
            "rope_theta": self.rope_theta(),
            "tied_embeddings": bool(self.get("tie_word_embeddings")),
            "vocab_size": self.count("vocab_size"),
            "depth_mup": False,
            "moe": moe,
        }

    @property
    def squared(self) -> bool:
        return self.kind == "arcee"

    def computed(self) -> dict[str, Any]:
        """The only values that ours computes."""
        only: dict[str, Any] = {
            "attention_bias": False,
            "mlp_bias": False,
            "attention_dropout": 0.0,
            "quantization_config": None,
            "router_jitter_noise": 0.0,
        }
        if self.kind == "qwen3_moe":
            only |= {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": None}
        return only

    def feed_forward(self) -> tuple[int, dict[str, Any] | None]:
        """Hidden features of all that a token passes, and the section `moe`."""
        own = self.kind == CUSTOM and bool(self.get("num_experts"))
        if self.kind not in EXPERTS and not own:
            return self.count("intermediate_size"), None
        key = "num_local_experts" if self.kind == "mixtral" else "num_experts"
        if key not in self.content:  # transformers knows them by both names
            key = "num_local_experts" if key == "num_experts" else "num_experts"
        experts, active = self.count(key), self.count("num_experts_per_tok")
        shared = own and bool(self.get("shared_expert"))
        top_k, slots = active + shared, experts + shared
        if slots % top_k:
            raise self.refusal(
                key, experts, f"archscale has a multiple of {active} that are active"
            )
        hidden = self.count(
            "moe_intermediate_size" if self.kind == "qwen3_moe" else "intermediate_size"
        )
        return hidden * top_k, {
            "sparsity": slots // top_k,
            "top_k": top_k,
            "shared_expert": shared,
            "sqrt_gate": own and bool(self.get("sqrt_gate")),
        }

    # --- attention

    def head_dim(self, width: int, heads: int) -> Any:
        value = self.get("head_dim")
        if value is None and self.kind.startswith("qwen3") and "head_dim" in self.content:
            raise self.refusal("head_dim", value, f"{CLASSES[self.kind]} needs a number")
        return value or width // heads

    def window(self) -> int | None:
        if self.kind == CUSTOM:
            window = self.get("attention_window")
            return None if window is None else self.count("attention_window")
        layers, types = self.count("num_hidden_layers"), self.content.get("layer_types")
        if types is not None and not isinstance(types, list):
            raise self.refusal("layer_types", types, "a list is needed")
        sliding = [self.get("sliding_window") is not None] * layers
        if self.kind in ("llama", "arcee"):
            sliding = [False] * layers
        elif self.kind.startswith("qwen3"):
            used = bool(self.get("use_sliding_window")) and sliding[0]
            first = self.get("max_window_layers") if self.kind == "qwen3" else 0
            if not isinstance(first, int):
                raise self.refusal("max_window_layers", first, "a whole number is needed")
            sliding = [used and number >= first for number in range(layers)]
            if types is not None and self.kind == "qwen3":
                sliding = [kind == "sliding_attention" and used for kind in types]
        as_types = ["sliding_attention" if each else "full_attention" for each in sliding]
        if types is not None and types != as_types:
            raise self.refusal("layer_types", types, "other layers have the window")
        if len(set(sliding)) > 1:
            key = "max_window_layers" if types is None else "layer_types"
            raise self.refusal(key, self.get(key), "only some of the layers have the window")
        return self.count("sliding_window") if sliding[0] else None

    def rope_theta(self) -> Any:
        theta = self.get("rope_theta")
        for key in ("rope_scaling", "rope_parameters"):
            for name, value in self.rope(key):
                if name == "rope_theta":
                    theta = value
                elif name in ("rope_type", "type") and value != "default":
                    raise self.refusal(f"{key}.{name}", value, "archscale scales no positions")
                elif name == "partial_rotary_factor" and value != 1:
                    raise self.refusal(f"{key}.{name}", value, "archscale turns all of a head")
        if self.get("partial_rotary_factor") not in (None, 1):
            raise self.refusal(
                "partial_rotary_factor",
                self.get("partial_rotary_factor"),
                "archscale turns all of a head",
            )
        return theta

    def rope(self, key: str) -> Iterator[tuple[str, Any]]:
        value = self.get(key)
        if value is None:
            return
        if not isinstance(value, dict):
            raise self.refusal(key, value, "archscale scales no positions")
        yield from value.items()
