"""Launches, bytes and collectives that are counted are those that can be derived by hand."""

import json

import pytest
import torch
import yaml
from typer.testing import CliRunner

from archscale import distributed
from archscale.bench.count import CountedGroup, LaunchCounter
from archscale.bench.step import count_step
from archscale.cli import app
from archscale.config import Config
from archscale.errors import ArchscaleError
from archscale.optim.roles import assign_roles
from archscale.plan.devices import find_device
from archscale.plan.transfer import transfer_of
from archscale.train.build import build_engine, build_optimizer

MODEL = {
    "depth": 1,
    "width": 64,
    "head_dim": 16,
    "mlp": "relu2",
    "context": 32,
    "vocab_size": 128,
    "gated_attention": False,
    "tied_embeddings": True,
}
# One block: q, k, v, out of 64×64 each, up of 256×64, down of 64×256.
SQUARE, LONG = 64 * 64, 256 * 64


def tiny(model=None, training=None, **sections):
    base = {
        "name": "tiny",
        "model": MODEL | (model or {}),
        "data": {"train": "none"},
        "training": {"tokens": 1e5, "batch_tokens": 64, "micro_batch": 2, "compile": False}
        | (training or {}),
        "parameterization": {"kind": "standard", "base": {"lr": 0.01}},
        "optimizer": {"matrix": {"rule": "orscale_lm"}},
    }
    return Config.from_dict(base | sections)


def by_part(config, **options):
    parts, collectives = count_step(config, **options)
    return {row["part"]: row for row in parts}, {row["collective"]: row for row in collectives}


def counted(run):
    counter = LaunchCounter({})
    with torch.compiler.set_stance("force_eager"), counter.part("all"):
        run()
    return counter.tallies.get("all")


def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def test_an_operator_reads_its_operands_and_writes_its_result():
    x, w = empty(4, 8), empty(8, 16)
    tally = counted(lambda: x @ w)
    assert (tally.launches, tally.bytes) == (1, 4 * (4 * 8 + 8 * 16 + 4 * 16))
    half = empty(2, 4, 4, dtype=torch.bfloat16)
    assert counted(lambda: torch.bmm(half, half)).bytes == 2 * 2 * (2 * 4 * 4)  # one operand, once


@pytest.mark.parametrize(
    ("run", "elements"),
    [
        (lambda x, y: x.add_(y), 3 * 8),  # reads both, writes one
        (lambda x, y: x.copy_(y), 2 * 8),
        (lambda x, y: x.zero_(), 8),
        (lambda x, y: torch.add(x, y, out=empty(8)), 3 * 8),
        (lambda x, y: x + y[:1].expand(8), 8 + 1 + 8),
        (lambda x, y: torch._foreach_mul_([x, y], 2.0), 4 * 8),
    ],
)
def test_bytes_in_place_written_only_and_expanded(run, elements):
    x, y = empty(8), empty(8)
    tally = counted(lambda: run(x, y))
    assert (tally.launches, tally.bytes) == (1, 4 * elements)


def test_what_a_compiled_region_only_overwrites_is_not_read():
    @torch.compile
    def update(x, y):
        x.copy_((x + y) * 2)
        y.zero_()

    x, y = empty(8), empty(8)
    assert counted(lambda: update(x, y)).bytes == 4 * (2 * 8 + 2 * 8)
    assert counted(lambda: torch.compile(torch.Tensor.zero_)(x)).bytes == 4 * 8


def test_views_and_allocations_launch_nothing():
    x = empty(4, 8)
    assert counted(lambda: (x.T, x[1:], x.view(-1), x.detach(), torch.empty_like(x))) is None


def test_a_compiled_region_is_one_launch_of_what_enters_and_leaves():
    @torch.compile
    def three(x, y):
        return ((x + y) * x).sum(-1)

    x, y = empty(4, 8), empty(4, 8)
    kept = []
    tally = counted(lambda: kept.append(three(x, y)))
    assert tally.operators == {"compiled region": 1}
    assert tally.bytes == 4 * (32 + 32 + 4)
    assert counted(lambda: (three(x, y), three(x, y), x + y)).launches == 3


def test_the_passes_of_one_block():
    parts, _ = by_part(tiny())
    tokens, width, half = 64, 64, 2
    head = parts["forward: head and loss"]
    # At least: logits from x and W, their gradient, and the gradients of x and W.
    assert head["bytes"] > half * (3 * tokens * width + 2 * 128 * width) + 4 * 4 * tokens * 128
    blocks, compiled = (by_part(tiny(training={"compile": c}))[0] for c in (False, True))
    assert compiled["forward: blocks"]["launches"] == compiled["backward: blocks"]["launches"] == 1
    assert blocks["forward: blocks"]["launches"] > 10
    assert "backward: blocks" not in blocks
    # The block's weights in float32, its input and its output are the least that a region moves.
    weights = 4 * (4 * SQUARE + 2 * LONG)
    assert compiled["forward: blocks"]["bytes"] > weights + 2 * 4 * tokens * width
    assert compiled["forward: blocks"]["bytes"] < blocks["forward: blocks"]["bytes"]
    deeper, _ = by_part(tiny(model={"depth": 3}, training={"compile": True}))
    assert deeper["forward: blocks"]["launches"] == deeper["backward: blocks"]["launches"] == 3
    assert deeper["backward: blocks"]["bytes"] == 3 * compiled["backward: blocks"]["bytes"]


