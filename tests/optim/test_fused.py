"""Fused passes give what the plain ones give, under any sharding: their tables with PyTorch's
operators, and their kernels through Triton's interpreter."""

import contextlib
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from archscale.bench.one_kernel import OneKernelPasses
from archscale.optim import RULES, MatrixOptimizer, engine, pass_tables
from archscale.optim.exchange import Block, Part
from archscale.optim.fused import FusedPasses
from archscale.optim.pass_tables import make_table
from archscale.optim.passes import Passes
from tests.optim.apart import run_apart
from tests.optim.test_kernels import needs_triton

SHAPES = [(1, 6), (2, 5), (18, 8), (97, 3), (5, 4, 6), (48, 32)]
VECTORS = [(7,), (33, 4), (1,)]
LAYOUTS = {
    "rows": lambda world: ((world,), [Shard(0)]),
    "columns": lambda world: ((world,), [Shard(1)]),
    "replicas of rows": lambda world: ((2, world // 2), [Replicate(), Shard(0)]),
}
# Both sides round each product and sum to float32, in another order: a few times 2⁻²⁴ of a number.
# Sums over a matrix differ by as much, and with them the whole step. In 16 bits a last digit can
# tip over, in Q and then in W.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def as_stored(tensor, layout):
    """A tensor as this rank stores it; columns only of matrices."""
    if layout == "whole":
        return tensor.clone()
    sizes, placements = LAYOUTS[layout](dist.get_world_size())
    if layout == "columns" and tensor.ndim < 2:
        placements = [Replicate()]
    return distribute_tensor(tensor.clone(), init_device_mesh("cpu", sizes), placements)


@contextlib.contextmanager
def passes(make):
    """`make(layout, state, plan, shards)` makes the passes; chunks are small."""
    with (
        mock.patch.object(engine, "choose_passes", make),
        mock.patch.object(pass_tables, "CHUNK", 64),
    ):
        yield


def trained(make, rule, layout="whole", dtype=torch.float32, wire=torch.bfloat16, steps=4, seed=0):
    """Weights and moments after some steps, whole; in one of which gradients are not finite, and
    in another one rank has no gradient of one parameter."""
    generator = torch.Generator().manual_seed(seed)

    def random(shape):
        return torch.randn(shape, generator=generator).to(dtype)

    params = [nn.Parameter(as_stored(random(shape), layout)) for shape in SHAPES + VECTORS]
    matrices, vectors = params[: len(SHAPES)], params[len(SHAPES) :]
    decay = 0.0 if RULES[rule].sphere else 0.1
    groups = [
        {"params": matrices[:3]},
        {"params": matrices[3:], "view": "stack", "momentum": 0.8, "nesterov": False},
        {"params": vectors, "rule": "adamw", "lr": 0.003, "weight_decay": 0.2},
    ]
    with passes(make):
        optimizer = MatrixOptimizer(
            groups,
            lr=0.02,
            rule=rule,
            weight_decay=decay,
            compute_dtype=torch.float32,
            wire_dtype=wire,
        )
        for step in range(steps):
            for i, p in enumerate(params):
                gradient = random(tuple(p.shape))
                if step == 2 and i in (2, 4, 7):
                    gradient.view(-1)[5] = float("nan")
                p.grad = as_stored(gradient, layout)
            if step == 1 and layout != "whole" and dist.get_rank() == 1:
                params[2].grad = params[4].grad = vectors[1].grad = None
            optimizer.step()
    values = [p.detach() for p in params]
    values += [v for p in params for key, v in optimizer.state[p].items() if v.shape == p.shape]
    return [v.full_tensor() if isinstance(v, DTensor) else v for v in values]


def check(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        tolerance = TOLERANCE.get(a.dtype, 2e-6)
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rule", RULES)
def test_one_process(rule):
    check(trained(OneKernelPasses, rule), trained(Passes, rule))


@pytest.mark.parametrize(
    ("dtype", "wire"),
    [(torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32,) * 2],
)
def test_dtypes_of_weights_and_of_what_travels(dtype, wire):
    options = {"dtype": dtype, "wire": wire, "steps": 2}
    check(
        trained(OneKernelPasses, "orscale_lm", **options), trained(Passes, "orscale_lm", **options)
    )


@pytest.mark.parametrize("rule", ["orscale_lm", "muonh", "adamh"])
@pytest.mark.parametrize(
    ("world", "layout"),
    [(2, "rows"), (3, "rows"), (2, "columns"), (2, "whole"), (4, "replicas of rows")],
)
def test_any_sharding(pool, rule, world, layout):
    plain = pool(world).run(trained, Passes, rule, layout, timeout=60)
    for found, expected in zip(
        pool(world).run(trained, OneKernelPasses, rule, layout, timeout=60), plain
    ):
        check(found, expected)


def test_a_gradient_that_is_read_later_is_not_covered():
    """Q of the second matrix of a fused parameter, the larger one, comes back before the momentum
    of the first is taken."""

    def train(make):
        generator = torch.Generator().manual_seed(0)
        fused = nn.Parameter(torch.randn(24, 16, generator=generator))
        group = {"params": [fused], "blocks": [[("small", 8), ("large", 16)]]}
        with passes(make), mock.patch("archscale.optim.shards.plan_exchange.__defaults__", (200,)):
            optimizer = MatrixOptimizer([group], lr=0.02, rule="muon")
            for _ in range(2):
                fused.grad = torch.randn(24, 16, generator=generator)
                optimizer.step()
        (plan,) = optimizer._planned._plans.values()
        assert len(plan.orthogonalizations[0].exchange.routes) == 2
        return [fused.detach(), optimizer.state[fused]["momentum"]]

    check(train(OneKernelPasses), train(Passes))


def test_chunks_of_a_table():
    row, rows = Block(32, 1, 40, 40), Block(7, 3, 10, 16)
    wire = Block(0, 3, 10, 10)
    with mock.patch.object(pass_tables, "CHUNK", 16):
        table, slots = make_table([Part(3, row, row, 5, True), Part(1, rows, wire, 6, False)], 9)
    assert slots == 12
    assert (table.apart, table.aligned) == (True, False)
    assert table.chunks[:, 6:].tolist() == [
        [0, 16, 5, 9],
        [16, 32, 5, 10],
        [32, 40, 5, 11],
        [0, 16, 6, -1],
        [16, 30, 6, -1],
    ]
    assert table.chunks[-1, :6].tolist() == [1, 7, 16, 0, 10, 10]


# --- the kernels


def in_columns(parts, first_slot=0):
    """A table of the same elements, where it can be as the first three columns of rows of four, and
    the last one."""
    cut = []
    for part in parts:
        rows, rest = divmod(part.here.cols, 4)
        blocks = [(part.here, part.there)]
        if part.here.rows == 1 and not rest:
            blocks = [
                tuple(Block(block.offset + at, rows, cols, 4) for block in blocks[0])
                for at, cols in ((0, 3), (3, 1))
            ]
        cut += [part._replace(here=here, there=there) for here, there in blocks]
    return make_table(cut, first_slot)


def interpreted():
    """Runs in a process of its own, with TRITON_INTERPRET set. There bfloat16 is not rounded as
    PyTorch rounds it, so float16 takes its place."""
    from archscale.optim import pass_check, pass_kernels

    def kernels(*args):
        return FusedPasses(*args, pass_kernels)

    cpu = torch.device("cpu")
    assert pass_check.wrong_kernel(pass_kernels, cpu) is None
    for name in ("momentum_kernel", "return_kernel", "update_kernel", "adam_kernel"):
        with mock.patch.object(pass_kernels, name, mock.MagicMock()):  # does nothing
            assert pass_check.wrong_kernel(pass_kernels, cpu) == name
    for rule in ("orscale_lm", "adamh"):
        expected = trained(Passes, rule, wire=torch.float16)
        check(trained(kernels, rule, wire=torch.float16), expected)
        with mock.patch.object(pass_tables, "make_table", in_columns):
            check(trained(kernels, rule, wire=torch.float16), expected)
    options = {"dtype": torch.float16, "wire": torch.float32, "steps": 1}
    check(trained(kernels, "muonh", **options), trained(Passes, "muonh", **options))
    print("interpreted")


def compiled(capability: int):
    """Compiles the passes over float32 weights, with a bfloat16 wire, for GPUs of this compute
    capability; needs none."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from archscale.optim import pass_kernels

    tl = triton.language
    constants = {"ROWS": False, "ALIGN": 16, "BLOCK": pass_kernels.BLOCK, "RATIO": 2}
    constants |= {
        "PACK": True,
        "UNPACK": True,
        "UPDATE": True,
        "SECOND": False,
        "Q_TYPE": tl.bfloat16,
    }
    types = {"OUT": "*bf16", "BACK": "*bf16", "BAD": "*u8", "TABLE": "*i64", "POINTERS": "*i64"}
    for name in ("momentum_kernel", "return_kernel", "update_kernel", "adam_kernel"):
        kernel = getattr(pass_kernels, name)
        own = {
            key: constants.get(key, tl.float32)
            for key in kernel.arg_names
            if key in constants or key.endswith("_TYPE")
        }
        signature = {
            key: "constexpr" if key in own else types.get(key, "*fp32" if key.isupper() else "fp32")
            for key in kernel.arg_names
        }
        source = ASTSource(
            kernel, signature, {(kernel.arg_names.index(k),): v for k, v in own.items()}
        )
        ptx = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]
        assert "ld.global.v4.b32" in ptx, f"{name} reads number by number"
        assert "st.global.v4.b32" in ptx or "st.global.v2.b32" in ptx, f"{name} writes so"
    print("compiled")


@needs_triton
def test_interpreted_kernels_give_what_pytorch_gives(tmp_path):
    assert "interpreted" in run_apart("test_fused", "interpreted()", tmp_path, TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_to_wide_accesses(tmp_path, capability):
    assert "compiled" in run_apart(
        "test_fused", f"compiled({capability})", tmp_path, TRITON_INTERPRET="0"
    )
