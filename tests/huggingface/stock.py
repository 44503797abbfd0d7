"""Stock models of transformers with random weights, as directories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

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
QWEN3 = {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 16}
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
    "llama": ("LlamaConfig", {"rope_theta": 500000.0}),
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


def change_config(directory: Path, **values: Any) -> None:
    """Other values in config.json; what is None goes."""
    path = directory / "config.json"
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
