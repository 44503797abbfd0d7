"""A language model trained with archscale, for transformers.

Copied beside the weights of an export: it needs torch and transformers only. Constant factors of
training (attention scale, depth multiplier, logit scale) are part of the weights.

Shapes: B batch, T new tokens, S all tokens up to them (the cached ones first), D width, H query
heads, G key-value heads, C channels of a head, N = B T, E experts, K of them that a token passes.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_archscale import ArchscaleConfig

# Newer versions of transformers call the cache of keys and values `cache`.
CACHE = "cache" if hasattr(CausalLMOutputWithPast, "cache") else "past_key_values"


class ArchscaleRMSNorm(nn.Module):
    """x / √(mean(x²) + ε) ⊙ g over the last axis: normalized in x's dtype, returned in g's."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], eps=self.eps).to(self.weight.dtype) * self.weight


def rope_table(positions, config):
    """cos and sin of position · θ^(−2i/C), each (B, 1, T, C/2) float32, for positions (B, T)."""
    exponent = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32)
    frequency = config.rope_theta ** (-exponent / config.head_dim)
    angle = positions[:, None, :, None].float() * frequency
    return angle.cos(), angle.sin()


def rotate(x, rope):
    """x (B, H, T, C) with the pairs of channels (i, i + C/2) turned by the angles of the table."""
    cos, sin = (table.to(x.dtype) for table in rope)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class VisibleKeys:
    """Which keys each query sees: those before it and itself, within the window, and no padding.

    Args:
        padding: (B, S), 0 where a token is padding; None: nowhere.
        first: number of the first new token.
        time: T.
        window: tokens that a position sees, itself included; None: all before it.
    """

    def __init__(self, padding, first, time, window):
        if padding is not None and bool(padding.all()):
            padding = None
        self.padding, self.first, self.time, self.window = padding, first, time, window
        self.made = None

    def mask(self, keys, device):
        """(B or 1, 1, T, keys), true where a key is seen; None where the plain causal mask of
        keys without a past says the same. Made once for all blocks on a device."""
        plain = self.padding is None and (self.window is None or keys <= self.window)
        if plain and self.first == 0 and keys == self.time:
            return None
        made_for = None if self.made is None else (self.made.shape[-1], self.made.device)
        if made_for != (keys, device):
            query = torch.arange(self.first, self.first + self.time, device=device)[:, None]
            key = torch.arange(keys, device=device)
            seen = (key <= query)[None]
            if self.window is not None:
                seen = seen & (query - key < self.window)
            if self.padding is not None:
                missing = keys - self.padding.shape[1]
                padding = F.pad(self.padding.to(device).bool(), (0, missing), value=True)
                # Itself even where it is padding: some kernels make NaN of a softmax over nothing.
                seen = seen & (padding[:, None, :] | (key == query))
            self.made = seen[:, None]
        return self.made


class ArchscaleAttention(nn.Module):
    """Causal attention with grouped queries; where the config says so, with normalized queries and
    keys and a gate per head."""

    def __init__(self, config, layer_idx):
        super().__init__()
        D, H, G, C = (
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.head_dim, self.grouped, self.layer_idx = C, H != G, layer_idx
        self.q_proj = nn.Linear(D, H * C, bias=False)
        self.k_proj = nn.Linear(D, G * C, bias=False)
        self.v_proj = nn.Linear(D, G * C, bias=False)
        self.o_proj = nn.Linear(H * C, D, bias=False)
        self.gate_proj = nn.Linear(D, H, bias=False) if config.gated_attention else None
        self.q_norm = ArchscaleRMSNorm(C, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = ArchscaleRMSNorm(C, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x, rope, visible, cache):
        """x (B, T, D) → (B, T, D); the new keys and values are added to the cache, if any."""
        B, T, _ = x.shape
        heads = (B, T, -1, self.head_dim)
        q = rotate(self.q_norm(self.q_proj(x).view(heads)).transpose(1, 2), rope)  # (B, H, T, C)
        k = rotate(self.k_norm(self.k_proj(x).view(heads)).transpose(1, 2), rope)  # (B, G, T, C)
        v = self.v_proj(x).view(heads).transpose(1, 2)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)  # (B, G, S, C)
        mask = visible.mask(k.shape[2], x.device)
        o = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.grouped
        ).transpose(1, 2)  # (B, T, H, C)
        if self.gate_proj is not None:
            o = o * torch.sigmoid(self.gate_proj(x)).unsqueeze(-1)
        return self.o_proj(o.reshape(B, T, -1))


