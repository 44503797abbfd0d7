"""What training minimizes: cross-entropy of the next token, and the balance loss of the experts.

Shapes: N tokens, D width, V vocabulary; B sequences, E routed experts, L layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORE = -100  # a target that does not count
CHUNK_ELEMENTS = 1 << 22  # float32 logits that exist at a time: 16 MiB


def cross_entropy_sum(
    x: Tensor, weight: Tensor, targets: Tensor, chunk_elements: int = CHUNK_ELEMENTS
) -> Tensor:
    """Σ over counted tokens of −log softmax(x Wᵀ)[target], in nats; float32 scalar.

    A sum and not a mean: the number of tokens that count is known only over all ranks and
    micro-batches.

    Args:
        x: (N, D). weight: W (V, D), same dtype.
        targets: (N,) int64, `IGNORE` where a token does not count.
        chunk_elements: logits that exist at a time.
    """
    return _ChunkedCrossEntropy.apply(x, weight, targets, chunk_elements, torch.is_grad_enabled())


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Logits exist for one chunk of tokens at a time, never (N, V) at once. Their gradient is taken
    while they exist, in the forward pass, so the backward pass recomputes nothing."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, chunk_elements: int, training: bool
    ) -> Tensor:
        N, V = x.shape[0], weight.shape[0]
        rows = max(1, min(N, chunk_elements // V))
        dtype = torch.promote_types(x.dtype, torch.float32)
        grad_x = torch.empty_like(x) if training and ctx.needs_input_grad[0] else None
        grad_w = (
            torch.zeros(weight.shape, device=x.device, dtype=dtype)
            if training and ctx.needs_input_grad[1]
            else None
        )
        total = torch.zeros((), device=x.device, dtype=dtype)
        for start in range(0, N, rows):
            x_c, t_c = x[start : start + rows], targets[start : start + rows]
            counted = t_c != IGNORE
            index = torch.where(counted, t_c, 0)[:, None]  # any valid column; it is masked below
            logits = (x_c @ weight.mT).to(total.dtype)  # (rows, V)
            lse = torch.logsumexp(logits, dim=-1, keepdim=True)
            total += ((lse - logits.gather(1, index)).squeeze(1) * counted).sum()
            if grad_x is None and grad_w is None:
                del logits
                continue
            # The derivative by the logits, softmax − one-hot, in place of them.
            p = logits.sub_(lse).exp_()
            p.scatter_add_(1, index, p.new_full((), -1.0).expand_as(index))
            p = p.mul_(counted[:, None]).to(x.dtype)
            if grad_x is not None:
                torch.mm(p, weight, out=grad_x[start : start + rows])
            if grad_w is not None:
                # Summed over chunks in float32, or small contributions of late chunks would vanish.
                if grad_w.dtype == p.dtype:
                    grad_w.addmm_(p.mT, x_c)
                else:
                    grad_w += p.mT @ x_c
            del logits, p  # or they would stay while the next chunk's are made
        ctx.save_for_backward(grad_x, grad_w)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_x, grad_w = ctx.saved_tensors
        grad_x = None if grad_x is None else grad_x * grads[0].to(grad_x.dtype)
        grad_w = None if grad_w is None else (grad_w * grads[0]).to(ctx.weight_dtype)
        return grad_x, grad_w, None, None, None


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
