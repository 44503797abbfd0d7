"""What the weights of known modules are, by the module's type; `groups.py` asks here.

A table entry tells the kind of a weight (a parameter of 2 or more dimensions) from its module and
the module's own name for it; None is a weight that this type does not have.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

Kind = str | Mapping[str, Any]  # a key of KINDS, or a dict as in a module's `parameter_roles`

KINDS: dict[str, dict[str, Any]] = {
    "matrix": {"role": "matrix"},  # (fan_out, fan_in)
    "stack": {"role": "matrix", "view": "stack"},  # (E, fan_out, fan_in)
    "flatten": {"role": "matrix", "view": "flatten"},  # (fan_out, ...)
    "embedding": {"role": "embedding"},
    "head": {"role": "head"},
    "vector": {"role": "vector"},
}
GATES = {  # in torch's storage order
    (nn.LSTM, nn.LSTMCell): ("i", "f", "g", "o"),
    (nn.GRU, nn.GRUCell): ("r", "z", "n"),
}


def _linear(module: nn.Module, key: str) -> Kind | None:
    return "matrix" if key == "weight" else None


def _convolution(module: Any, key: str) -> Kind | None:
    """(out, in/groups, kernel); a transposed one stores (in, out/groups, kernel)."""
    if key != "weight":
        return None
    rows, inner = module.out_channels, module.in_channels // module.groups
    if module.transposed:
        rows, inner = module.in_channels, module.out_channels // module.groups
    if module.groups > 1 and inner == 1:
        return "vector"
    each = rows // module.groups
    blocks = [(f"group{g}", each) for g in range(module.groups)] if module.groups > 1 else []
    return {**KINDS["flatten"], "blocks": blocks, "transposed": module.transposed}


def _recurrent(module: Any, key: str) -> Kind | None:
    if key.startswith("weight_hr"):
        return "matrix"
    if not key.startswith(("weight_ih", "weight_hh")):
        return None
    gates = next((names for types, names in GATES.items() if isinstance(module, types)), ())
    return {"role": "matrix", "blocks": [(gate, module.hidden_size) for gate in gates]}


def _attention(module: Any, key: str) -> Kind | None:
    if key == "in_proj_weight":
        return {"role": "matrix", "blocks": [(name, module.embed_dim) for name in "qkv"]}
    if key in ("bias_k", "bias_v"):  # (1, 1, embed_dim)
        return "vector"
    return "matrix" if key in ("q_proj_weight", "k_proj_weight", "v_proj_weight") else None


def _always(kind: str) -> Callable[[nn.Module, str], Kind | None]:
    return lambda module, key: kind


KNOWN: dict[type, Callable[[Any, str], Kind | None]] = {
    nn.Linear: _linear,
    nn.Bilinear: lambda module, key: "flatten" if key == "weight" else None,
    nn.modules.conv._ConvNd: _convolution,
    nn.RNNBase: _recurrent,
    nn.RNNCellBase: _recurrent,
    nn.MultiheadAttention: _attention,
    nn.Embedding: _always("embedding"),
    nn.EmbeddingBag: _always("embedding"),
    **dict.fromkeys((nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, _NormBase), _always("vector")),
    nn.PReLU: _always("vector"),
}


def known_types() -> dict[type, Callable[[Any, str], Kind | None]]:
    """KNOWN, and transformers' `Conv1D` (in, out) where transformers has been imported."""
    utils = sys.modules.get("transformers.pytorch_utils")
    if utils is None:
        return KNOWN
    kind = {"role": "matrix", "transposed": True}
    return {**KNOWN, utils.Conv1D: lambda module, key: kind if key == "weight" else None}
