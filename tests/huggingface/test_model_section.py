"""config.json → the model section that computes the same, or the key that keeps it from that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from archscale.config import ModelConfig
from archscale.errors import ConfigError
from archscale.huggingface.architecture import CLASSES, CUSTOM, choose, config_json
from archscale.huggingface.model_section import DEFAULTS, OTHER_DEFAULTS, read_model
from archscale.train.initial_weights import differing_keys
from tests.export.test_export import CASES
from tests.huggingface.stock import COMMON

SIZES = {"depth": 2, "width": 24, "head_dim": 8, "kv_heads": 1, "vocab_size": 300}


@pytest.mark.parametrize("name", CASES)
def test_an_export_comes_back_as_the_model_that_it_was(name, tmp_path):
    model = ModelConfig(**{**SIZES, **CASES[name][1]})
    content = config_json(model, choose(model), "float32", None, 1)
    (tmp_path / "config.json").write_text(json.dumps(content))
    there = read_model(tmp_path)
    assert there.model_type == choose(model).model_type
    assert differing_keys(there.config, model) == {}
    assert there.config.context == model.context


def written(directory: Path, model_type: str, **keys: Any) -> Path:
    """A directory with a config.json of every-day sizes; a key that is ABSENT is left out."""
    content = {**COMMON, "model_type": model_type, **keys}
    if model_type == "arcee":
        content = {"hidden_act": "relu2", **content}
    content = {key: value for key, value in content.items() if value != "ABSENT"}
    (directory / "config.json").write_text(json.dumps(content))
    return directory


MOE = {"num_experts": 6, "moe_intermediate_size": 20, "num_experts_per_tok": 2}
MOE |= {"norm_topk_prob": True}
REFUSED = [
    ("gemma", {}, "model_type"),
    ("llama", {"hidden_size": "ABSENT"}, "hidden_size"),
    ("llama", {"vocab_size": 0.5}, "vocab_size"),
    ("llama", {"rms_norm_eps": 0}, "rms_norm_eps"),
    ("llama", {"attention_bias": True}, "attention_bias"),
    ("llama", {"mlp_bias": True}, "mlp_bias"),
    ("llama", {"attention_dropout": 0.1}, "attention_dropout"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act"),
    ("llama", {"hidden_act": "relu2"}, "hidden_act"),
    ("arcee", {"hidden_act": "silu"}, "hidden_act"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling.type"),
    ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.rope_type"),
    ("llama", {"rope_scaling": "yarn"}, "rope_scaling"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("llama", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ("llama", {"num_attention_heads": 5, "num_key_value_heads": 2}, "model.kv_heads"),
    ("llama", {"head_dim": 7}, "model.head_dim"),
    ("qwen3", {"head_dim": None}, "head_dim is null"),
    ("qwen3", {"use_sliding_window": True, "max_window_layers": 1}, "max_window_layers"),
    ("qwen3", {"use_sliding_window": True, "max_window_layers": None}, "max_window_layers"),
    (
        "qwen3",
        {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]},
        "layer_types",
    ),
    ("qwen3_moe", {**MOE, "norm_topk_prob": False}, "norm_topk_prob"),
    ("qwen3_moe", {**MOE, "mlp_only_layers": [0]}, "mlp_only_layers"),
    ("qwen3_moe", {**MOE, "decoder_sparse_step": 2}, "decoder_sparse_step"),
    ("qwen3_moe", {**MOE, "num_experts": 7}, "num_experts"),
    ("mixtral", {"num_local_experts": 4}, "num_experts_per_tok"),
    (
        "mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.1},
        "router_jitter_noise",
    ),
]


@pytest.mark.parametrize(("model_type", "keys", "named"), REFUSED)
def test_what_cannot_be_said_is_refused_by_its_key(model_type, keys, named, tmp_path):
    keys = {"sliding_window": 5, **keys} if model_type == "qwen3" else keys
    with pytest.raises(ConfigError) as refused:
        read_model(written(tmp_path, model_type, **keys))
    assert named in f"{refused.value.what} {refused.value.where}"
    assert "config.json" in refused.value.where
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"rope_theta": 5e5}, {"rope_theta": 5e5}),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, {"rope_theta": 5e5}),
        ({"rope_scaling": {"rope_type": "default"}, "hidden_act": "swish"}, {"rope_theta": 1e4}),
        ({"head_dim": None, "num_key_value_heads": None}, {"head_dim": 6, "kv_heads": 4}),
        ({"tie_word_embeddings": True}, {"tied_embeddings": True}),
        ({}, {"tied_embeddings": False, "window": None, "moe": None, "mlp_ratio": 40 / 24}),
    ],
)
def test_what_may_be_written_in_several_ways(keys, expected, tmp_path):
    section = read_model(written(tmp_path, "llama", **keys)).section
    assert {key: section[key] for key in expected} == expected


@pytest.mark.slow
def test_what_is_not_there_means_what_transformers_takes_it_for():
    transformers = pytest.importorskip("transformers")
    for model_type in CLASSES.keys() - {CUSTOM}:
        kind = type(transformers.AutoConfig.for_model(model_type))
        theirs = kind(use_sliding_window=True).to_dict()  # else Qwen's classes drop its width
        theirs |= theirs["rope_parameters"]
        for key, value in (DEFAULTS | OTHER_DEFAULTS.get(model_type, {})).items():
            if key in theirs:
                assert theirs[key] == value, f"{model_type}: {key}"


@pytest.mark.parametrize("use_window", [False, True])
@pytest.mark.parametrize("model_type", [name for name in CLASSES if name != CUSTOM])
def test_a_file_without_them_is_the_model_that_transformers_reads(model_type, use_window, tmp_path):
    """Heads that every default divides: what is read then is theirs to the last key."""
    transformers = pytest.importorskip("transformers")
    keys: dict[str, Any] = {"hidden_size": 384, "num_attention_heads": 32}
    keys |= MOE if model_type == "qwen3_moe" else {}
    keys |= {"num_local_experts": 4, "num_experts_per_tok": 2} if model_type == "mixtral" else {}
    if use_window:
        keys |= {"use_sliding_window": True, "max_window_layers": 0}
    keys |= dict.fromkeys(("head_dim", "num_key_value_heads", "sliding_window"), "ABSENT")
    section = read_model(written(tmp_path, model_type, **keys)).section
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    head_dim = getattr(theirs, "head_dim", None) or 384 // 32  # as their attention says it
    assert section["head_dim"] == head_dim
    assert section["kv_heads"] == theirs.num_key_value_heads
    assert section["window"] == getattr(theirs, "sliding_window", None)
    assert section["rope_theta"] == theirs.rope_parameters["rope_theta"]


def test_no_json_and_no_file_are_a_line(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the model"):
        read_model(tmp_path)
    for text in ("{", "[]", '{"model_type": ["llama"]}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=r"no JSON|model_type"):
            read_model(tmp_path)
