"""The transformer's parts against plain definitions, and its initialization under sharding."""

import math
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from archscale.config import ModelConfig
from archscale.distributed import Fragment
from archscale.model import Transformer, initialization, initialize
from archscale.model.initialization import CHUNK
from archscale.model.layers import RMSNorm, attention_mask, rope_table, rotate
from archscale.optim.roles import assign_roles

TINY = {"depth": 2, "width": 32, "head_dim": 8, "kv_heads": 2, "context": 16, "vocab_size": 37}


def tiny(dtype=torch.float32, **changes) -> Transformer:
    options = {k: changes.pop(k) for k in ("eos_id", "recompute") if k in changes}
    model = Transformer(ModelConfig(**{**TINY, **changes}), dtype, **options)
    initialize(model, seed=0)
    with torch.no_grad():  # the published embedding is so small that RMSNorm's ε hides it
        model.embedding.weight.mul_(1e3)
    return model


def tokens(batch=2, time=16, seed=0) -> torch.Tensor:
    return torch.randint(0, 37, (batch, time), generator=torch.Generator().manual_seed(seed))


def test_model_loss_equals_cross_entropy_of_its_logits():
    model, x = tiny(), tokens()
    y = tokens(seed=1)
    torch.testing.assert_close(
        model(x, y).loss,
        F.cross_entropy(model(x).logits.flatten(0, 1), y.flatten(), reduction="sum"),
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"window": 4},
        {"mlp": "relu2"},
        {"gated_attention": False, "qk_norm": False},
        {"tied_embeddings": True},
    ],
)
def test_causality(changes):
    """Logits at a position do not depend on later tokens, nor, with a window, on tokens that left
    it."""
    model, x = tiny(**changes), tokens()
    later = x.clone()
    later[:, 9:] = (later[:, 9:] + 1) % 37
    torch.testing.assert_close(model(x).logits[:, :9], model(later).logits[:, :9])
    assert not torch.allclose(model(x).logits[:, 9:], model(later).logits[:, 9:])


def test_window_hides_old_tokens():
    model, x = tiny(window=3, depth=1), tokens()
    old = x.clone()
    old[:, 0] = (old[:, 0] + 1) % 37
    torch.testing.assert_close(model(x).logits[:, 3:], model(old).logits[:, 3:])
    assert not torch.allclose(model(x).logits[:, 2], model(old).logits[:, 2])


def test_document_mask_makes_packing_invisible():
    model = tiny(eos_id=0)
    first, second = tokens(1, 7, seed=1).clamp(min=1), tokens(1, 9, seed=2).clamp(min=1)
    first[:, -1] = 0
    packed = model(torch.cat([first, second], dim=1)).logits
    torch.testing.assert_close(packed[:, :7], model(first).logits)
    torch.testing.assert_close(
        packed[:, 7:], model(second).logits, rtol=1e-4, atol=1e-5
    )  # RoPE is relative
    assert attention_mask(first, None, None, torch.float32) is None


def test_grouped_queries_equal_repeated_heads():
    """kv_heads = 2 equals kv_heads = 4 with each key and value head stored twice."""
    few, many, x = tiny(), tiny(kv_heads=4), tokens()
    with torch.no_grad():
        for name, p in few.state_dict().items():
            if "qkv" in name:
                q, k, v, gate = p.split([32, 16, 16, 4])
                k, v = (
                    t.view(2, 8, 32).repeat_interleave(2, dim=0).reshape(32, 32) for t in (k, v)
                )
                p = torch.cat([q, k, v, gate])
            many.state_dict()[name].copy_(p)
    torch.testing.assert_close(few(x).logits, many(x).logits)


def test_rope_is_a_rotation_that_depends_on_distance_only():
    x = torch.randn(1, 1, 1, 8).expand(1, 12, 1, 8)
    turned = rotate(x, rope_table(torch.arange(12), 8, 100.0))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    dots = turned[0, :, 0] @ turned[0, :, 0].mT
    for distance in range(4):
        diagonal = dots.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))


