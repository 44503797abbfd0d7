"""Attention on segments is attention with the mask that they stand for.

The kernel itself needs a GPU. Here its place is taken by its definition: attention of one segment
after the other.
"""

import itertools
import math

import pytest
import torch
import torch.nn.attention.varlen as varlen
import torch.nn.functional as F

from archscale.bench import gpu
from archscale.config import ModelConfig
from archscale.data.loader import Batch
from archscale.model import Transformer, initialize, layers, segments, transformer
from archscale.model.layers import attention_mask, masked_attention
from archscale.model.segments import (
    Segments,
    expands_groups,
    segment_attention,
    segment_bounds,
    sequence_bounds,
    takes_segments,
)
from archscale.telemetry.stability import Probe
from archscale.train.placing import place

B, T = 3, 24
CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="GPU"))


def one_by_one(q, k, v, *bounds, return_aux, scale, window_size, enable_gqa=False):
    """What `varlen_attn` says that it computes."""
    begins, begins_k, longest, longest_k = bounds
    assert begins is begins_k
    assert longest == longest_k
    assert enable_gqa or q.shape[1] == k.shape[1]
    out, lse = [], []
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    for low, high in itertools.pairwise(begins.tolist()):
        assert 0 <= high - low <= longest
        at = torch.arange(high - low)
        distance = at[:, None] - at
        seen = distance >= -window_size[1]
        if window_size[0] >= 0:
            seen &= distance <= window_size[0]
        logits = torch.einsum("ihc,jhc->hij", q[low:high], k[low:high]) * scale
        logits = logits.masked_fill(~seen, -math.inf)
        out.append(torch.einsum("hij,jhc->ihc", logits.softmax(-1), v[low:high]))
        lse.append(logits.logsumexp(-1))
    assert return_aux.lse
    return torch.cat(out), torch.cat(lse, 1)


def batch_of_documents():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 20, (B, T), generator=generator)
    # Documents of one token, an end at the start and at the end of a sequence, and none.
    tokens[0, [0, 5, 6, 23]] = 0
    tokens[1, [11]] = 0
    return tokens


