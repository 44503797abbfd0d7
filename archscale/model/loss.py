"""What training minimizes: cross-entropy of the next token, and the balance loss of the experts.

Shapes: N tokens, n of a chunk; D width, V vocabulary; B sequences, E routed experts, L layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

IGNORE = -100  # a target that does not count
CPU_LOGITS = 1 << 22  # of a chunk on a CPU: 16 MiB in float32
CHUNK_TOKENS = 4096  # of a chunk elsewhere, at least


def chunk_tokens(tokens: int, vocabulary: int, device: torch.device) -> int:
    """Tokens whose logits exist at a time.

    Every chunk reads W twice, and reads and writes its gradient: thousands of tokens keep a GPU
    busy with products meanwhile. The chunks are equal there, but for a last one that is shorter by
    less than their number. On a CPU a chunk is what caches hold.
    """
    if device.type == "cpu":
        return max(1, min(tokens, CPU_LOGITS // vocabulary))
    chunks = max(1, tokens // CHUNK_TOKENS)
    return max(1, -(-tokens // chunks))


def cross_entropy_sum(
    x: Tensor, weight: Tensor, targets: Tensor, *, chunk: int | None = None, compiled: bool = False
) -> Tensor:
    """Σ over counted tokens of −log softmax(x Wᵀ)[target], in nats; float32 scalar.

    A sum and not a mean: the number of tokens that count is known only over all ranks and
    micro-batches.

    Args:
        x: (N, D). weight: W (V, D), same dtype.
        targets: (N,) int64, `IGNORE` where a token does not count.
        chunk: tokens whose logits exist at a time; None: `chunk_tokens`.
        compiled: softmax and its gradient are one compiled pass over the logits.
    """
    if chunk is None:
        chunk = chunk_tokens(x.shape[0], weight.shape[0], x.device)
    training = torch.is_grad_enabled()
    return _ChunkedCrossEntropy.apply(x, weight, targets, chunk, training, compiled)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Logits exist for one chunk of tokens at a time, never (N, V) at once. Their gradient is taken
    while they exist, in the forward pass, so the backward pass recomputes nothing."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        chunk: int,
        training: bool,
        compiled: bool,
    ) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        grad_x = grad_w = None
        if training and ctx.needs_input_grad[0]:
            grad_x = torch.empty_like(x)
        if training and ctx.needs_input_grad[1]:
            grad_w = (torch.empty_like if len(x) else torch.zeros_like)(weight, dtype=dtype)
        nats, gradient = (_nats, _gradient) if compiled else (softmax_nats, softmax_gradient)
        index = torch.where(targets != IGNORE, targets, 0)[:, None]  # any column where none counts
        total = torch.zeros((), device=x.device, dtype=dtype)
        for start in range(0, len(x), chunk):
            here = slice(start, start + chunk)
            x_c = x[here]
            if grad_x is None and grad_w is None:
                total = nats(x_c @ weight.mT, targets[here], index[here], total)
                continue
            total, g = gradient(x_c @ weight.mT, targets[here], index[here], total)
            if grad_x is not None:
                torch.mm(g, weight, out=grad_x[here])
            if grad_w is not None:
                _add_product(grad_w, g, x_c, first=start == 0)
            del g  # or it would stay while the next chunk's logits are made
        ctx.save_for_backward(grad_x, grad_w)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_w = ctx.saved_tensors
        if grad_x is not None:
            grad_x = grad_x * grads[0].to(grad_x.dtype)
        if grad_w is not None:  # scaled and rounded in one pass
            scaled = torch.empty_like(grad_w, dtype=ctx.weight_dtype)
            grad_w = torch.mul(grad_w, grads[0], out=scaled)
        return grad_x, grad_w, None, None, None, None


def softmax_nats(logits: Tensor, targets: Tensor, index: Tensor, total: Tensor) -> Tensor:
    """`total` and one chunk's −log softmax(logits)[target], summed over the tokens that count.

    Args:
        logits: (n, V). targets: (n,). index: (n, 1), the targets' columns, any where none counts.
        total: scalar, in the dtype of the arithmetic.
    """
    logits = logits.to(total.dtype)
    lse = torch.logsumexp(logits, dim=-1, keepdim=True)
    return total + ((lse - logits.gather(1, index)).squeeze(1) * (targets != IGNORE)).sum()


def softmax_gradient(
    logits: Tensor, targets: Tensor, index: Tensor, total: Tensor
) -> tuple[Tensor, Tensor]:
    """As `softmax_nats`, and the derivative by the logits, softmax − one-hot, in their dtype and
    perhaps in their place."""
    dtype, counted = logits.dtype, targets != IGNORE
    logits = logits.to(total.dtype)
    lse = torch.logsumexp(logits, dim=-1, keepdim=True)
    total = total + ((lse - logits.gather(1, index)).squeeze(1) * counted).sum()
    p = logits.sub_(lse).exp_()
    p.scatter_add_(1, index, p.new_full((), -1.0).expand_as(index))
    return total, p.mul_(counted[:, None]).to(dtype)


def _nats(logits: Tensor, targets: Tensor, index: Tensor, total: Tensor) -> Tensor:
    """`softmax_nats`, compiled."""
    chosen = logits.gather(1, index).to(total.dtype)
    return total + _compiled(_fused_nats)(*_of_any_length(logits, chosen, targets)).sum()


def _gradient(
    logits: Tensor, targets: Tensor, index: Tensor, total: Tensor
) -> tuple[Tensor, Tensor]:
    """`softmax_gradient`, compiled."""
    # Gathered beforehand: a reader of single logits would have to come before the pass that
    # overwrites them, and so split it. Here a wrong target is an error; below it is no column.
    chosen = logits.gather(1, index).to(total.dtype)
    nats = _compiled(_fused_gradient)(*_of_any_length(logits, chosen, targets))
    return total + nats.sum(), logits


def _fused_nats(logits: Tensor, chosen: Tensor, targets: Tensor) -> Tensor:
    """−log softmax(logits)[target], (n, 1); zeros where none counts. chosen: the targets' logits,
    (n, 1), in the dtype of the arithmetic."""
    lse = torch.logsumexp(logits.to(chosen.dtype), dim=-1, keepdim=True)
    return (lse - chosen) * (targets != IGNORE)[:, None]


def _fused_gradient(logits: Tensor, chosen: Tensor, targets: Tensor) -> Tensor:
    """As `_fused_nats`; overwrites the logits with the derivative by them. The sum over tokens is
    left to the caller: it would stand between two passes, where a row could stay in a cache."""
    z, counted = logits.to(chosen.dtype), (targets != IGNORE)[:, None]
    lse = torch.logsumexp(z, dim=-1, keepdim=True)
    # Not scattered, which would be a pass of its own; 32 bits, because a CPU compares as many at a
    # time as a register holds.
    columns = torch.arange(z.shape[1], device=z.device, dtype=torch.int32)
    one_hot = (targets.to(torch.int32)[:, None] == columns).to(z.dtype)
    nats = (lse - chosen) * counted
    # Taken again from the logits: a compiler would keep exp(z − max z), of the sum, in float32.
    logits.copy_((torch.exp(z - lse) - one_hot) * counted)
    return nats


@functools.cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function)


def _of_any_length(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tells the compiler that the last chunk is shorter, so that it need not compile again."""
    from torch._dynamo import maybe_mark_dynamic  # half a second, where nothing is compiled

    for tensor in tensors:
        maybe_mark_dynamic(tensor, 0)
    return tensors


