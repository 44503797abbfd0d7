"""Counts from structure against the built transformer, torch's FLOP counter and the published
numbers."""

import itertools

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from archscale.config import ModelConfig
from archscale.model import Transformer
from archscale.model.layers import attention_mask
from archscale.optim import MatrixOptimizer
from archscale.optim.orthogonalize import direct_cost
from archscale.optim.roles import assign_roles, parameter_groups
from archscale.plan.counting import (
    forward_flops,
    optimizer_flops,
    parameters,
    published_flops_per_token,
    published_parameters,
    training_flops,
    visible_keys,
    weights,
)
from archscale.rules import Views

SMALL = {"depth": 2, "width": 64, "head_dim": 16, "kv_heads": 2, "context": 32, "vocab_size": 96}
VARIANTS = [
    {"tied_embeddings": tied, "gated_attention": gated, "qk_norm": norm, "mlp": mlp, **shape}
    for tied, gated, norm, mlp, shape in itertools.product(
        (False, True),
        (False, True),
        (False, True),
        ("swiglu", "relu2"),
        ({}, {"heads": 6, "kv_heads": 3, "mlp_ratio": 2.5}, {"kv_heads": 4, "depth": 3}),
    )
]
MOE = {"sparsity": 4, "top_k": 4, "shared_expert": True}


def small(**changes) -> ModelConfig:
    return ModelConfig(**{**SMALL, **changes})


@pytest.mark.parametrize(
    "changes", [*VARIANTS, {"moe": MOE}, {"moe": {**MOE, "shared_expert": False}, "mlp": "relu2"}]
)
def test_every_stored_parameter_is_listed_with_its_shape_role_and_blocks(changes):
    model = small(**changes)
    with torch.device("meta"):
        built = Transformer(model)
    listed = [
        (w.name.replace("*", str(i)), w.shape, w.role, w.blocks)
        for w in weights(model)
        for i in range(w.copies)
    ]
    assert sorted(listed) == sorted(
        (r.name, r.shape, r.role, r.blocks) for r in assign_roles(built)
    )
    counted = parameters(model)
    assert counted.total == sum(p.numel() for p in built.parameters())
    assert model.moe or counted.active == counted.total
    by_role = {
        role: sum(r.parameter.numel() for r in assign_roles(built) if r.role == role)
        for role in ("embedding", "head", "matrix", "vector")
    }
    assert {role: getattr(counted, role) for role in by_role} == by_role


@pytest.mark.parametrize(("shared", "routed", "active"), [(True, 15, 3), (False, 16, 4)])
def test_experts_store_sparsity_times_the_active_parameters(shared, routed, active):
    """S k slots of hidden size F / k, of which a token passes k: active, they are the dense model
    plus a router."""
    dense, moe = small(), small(moe={**MOE, "shared_expert": shared})
    assert moe.expert_counts == (routed, active)
    assert dense.expert_counts == (0, 0)
    a, b = parameters(dense), parameters(moe)
    router = 2 * routed * 64
    mlp = 2 * 3 * 64 * 256
    assert b.router == router
    assert b.active == a.active + router
    assert b.total == a.total + router + 3 * mlp
    assert b.total == b.embedding + b.head + b.matrix + b.vector
    by_name = {w.name: w for w in weights(moe)}
    assert by_name["blocks.*.mlp.experts.up.weight"].shape == (routed, 2 * 64, 64)
    assert by_name["blocks.*.mlp.experts.down.weight"].shape == (routed, 64, 64)
    assert ("blocks.*.mlp.shared.up.weight" in by_name) == shared
    up = by_name["blocks.*.mlp.experts.up.weight"]
    assert up.matrices(Views()) == [(2 * 2 * routed, 64, 64)]  # of gate and up
    assert up.matrices(Views(fused=(("gate", "up"),))) == [(2 * routed, 2 * 64, 64)]


def test_published_counts():
    """HyperP's family: aspect 128, head size 128, 2 d heads, 4 key-value heads, V = 32,000."""

    def member(d: int) -> ModelConfig:
        return ModelConfig(
            depth=d, aspect=128, head_dim=128, heads=2 * d, kv_heads=4, vocab_size=32_000
        )

    assert published_parameters(member(8)) == 208_142_336
    tokens = 10.4e9 * published_parameters(member(12)) / published_parameters(member(8))
    assert int(tokens) == 28_488_664_987
    size = {"depth": 8, "width": 1024, "heads": 16, "kv_heads": 4}
    base = published_parameters(member(12).model_copy(update=size))
    assert base == 208_142_336
    other = {"heads": 8, "kv_heads": 2, "head_dim": 64, "vocab_size": 100}
    shape = size | other | {"mlp": "relu2", "mlp_ratio": 2.0}
    small_family = published_parameters(member(12).model_copy(update=shape))
    assert small_family == 2 * 2 * 1024**2 * 8 + 2 * 1024 * 100 + 2 * 1024 * 8 * (8 + 2) * 64
    flops = published_flops_per_token(member(8))
    assert flops == 3 * (2 * 208_142_336 + 4 * 8 * 16 * 128 * 1024)


