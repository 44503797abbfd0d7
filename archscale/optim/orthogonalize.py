"""Q ≈ U Vᵀ of M = U Σ Vᵀ, for one matrix or a batch of equal shapes. Stateless; whole matrices
only.

    X ← M / (f ‖M‖);   five times:  A = X Xᵀ,  X ← a X + (b A + c A²) X

with (a, b, c) and f from the tables below (Newton-Schulz iterations; Polar Express, arXiv
2505.16932). Tall matrices use XᵀX from the right, the same polynomial without a transposed copy.
The normalization has no additive ε: Q does not change when M is scaled.
"""

from __future__ import annotations

import functools
import warnings
from types import ModuleType

import torch
from torch import Tensor

COEFFICIENTS = {  # (a, b, c) of X ← a X + (b A + c A²) X, A = X Xᵀ
    "polar_express": [  # arXiv 2505.16932
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ],
    "quintic": [(3.4445, -4.7750, 2.0315)] * 5,  # Jordan
    "quintic_tuned": [  # Dion code base
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ],
}
KERNEL = 512  # rows from which the Triton kernel takes symmetric products
# Rows from which a symmetric product, and a diagonal block of it, is cut in four; measured.
SPLIT, LEAF = 1024, 512
NORMALIZATION = {"polar_express": 1.02, "quintic": 1.0, "quintic_tuned": 1.0}  # f
SCHEMES = (*COEFFICIENTS, "exact")


def orthogonalize(
    M: Tensor, scheme: str = "polar_express", dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Orthogonalize M (m, n) or (k, m, n).

    Args:
        scheme: `polar_express` (arXiv 2505.16932), `quintic` (Jordan), `quintic_tuned` (Dion) or
            `exact` (SVD in float64).
        dtype: of the iteration and of the result.

    Returns:
        Q, same shape as M, in `dtype`. A zero or non-finite M gives a zero Q.

    Raises:
        ValueError: an unknown scheme, or M not 2-D or 3-D.
    """
    if M.ndim not in (2, 3):
        raise ValueError(f"orthogonalize takes (m, n) or (k, m, n), not {tuple(M.shape)}")
    Q = M.detach().clone(memory_format=torch.contiguous_format)
    orthogonalize_(Q if M.ndim == 3 else Q[None], scheme, dtype)
    return Q.to(dtype)


def orthogonalize_(M: Tensor, scheme: str, dtype: torch.dtype) -> Tensor:
    """Overwrite the stack M (k, m, n) with its Q, iterating in `dtype`; returns ‖M‖, (k,), float64.

    A norm of zero or not finite means that Q is zero.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"unknown orthogonalizer {scheme!r}; one of {', '.join(SCHEMES)}")
    norm = _norms(M)
    if M.numel() == 0:
        return norm
    usable = torch.isfinite(norm) & (norm > 0)
    if scheme == "exact":
        M.copy_(_exact(torch.where(usable[:, None, None], M, 0.0)))
        return norm
    scale = torch.where(usable, 1.0 / (NORMALIZATION[scheme] * norm), 0.0)
    X = scaled(M, scale.to(torch.promote_types(M.dtype, torch.float32)), dtype)
    Q = _iterate(X, M if M.dtype == dtype else torch.empty_like(X), COEFFICIENTS[scheme])
    if Q.data_ptr() != M.data_ptr():
        M.copy_(Q)
    return norm


def _norms(M: Tensor) -> Tensor:
    """‖M‖ of each matrix, (k,), float64: the squares of a small gradient underflow in float32."""
    if M.device.type == "cpu" or M.numel() == 0:
        return torch.linalg.vector_norm(M, dim=(-2, -1), dtype=torch.float64)
    # On a GPU `vector_norm` would make a copy in float64, and this converts while it reads.
    return torch.stack(torch._foreach_norm(M.unbind(), dtype=torch.float64))