class ArchscaleMLP(nn.Module):
    """(silu(x W_gateᵀ) ⊙ x W_upᵀ) W_downᵀ, or relu(x W_upᵀ)² W_downᵀ."""

    def __init__(self, config):
        super().__init__()
        D, hidden = config.hidden_size, config.intermediate_size
        gated = config.hidden_act == "silu"
        self.gate_proj = nn.Linear(D, hidden, bias=False) if gated else None
        self.up_proj = nn.Linear(D, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, D, bias=False)

    def forward(self, x, gates=None):
        """x (…, D) → (…, D), times the gates (…, 1), if any."""
        if self.gate_proj is None:
            h = F.relu(self.up_proj(x)).square()
        else:
            h = F.silu(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(h if gates is None else h * gates.to(h.dtype))


class ArchscaleMoE(nn.Module):
    """Σ_e a_e E_e(x) over the K experts of largest logit, and a shared expert if there is one.

    a is the softmax over the K chosen logits, or its square root.
    """

    def __init__(self, config):
        super().__init__()
        self.active, self.sqrt_gate = config.num_experts_per_tok, config.sqrt_gate
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(ArchscaleMLP(config) for _ in range(config.num_experts))
        self.shared_expert = ArchscaleMLP(config) if config.shared_expert else None

    def forward(self, x):
        """x (B, T, D) → (B, T, D)."""
        tokens = x.flatten(0, 1)  # (N, D)
        # In float32: close logits would tie in bfloat16.
        logits = F.linear(tokens.float(), self.gate.weight.float())  # (N, E)
        chosen = logits.sort(dim=-1, descending=True, stable=True).indices[:, : self.active]
        log_gates = logits.gather(1, chosen).log_softmax(-1)
        gates = (log_gates / 2 if self.sqrt_gate else log_gates).exp()  # (N, K)
        y = torch.zeros_like(tokens, dtype=torch.float32)
        for number in chosen.unique().tolist():
            row, choice = (chosen == number).nonzero(as_tuple=True)
            output = self.experts[number](tokens[row], gates[row, choice, None])
            y.index_add_(0, row, output.float())  # each row once, so in the same order every time
        y = y.to(x.dtype)
        if self.shared_expert is not None:
            y = y + self.shared_expert(tokens)
        return y.view_as(x)


class ArchscaleDecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), on a float32 residual stream."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.input_layernorm = ArchscaleRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = ArchscaleAttention(config, layer_idx)
        self.post_attention_layernorm = ArchscaleRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = ArchscaleMoE(config) if config.num_experts else ArchscaleMLP(config)

    def forward(self, x, rope, visible, cache):
        x = x + self.self_attn(self.input_layernorm(x), rope, visible, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class ArchscalePreTrainedModel(PreTrainedModel):
    config_class = ArchscaleConfig
    base_model_prefix = "model"
    _no_split_modules = ["ArchscaleDecoderLayer"]  # noqa: RUF012  as transformers reads it
    _supports_sdpa = True
    _supports_cache_class = True

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, 0.0, self.config.initializer_range)


class ArchscaleModel(ArchscalePreTrainedModel):
    """Embedding, blocks and final norm."""

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            ArchscaleDecoderLayer(config, number) for number in range(config.num_hidden_layers)
        )
        self.norm = ArchscaleRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def set_input_embeddings(self, value):
        self.embed_tokens = value

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        output_hidden_states=None,
        cache=None,
        **kwargs,
    ):
        """Hidden states of the new tokens.

        Args:
            input_ids: (B, T), or `inputs_embeds` (B, T, D) in their place.
            attention_mask: (B, S), 0 where a token is padding.
            position_ids: (B, T); by default tokens count from the first one on.
            past_key_values, cache: keys and values of earlier tokens, by its old and new name.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if kwargs.get("output_attentions"):
            raise ValueError("attention weights are not computed: output_attentions is not there")
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError("attention_mask marks padding, (batch, tokens): others are not read")
        cache = past_key_values if cache is None else cache
        if cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache()
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        x = x.float()
        first = 0 if cache is None else int(cache.get_seq_length())
        if position_ids is None:
            position_ids = torch.arange(first, first + x.shape[1], device=x.device)[None]
        rope = rope_table(position_ids, self.config)
        visible = VisibleKeys(attention_mask, first, x.shape[1], self.config.attention_window)
        states = [x]
        for layer in self.layers:
            x = layer(x, rope, visible, cache)
            states.append(x)
        x = self.norm(x)
        states[-1] = x
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            hidden_states=tuple(states) if output_hidden_states else None,
            **{CACHE: cache},
        )


class ArchscaleForCausalLM(ArchscalePreTrainedModel, GenerationMixin):
    """The model with its output matrix: logits of the next token, (B, T, vocabulary) float32."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.model = ArchscaleModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_hidden_states=None,
        logits_to_keep=0,
        cache=None,
        return_dict=None,
        **kwargs,
    ):
        """As of `ArchscaleModel`.

        Args:
            labels: (B, T), as of `input_ids`: the loss of position t is that of label t + 1; −100
                does not count.
            logits_to_keep: number of last positions whose logits are needed; 0: all.
        """
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            cache=past_key_values if cache is None else cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, kept]).float()
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=output.hidden_states,
            **{CACHE: output.get(CACHE)},
        )
        return result.to_tuple() if return_dict is False else result


__all__ = ["ArchscaleConfig", "ArchscaleForCausalLM", "ArchscaleModel", "ArchscalePreTrainedModel"]
