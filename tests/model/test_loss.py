"""The loss by chunks, plain and compiled, beside cross-entropy of all logits in float64."""

import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch.profiler import ProfilerActivity, profile

from archscale.model import loss
from archscale.model.loss import CHUNK_TOKENS, IGNORE, chunk_tokens, cross_entropy_sum

UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9}
SCALE = 0.3  # of the loss, as the number of tokens scales it in a run


def problem(n=50, d=16, v=37, dtype=torch.float32):
    """x (n, d), W (v, d) and targets, some of which do not count."""
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(n, d, generator=g), torch.randn(v, d, generator=g)
    targets = torch.randint(0, v, (n,), generator=g)
    targets[::7] = IGNORE
    return x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_(), targets


def results(x, w, targets, **options):
    """The loss and its gradients, times `SCALE`."""
    total = cross_entropy_sum(x, w, targets, **options) * SCALE
    return total.detach(), *torch.autograd.grad(total, (x, w))


def check(actual, x, w, targets, exact_products=False):
    """Against float64, within what rounding to first order can amount to, element by element.

    A sum of k terms in the arithmetic's unit u is wrong by at most k u times the sum of their
    magnitudes. Logits are then rounded to the dtype, of unit h; an error e of a row's logits
    changes its softmax by a factor of 1 ± 2 e. The derivative is rounded to the dtype, and so are
    its two products and their factor, `SCALE`.

    Args:
        exact_products: the gradient of W is summed before it is rounded, and not by chunk.
    """
    h, u = UNIT[x.dtype], min(UNIT[x.dtype], UNIT[torch.float32])
    n, d, v = len(x), x.shape[1], len(w)
    x, w = x.detach().double(), w.detach().double()
    counted = (targets != IGNORE)[:, None]
    z, magnitude = x @ w.mT, x.abs() @ w.abs().mT
    error = (d * u * magnitude + h * z.abs()).amax(1, keepdim=True) + (v + 4) * u
    p = torch.softmax(z, -1)
    g = (p - F.one_hot(targets.clamp(min=0), v)) * counted
    g_error = p * torch.expm1(2 * error) * counted + h * g.abs()
    nats = F.cross_entropy(z, targets, ignore_index=IGNORE, reduction="none")[:, None]
    bounds = [
        SCALE * ((2 * error + (n + 4) * u * nats) * counted).sum(),
        SCALE * (g_error @ w.abs() + (v * u + 3 * h) * (g.abs() @ w.abs())),
        SCALE
        * (g_error.mT @ x.abs() + (n * u + (2 - exact_products) * h) * (g.abs().mT @ x.abs())),
    ]
    exact = [nats.sum(), g @ w, g.mT @ x]
    for value, expected, bound in zip(actual, exact, bounds, strict=True):
        assert ((value.double() - SCALE * expected).abs() <= bound + 1e-300).all()


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 20),
    v=st.integers(2, 30),
    chunk=st.integers(1, 25),
    ignored=st.integers(0, 20),
)
def test_chunked_loss_and_gradients_equal_cross_entropy(n, v, chunk, ignored):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 6, generator=g, dtype=torch.float64, requires_grad=True)
    w = torch.randn(v, 6, generator=g, dtype=torch.float64, requires_grad=True)
    t = torch.randint(0, v, (n,), generator=g)
    t[:ignored] = IGNORE
    expected = F.cross_entropy(x @ w.mT, t, ignore_index=IGNORE, reduction="sum") * SCALE
    grads = torch.autograd.grad(expected, (x, w))
    total, *actual = results(x, w, t, chunk=chunk)
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(tuple(actual), grads)


@pytest.mark.parametrize(
    ("dtype", "backend"),
    [
        *((dtype, None) for dtype in UNIT),
        (torch.float64, "aot_eager"),
        (torch.float32, "inductor"),
        (torch.bfloat16, "inductor"),
    ],
)
def test_loss_and_gradients_are_right_to_rounding(monkeypatch, dtype, backend):
    if backend:
        compiled = functools.cache(lambda f: torch.compile(f, backend=backend, fullgraph=True))
        monkeypatch.setattr(loss, "_compiled", compiled)
    x, w, targets = problem(dtype=dtype)
    options = {"chunk": 16, "compiled": bool(backend)}
    actual = results(x, w, targets, **options)
    assert [t.dtype for t in actual] == [torch.promote_types(dtype, torch.float32), dtype, dtype]
    check(actual, x, w, targets)
    with torch.no_grad():
        alone = cross_entropy_sum(x, w, targets, **options) * SCALE
    check((alone, *actual[1:]), x, w, targets)