CASES = {
    "documents": (None, 0, False),
    "window": (5, None, False),
    "a window of one": (1, None, False),
    "documents and window": (4, 0, False),
    "packed": (None, None, True),
    "packed, window": (7, 0, True),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("version", [(2, 11), (2, 13)])
def test_segments_are_the_mask(monkeypatch, case, kv_heads, version):
    window, eos, packed = CASES[case]
    tokens = batch_of_documents()
    documents = torch.arange(T).div(7, rounding_mode="floor").expand(B, T) if packed else None
    monkeypatch.setattr(varlen, "varlen_attn", one_by_one)
    monkeypatch.setattr(segments, "TORCH", version)
    mask = attention_mask(tokens, window, eos, torch.float64, documents)
    if eos is None and documents is None:
        bounds = sequence_bounds(B, T, torch.device("cpu"))
    else:
        bounds = segment_bounds(tokens, eos, documents)
    generator = torch.Generator().manual_seed(1)
    inputs = [
        torch.randn(B, T, n, 8, dtype=torch.float64, generator=generator).requires_grad_()
        for n in (4, kv_heads, kv_heads)
    ]
    found, lse = segment_attention(*inputs, Segments(bounds, T, window), 0.3)
    q, k, v = (x.transpose(1, 2) for x in inputs)
    expected = masked_attention(q, k, v, mask, 0.3).transpose(1, 2)
    torch.testing.assert_close(found, expected)  # float64: rounding alone
    weight = torch.randn(found.shape, dtype=torch.float64, generator=generator)
    for a, b in zip(*(torch.autograd.grad((o * weight).sum(), inputs) for o in (found, expected))):
        torch.testing.assert_close(a, b)
    logits = q @ k.repeat_interleave(4 // kv_heads, 1).mT * 0.3 + mask
    torch.testing.assert_close(lse.unflatten(1, (B, T)).transpose(0, 1), logits.logsumexp(-1))
    assert not lse.requires_grad


def test_bounds_are_padded_to_a_power_of_two():
    tokens = batch_of_documents()
    bounds = segment_bounds(tokens, 0, None)
    # 3 sequences and the ends that another token of the sequence follows: 0, 5, 6 and 11.
    assert bounds.tolist() == [0, 1, 6, 7, 24, 36, 48, 72, 72]
    assert bounds.dtype == torch.int32
    assert segment_bounds(tokens[2:], 0, None).tolist() == [0, T]


MODELS = {
    "dense": {},
    "groups and window": {"kv_heads": 2, "window": 6},
    "experts": {"moe": {"sparsity": 2, "top_k": 2}},
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("eos", [0, None])
def test_a_model_on_segments_is_the_masked_model(monkeypatch, name, eos):
    shape = {"depth": 2, "width": 64, "head_dim": 16, "context": T, "vocab_size": 20}
    model = Transformer(ModelConfig(**shape | MODELS[name]), eos_id=eos)
    initialize(model, 0)
    tokens = batch_of_documents()
    batch, cpu = Batch(tokens, tokens.roll(-1, 1)), torch.device("cpu")

    def run():
        placed = place(batch, model, cpu)
        output = model(*placed, probe=Probe())
        gradients = torch.autograd.grad(output.loss, list(model.parameters()))
        return placed.documents, output.loss, gradients, [p.attention_lse for p in output.probed]

    none, loss, gradients, z = run()
    assert none is None
    monkeypatch.setattr(varlen, "varlen_attn", one_by_one)
    monkeypatch.setattr(transformer, "device_takes_segments", lambda *_: True)
    if eos is not None or model.config.window is not None:
        monkeypatch.setattr(transformer, "attention_mask", None)  # and no mask is made
    placed, other_loss, other_gradients, other_z = run()
    assert isinstance(placed, Segments) == (eos is not None)
    # Float32, sums of up to 128 products in another order.
    close = {"rtol": 128 * 2**-23, "atol": 1e-6}
    torch.testing.assert_close(other_loss, loss, **close)
    torch.testing.assert_close(other_z, z, **close)
    for found, expected in zip(other_gradients, gradients):
        torch.testing.assert_close(
            found, expected, rtol=0, atol=128 * 2**-23 * expected.abs().max().item() + 1e-9
        )


def test_who_takes_segments():
    for device, capability, dtype, head_dim, version in itertools.product(
        ["cpu", "cuda", "mps", "meta"],
        [None, (7, 5), (8, 0), (9, 0), (10, 0)],
        [torch.float32, torch.bfloat16, torch.float16, torch.float64],
        [12, 64, 128, 256, 264],
        [(2, 10), (2, 11), (2, 12), (2, 13), (3, 0)],
    ):
        refusals = (
            device != "cuda",
            capability is None or capability < (8, 0),
            dtype in (torch.float32, torch.float64),
            head_dim in (12, 264),
            version == (2, 10),
        )
        assert takes_segments(device, capability, dtype, head_dim, version) == (not any(refusals))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_groups_are_expanded_where_no_kernel_takes_them(monkeypatch, dtype, masked):
    assert not expands_groups("cpu", dtype, masked)
    assert expands_groups("cuda", dtype, masked) == (masked or dtype == torch.float32)
    seen = []
    kernel = F.scaled_dot_product_attention

    def watched(q, k, v, **options):
        seen.append((k.shape[1], v.shape[1], options["enable_gqa"]))
        return kernel(q, k, v, **options)

    monkeypatch.setattr(layers.F, "scaled_dot_product_attention", watched)
    q, k = torch.randn(2, 6, 5, 8).to(dtype), torch.randn(2, 2, 5, 8).to(dtype)
    mask = torch.zeros(1, 1, 5, 5, dtype=dtype).masked_fill_(
        torch.ones(5, 5).triu(1) > 0, -math.inf
    )
    plain = masked_attention(q, k, k, mask if masked else None, 0.3)
    monkeypatch.setattr(layers, "expands_groups", lambda *_: True)
    expanded = masked_attention(q, k, k, mask if masked else None, 0.3)
    assert seen == [(2, 2, True), (6, 6, False)]
    torch.testing.assert_close(plain, expanded)


def test_a_block_on_segments_is_one_graph_for_any_number_of_documents():
    """Shapes alone: the kernel's operator traces without a GPU, read steps too."""
    torch._dynamo.reset()
    with torch.device("meta"):
        config = ModelConfig(depth=2, width=64, head_dim=16, kv_heads=2, context=T, vocab_size=20)
        model = Transformer(config, torch.bfloat16, eos_id=0)
        tokens = torch.zeros(B, T, dtype=torch.int64)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    for block in model.blocks:
        block.compile(backend=backend, fullgraph=True)
    for documents in (5, 9, 17, 33):
        placed = Segments(torch.empty(documents, dtype=torch.int32, device="meta"), T, None)
        model(tokens, tokens, placed).loss.backward()
    assert len(graphs) == 1
    for documents in (5, 9):
        placed = Segments(torch.empty(documents, dtype=torch.int32, device="meta"), T, None)
        model(tokens, tokens, placed, probe=Probe())
    assert len(graphs) == 2


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_probe_breaks_no_graph(masked, dtype):
    torch._dynamo.reset()
    config = ModelConfig(depth=2, width=64, head_dim=16, context=T, vocab_size=20)
    model = Transformer(config, dtype, eos_id=0 if masked else None)
    if dtype == torch.float64:  # no kernel gives the log-sum-exp: it is computed by chunks
        model.double()
    initialize(model, 0)
    tokens = batch_of_documents()
    expected = [p.attention_lse for p in model(tokens, probe=Probe()).probed]
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    found = [p.attention_lse for p in model(tokens, probe=Probe()).probed]
    torch.testing.assert_close(
        found, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=0
    )


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_kernel_is_its_definition(device, window, kv_heads):
    """In bfloat16: outputs round by 2⁻⁹, and so does the softmax before its product with v."""
    tokens = batch_of_documents()
    bounds = segment_bounds(tokens, 0, None).to(device)
    generator = torch.Generator().manual_seed(1)
    exact = [torch.randn(B, T, n, 64, generator=generator) for n in (4, kv_heads, kv_heads)]
    half = [x.to(device, torch.bfloat16).requires_grad_() for x in exact]
    found, lse = segment_attention(*half, Segments(bounds, T, window), 0.125)
    q, k, v = (x.detach().double().cpu().transpose(1, 2).requires_grad_() for x in half)
    mask = attention_mask(tokens, window, 0, torch.float64)
    expected = masked_attention(q, k, v, mask, 0.125)
    size = expected.abs().max().item()
    close = {"rtol": 0, "atol": 4 * 2**-9 * size}
    torch.testing.assert_close(found.double().cpu(), expected.transpose(1, 2), **close)
    logits = q @ k.repeat_interleave(4 // kv_heads, 1).mT * 0.125 + mask
    expected_lse = logits.logsumexp(-1).transpose(0, 1).flatten(1)
    torch.testing.assert_close(lse.double().cpu(), expected_lse, rtol=1e-3, atol=1e-3)
    gradients = torch.autograd.grad(found.float().sum(), half)
    for a, b in zip(gradients, torch.autograd.grad(expected.sum(), (q, k, v))):
        size = b.abs().max().item()
        torch.testing.assert_close(
            a.double().cpu(), b.transpose(1, 2), rtol=0, atol=16 * 2**-9 * size
        )


def test_the_check_for_a_gpu_compares_segments_with_the_mask(monkeypatch):
    """On a CPU, where the kernel's definition stands for it; in bfloat16 both round by 2⁻⁹, the
    softmax, its product and the result."""
    monkeypatch.setattr(varlen, "varlen_attn", one_by_one)
    monkeypatch.setattr(gpu, "device_takes_segments", lambda *_: True)
    bench = gpu.Bench(torch.device("cpu"), tiny=True, repeats=1)
    gpu.attention(bench)
    rows = [row for row in bench.rows if str(row["case"]).startswith("segments")]
    assert len(rows) == 4
    for row in rows:
        differences = [value for name, value in row.items() if name.endswith("difference")]
        assert len(differences) == 5
        assert 0 < max(differences) < 8 * 2**-9
