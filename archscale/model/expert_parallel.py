"""Expert parallelism: experts spread over ranks, and only routed rows sent to them and back.

Each of R ranks routes its own tokens and holds E / R of the experts. Rows (one for each assignment)
are sorted by expert, so those for one rank are contiguous: two packed all-to-alls, there and back,
and their transposes in the backward pass. Numbers of rows are exchanged first. They decide the
sizes of what follows, so the host waits for them once a layer and pass.

Shapes: M assignments routed here, N rows received, D width, E experts, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from archscale.distributed import all_to_all


def spread(experts: nn.Module, mesh: DeviceMesh) -> None:
    """Make the stacks (E, …) of `experts`, on the meta device, DTensors of which each rank of the
    1-D `mesh` holds an equal part in order.

    Raises:
        ValueError: a stack that the ranks do not divide.
    """
    for module in experts.modules():
        for name, stack in list(module.named_parameters(recurse=False)):
            if len(stack) % mesh.size():
                raise ValueError(f"{len(stack)} experts cannot be spread over {mesh.size()} ranks")
            part = stack.detach()[: len(stack) // mesh.size()]
            setattr(
                module,
                name,
                nn.Parameter(DTensor.from_local(part, mesh, [Shard(0)], run_check=False)),
            )


def held_here(weight: Tensor) -> Tensor:
    """This rank's part of a spread stack, with its gradient; of another weight, all."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


@torch.compiler.disable  # the sizes of what is sent are data
def run_elsewhere(
    experts: Callable[[Tensor, Tensor, Tensor], Tensor],
    rows: Tensor,
    gates: Tensor,
    load: Tensor,
    mesh: DeviceMesh,
) -> Tensor:
    """`experts(rows, gates, ends)` of all ranks' rows, each on the rank that holds its expert.

    Args:
        experts: this rank's experts: rows sorted by expert, gates, ends as in `moe.Experts`.
        rows: (M, D) sorted by expert. gates: (M, 1). load: (E,) rows for each expert.

    Returns:
        (M, D) in the order of `rows`.
    """
    group = mesh.get_group()
    ranks = mesh.size()
    even = [len(load) // ranks] * ranks
    arriving, work = all_to_all(load, even, even, group)
    work.wait()
    arriving = arriving.view(ranks, -1)  # by source, of each expert held here
    sends, receives = torch.stack(
        [load.view(ranks, -1).sum(1), arriving.sum(1)]
    ).tolist()  # waits for the device
    # Rows arrive by source and then by expert; the product wants them by expert and then by source.
    expert = torch.arange(arriving.shape[1], device=load.device).repeat(ranks)
    expert = expert.repeat_interleave(arriving.flatten(), output_size=sum(receives))
    order = expert.argsort(stable=True)
    place = torch.empty_like(order).scatter_(
        0, order, torch.arange(len(order), device=order.device)
    )
    rows = _Exchange.apply(rows, sends, receives, group)
    gates = _Exchange.apply(gates, sends, receives, group)
    ends = arriving.sum(0).cumsum(0).to(torch.int32)
    y = experts(_Permute.apply(rows, order, place), _Permute.apply(gates, order, place), ends)
    return _Exchange.apply(_Permute.apply(y, place, order), receives, sends, group)


class _Exchange(torch.autograd.Function):
    """Rows (M, …) cut into `sends` for the ranks of a group → the rows received from them, (N, …),
    in the order of ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sends: list[int], receives: list[int], group: Any) -> Tensor:
        ctx.sends, ctx.receives, ctx.group = sends, receives, group
        return _exchange(x, sends, receives, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(grads[0], ctx.receives, ctx.sends, ctx.group), None, None, None


def _exchange(x: Tensor, sends: list[int], receives: list[int], group: Any) -> Tensor:
    size = x.shape[1:].numel()
    received, work = all_to_all(
        x.contiguous().view(-1), [n * size for n in sends], [n * size for n in receives], group
    )
    work.wait()
    return received.view(-1, *x.shape[1:])


class _Permute(torch.autograd.Function):
    """x[order]; its derivative gathers by the inverse, where indexing's own would add
    atomically."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grads[0].index_select(0, inverse), None, None
