"""Whether the kernels of the passes give on a device what PyTorch's operators give there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from archscale.optim.exchange import Block, Part
from archscale.optim.pass_tables import CHUNK, make_table

# Of float32 arithmetic in another order or with fused multiplications: a few roundings of 2⁻²⁴;
# sums over n random terms differ by about √n of them.
TOLERANCE = 1e-5
MU, LR, KEEP, APPLY, BETA1, BETA2, EPS = 0.9, 0.01, 0.99, 0.02, 0.9, 0.95, 1e-8


def wrong_kernel(module: Any, device: torch.device) -> str | None:
    """Run every kernel of `pass_kernels` on a few numbers; the name of one that gives something
    else than PyTorch does, or None."""
    size = CHUNK + 48  # two chunks, the second of less than a block
    generator = torch.Generator().manual_seed(0)
    W, G, M, V = (torch.randn(size, generator=generator).to(device) for _ in range(4))
    V.square_()
    block, number = Block(0, 1, size, size), module.tl.float32
    table, slots = make_table([Part(0, block, block, 0, True)])
    chunks, grid = table.chunks.to(device), (len(table.chunks),)
    addresses = [tensor.data_ptr() for tensor in (W, G, M, V, M, V)]
    pointers = torch.tensor([addresses], dtype=torch.int64, device=device)
    common = {"ALIGN": 1 if any(a % 16 for a in addresses) else 16, "BLOCK": module.BLOCK}

    def scalars(*values: float) -> Tensor:
        return torch.tensor(values, device=device)

    def differ(*pairs: tuple[Tensor, Tensor]) -> bool:
        return any(bool(~((a - b).norm() <= TOLERANCE * b.norm())) for a, b in pairs)

    momentum = MU * M + G
    wire = torch.empty(size, device=device)
    expected = MU * momentum + G
    types = {"G_TYPE": number, "M_TYPE": number}
    module.momentum_kernel[grid](
        chunks, pointers, scalars(MU, 1.0), wire, PACK=True, ROWS=False, **types, **common
    )
    if differ((M, momentum), (wire, expected)):
        return "momentum_kernel"

    partial, (w, q, p) = torch.empty(slots, 3, device=device), torch.empty(3, 1, device=device)
    types = {"W_TYPE": number, "Q_TYPE": number, "RATIO": 1}
    module.return_kernel[grid](
        chunks, pointers, wire, partial, UNPACK=True, ROWS=False, **types, **common
    )
    ranges = torch.tensor([[0, 0, slots]], device=device)
    module.sum_kernel[(1,)](ranges, partial, w, q, p, BLOCK=256)
    products = torch.stack([W.dot(W), wire.dot(wire), W.norm() * wire.norm()])
    found = torch.stack([w[0], q[0], p[0] - W.dot(wire) + products[2]])
    if differ((G, wire), (found, products)):
        return "return_kernel"

    moved = KEEP * W - APPLY * G
    types |= {"FIRST_TYPE": number, "SECOND_TYPE": number}
    for bad in (0, 1):
        flags = torch.full((1,), bad, dtype=torch.uint8, device=device)
        factors = scalars(KEEP), scalars(APPLY)
        module.update_kernel[grid](
            chunks, pointers, *factors, flags, SECOND=False, ROWS=False, **types, **common
        )
        if differ((W, moved)) or bool(M.any()) != (bad == 0):
            return "update_kernel"

    first, second = 1 - BETA1, 1 - BETA2
    expected_v = BETA2 * V + second * G.square()
    moved = KEEP * W - LR * (first * G / first) / ((expected_v / second).sqrt() + EPS)
    rates = LR, KEEP, first, BETA2, second, EPS
    types = {"W_TYPE": number, "G_TYPE": number, "M_TYPE": number, "V_TYPE": number}
    module.adam_kernel[grid](
        chunks, pointers, scalars(first, second**0.5), *rates, UPDATE=True, **types, **common
    )
    if differ((M, first * G), (V, expected_v), (W, moved)):
        return "adam_kernel"
    return None
