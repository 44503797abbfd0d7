"""Which class of transformers has the parts of a model, and its `config.json`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from archscale.config import ModelConfig

CUSTOM = "archscale"
CLASSES = {  # model_type → class
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "arcee": "ArceeForCausalLM",
    CUSTOM: "ArchscaleForCausalLM",
}
ACTIVATIONS = {"swiglu": "silu", "relu2": "relu2"}


@dataclass(frozen=True)
class Architecture:
    """The class that a model goes out as.

    Attributes:
        model_type: key of `CLASSES`.
        obstacles: the parts that no stock class has; empty for a stock class.
    """

    model_type: str
    obstacles: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return CLASSES[self.model_type]

    @property
    def stock(self) -> bool:
        return not self.obstacles

    @property
    def sentence(self) -> str:
        if self.stock:
            return f"{self.name}, a class of transformers"
        return f"{self.name}, own code: no class of transformers has {' and '.join(self.obstacles)}"


def choose(model: ModelConfig) -> Architecture:
    """The stock class that computes what `model` does, or the code that an export brings along."""
    if obstacles := tuple(_obstacles(model)):
        return Architecture(CUSTOM, obstacles)
    if model.mlp == "relu2":
        return Architecture("arcee")
    if model.qk_norm:
        return Architecture("qwen3" if model.moe is None else "qwen3_moe")
    if model.moe is not None:
        return Architecture("mixtral")
    return Architecture("llama" if model.window is None else "mistral")


def square_root_gates(model: ModelConfig) -> bool:
    """Whether the roots of the gates are other numbers than the gates: that of one expert is 1."""
    return model.moe is not None and model.moe.sqrt_gate and model.moe.routed_per_token > 1


def _obstacles(model: ModelConfig) -> list[str]:
    moe, relu2 = model.moe, model.mlp == "relu2"
    parts = {
        "a gate on every head": model.gated_attention,
        "square-root gates": square_root_gates(model),
        "a shared expert that is not gated": moe is not None and moe.shared_expert,
        "squared ReLU in experts": relu2 and moe is not None,
        "squared ReLU with QK-norm": relu2 and moe is None and model.qk_norm,
        "squared ReLU with a window": relu2 and model.window is not None,
        # Llama's and Arcee's own check of a configuration refuses it.
        f"a width of {model.width} for {model.heads} heads without QK-norm": (
            not model.qk_norm and model.width % model.heads != 0
        ),
    }
    return [part for part, there in parts.items() if there]


def config_json(
    model: ModelConfig, architecture: Architecture, dtype: str, bos_id: int | None, eos_id: int
) -> dict[str, Any]:
    """The content of `config.json`.

    Args:
        dtype: of the weights, as torch names it.
        bos_id: the token that every text starts with; None: none does.
    """
    kind = architecture.model_type
    hidden = model.mlp_hidden
    common: dict[str, Any] = {
        "architectures": [architecture.name],
        "model_type": kind,
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "intermediate_size": hidden,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": ACTIVATIONS[model.mlp],
        "rms_norm_eps": model.norm_eps,
        # transformers 5 moves it into `rope_parameters` as it reads it; all others know it here.
        "rope_theta": model.rope_theta,
        "max_position_embeddings": model.context,
        "tie_word_embeddings": model.tied_embeddings,
        "torch_dtype": dtype,  # read as `dtype` by transformers 5
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "use_cache": True,
    }
    if kind == CUSTOM:
        common |= {
            "auto_map": {
                "AutoConfig": "configuration_archscale.ArchscaleConfig",
                "AutoModel": "modeling_archscale.ArchscaleModel",
                "AutoModelForCausalLM": "modeling_archscale.ArchscaleForCausalLM",
            },
            "attention_window": model.window,
            "qk_norm": model.qk_norm,
            "gated_attention": model.gated_attention,
        }
    else:
        common |= {"attention_bias": False, "attention_dropout": 0.0}
    if kind in ("llama", "arcee"):
        common["mlp_bias"] = False
    if kind in ("mistral", "mixtral"):
        common["sliding_window"] = model.window
    if kind in ("qwen3", "qwen3_moe"):
        windowed = model.window is not None
        common |= {"use_sliding_window": windowed, "sliding_window": model.window}
        common["max_window_layers"] = 0 if windowed else model.depth
    return common | _expert_keys(model, kind)


def _expert_keys(model: ModelConfig, kind: str) -> dict[str, Any]:
    if model.moe is None:
        return {}
    experts, active = model.expert_counts
    hidden = model.mlp_hidden // model.moe.top_k
    keys: dict[str, Any] = {"num_experts_per_tok": active}
    if kind == "mixtral":
        return keys | {"intermediate_size": hidden, "num_local_experts": experts}
    keys["num_experts"] = experts
    if kind == "qwen3_moe":
        return keys | {
            "moe_intermediate_size": hidden,
            "norm_topk_prob": True,  # ours: the softmax over the chosen alone
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    return keys | {
        "intermediate_size": hidden,
        "shared_expert": model.moe.shared_expert,
        "sqrt_gate": square_root_gates(model),
    }