@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_moves_little_more_than_its_products_need(tied):
    """16,384 tokens are four chunks, each of which reads W twice and adds to its gradient once."""
    tokens, width, vocabulary, half, full = 16384, 64, 1000, 2, 4
    model = {"context": 8192, "vocab_size": vocabulary, "tied_embeddings": tied}
    training = {"batch_tokens": tokens, "compile": True}
    parts, _ = by_part(tiny(model=model, training=training))
    head = parts["forward: head and loss"]
    table, stream, logits = vocabulary * width, tokens * width, tokens * vocabulary
    products = half * (3 * logits + 4 * 2 * table + 3 * stream) + full * (4 * 2 - 1) * table
    softmax = half * 3 * logits  # the third is a gather, counted as if it read them all
    norm_and_cast = (full + half) * (stream + table)
    kept = 4 * stream  # at most, by the norm for its backward pass
    assert 0 < head["bytes"] - (products + softmax + norm_and_cast) < kept
    assert head["launches"] <= 4 * 10 + 10


def test_attention_is_one_kernel_whatever_its_form():
    plain, _ = by_part(tiny())
    for more in ({"kv_heads": 2}, {"window": 8}):
        other, _ = by_part(tiny(model=more))
        assert other["forward: blocks"]["launches"] == plain["forward: blocks"]["launches"]


def test_the_parts_of_an_optimizer_step():
    parts, collectives = by_part(tiny())
    assert collectives == {}
    update = {name: row for name, row in parts.items() if name.startswith("optimizer")}
    assert update.keys() == {
        f"optimizer: {part}"
        for part in (
            "clip",
            "elementwise",
            "momentum and pack",
            "orthogonalize",
            "inner products",
            "update",
        )
    }
    assert {row["times"] for row in update.values()} == {1}
    matrix = 4 * SQUARE + 2 * LONG
    # Clipping reads all gradients, and reads and writes them once more; the rest is scalars.
    elements = matrix + 128 * 64 + 3 * 64 + 2 * 16  # embedding; three norms; those of q and k
    assert 0 < update["optimizer: clip"]["bytes"] - 3 * 4 * elements < 1000
    # Each number once, float32 but for what travels and Q, which are bfloat16: M and G read, M
    # written, M̂; Q and W read, Q written; W and Q read, W written; all of Adam's four read, three
    # written. Beside them scalars of each matrix, and addresses.
    for part, least in (
        ("momentum and pack", (4 + 4 + 4 + 2) * matrix),
        ("inner products", (2 + 4 + 2) * matrix),
        ("update", (4 + 2 + 4) * matrix),
        ("elementwise", 4 * (4 + 3) * (elements - matrix)),
    ):
        assert 0 <= update[f"optimizer: {part}"]["bytes"] - least < 4000
    deeper, _ = by_part(tiny(model={"depth": 4}))
    for part in ("clip", "momentum and pack", "inner products", "update", "elementwise"):
        launches = update[f"optimizer: {part}"]["launches"]
        assert launches == deeper[f"optimizer: {part}"]["launches"] <= 66, part


def test_launches_of_an_update_on_one_of_many_ranks():
    """They do not depend on how many parameters there are, nor on how many other ranks."""
    parallel = {"replicate": 1, "shard": 4}
    config = tiny(model={"depth": 4}, training={"batch_tokens": 256}, parallel=parallel)
    parts, _ = by_part(config, processes=4)
    most = {"momentum and pack": 12, "inner products": 8, "update": 74, "elementwise": 20}
    for part, launches in most.items():
        assert parts[f"optimizer: {part}"]["launches"] <= launches, part


def test_the_products_of_an_orthogonalization(monkeypatch):
    seen = []
    add = LaunchCounter._add

    def note(self, part, name, size):
        seen.append((part, name))
        add(self, part, name, size)

    monkeypatch.setattr(LaunchCounter, "_add", note)
    count_step(tiny())
    products = [n for part, n in seen if part == "optimizer: orthogonalize" and "bmm" in n]
    # Three shapes, each one stack; five iterations of X Xᵀ, b A + c A², and a X + B X.
    assert (products.count("bmm"), products.count("baddbmm")) == (3 * 5, 3 * 5 * 2)


