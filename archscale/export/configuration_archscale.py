"""Configuration of a language model trained with archscale, for transformers.

Copied beside the weights of an export: it needs transformers only.
"""

from transformers import PretrainedConfig


class ArchscaleConfig(PretrainedConfig):
    """A decoder-only transformer with what no stock class has: gated heads, experts under
    square-root gates or beside a shared one, squared ReLU with normalized queries and keys.

    Args:
        intermediate_size: hidden features of the feed-forward, or of one expert.
        hidden_act: `silu`: a gated feed-forward of three matrices; `relu2`: squared ReLU, two.
        attention_window: tokens that a position sees, itself included; None: all before it.
        qk_norm: whether queries and keys are normalized.
        gated_attention: whether a sigmoid gate multiplies each head's output.
        num_experts: routed experts of a block; 0: dense.
        shared_expert: whether one more expert is passed by every token.
        sqrt_gate: whether experts are added up with the square roots of their gates.
    """

    model_type = "archscale"

    def __init__(
        self,
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=128,
        hidden_act="silu",
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        max_position_embeddings=1024,
        attention_window=None,
        qk_norm=True,
        gated_attention=True,
        num_experts=0,
        num_experts_per_tok=0,
        shared_expert=False,
        sqrt_gate=False,
        initializer_range=0.02,
        use_cache=True,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.hidden_act = hidden_act
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.max_position_embeddings = max_position_embeddings
        # Not named `sliding_window`: transformers would then keep only the keys within it, and
        # how many it keeps differs between its versions.
        self.attention_window = attention_window
        self.qk_norm = qk_norm
        self.gated_attention = gated_attention
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.shared_expert = shared_expert
        self.sqrt_gate = sqrt_gate
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)


__all__ = ["ArchscaleConfig"]
