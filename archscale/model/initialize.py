"""Initialization that does not depend on the sharding: each element is a function of (seed,
parameter name, position).

A parameter is cut into chunks of fixed size, each with its own generator, so a rank draws only the
chunks that it holds.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from archscale.distributed import Fragment, fragment

# elements of one generator; part of the definition of a run: changing it changes every weight
CHUNK = 1 << 18


@torch.no_grad()
def initialize(model: nn.Module, seed: int, weights: Mapping[str, Fragment] | None = None) -> None:
    """Fill every parameter of `model` (plain tensors or DTensors, on any device) from its module's
    `parameter_roles`.

    Args:
        weights: what to fill instead, by parameter name, where an engine keeps the weights
            elsewhere.

    Raises:
        ValueError: a parameter without `init`.
    """
    done: set[int] = set()
    for prefix, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if id(parameter) in done:  # a tied weight is drawn where it is first registered
                continue
            done.add(id(parameter))
            name = f"{prefix}.{key}" if prefix else key
            spec = getattr(module, "parameter_roles", {}).get(key, {})
            if "init" not in spec:
                raise ValueError(
                    f"parameter {name!r} has no initialization: add 'init' to its module's"
                    " parameter_roles"
                )
            of = fragment(parameter) if weights is None else weights[name]
            hi, numel = of.lo + of.data.numel(), math.prod(of.shape)
            of.data.copy_(draw(*spec["init"], seed=seed, name=name, lo=of.lo, hi=hi, numel=numel))


def draw(
    distribution: str, scale: float, *, seed: int, name: str, lo: int, hi: int, numel: int
) -> Tensor:
    """Elements [lo, hi) of a flattened parameter of `numel` elements; float32 on CPU, whatever the
    device.

    Args:
        distribution: `uniform` on (−scale, scale), `normal` with standard deviation `scale`, or
            `constant`.
    """
    values = torch.empty(hi - lo)
    if distribution == "constant":
        return values.fill_(scale)
    for chunk in range(lo // CHUNK, -(-hi // CHUNK)):
        start = chunk * CHUNK
        block = torch.empty(min(CHUNK, numel - start))
        key = hashlib.blake2b(f"{seed}/{name}/{chunk}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key, "little", signed=True))
        if distribution == "uniform":
            block.uniform_(-scale, scale, generator=generator)
        elif distribution == "normal":
            block.normal_(0.0, scale, generator=generator)
        else:
            raise ValueError(f"unknown distribution {distribution!r} of parameter {name!r}")
        a, b = max(lo, start), min(hi, start + len(block))
        values[a - lo : b - lo] = block[a - start : b - start]
    return values
