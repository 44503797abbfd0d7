"""What the native engine's wrappers really send, call by call, and what DDP compiles."""

from collections import Counter

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from archscale.config import ModelConfig
from archscale.model import Transformer, initialize
from archscale.parallel.mesh import MeshSizes
from archscale.parallel.native import NativeEngine

MODEL = {"depth": 3, "width": 32, "head_dim": 16, "mlp_ratio": 2, "context": 8, "vocab_size": 32}
ACCUMULATION = 3


class Collectives(TorchDispatchMode):
    """Counts the collectives that are called within it."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def build(replicate, shard, **options):
    return NativeEngine(
        lambda: Transformer(ModelConfig(**MODEL)),
        lambda model: initialize(model, 0),
        device=torch.device("cpu"),
        sizes=MeshSizes(replicate, shard, 1),
        dtype=torch.float32,
        **{"reshard": True, "compile": False} | options,
    )


def accumulate(replicate, shard, each=False):
    """Collectives of a step's passes, and its gradients; each: replicas add up at every
    micro-batch."""
    engine = build(replicate, shard)
    rank = torch.distributed.get_rank()
    with Collectives() as counted:
        for i in range(ACCUMULATION):
            generator = torch.Generator().manual_seed(100 * rank + i)
            tokens = torch.randint(0, 32, (2, 9), generator=generator)
            with engine.micro_batch(last=each or i == ACCUMULATION - 1):
                loss = engine.forward(tokens[:, :-1], tokens[:, 1:]).loss
                engine.backward(loss * engine.gradient_scale)
    gradients = [
        p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        for p in engine.parameters().values()
    ]
    return counted.calls, [g.detach().clone() for g in gradients]


@pytest.mark.timeout(240)
def test_replicas_add_up_their_gradients_once(pool):
    ranks = pool(4)
    (once, gradients), *_ = ranks.run(accumulate, 2, 2, timeout=100)
    (each, expected), *_ = ranks.run(accumulate, 2, 2, True, timeout=100)
    groups = MODEL["depth"] + 1
    reduced = [n for name, n in once.items() if "allreduce" in name]
    assert reduced == [groups]
    assert [n for name, n in each.items() if "allreduce" in name] == [groups * ACCUMULATION]
    scattered = [n for name, n in once.items() if "reduce_scatter" in name]
    assert scattered == [groups * ACCUMULATION]
    # The last block is not gathered again for its backward pass.
    gathered = [n for name, n in once.items() if "allgather" in name]
    assert gathered == [ACCUMULATION * (groups + MODEL["depth"] - 1)]
    # The same 4 · 3 summands in another order: each of 11 sums rounds by 2⁻²⁴ of what is summed,
    # on either side; the summands are at most a few times the largest element of their sum.
    for found, other in zip(gradients, expected):
        bound = 2 * 11 * 2**-24 * 4 * other.abs().max().item()
        torch.testing.assert_close(found, other, rtol=0, atol=bound)


def subgraphs(optimize):
    """Graphs that the compiled blocks of a wide model are cut into under DDP."""
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    wide = MODEL | {"width": 1024, "head_dim": 128, "depth": 1, "mlp_ratio": 4}
    engine = NativeEngine(
        lambda: Transformer(ModelConfig(**wide)),
        lambda model: [p.data.zero_() for p in model.parameters()],
        device=torch.device("cpu"),
        sizes=MeshSizes(torch.distributed.get_world_size(), 1, 1),
        reshard=True,
        dtype=torch.float32,
        compile=True,
    )
    for block in engine.module.blocks:
        block.compile(backend=backend)
    if optimize:
        torch._dynamo.config.optimize_ddp = True
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    engine.forward(tokens, tokens)
    torch._dynamo.config.optimize_ddp = True
    torch._dynamo.reset()
    return len(graphs)


@pytest.mark.timeout(240)
def test_a_block_is_one_graph_under_ddp(pool):
    ranks = pool(2)
    assert ranks.run(subgraphs, False, timeout=100) == [1, 1]
    assert ranks.run(subgraphs, True, timeout=100)[0] > 1
