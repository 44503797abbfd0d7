"""Directories as transformers writes them, with random weights: of its own models, and of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from archscale.config import ModelConfig
from archscale.huggingface.architecture import choose, config_json
from archscale.huggingface.weights import factors, sources

COMMON: dict[str, Any] = {
    "vocab_size": 304,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-5,
}
QWEN3 = {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 16, "rms_norm_eps": 1e-6}
EXPERTS = {"num_experts_per_tok": 2, "tie_word_embeddings": True}
# name → (configuration, its keys)
STOCK: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3Config", {**QWEN3, "tie_word_embeddings": True}),
    "qwen3_window": (
        "Qwen3Config",
        {**QWEN3, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**EXPERTS, "num_experts": 6, "moe_intermediate_size": 20, "norm_topk_prob": True},
    ),
    "llama": ("LlamaConfig", {"rope_theta": 500000.0, "rms_norm_eps": 1e-2}),
    "mistral": ("MistralConfig", {"sliding_window": 5}),
    "mixtral": ("MixtralConfig", {**EXPERTS, "num_local_experts": 4}),
    "arcee": ("ArceeConfig", {"tie_word_embeddings": True}),
}


def make_stock(name: str, directory: Path, dtype: torch.dtype, shard_size: str = "5GB") -> Any:
    """Writes a model of every-day weights and returns it; norms too have weights of their own."""
    import transformers

    kind, keys = STOCK[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**{**COMMON, **keys})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            size = parameter.shape[-1] if parameter.ndim > 1 else 16
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, size**-0.5)
    model.to(dtype).save_pretrained(directory, max_shard_size=shard_size)
    return model


def write_directory(model: ModelConfig, directory: Path, **change: torch.Tensor | None) -> Path:
    """Random weights for a model of ours, `change` among them (None: not there); without
    transformers."""
    save_file = pytest.importorskip("safetensors.torch").save_file
    kind = choose(model)
    directory.mkdir()
    content = config_json(model, kind, "float32", None, 1)
    (directory / "config.json").write_text(json.dumps(content))
    generator = torch.Generator().manual_seed(3)
    stored = {
        piece.name: torch.randn(piece.shape(part.shape), generator=generator) / 5
        for part in sources(model, kind.model_type, factors(model, 1.0, 1.0))
        for piece in part.pieces
    } | change
    save_file({k: v for k, v in stored.items() if v is not None}, directory / "model.safetensors")
    return directory