def test_depth_mup_scales_every_branch():
    plain, scaled, x = tiny(), tiny(depth_mup=True), tokens()
    with torch.no_grad():
        for model, factor in ((plain, 1 / math.sqrt(4)), (scaled, 1.0)):
            for block in model.blocks:
                block.attention.out.weight.mul_(factor)
                block.mlp.down.weight.mul_(factor)
    torch.testing.assert_close(plain(x).logits, scaled(x).logits)


def test_recomputation_changes_nothing():
    grads = []
    for recompute in (False, True):
        model = tiny(recompute=recompute)
        model(tokens(), tokens(seed=1)).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)


def test_without_gradients_old_residual_streams_are_freed():
    model, streams, alive = tiny(depth=4), [], []

    def watch(block, inputs, output):
        alive.append(sum(stream() is not None for stream in streams))
        streams.append(weakref.ref(output.stream))

    for block in model.blocks:
        block.register_forward_hook(watch)
    with torch.no_grad():
        model(tokens())
    assert alive == [0, 1, 1, 1]  # the block's own input


@pytest.mark.parametrize("moe", [None, {"sparsity": 4, "top_k": 2}])
def test_a_compiler_sees_a_block_as_one_graph(moe):
    """Also the record that it returns, which a graph break would take apart."""
    model = tiny(torch.bfloat16, moe=moe)
    expected = model(tokens(), tokens(seed=1))
    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(fullgraph=True, backend="eager")
    found = model(tokens(), tokens(seed=1))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert (found.logits, found.probed, found.routing is None) == (None, None, moe is None)


def test_residual_stream_is_float32_under_bfloat16():
    model, seen = tiny(torch.bfloat16), []
    for block in model.blocks:
        block.register_forward_hook(
            lambda m, i, o: seen.append((o.stream.dtype, m.mlp.up(m.mlp_norm(o.stream)).dtype))
        )
    model(tokens(), tokens())
    assert seen == [(torch.float32, torch.bfloat16)] * 2


def test_rms_norm():
    x = torch.randn(3, 8)
    norm = RMSNorm(8, torch.float32, 1e-2)
    torch.nn.init.constant_(norm.weight, 2.0)
    torch.testing.assert_close(norm(x), 2 * x / (x.square().mean(-1, keepdim=True) + 1e-2).sqrt())


# --- initialization


class Drawn(torch.nn.Module):
    """One parameter of two and a bit chunks, or a second one beside it."""

    def __init__(self, distribution: str):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(2 * CHUNK + 77))
        self.bias = torch.nn.Parameter(torch.empty(77))
        init = (distribution, 1.0)
        self.parameter_roles = {"weight": {"init": init}, "bias": {"init": init}}


def drawn(distribution: str, lo: int, hi: int, dtype=torch.float32, **options) -> torch.Tensor:
    """Elements [lo, hi) of the large parameter, drawn alone, and all of the small one."""
    model = Drawn(distribution)
    held = {
        "weight": Fragment((2 * CHUNK + 77,), lo, torch.full((hi - lo,), math.nan, dtype=dtype)),
        "bias": Fragment((77,), 0, torch.full((77,), math.nan, dtype=dtype)),
    }
    initialize(model, 3, held, **options)
    return torch.cat([held["weight"].data, held["bias"].data])


@settings(max_examples=20, deadline=None)
@given(
    cut=st.integers(0, 2 * CHUNK + 77),
    threads=st.sampled_from([1, 2, 5]),
    distribution=st.sampled_from(["uniform", "normal"]),
)
def test_any_interval_and_number_of_threads_draws_the_same_values(cut, threads, distribution):
    end = 2 * CHUNK + 77
    whole = drawn(distribution, 0, end, threads=1)
    first = drawn(distribution, 0, cut, threads=threads)[:-77]
    second = drawn(distribution, cut, end, threads=threads)
    assert torch.equal(whole, torch.cat([first, second]))


def test_weights_of_another_dtype_are_the_rounded_ones():
    end = 2 * CHUNK + 77
    exact = drawn("normal", 0, end)
    assert torch.equal(drawn("normal", 0, end, torch.bfloat16), exact.to(torch.bfloat16))