def test_a_large_symmetric_product_is_one_kernel():
    """Plain PyTorch would cut it into ten products of blocks."""
    wide = {"width": 1024, "head_dim": 128, "mlp_ratio": 1}
    small, _ = by_part(tiny(model={"mlp_ratio": 1}))
    large, _ = by_part(tiny(model=wide))
    key = "optimizer: orthogonalize"
    assert large[key]["launches"] == small[key]["launches"]


def test_a_batch_of_several_micro_batches():
    parts, _ = by_part(tiny(training={"batch_tokens": 256}))
    assert {row["times"] for name, row in parts.items() if "ward" in name} == {4}
    experts = {"moe": {"sparsity": 2, "top_k": 2}}
    parts, _ = by_part(tiny(model=experts, training={"batch_tokens": 256}))
    assert parts["counting pass"]["times"] == 3
    forward = sum(row["launches"] for name, row in parts.items() if name.startswith("forward"))
    assert 10 < parts["counting pass"]["launches"] < forward


def test_collectives_of_replicas():
    parallel = {"replicate": 4, "shard": 1}
    _, collectives = by_part(tiny(training={"batch_tokens": 256}, parallel=parallel), processes=4)
    assert collectives["gradients: all-reduce"]["calls"] is None
    # The longest work goes round first: rank 0 orthogonalizes one long matrix and sends what it
    # makes of it, in bf16, to the three others. Momentum is at hand.
    sent = {"calls": 2, "bytes": 3 * 2 * LONG}
    assert collectives["update: all-to-all"] == {"collective": "update: all-to-all"} | sent
    assert collectives["update: all-reduce"]["calls"] == 1


def test_collectives_of_shards_of_replicas():
    parallel = {"replicate": 2, "shard": 2}
    config = tiny(model={"depth": 3}, training={"batch_tokens": 512}, parallel=parallel)
    _, collectives = by_part(config, processes=4)
    assert collectives["parameters: all-gather"]["calls"] == 2 * (3 + 1 + 2)
    assert collectives["gradients: reduce-scatter and all-reduce"]["calls"] == (2 + 1) * (3 + 1)
    assert collectives["update: all-reduce"]["calls"] == 2  # of clipping and of the optimizer


def test_shards_by_rows_are_chunked_by_ceiling():
    group = CountedGroup(8, 4)
    pieces = [group.held((10, 5), rank) for rank in range(5)]
    assert [(piece.start, piece.length) for piece in pieces] == [
        (0, 15),
        (15, 15),
        (30, 15),
        (45, 5),
        (0, 15),  # a replica
    ]


def bytes_sent(values):
    """Bytes that each rank's optimizer really sends in a step under FSDP2."""
    config = Config.from_dict(values)
    transfer = transfer_of(config)
    engine = build_engine(config, 0, transfer, torch.device("cpu"), 2)
    roles = assign_roles(engine.module)
    optimizer = build_optimizer(config, roles, transfer.roles, engine)
    return distributed.rank(), optimizer.bytes_sent()


def test_shards_send_what_two_ranks_send(pool):
    config = tiny(training={"batch_tokens": 128}, parallel={"replicate": 1, "shard": 2})
    sent = dict(pool(2).run(bytes_sent, config.resolved(), timeout=60))
    _, collectives = by_part(config, processes=2)
    assert collectives["update: all-to-all"]["bytes"] == sent[0] > 0


@pytest.mark.parametrize("rule", ["muonh", "adamw", "muon"])
@pytest.mark.parametrize("moe", [None, {"sparsity": 2, "top_k": 2}])
def test_every_kind_of_step_can_be_counted(rule, moe):
    config = tiny(
        model={"moe": moe},
        training={"activation_checkpoint": "block", "compile": True},
        optimizer={"matrix": {"rule": rule}},
        data={"train": "none", "document_mask": True},
    )
    parts, _ = by_part(config, device=find_device("h100"))
    for row in parts.values():
        assert row["ms at bandwidth"] == pytest.approx(row["times"] * row["bytes"] / 3.35e12 * 1e3)
    assert ("optimizer: orthogonalize" in parts) == (rule != "adamw")


def test_the_command(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny().resolved()))

    def run(*options):
        return CliRunner().invoke(app, ["bench", "step", str(path), *options])

    content = json.loads(run("--count", "--device", "h100", "--json").stdout)
    assert content["collectives"] == []
    assert {row["part"] for row in content["parts"]} >= {"forward: blocks", "optimizer: update"}
    assert "| part | times | launches | bytes |" in run("--count").stdout
    refusals = {
        (): "add --count",
        ("--count", "--device", "abacus"): "memory bandwidth of abacus is not known (--device)",
        ("--count", "--set", "parallel.engine=deepspeed"): "deepspeed is not counted",
    }
    for options, expected in refusals.items():
        error = run(*options).exception
        assert isinstance(error, ArchscaleError)
        assert expected in str(error)
