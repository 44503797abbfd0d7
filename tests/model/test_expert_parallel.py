"""Experts spread over ranks: the same outputs and gradients, and only routed rows travel."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from archscale.distributed import rank, world_size
from archscale.model import initialize, moe
from archscale.model.moe import MoE

SHAPE = {
    "width": 16,
    "hidden": 8,
    "kind": "swiglu",
    "experts": 12,
    "active": 3,
    "shared": True,
    "sqrt_gate": True,
}


def tokens(dtype: torch.dtype, one_expert: bool) -> torch.Tensor:
    """Four sequences of 6 tokens, (4, 6, 16); or the same token everywhere."""
    x = torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(
        dtype
    )
    return x[:1, :1].expand_as(x).contiguous() if one_expert else x


def build(spread: bool) -> MoE:
    with torch.device("meta"):
        layer = MoE(**SHAPE)
    if spread:
        layer.spread_experts(init_device_mesh("cpu", (world_size(),)))
    layer.to_empty(device="cpu")
    initialize(layer, 0)
    return layer


def passes(
    spread: bool, dtype: torch.dtype = torch.float64, one_expert: bool = False
) -> dict[str, torch.Tensor]:
    """Outputs and gradients of this rank's sequences, and rows that crossed to each rank."""
    layer = build(spread).to(dtype)
    x = tokens(dtype, one_expert).tensor_split(world_size())[rank()].clone().requires_grad_()
    crossed, original = [], moe.all_to_all

    def counting(send, sends, receives, group=None):
        crossed.append(list(sends))
        return original(send, sends, receives, group)

    moe.all_to_all = counting
    try:
        output = layer(x)
        y, (load, mass) = output.hidden, output.routing
        ((y * torch.linspace(-1, 1, 16, dtype=dtype)).sum() + mass.square().sum()).backward()
    finally:
        moe.all_to_all = original
    local = lambda g: g.to_local() if hasattr(g, "to_local") else g  # noqa: E731
    grads = {name: local(p.grad) for name, p in layer.named_parameters()}
    return {"y": y.detach(), "load": load, "x": x.grad, "crossed": crossed, **grads}


def together(parts: list[dict]) -> dict[str, torch.Tensor]:
    """What all ranks have: sequences in order, experts in order, gradients of what every rank holds
    summed."""
    found = {key: torch.cat([part[key] for part in parts]) for key in ("y", "load", "x")}
    for key in parts[0].keys() - {"y", "load", "x", "crossed"}:
        grads = [part[key] for part in parts]
        found[key] = torch.cat(grads) if ".experts." in f".{key}" else sum(grads)
    return found


@pytest.mark.parametrize("one_expert", [False, True])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_outputs_and_gradients_equal_those_of_one_process(pool, world, one_expert):
    """In float64; also with all tokens on the same three experts, so that ranks get no rows at
    all. Three ranks share four sequences unevenly."""
    alone = passes(False, one_expert=one_expert)
    parts = pool(world).run(passes, True, one_expert=one_expert)
    found = together(parts)
    for key, value in found.items():
        torch.testing.assert_close(
            value, alone[key], rtol=1e-10, atol=1e-12, msg=lambda text, key=key: f"{key}: {text}"
        )
    if one_expert:
        idle = found["load"].sum(0) == 0
        assert idle.sum() == 9
        for name in ("experts.up.weight", "experts.down.weight"):
            assert (found[name][idle] == 0).all()
            assert (found[name][~idle] != 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fast_path_with_ranks_without_rows(pool, dtype):
    alone = passes(False, dtype, one_expert=True)
    found = together(pool(4).run(passes, True, dtype, one_expert=True))
    torch.testing.assert_close(
        found["y"], alone["y"], rtol=0, atol=1e-2 if dtype == torch.bfloat16 else 1e-6
    )
    assert all(value.isfinite().all() for value in found.values())


def test_only_routed_rows_travel(pool):
    """Counts; then rows and gates there, outputs back, and the gradients of the three: nothing
    else, and to nobody in vain."""
    for me, part in enumerate(pool(2).run(passes, True)):
        to = part["load"].sum(0).view(2, -1).sum(1).tolist()  # rows for each rank's experts
        counts, rows, gates, outputs, *backward = part["crossed"]
        assert counts == [6, 6]
        assert rows == [16 * n for n in to]
        assert gates == to
        assert outputs[me] == rows[me]
        assert sorted(backward) == sorted([rows, [n // 16 for n in outputs], outputs])


def test_stacks_that_the_ranks_do_not_divide_are_refused():
    class Mesh:
        def size(self) -> int:
            return 5

    with (
        torch.device("meta"),
        pytest.raises(ValueError, match="12 experts cannot be spread over 5 ranks"),
    ):
        MoE(**SHAPE).spread_experts(Mesh())
