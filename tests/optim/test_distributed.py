"""Any sharding gives the one-process result, with two exchanges and one all-reduce a step."""

import re

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from archscale.distributed import local_interval
from archscale.optim import RULES, MatrixOptimizer

SHAPES = [(1, 6), (2, 5), (3, 3), (5, 4), (18, 8), (97, 3), (5, 4, 6)]
WHOLE_MATRIX_RULES = [name for name, rule in RULES.items() if rule.direction == "orthogonal"]


class Bag(nn.Module):
    def __init__(self, params):
        super().__init__()
        self.params = nn.ParameterList(params)


def layout(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` as this rank stores it."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    if name == "replica":
        return tensor.clone()
    if name == "shard":
        return distribute_tensor(tensor.clone(), init_device_mesh("cpu", (world,)), [Shard(0)])
    mesh = init_device_mesh("cpu", (2, world // 2))  # hsdp
    return distribute_tensor(tensor.clone(), mesh, [Replicate(), Shard(0)])


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def build(kind: str, rule: str, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    params = [
        nn.Parameter(layout(kind, torch.randn(s, generator=generator, dtype=dtype))) for s in SHAPES
    ]
    bag = Bag(params)
    decay = 0.0 if RULES[rule].sphere else 0.1
    opt = MatrixOptimizer(
        bag.named_parameters(),
        lr=0.02,
        rule=rule,
        weight_decay=decay,
        compute_dtype=dtype,
        view="stack",
    )
    return bag, opt


def train(bag, opt, kind: str, seeds, dtype=torch.float64) -> None:
    for seed in seeds:
        generator = torch.Generator().manual_seed(100 + seed)
        for p in bag.parameters():
            p.grad = layout(kind, torch.randn(tuple(p.shape), generator=generator, dtype=dtype))
        opt.step()


def result(kind: str, rule: str, steps: int = 4) -> list[torch.Tensor]:
    bag, opt = build(kind, rule)
    train(bag, opt, kind, range(steps))
    return [whole(p.detach()) for p in bag.parameters()]


@pytest.mark.parametrize("rule", WHOLE_MATRIX_RULES)
@pytest.mark.parametrize(
    ("world", "kind"),
    [(2, "shard"), (3, "shard"), (4, "shard"), (2, "replica"), (3, "replica"), (4, "hsdp")],
)
def test_every_layout_gives_the_one_process_result(pool, rule, world, kind):
    alone = result("replica", rule)
    for weights in pool(world).run(result, kind, rule, timeout=60):
        for a, b in zip(alone, weights):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def partitioned(rule: str, steps: int) -> list[tuple[int, torch.Tensor]]:
    """All parameters laid end to end and cut into equal parts, as ZeRO does: a matrix may be cut
    anywhere, or lie wholly on one rank. Returns of each parameter where this rank's fragment
    begins, and the fragment."""
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(s, generator=generator, dtype=torch.float64) for s in SHAPES]
    world, me = dist.get_world_size(), dist.get_rank()
    part = -(-sum(w.numel() for w in whole) // world) + 2
    ends = torch.tensor([0, *(w.numel() for w in whole)]).cumsum(0).tolist()
    spans = []  # of each parameter, [lo, hi) held here
    for start, w in zip(ends, whole):
        lo, hi = (min(max(me * part + i * part - start, 0), w.numel()) for i in (0, 1))
        spans.append((lo, hi))
    params = [nn.Parameter(w.view(-1)[lo:hi].clone()) for w, (lo, hi) in zip(whole, spans)]
    group = {
        "params": [(f"params.{i}", p) for i, p in enumerate(params)],
        "fragments": [(s, lo) for s, (lo, _) in zip(SHAPES, spans)],
    }
    decay = 0.0 if RULES[rule].sphere else 0.1
    opt = MatrixOptimizer(
        [group], lr=0.02, rule=rule, weight_decay=decay, compute_dtype=torch.float64, view="stack"
    )
    for seed in range(steps):
        generator = torch.Generator().manual_seed(100 + seed)
        for p, shape, (lo, hi) in zip(params, SHAPES, spans):
            p.grad = (
                torch.randn(shape, generator=generator, dtype=torch.float64).view(-1)[lo:hi].clone()
            )
        opt.step()
    return [(lo, p.detach()) for p, (lo, _) in zip(params, spans)]


@pytest.mark.parametrize("rule", ["orscale_lm", "muonh", "muon", "adamw", "lamb"])
@pytest.mark.parametrize("world", [2, 3])
def test_a_partition_that_cuts_matrices_anywhere(pool, rule, world):
    alone = result("replica", rule)
    parts = pool(world).run(partitioned, rule, 4, timeout=60)
    cuts = 0
    for i, expected in enumerate(alone):
        held = [part[i] for part in parts if part[i][1].numel()]
        cuts += any(lo % expected.shape[-1] for lo, _ in held)
        found = torch.cat([fragment for _, fragment in sorted(held, key=lambda at: at[0])])
        torch.testing.assert_close(found, expected.view(-1), rtol=1e-7, atol=1e-9)
    assert cuts  # within a row


def test_what_is_no_fragment_is_refused():
    for value, at in ((torch.zeros(3, 4), 0), (torch.zeros(5), 8)):
        with pytest.raises(ValueError, match="is no fragment of"):
            MatrixOptimizer(
                [{"params": [nn.Parameter(value)], "fragments": [((3, 4), at)]}], lr=0.1
            )


@pytest.mark.parametrize("rule", ["adamh", "lamb", "adamw", "lion", "sgd"])
def test_elementwise_rules_too(pool, rule):
    alone = result("replica", rule)
    for world, kind in ((3, "shard"), (4, "hsdp")):
        for weights in pool(world).run(result, kind, rule, timeout=60):
            for a, b in zip(alone, weights):
                torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def norms(kind: str) -> list[float]:
    """Largest relative |‖W‖ − R| per rank, over matrices and experts, on the sphere."""
    bag, opt = build(kind, "muonh", torch.float32)
    before = [whole(p.detach()).double().flatten(-2).norm(dim=-1) for p in bag.parameters()]
    train(bag, opt, kind, range(20), torch.float32)
    after = [whole(p.detach()).double().flatten(-2).norm(dim=-1) for p in bag.parameters()]
    return [((a / b - 1).abs().max()).item() for a, b in zip(after, before)]


def test_sphere_holds_per_matrix_and_expert(pool):
    for world, kind in ((2, "shard"), (4, "hsdp"), (4, "shard")):
        for drift in pool(world).run(norms, kind, timeout=60):
            assert max(drift) < 1e-6


def count_collectives(kind: str) -> tuple[int, int, int, int]:
    """(all-to-alls, bytes this rank sends in them, all-reduces, floats reduced) of one step."""
    bag, opt = build(kind, "orscale_lm", torch.float32)
    seen = {"a2a": 0, "bytes": 0, "reduce": 0, "floats": 0}
    from archscale import distributed

    a2a, reduce = dist.all_to_all_single, dist.all_reduce

    def counted_a2a(output, input, *args, **kwargs):
        seen["a2a"] += 1
        seen["bytes"] += input.numel()
        return a2a(output, input, *args, **kwargs)

    def counted_reduce(tensor, *args, **kwargs):
        seen["reduce"] += 1
        seen["floats"] += tensor.numel()
        return reduce(tensor, *args, **kwargs)

    distributed.dist.all_to_all_single, distributed.dist.all_reduce = counted_a2a, counted_reduce
    try:
        train(bag, opt, kind, [0], torch.float32)
    finally:
        distributed.dist.all_to_all_single, distributed.dist.all_reduce = a2a, reduce
    return tuple(seen.values())


def test_two_exchanges_and_one_all_reduce(pool):
    matrices = sum(s[0] if len(s) == 3 else 1 for s in SHAPES)
    elements = sum(torch.Size(s).numel() for s in SHAPES)
    for world in (2, 4):
        counts = pool(world).run(count_collectives, "shard", timeout=60)
        for a2a, _, reduces, floats in counts:
            flags = len(SHAPES)  # whether this rank has a gradient, by parameter
            # Three inner products, and whether the direction was finite, by matrix.
            assert (a2a, reduces, floats) == (2, 1, (3 + 1) * matrices + flags)
        # Momentum in and directions out, float32, less what a rank would send to itself.
        assert sum(sent for _, sent, _, _ in counts) <= 2 * 4 * elements
        assert sum(sent for _, sent, _, _ in counts) > 0


def save(kind: str, rule: str, path: str) -> None:
    bag, opt = build(kind, rule)
    train(bag, opt, kind, range(3))
    dcp.save(
        {"model": bag.state_dict(), "optimizer": get_optimizer_state_dict(bag, opt)},
        checkpoint_id=path,
        no_dist=not dist.is_initialized(),
    )


def resume(
    kind: str, rule: str, path: str, seeds: list[int], save_to: str | None
) -> list[torch.Tensor]:
    bag, opt = build(kind, rule)
    with torch.no_grad():
        for p in bag.parameters():
            p.mul_(1.5)  # R and c must come from the checkpoint, not from these weights
    alone = not dist.is_initialized()
    content = {"model": bag.state_dict(), "optimizer": get_optimizer_state_dict(bag, opt)}
    dcp.load(content, checkpoint_id=path, no_dist=alone)
    bag.load_state_dict(content["model"])
    set_optimizer_state_dict(bag, opt, content["optimizer"])
    train(bag, opt, kind, seeds)
    if save_to:
        dcp.save(
            {"model": bag.state_dict(), "optimizer": get_optimizer_state_dict(bag, opt)},
            checkpoint_id=save_to,
            no_dist=alone,
        )
    return [whole(p.detach()) for p in bag.parameters()]


@pytest.mark.parametrize("rule", list(RULES))
def test_checkpoint_reshards(pool, rule, tmp_path):
    """2 → 1 → 3 → 4 (HSDP), each training on; the same as seven steps in one process."""
    expected = result("replica", rule, steps=7)
    pool(2).run(save, "shard", rule, str(tmp_path / "a"), timeout=60)
    resume("replica", rule, str(tmp_path / "a"), [3], str(tmp_path / "b"))
    pool(3).run(resume, "shard", rule, str(tmp_path / "b"), [4], str(tmp_path / "c"), timeout=60)
    for weights in pool(4).run(resume, "hsdp", rule, str(tmp_path / "c"), [5, 6], None, timeout=60):
        for a, b in zip(expected, weights):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def non_finite_on_one_rank() -> tuple[list[torch.Tensor], list[torch.Tensor], list[bool]]:
    bag, opt = build("shard", "orscale_lm")
    train(bag, opt, "shard", [0])
    before = [whole(p.detach()) for p in bag.parameters()]
    for seed, p in enumerate(bag.parameters()):
        p.grad = layout(
            "shard",
            torch.randn(
                tuple(p.shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
            ),
        )
    if dist.get_rank() == 1:
        list(bag.parameters())[4].grad.to_local()[0, 0] = float("nan")
    opt.step()
    return before, [whole(p.detach()) for p in bag.parameters()], opt.diagnostics()["bad"].tolist()


def test_a_nan_on_one_rank_skips_that_matrix_on_all(pool):
    for before, after, bad in pool(2).run(non_finite_on_one_rank, timeout=60):
        assert bad == [i == 4 for i in range(len(bad))]
        assert torch.equal(before[4], after[4])
        assert not torch.equal(before[3], after[3])


def permuted() -> list[tuple[int, int, torch.Tensor]]:
    """Shards handed out in reverse rank order: this rank's (lo, hi, weights) of every parameter
    after four steps."""
    world, rank = dist.get_world_size(), dist.get_rank()
    mesh = DeviceMesh("cpu", list(reversed(range(world))))

    def mine(tensor: torch.Tensor) -> DTensor:
        chunks = [*tensor.chunk(world), *[tensor[:0]] * world][:world]
        return DTensor.from_local(
            chunks[world - 1 - rank].clone(),
            mesh,
            [Shard(0)],
            run_check=False,
            shape=tensor.shape,
            stride=tensor.stride(),
        )

    generator = torch.Generator().manual_seed(0)
    params = [
        nn.Parameter(mine(torch.randn(s, generator=generator, dtype=torch.float64))) for s in SHAPES
    ]
    options = {"weight_decay": 0.1, "compute_dtype": torch.float64, "view": "stack"}
    opt = MatrixOptimizer(params, lr=0.02, rule="orscale_lm", **options)
    for seed in range(4):
        generator = torch.Generator().manual_seed(100 + seed)
        for p in params:
            p.grad = mine(torch.randn(tuple(p.shape), generator=generator, dtype=torch.float64))
        opt.step()
    return [(*local_interval(p), p.to_local().detach().flatten()) for p in params]


def test_permuting_ranks_changes_nothing(pool):
    alone = result("replica", "orscale_lm")
    for shards in pool(3).run(permuted, timeout=60):
        for whole_weight, (lo, hi, weight) in zip(alone, shards):
            torch.testing.assert_close(
                whole_weight.flatten()[lo:hi], weight, rtol=1e-10, atol=1e-12
            )


def partial() -> None:
    p = DTensor.from_local(
        torch.randn(4, 6), init_device_mesh("cpu", (dist.get_world_size(),)), [Partial()]
    )
    MatrixOptimizer([("w", nn.Parameter(p))], lr=0.1)


def other_shape() -> None:
    MatrixOptimizer([("w", nn.Parameter(torch.randn(4, 6 + dist.get_rank())))], lr=0.1)


def other_order() -> None:
    params = [(name, nn.Parameter(torch.randn(4, 4))) for name in ("a", "b")]
    MatrixOptimizer(params[:: 1 - 2 * dist.get_rank()], lr=0.1)


def other_rule() -> None:
    MatrixOptimizer(
        [("w", nn.Parameter(torch.randn(4, 4)))], lr=0.1, rule=["muon", "orscale"][dist.get_rank()]
    )


def one_more() -> None:
    params = [(name, nn.Parameter(torch.randn(4, 4))) for name in ("a", "b")]
    MatrixOptimizer(params[: 1 + dist.get_rank()], lr=0.1)


def refused_on_one_rank() -> None:
    """The other one must not be left waiting."""
    MatrixOptimizer(
        [("w", nn.Parameter(torch.randn((4, 6) if dist.get_rank() == 0 else (4,))))],
        lr=0.1,
        rule="muon",
    )


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (partial, r"group 0: parameter 'w': placement P\(sum\)"),
        (
            other_shape,
            r"different parameters: number 0 is 'w' \(4, 6\).*rank 0, 'w' \(4, 7\).*rank 1",
        ),
        (other_order, "different parameters: number 0 is 'a'.*on rank 0, 'b'.*on rank 1"),
        (
            other_rule,
            (
                "different parameters: number 0 is 'w'.*rule 'muon' on rank 0.*rule 'orscale' on"
                " rank 1"
            ),
        ),
        (one_more, "different parameters: number 1 is no parameter on rank 0, 'b'.*on rank 1"),
        (refused_on_one_rank, "group 0: parameter 'w' has shape"),
    ],
)
def test_refusals(pool, fn, message):
    for kind, text in pool(2).run(fn, timeout=30, expect_error=True):
        assert kind == "ValueError"
        assert re.search(message, text)