def test_published_parameters_are_the_exact_ones_without_norms_gates_and_router():
    model = small(gated_attention=False, qk_norm=False)
    assert published_parameters(model) == parameters(model).total - parameters(model).vector
    moe = small(gated_attention=False, qk_norm=False, moe=MOE)
    assert (
        published_parameters(moe)
        == parameters(moe).active - parameters(moe).vector - parameters(moe).router
    )


@pytest.mark.parametrize(
    "model", [small(), small(window=5), small(window=100)], ids=["plain", "window", "wide"]
)
def test_visible_keys_are_those_of_the_mask(model):
    mask = attention_mask(
        torch.zeros(1, 32, dtype=torch.int64), model.window or 32, None, torch.float32
    )
    assert visible_keys(model.context, model.window) == (mask == 0).sum().item() / 32


def counted_flops(model: ModelConfig, dtype: torch.dtype, recompute: bool = False) -> float:
    """FLOPs per token of forward and backward by torch's counter, which sees attention through its
    plain form."""
    built = Transformer(model, dtype, recompute=recompute)
    tokens = torch.randint(0, 96, (2, model.context))
    in_place = {
        torch.ops.aten.addmm_: lambda out, a, b, **_: 2 * a[0] * a[1] * b[1]
    }  # the counter knows no addmm_
    counter = FlopCounterMode(display=False, custom_mapping=in_place)
    with counter, sdpa_kernel(SDPBackend.MATH):
        built(tokens, tokens).loss.backward()
    return counter.get_total_flops() / tokens.numel()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kv_heads": 1, "gated_attention": False},
        {"tied_embeddings": True, "mlp": "relu2"},
        {"mlp": "relu2", "mlp_ratio": 2.5, "heads": 6, "kv_heads": 3, "qk_norm": False},
        {"window": 5, "depth": 3},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_flops_equal_those_of_a_counted_run(changes, dtype):
    model = small(**changes)
    assert training_flops(model, causal=False) == pytest.approx(
        counted_flops(model, dtype), rel=1e-6
    )


def test_recomputation_adds_the_blocks_forward():
    """All but their last product, whose output no backward needs: recomputation stops early."""
    model = small(depth=4)
    counted = counted_flops(model, torch.float32, recompute=True)
    last = sum(2 * w.elements for w in weights(model) if w.name == "blocks.*.mlp.down.weight")
    assert training_flops(model, causal=False, recompute=True) - last == pytest.approx(
        counted, rel=1e-6
    )


def test_parts_of_the_forward_pass():
    dense, moe = forward_flops(small()), forward_flops(small(moe=MOE))
    assert dense.keys() == {"projections", "attention", "mlp", "head"}
    assert moe.keys() == {"projections", "attention", "experts", "shared_expert", "router", "head"}
    assert moe["experts"] + moe["shared_expert"] == dense["mlp"]
    assert moe["shared_expert"] == dense["mlp"] / 4
    assert moe["router"] == 2 * 2 * 15 * 64
    causal, full = dense["attention"], forward_flops(small(), causal=False)["attention"]
    assert causal == full * 33 / 64
    passes = training_flops(small(moe=MOE), counting_pass=True) - training_flops(small(moe=MOE))
    assert passes == sum(moe.values()) - moe["head"]


@pytest.mark.parametrize(
    "views", [Views(), Views(16), Views(fused=(("q", "k", "v"), ("gate", "up")))]
)
@pytest.mark.parametrize("changes", [{}, {"mlp": "relu2", "gated_attention": False}])
def test_optimizer_flops_are_those_of_the_matrices_that_the_optimizer_orthogonalizes(
    changes, views
):
    model = small(**changes)
    element = {"rule": "adamw", "lr": 1e-3}
    options = {
        "matrix": {"rule": "muon", "lr": 1e-3},
        "embedding": element,
        "head": element,
        "vector": element,
    }
    groups = parameter_groups(assign_roles(Transformer(model)), options, views)
    matrices = MatrixOptimizer(groups, lr=1e-3).views()
    expected = sum(direct_cost(*sorted((rows, cols))) for _, _, rows, cols in matrices)
    assert optimizer_flops(model, views=views) == expected
    assert optimizer_flops(model, orthogonal=()) == 0


def test_an_unknown_vocabulary_is_refused():
    with pytest.raises(ValueError, match="take it from the data set"):
        parameters(ModelConfig(depth=2, width=64, head_dim=16))
