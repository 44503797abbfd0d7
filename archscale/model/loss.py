"""Cross-entropy of a language-model head without the logits of the whole batch.

Shapes: N tokens, D width, V vocabulary. Logits exist for one chunk of tokens at a time; their
gradient is taken in the forward pass, so that nothing is recomputed in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORE = -100  # targets that count for nothing
CHUNK_ELEMENTS = 1 << 22  # of float32 logits at a time: 16 MiB


class _ChunkedCrossEntropy(torch.autograd.Function):
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
            index = torch.where(counted, t_c, 0)[:, None]
            logits = (x_c @ weight.mT).to(total.dtype)
            lse = torch.logsumexp(logits, dim=-1, keepdim=True)
            total += ((lse - logits.gather(1, index)).squeeze(1) * counted).sum()
            if grad_x is None and grad_w is None:
                del logits
                continue
            p = logits.sub_(lse).exp_()  # softmax, in place of the logits
            p.scatter_add_(1, index, p.new_full((), -1.0).expand_as(index))
            p = p.mul_(counted[:, None]).to(x.dtype)
            if grad_x is not None:
                torch.mm(p, weight, out=grad_x[start : start + rows])
            if grad_w is not None:
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


def cross_entropy_sum(
    x: Tensor, weight: Tensor, targets: Tensor, chunk_elements: int = CHUNK_ELEMENTS
) -> Tensor:
    """Σ over counted tokens of −log softmax(x Wᵀ)[target], in nats; float32 scalar.

    Args:
        x: (N, D). weight: (V, D), same dtype. targets: (N,), `IGNORE` where a token does not count.
        chunk_elements: logits that exist at a time.
    """
    return _ChunkedCrossEntropy.apply(x, weight, targets, chunk_elements, torch.is_grad_enabled())
