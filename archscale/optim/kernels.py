"""Triton kernels of the orthogonalization: symmetric products α X Xᵀ + β · add, of which half of
the tiles are computed and each is written twice, and the scaling before them.

`orthogonalize.plain_symmetric_product` and `plain_scaled` are the references, and that file imports
this one only where Triton is installed. Letters: k matrices of m rows
and n columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Square tiles, so that the mirror of a tile is a tile. Two operand tiles per stage, 2 BLOCK BLOCK_K
# elements, must fit the shared memory of a block (Ampere 164 KB, Hopper 227 KB); the tuner drops a
# configuration that does not (float32, the largest).
CONFIGS = [
    triton.Config(
        {"BLOCK": block, "BLOCK_K": depth, "GROUP": 8}, num_warps=warps, num_stages=stages
    )
    for block, depth, warps, stages in (
        (128, 64, 8, 3),
        (128, 64, 8, 4),
        (128, 64, 4, 3),
        (128, 32, 8, 4),
        (64, 64, 4, 4),
    )
]


@triton.jit
def _kernel(  # noqa: PLR0913  Triton passes pointers and strides one by one
    X,
    ADD,
    OUT,
    m,
    n,
    x_k,
    x_m,
    x_n,
    add_k,
    add_m,
    add_n,
    out_k,
    out_m,
    out_n,
    alpha,
    beta,
    HAS_ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One program per tile (i, j) of a matrix; those above the diagonal have nothing to do.

    x_k, x_m, x_n and the like are strides in elements. Offsets are int64: k m n may exceed 2³¹.
    """
    tiles = tl.cdiv(m, BLOCK)
    matrix = (tl.program_id(0) // (tiles * tiles)).to(tl.int64)
    place = tl.program_id(0) % (tiles * tiles)
    # GROUP rows of tiles at a time, column by column: what runs at the same time reads few distinct
    # rows of X, out of L2.
    first = place // (GROUP * tiles) * GROUP
    height = tl.minimum(tiles - first, GROUP)
    i = first + place % (GROUP * tiles) % height
    j = place % (GROUP * tiles) // height
    if j > i:
        return
    inner = tl.arange(0, BLOCK_K)
    rows = (i * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    cols = (j * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    step = inner.to(tl.int64) * x_n
    left = X + matrix * x_k + rows[:, None] * x_m + step[None, :]
    right = X + matrix * x_k + cols[None, :] * x_m + step[:, None]
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for start in range(0, n, BLOCK_K):
        rest = n - start
        a = tl.load(left, mask=(rows < m)[:, None] & (inner < rest)[None, :], other=0.0)
        b = tl.load(right, mask=(cols < m)[None, :] & (inner < rest)[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        left += BLOCK_K * tl.cast(x_n, tl.int64)
        right += BLOCK_K * tl.cast(x_n, tl.int64)
    total *= alpha
    inside = (rows < m)[:, None] & (cols < m)[None, :]
    if HAS_ADD:
        added = tl.load(
            ADD + matrix * add_k + rows[:, None] * add_m + cols[None, :] * add_n,
            mask=inside,
            other=0.0,
        )
        total += beta * added.to(tl.float32)
    tile = total.to(OUT.dtype.element_ty)
    OUT += matrix * out_k
    tl.store(OUT + rows[:, None] * out_m + cols[None, :] * out_n, tile, mask=inside)
    if i != j:  # a diagonal tile is its own mirror
        mirror = OUT + cols[:, None] * out_m + rows[None, :] * out_n
        tl.store(mirror, tl.trans(tile), mask=(cols < m)[:, None] & (rows < m)[None, :])


_tuned = triton.autotune(CONFIGS, key=["m", "n", "x_n", "HAS_ADD", "PRECISION"])(_kernel)


def symmetric_product(
    X: Tensor,
    add: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    config: triton.Config | None = None,
) -> Tensor:
    """α X Xᵀ + β · add, (k, m, m) contiguous in X's dtype; sums in float32.

    Args:
        X: (k, m, n) with any strides (X.mT of a stored matrix too), in one of `DTYPES`.
        add: (k, m, m), symmetric; only its lower triangle of tiles is read.
        config: one of `CONFIGS`; None: the fastest here, measured at the first call with these m, n
            and strides.
    """
    assert X.dtype in DTYPES, X.dtype
    k, m, n = X.shape
    out = X.new_empty(k, m, m)
    other = out if add is None else add
    assert (other.shape, other.dtype) == (out.shape, X.dtype)
    if not out.numel():
        return out
    kernel = _tuned if config is None else _kernel
    with torch.cuda.device_of(X):  # Triton launches on the current device
        kernel[lambda meta: (k * triton.cdiv(m, meta["BLOCK"]) ** 2,)](
            X,
            other,
            out,
            m,
            n,
            *X.stride(),
            *other.stride(),
            *out.stride(),
            alpha,
            beta,
            HAS_ADD=add is not None,
            PRECISION=precision(X.dtype),
            **(config.all_kwargs() if config else {}),
        )
    return out


@triton.jit
def _scale_kernel(M, SCALE, X, numel, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """X ← M · scale of each matrix of `numel` elements, zero where its scale is; SCALE: float32."""
    matrix = tl.program_id(1)
    scale = tl.load(SCALE + matrix)
    usable = tl.where(scale != 0, numel, 0)
    offset = matrix.to(tl.int64) * numel
    for low in range(0, CHUNK, BLOCK):
        e = tl.program_id(0).to(tl.int64) * CHUNK + low + tl.arange(0, BLOCK)
        m = tl.load(M + offset + e, mask=e < usable, other=0.0).to(tl.float32)
        tl.store(X + offset + e, (m * scale).to(X.dtype.element_ty), mask=e < numel)


def scaled(M: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """M · scale in `dtype`; zero where the scale is, whatever M holds.

    Args:
        M: (k, m, n), contiguous. scale: (k,), float32.
    """
    X, numel = torch.empty_like(M, dtype=dtype), M[0].numel()
    with torch.cuda.device_of(M):
        grid = (triton.cdiv(numel, 8192), len(M))
        _scale_kernel[grid](M, scale, X, numel, BLOCK=1024, CHUNK=8192)
    return X


def precision(dtype: torch.dtype) -> str:
    """Precision in which `torch.bmm` would take the products: tf32 for float32 only where PyTorch's
    setting allows it."""
    return (
        "tf32"
        if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
        else "ieee"
    )