def test_every_chunk_has_a_generator_of_its_own(monkeypatch):
    """Also where chunks are drawn one by one, and where many parameters wait."""
    chunks = drawn("uniform", 0, 2 * CHUNK + 77).split([CHUNK, CHUNK, 77, 77])
    assert len({chunk[:77].sum().item() for chunk in chunks}) == 4
    model, again = tiny(), tiny()
    initialize(model, 0)
    monkeypatch.setattr(initialization, "AHEAD", 1)
    initialize(again, 0, threads=2)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_thread_that_fails_is_heard_of():
    model = Drawn("normal")
    model.parameter_roles["weight"]["init"] = ("normal", -1.0)
    with pytest.raises(RuntimeError, match="normal"):
        initialize(model, 0)


def test_initialization_has_the_published_scales():
    model = Transformer(ModelConfig(depth=2, width=256, head_dim=32, vocab_size=512))
    initialize(model, seed=0)
    bound = 1 / math.sqrt(256)
    up = model.blocks[0].mlp.up.weight
    assert up.abs().max() <= bound
    torch.testing.assert_close(up.std().item(), bound / math.sqrt(3), rtol=0.01, atol=0)
    torch.testing.assert_close(model.embedding.weight.std().item(), 1e-4, rtol=0.02, atol=0)
    torch.testing.assert_close(model.head.weight.std().item(), 0.02, rtol=0.02, atol=0)
    assert not torch.equal(model.blocks[0].mlp.up.weight, model.blocks[1].mlp.up.weight)
    again = Transformer(ModelConfig(depth=2, width=256, head_dim=32, vocab_size=512))
    initialize(again, seed=1)
    assert not torch.equal(again.head.weight, model.head.weight)


U, N = "uniform", "normal"
STARTS = {  # init → embedding, q k v and gate, out, up, down, head (None: tied)
    "fan_in": [(N, 1e-4), (U, 1), (U, 1), (U, 1), (U, 1), (N, 0.02)],
    "fan_in_tied": [(N, 0.02), (U, 0.5), (U, 0.5), (U, 1), (U, 0.5), None],
    "normal": [(N, 0.02), (N, 0.02), (N, 0.01), (N, 0.02), (N, 0.01), (N, 0.02)],
}


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("init", STARTS)
def test_the_papers_starts(init, experts):
    """The depth is 2, so √(2 depth) is 2; scales of U are in units of 1/√fan_in."""
    moe = {"sparsity": 3, "top_k": 2, "router_init": "normal"} if experts else None
    tied = {"tied_embeddings": init == "fan_in_tied"}
    model = tiny(init=init, moe=moe, **tied)
    block = model.blocks[1]
    attention, mlp = block.attention, block.mlp
    part = mlp.experts if experts else mlp
    embedding, qkv, out, up, down, head = STARTS[init]
    expected = {model.embedding: embedding, attention.qkv: qkv, attention.out: out}
    expected |= {part.up: up, part.down: down}
    if experts:
        expected |= {mlp.shared.up: up, mlp.shared.down: down, mlp.router: (N, 0.02)}
    if head:
        expected |= {model.head: head}
    for module, (distribution, scale) in expected.items():
        if distribution == U:
            scale /= math.sqrt(module.weight.shape[-1])
        assert module.parameter_roles["weight"]["init"] == (distribution, pytest.approx(scale))


def test_a_parameter_without_initialization_is_refused():
    with pytest.raises(ValueError, match="'weight' has no initialization"):
        initialize(torch.nn.Linear(2, 2), 0)


def test_every_parameter_has_a_role_and_fused_projections_their_blocks():
    rows = {row.name: row for row in assign_roles(tiny())}
    assert {row.role for row in rows.values()} == {"matrix", "embedding", "head", "vector"}
    assert rows["blocks.0.attention.qkv.weight"].blocks == (
        ("q", 32),
        ("k", 16),
        ("v", 16),
        ("gate", 4),
    )
    assert rows["blocks.1.mlp.up.weight"].blocks == (("gate", 128), ("up", 128))
    assert sum(row.parameter.numel() for row in rows.values()) == sum(
        p.numel() for p in tiny().parameters()
    )
    assert "head.weight" not in {row.name for row in assign_roles(tiny(tied_embeddings=True))}


def test_vocabulary_must_be_known():
    with pytest.raises(ValueError, match="vocab_size is not set"):
        Transformer(SimpleNamespace(vocab_size=None))