def _add_product(total: Tensor, g: Tensor, x: Tensor, *, first: bool) -> None:
    """Add gᵀ x (V, D) to `total`, which is float32 at least: small contributions of late chunks
    would vanish otherwise. The first one overwrites it."""
    if total.dtype == g.dtype:
        if first:
            torch.mm(g.mT, x, out=total)
        else:
            total.addmm_(g.mT, x)
    elif _adds_in_float32(g.device, g.dtype):
        if first:
            torch.mm(g.mT, x, out_dtype=total.dtype, out=total)
        else:
            torch.addmm(total, g.mT, x, out_dtype=total.dtype, out=total)
    elif first:
        total.copy_(g.mT @ x)
    else:
        total += g.mT @ x


@functools.cache
def _adds_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device adds products of a 16-bit dtype to a float32 matrix without rounding them
    first. CUDA does; tried once, since a CPU and other accelerators do not."""
    if device.type == "meta":
        return True  # stands for a GPU
    ones = torch.ones(16, 16, device=device, dtype=dtype)
    small = 2.0**-10  # beside 16 it is less than half a unit of 16 bits
    total = torch.full((16, 16), small, device=device, dtype=torch.float32)
    try:
        torch.addmm(total, ones, ones, out_dtype=torch.float32, out=total)
    except (RuntimeError, NotImplementedError):
        return False
    return bool((total == 16 + small).all())


# --- balance of the experts


def balance_loss(mass: Tensor, share: Tensor, tokens: Tensor | float, weight: float) -> Tensor:
    """γ E Σ_e f_e P_e, summed over layers (arXiv 2101.03961, eqs. 4 to 6): the part that the tokens
    in `mass` have in it; scalar.

    Given f it is linear in the probabilities. Parts of different tokens therefore add up to the
    loss of all of them, and so do their gradients; nothing but f has to be reduced over ranks
    before the backward pass.

    Args:
        mass: sums of probabilities, (L, B, E) as of `moe.Routing`; divided by `tokens` they give P.
        share: f, the share of a scope's assignments that goes to each expert: (L, 1, E) where the
            scope is everything (arXiv 2501.11873), (L, B, E) where it is each sequence, whose
            losses are then averaged.
        tokens: of the whole batch, on all ranks.
        weight: γ.
    """
    return weight * share.shape[-1] / tokens * (share.to(mass.dtype) * mass).sum()


def load_share(load: Tensor) -> Tensor:
    """f (…, E) float32 from counts (…, E): each expert's share of all assignments; zeros where
    there are none."""
    return load.float() / load.sum(-1, keepdim=True).clamp(min=1).float()


def load_metrics(load: Tensor) -> dict[str, Tensor]:
    """How uneven the loads (L, E) are, as means over layers: `moe/max_violation`, largest load over
    mean load − 1, and `moe/load_entropy`, −Σ f log f in nats. Equal loads have 0 and log E."""
    f = load_share(load)
    return {
        "moe/max_violation": (f.amax(-1) * f.shape[-1] - 1).mean(),
        "moe/load_entropy": -torch.special.xlogy(f, f).sum(-1).mean(),
    }