def scaled(M: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """M · scale of each matrix (k, m, n) in `dtype`, zero where its scale (k,) is: by a Triton
    kernel on a GPU."""
    kernels = _kernels() if M.is_cuda else None
    if kernels and M.dtype in kernels.DTYPES and dtype in kernels.DTYPES:
        return kernels.scaled(M, scale, dtype)
    return plain_scaled(M, scale, dtype)


def plain_scaled(M: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`scaled` in plain PyTorch: the reference of the kernel."""
    scale = scale[:, None, None]
    X = (M * scale).to(dtype)
    zero = scale == 0
    # 0 · NaN is NaN. To ask an accelerator whether there is any would make the host wait.
    if M.device.type != "cpu" or bool(zero.any()):
        X.masked_fill_(zero, 0.0)
    return X


def _iterate(X: Tensor, spare: Tensor, coefficients: list[tuple[float, float, float]]) -> Tensor:
    """The iteration on a stack X (k, m, n); X and `spare` are both used up, and the result is in
    one of them."""
    short, long = sorted(X.shape[-2:])
    # In bfloat16 the Gram matrix alone no longer knows the small singular values, so there the form
    # is always direct.
    gram = X.dtype != torch.bfloat16 and gram_cost(short, long) < direct_cost(short, long)
    return (_iterate_gram if gram else _iterate_direct)(X, spare, coefficients)


def direct_cost(m: int, n: int) -> int:
    """FLOPs of five iterations on (m, n), m ≤ n, in the direct form."""
    return 5 * (4 * m * m * n + 2 * m**3)


def gram_cost(m: int, n: int) -> int:
    """FLOPs of five iterations on (m, n), m ≤ n, in the Gram form with one restart after the
    second."""
    return 8 * m * m * n + 28 * m**3


def _iterate_direct(
    X: Tensor, spare: Tensor, coefficients: list[tuple[float, float, float]]
) -> Tensor:
    tall = X.shape[-2] > X.shape[-1]
    for a, b, c in coefficients:
        A = symmetric_product(X.mT if tall else X)
        B = symmetric_product(A, add=A, alpha=c, beta=b)
        torch.baddbmm(X, *((X, B) if tall else (B, X)), beta=a, out=spare)
        X, spare = spare, X
    return X


def _iterate_gram(
    X: Tensor, spare: Tensor, coefficients: list[tuple[float, float, float]]
) -> Tensor:
    """The same polynomial on the m × m Gram matrix: with P = a I + b A + c A², X ← P X and A ← P A
    P. Restarted once from X itself, because A's error grows."""
    tall = X.shape[-2] > X.shape[-1]
    for segment in (coefficients[:2], coefficients[2:]):
        A = symmetric_product(X.mT if tall else X)
        R = None  # the product of the segment's polynomials
        for i, (a, b, c) in enumerate(segment):
            P = symmetric_product(A, add=A, alpha=c, beta=b)
            P.diagonal(dim1=-2, dim2=-1).add_(a)
            R = P if R is None else torch.bmm(P, R)
            if i + 1 < len(segment):
                A = torch.bmm(torch.bmm(P, A), P)
        torch.bmm(*((X, R) if tall else (R, X)), out=spare)
        X, spare = spare, X
    return X


def symmetric_product(
    X: Tensor, add: Tensor | None = None, alpha: float = 1.0, beta: float = 1.0
) -> Tensor:
    """α X Xᵀ + β · add, for X (k, m, n) and symmetric `add` (k, m, m): by the Triton kernel on a
    GPU, where it pays."""
    kernels = _kernels() if X.is_cuda and X.shape[-2] >= KERNEL else None
    # float32 in full precision has no tensor cores to gain from: it stays with the library's
    # products (not measured).
    if (
        kernels
        and X.dtype in kernels.DTYPES
        and (X.dtype != torch.float32 or kernels.precision(X.dtype) == "tf32")
    ):
        return kernels.symmetric_product(X, add, alpha, beta)
    return plain_symmetric_product(X, add, alpha, beta)


@functools.cache
def _kernels() -> ModuleType | None:
    """The module of Triton kernels, where they run (NVIDIA, compute capability 8.0 or more); tried
    once."""
    if torch.version.cuda is None or torch.cuda.get_device_capability() < (8, 0):
        return None
    try:
        from archscale.optim import kernels
    except ImportError:  # Triton comes with PyTorch's CUDA wheels for Linux, not with others
        return None
    try:
        X = torch.ones(1, 16, 16, dtype=torch.bfloat16, device="cuda")
        double = kernels.scaled(X, torch.full((1,), 2.0, device="cuda"), torch.float32)
        product = kernels.symmetric_product(X, config=kernels.CONFIGS[0])
        if bool((double == 2).all()) and bool((product == 16).all()):
            return kernels
        reason = "wrong result"
    except Exception as error:  # no C compiler, say: PyTorch's products are slower, not different
        reason = f"{type(error).__name__}: {error}"
    warnings.warn(
        f"Triton does not run here, PyTorch's operators take its place: {reason}",
        stacklevel=2,
    )
    return None


def plain_symmetric_product(
    X: Tensor, add: Tensor | None = None, alpha: float = 1.0, beta: float = 1.0
) -> Tensor:
    """`symmetric_product` in plain PyTorch: the reference of the kernel.

    A large one is cut in four, and in four again: the upper right blocks are copied to the lower
    left, which saves 3/8 of the work (or less, as blocks get too small to be worth it).
    """
    m = X.shape[-2]
    if m < SPLIT:
        return (
            torch.bmm(X, X.mT)
            if add is None
            else torch.baddbmm(add, X, X.mT, beta=beta, alpha=alpha)
        )
    out = X.new_empty(X.shape[0], m, m)

    def fill(lo: int, hi: int) -> None:
        """The diagonal block of rows [lo, hi)."""
        rows = cols = slice(lo, hi)
        if hi - lo >= LEAF:
            mid = (lo + hi) // 2
            fill(lo, mid)
            fill(mid, hi)
            rows, cols = slice(lo, mid), slice(mid, hi)
        left, right = X[:, rows], X[:, cols].mT
        if add is None:
            block = torch.bmm(left, right)
        else:
            block = torch.baddbmm(add[:, rows, cols], left, right, beta=beta, alpha=alpha)
        out[:, rows, cols] = block
        if rows != cols:
            out[:, cols, rows] = block.mT

    fill(0, m)
    return out


def _exact(M: Tensor) -> Tensor:
    U, S, Vh = torch.linalg.svd(M.double(), full_matrices=False)
    rank = S.amax(dim=-1, keepdim=True) * max(M.shape[-2:]) * torch.finfo(torch.float64).eps < S
    return (U * rank.unsqueeze(-2)) @ Vh


def orthogonality_residual(Q: Tensor) -> Tensor:
    """‖Q Qᵀ − I‖ / √m of each Q (k, m, n), m its short side; (k,) float32."""
    X = Q.float() if Q.shape[-2] <= Q.shape[-1] else Q.mT.float()
    A = torch.bmm(X, X.mT)
    A.diagonal(dim1=-2, dim2=-1).sub_(1)
    return A.square().mean(dim=-1).sum(dim=-1).sqrt()