def test_only_what_is_needed_is_differentiated():
    x, w, targets = problem()
    _, grad_x, grad_w = results(x, w, targets, chunk=16)
    for needed, constant in ((0, w), (1, x)):
        constant.requires_grad_(False)
        total = cross_entropy_sum(x, w, targets, chunk=16) * SCALE
        (grad,) = torch.autograd.grad(total, (x, w)[needed])
        assert torch.equal(grad, (grad_x, grad_w)[needed])
        constant.requires_grad_()
    assert not results(x[:0], w, targets[:0])[2].any()


def test_products_that_a_gpu_adds_in_float32(monkeypatch):
    """A CPU has none of them: they are stood in for."""
    calls = []

    def mm(a, b, *, out_dtype=None, out=None, plain=torch.mm):
        if out_dtype is None:
            return plain(a, b, out=out)
        calls.append("mm")
        return plain(a.to(out_dtype), b.to(out_dtype), out=out)

    def addmm(total, a, b, *, out_dtype, out, plain=torch.addmm):
        calls.append("addmm")
        assert out is total
        return plain(total, a.to(out_dtype), b.to(out_dtype), out=out)

    x, w, targets = problem(dtype=torch.bfloat16)
    monkeypatch.setattr(loss, "_adds_in_float32", lambda device, dtype: True)
    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "addmm", addmm)
    actual = results(x, w, targets, chunk=16)
    monkeypatch.undo()
    assert calls == ["mm", "addmm", "addmm", "addmm"]
    check(actual, x, w, targets, exact_products=True)


def test_which_devices_add_products_in_float32(monkeypatch):
    """A CPU knows no such product; a device that rounds first is found out."""
    cpu, adds = torch.device("cpu"), loss._adds_in_float32.__wrapped__
    assert not adds(cpu, torch.bfloat16)

    def product(rounds):
        def addmm(total, a, b, *, out_dtype, out):
            return out.copy_((total + a.float() @ b.float()).to(a.dtype if rounds else out_dtype))

        return addmm

    for rounds in (False, True):
        monkeypatch.setattr(torch, "addmm", product(rounds))
        assert adds(cpu, torch.bfloat16) != rounds


def test_no_length_of_a_chunk_is_compiled_again(monkeypatch):
    counters = {}

    def compiled(function):
        if function not in counters:
            counter = CompileCounter()
            counters[function] = counter, torch.compile(function, backend=counter, fullgraph=True)
        return counters[function][1]

    monkeypatch.setattr(loss, "_compiled", compiled)
    x, w, targets = problem()
    for n in (50, 41, 34):  # a last chunk of one token alone is a graph of its own
        total = cross_entropy_sum(x[:n], w, targets[:n], chunk=16, compiled=True)
        total.backward()
        with torch.no_grad():
            cross_entropy_sum(x[:n], w, targets[:n], chunk=16, compiled=True)
    assert [counter.frame_count for counter, _ in counters.values()] == [1, 1]


def test_a_wrong_target_is_an_error_when_compiled():
    x, w, targets = problem()
    for wrong in (37, -5):
        targets[3] = wrong
        with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
            cross_entropy_sum(x, w, targets, compiled=True)


def peak(run):
    """Bytes allocated at a time while it runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        kept = run()
    events = record.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    live = most = 0
    for _, size in changes:
        live += size
        most = max(most, live)
    del kept
    return most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_chunk_takes_no_more_than_its_logits(dtype):
    x, w, targets = problem(n=512, d=8, v=1003, dtype=dtype)

    def run():
        return cross_entropy_sum(x, w, targets, chunk=128, compiled=True)

    run()
    logits = 128 * 1003 * x.element_size()
    gradients = x.nbytes + 4 * w.numel()
    # With less than one more byte a logit there is no second tensor of this size. A CPU has a
    # product's result beside the sum that it joins, and oneDNN float32 scratch of its own.
    product = (dtype == torch.bfloat16) * (w.nbytes + x.nbytes + 4 * 128 * 1003)
    assert logits + gradients <= peak(run) < 1.2 * logits + gradients + product


def test_chunks_of_a_gpu_are_equal_and_have_thousands_of_tokens():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    for tokens in (1, 77, 4095, 4096, 5000, 8191, 8192, 16384, 16390, 10**6 + 3):
        chunk = chunk_tokens(tokens, 50_304, gpu)
        chunks = -(-tokens // chunk)
        assert min(tokens, CHUNK_TOKENS) <= chunk < 2 * CHUNK_TOKENS
        assert chunks * chunk - tokens < chunks
    assert chunk_tokens(16384, 50_304, cpu) == 83
    assert chunk_tokens(16384, 1 << 23, cpu) == 1
