"""Experts against a per-token reference in float64, their routing, gates, balance loss and
sizes."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from archscale.config import ModelConfig
from archscale.model import Transformer, initialize, moe
from archscale.model.loss import balance_loss, load_metrics, load_share
from archscale.model.moe import MoE, MoEOutput, Routing, choose
from archscale.optim import MatrixOptimizer
from archscale.optim.roles import assign_roles, parameter_groups
from archscale.plan.counting import forward_flops, parameters, training_flops, weights

SMALL = {"depth": 2, "width": 64, "head_dim": 16, "kv_heads": 2, "context": 32, "vocab_size": 96}
SHAPE = {"width": 16, "hidden": 8, "kind": "swiglu", "experts": 7, "active": 3}
VARIANTS = list(
    itertools.product(("swiglu", "relu2"), (True, False), (True, False))
)  # kind, shared, sqrt_gate


def layer(dtype=torch.float32, shared=True, sqrt_gate=True, seed=0, **changes) -> MoE:
    built = MoE(**{**SHAPE, **changes}, shared=shared, sqrt_gate=sqrt_gate).to(dtype)
    initialize(built, seed)
    return built


def inputs(dtype=torch.float32, B=2, T=12, D=16) -> torch.Tensor:
    return torch.randn(B, T, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(
        dtype
    )


def feed_forward(x, up, down, kind):
    if kind == "swiglu":
        gate, linear = (up @ x).chunk(2)
        return down @ (F.silu(gate) * linear)
    return down @ F.relu(up @ x) ** 2


def reference(m: MoE, x: torch.Tensor, kind: str) -> MoEOutput:
    """One token after the other."""
    out, counts, mass = torch.zeros_like(x), [[0] * len(m.router.weight) for _ in x], []
    for b, sequence in enumerate(x):
        probabilities = []
        for t, token in enumerate(sequence):
            logits = m.router.weight @ token * m.router.scale
            chosen = sorted(range(len(logits)), key=lambda e: (-logits[e].item(), e))[: m.active]
            g = torch.softmax(torch.stack([logits[e] for e in chosen]), 0)
            y = torch.zeros_like(token)
            for j, e in enumerate(chosen):
                a = g[j].sqrt() if m.sqrt_gate else g[j]
                y = y + a * feed_forward(
                    token, m.experts.up.weight[e], m.experts.down.weight[e], kind
                )
                counts[b][e] += 1
            if m.shared is not None:
                s = feed_forward(token, m.shared.up.weight, m.shared.down.weight, kind)
                y = (y + s) * math.sqrt(0.5) if m.sqrt_gate else y + s
            out[b, t] = y
            probabilities.append(torch.softmax(logits, 0))
        mass.append(torch.stack(probabilities).sum(0))
    return MoEOutput(out, Routing(torch.tensor(counts), torch.stack(mass)), None)


@pytest.mark.parametrize(("kind", "shared", "sqrt_gate"), VARIANTS)
def test_output_and_gradients_equal_the_reference(kind, shared, sqrt_gate):
    m = layer(torch.float64, shared, sqrt_gate, kind=kind, logit_scale=0.7)
    x = inputs(torch.float64).requires_grad_()
    for other in (m, lambda x: reference(m, x, kind)):
        output = other(x)
        y, (load, mass) = output.hidden, output.routing
        probe = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)
        objective = (y * probe).sum() + (mass * torch.arange(7)).sum()
        grads = torch.autograd.grad(objective, [x, *m.parameters()])
        if other is m:
            found = (y, load, mass, grads)
    torch.testing.assert_close(found[0], y, rtol=1e-12, atol=1e-12)
    assert torch.equal(found[1], load)
    torch.testing.assert_close(found[2], mass, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[3], grads, rtol=1e-10, atol=1e-12)


def passes(m: MoE, x: torch.Tensor) -> list[torch.Tensor]:
    """Outputs and gradients."""
    x = x.clone().requires_grad_()
    output = m(x)
    y, (load, mass) = output.hidden, output.routing
    grads = torch.autograd.grad(
        (y.float() * y.float().detach()).sum() + mass.square().sum(), [x, *m.parameters()]
    )
    return [y, load, mass, *grads]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_product_equals_the_loop(monkeypatch, dtype):
    m, x = layer(), inputs(dtype)
    """Which kernel sums is the library's choice: three products follow each other, whose results of
    a `dtype` differ by at most one unit in the last place each, and whose gradients of weights sum
    over 24 tokens in float32."""
    fast, loops = passes(m, x), []
    monkeypatch.setattr(moe, "has_grouped_product", lambda *_: loops.append(1) and False)
    for found, expected in zip(fast, passes(m, x), strict=True):
        tolerance = 8 * torch.finfo(dtype).eps * expected.abs().max().item()
        torch.testing.assert_close(
            found, expected, rtol=0, atol=tolerance if found.is_floating_point() else 0
        )
    assert loops
    assert fast[0].dtype == dtype
    assert fast[2].dtype == torch.float32


class GarbageProduct(torch.autograd.Function):
    """The grouped product as Blackwell has it: the weight gradient of an expert without rows is
    whatever was in memory."""

    @staticmethod
    def forward(ctx, x, weight, ends):
        ctx.save_for_backward(x, ends)
        return torch._grouped_mm(x, weight, offs=ends)

    @staticmethod
    def backward(ctx, grad):
        x, ends = ctx.saved_tensors
        of_weight = torch._grouped_mm(x.mT, grad, offs=ends)
        empty = ends.diff(prepend=ends.new_zeros(1)) == 0
        return None, of_weight.masked_fill(empty[:, None, None], math.nan), None


@pytest.mark.parametrize("compiled", [False, True])
def test_experts_without_rows_have_no_gradient_where_the_product_leaves_garbage(
    monkeypatch, compiled
):
    x, ends = torch.randn(6, 16, dtype=torch.bfloat16), torch.tensor([0, 2, 2, 6, 6])
    weight = torch.randn(5, 8, 16, dtype=torch.bfloat16, requires_grad=True)

    def gradient() -> torch.Tensor:
        def loss(weight):
            return moe.grouped_linear(x, weight, ends.int()).float().square().sum()

        torch._dynamo.reset()
        run = torch.compile(loss, backend="aot_eager", fullgraph=True) if compiled else loss
        return torch.autograd.grad(run(weight), weight)[0]

    expected = gradient()
    assert not expected[[0, 2, 4]].any()
    monkeypatch.setattr(F, "grouped_mm", lambda x, w, offs: GarbageProduct.apply(x, w, offs))
    assert gradient()[[0, 2, 4]].isnan().all()
    monkeypatch.setattr(moe, "has_garbage_gradients", lambda device: True)
    torch.testing.assert_close(gradient(), expected)


def test_which_devices_leave_garbage(monkeypatch):
    for capability, garbage in (((9, 0), False), ((10, 0), True), ((10, 3), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert moe.has_garbage_gradients(torch.device("cuda")) is garbage
    assert not moe.has_garbage_gradients(torch.device("cpu"))


def test_sizes_that_the_grouped_product_refuses_take_the_loop():
    assert not moe.has_grouped_product(torch.empty(4, 17), torch.empty(3, 5, 17))
    m = layer(width=17, hidden=5)
    y = m(inputs(D=17)).hidden
    double = layer(torch.float64, width=17, hidden=5)
    torch.testing.assert_close(
        y.double(), double(inputs(torch.float64, D=17)).hidden, rtol=1e-5, atol=1e-6
    )


def test_forward_and_backward_wait_for_nothing_on_the_host(monkeypatch):
    """Fake tensors have no values: whoever asks for one fails, as the loop over experts does."""
    m = layer()
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(2, 12, 16, dtype=torch.bfloat16)
        passes(m, x)
        monkeypatch.setattr(moe, "has_grouped_product", lambda *_: False)
        with pytest.raises(DataDependentOutputException):
            m(x)


def test_a_compiler_sees_one_graph():
    m, x = layer(), inputs(torch.bfloat16)
    expected = passes(m, x)
    torch._dynamo.reset()
    m.compile(fullgraph=True, backend="eager")
    torch.testing.assert_close(passes(m, x), expected, rtol=0, atol=0)


# --- routing


def test_equal_logits_go_to_the_lower_index():
    logits = torch.tensor(
        [[1.0, 3.0, 3.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0], [-1.0, -2.0, -1.0, 5.0, -1.0]]
    )
    assert choose(logits, 2).tolist() == [[1, 2], [0, 1], [3, 0]]
    many = torch.zeros(1, 1000)  # where an unstable sort or a parallel top-k would differ
    assert choose(many, 7).tolist() == [list(range(7))]


def test_the_order_of_the_experts_means_nothing():
    """In float64, since an expert's place decides which kernel computes its logit: 16 + 16 + 8
    products and 4 outputs are summed, each sum within its number of terms times 1.1e-16 of values
    below 10."""
    m, other, x = layer(torch.float64), layer(torch.float64), inputs(torch.float64)
    order = torch.tensor([4, 2, 6, 0, 1, 5, 3])
    with torch.no_grad():
        for a, b in zip(
            (m.router, m.experts.up, m.experts.down),
            (other.router, other.experts.up, other.experts.down),
        ):
            b.weight.copy_(a.weight[order])
    (y, (load, mass), _), (y2, (load2, mass2), _) = m(x), other(x)
    torch.testing.assert_close(y, y2, rtol=0, atol=1e-13)
    torch.testing.assert_close(load[:, order], load2, rtol=0, atol=0)
    torch.testing.assert_close(mass[:, order], mass2, rtol=0, atol=1e-13)


def test_routing_is_float32_under_bfloat16():
    """Logits of the rounded weight, but with all of float32's digits."""
    m, x = layer(), inputs(torch.bfloat16)
    logits = m.router(x.flatten(0, 1))
    expected = x.flatten(0, 1).double() @ m.router.weight.bfloat16().double().mT
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(logits, logits.bfloat16().float())


def test_logit_scale():
    plain, scaled, x = layer(), layer(logit_scale=0.25), inputs()
    with torch.no_grad():
        scaled.router.weight.mul_(4)
    torch.testing.assert_close(plain(x), scaled(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_idle_experts_have_zero_gradients(dtype):
    """A router of zeros sends every token to the first expert."""
    m = layer(torch.float64 if dtype == torch.float64 else torch.float32, shared=False, active=1)
    with torch.no_grad():
        m.router.weight.zero_()
    y, load, mass, _, router, up, down = passes(m, inputs(dtype))
    assert load.tolist() == [[12, 0, 0, 0, 0, 0, 0]] * 2
    for grad in (up, down):
        assert grad[0].abs().max() > 0
        assert torch.equal(grad[1:], torch.zeros_like(grad[1:]))
    assert all(t.isfinite().all() for t in (y, mass, router, up, down))


@pytest.mark.parametrize("sqrt_gate", [True, False])
def test_an_underflowing_gate_has_a_finite_gradient(sqrt_gate):
    m, x = layer(sqrt_gate=sqrt_gate), inputs()
    with torch.no_grad():
        m.router.weight.mul_(1e4)
    gates = m.gates(m.router(x.flatten(0, 1)).topk(3).values)
    assert (gates == 0).any()
    assert all(t.isfinite().all() for t in passes(m, x))


def test_sqrt_gate_keeps_the_output_rms_at_any_granularity():
    """No shared expert, S = 4, at initialization: flat within 5 %, while the plain gate falls as
    √Σg²."""
    x = F.rms_norm(inputs(B=2, T=64, D=128), (128,))
    found = []
    for k in (1, 2, 4, 8, 16, 32, 64):
        shape = {"width": 128, "hidden": 512 // k, "experts": 4 * k, "active": k, "shared": False}
        sqrt, plain = layer(**shape), layer(**shape, sqrt_gate=False)
        with torch.no_grad():
            g = plain.gates(plain.router(x.flatten(0, 1)).topk(k).values)
            rms = [m(x).hidden.square().mean().sqrt().item() for m in (sqrt, plain)]
        found.append((*rms, g.square().sum(-1).mean().sqrt().item()))
    mean = sum(sqrt for sqrt, *_ in found) / len(found)
    for sqrt, plain, shrinkage in found:
        assert sqrt == pytest.approx(mean, rel=0.05)
        assert plain == pytest.approx(mean * shrinkage, rel=0.06)
    assert found[-1][1] < 0.2 * found[0][1]


@pytest.mark.parametrize(("experts", "active"), [(7, 8), (7, 0), (0, 1)])
def test_more_active_experts_than_there_are_is_refused(experts, active):
    with pytest.raises(
        ValueError, match=rf"cannot pass {active} of {experts} routed experts: set top_k"
    ):
        MoE(16, 8, "swiglu", experts, active, shared=False, sqrt_gate=True)


# --- balance loss


def test_balance_loss_is_its_definition_in_parts():
    """γ E Σ f P over all tokens, whatever the parts in which its tokens come; 1 · γ per layer when
    all is equal."""
    g = torch.Generator().manual_seed(0)
    mass = torch.rand(3, 6, 5, generator=g)
    mass = 8 * mass / mass.sum(-1, keepdim=True)  # 8 tokens a sequence
    load = torch.randint(0, 9, (3, 6, 5), generator=g)
    f, P = load.sum(1) / load.sum((1, 2))[:, None], mass.sum(1) / 48
    expected = sum(0.1 * 5 * (f[i] * P[i]).sum() for i in range(3))
    share = load_share(load.sum(1))[:, None]
    parts = [balance_loss(mass[:, a:b], share, 48, 0.1) for a, b in ((0, 1), (1, 4), (4, 6))]
    torch.testing.assert_close(sum(parts), expected)
    of_each = [
        0.1 * 5 * (load[i, s] / load[i, s].sum() * mass[i, s] / 8).sum()
        for i in range(3)
        for s in range(6)
    ]
    torch.testing.assert_close(balance_loss(mass, load_share(load), 48, 0.1), sum(of_each) / 6)
    equal = balance_loss(
        torch.full((3, 6, 5), 8 / 5), load_share(torch.full((3, 1, 5), 4)), 48, 0.1
    )
    torch.testing.assert_close(equal, torch.tensor(0.3))


def test_load_metrics():
    measured = load_metrics(torch.tensor([[4, 4, 4, 4], [16, 0, 0, 0]]))
    assert measured["moe/max_violation"].item() == pytest.approx((0 + 3) / 2)
    assert measured["moe/load_entropy"].item() == pytest.approx(math.log(4) / 2)


# --- the model and its sizes


def small(**changes) -> ModelConfig:
    experts = {"sparsity": 4, "top_k": 4, **changes.pop("moe", {})}
    return ModelConfig(**{**SMALL, **changes, "moe": experts})


@pytest.mark.parametrize("mlp", ["swiglu", "relu2"])
@pytest.mark.parametrize("shared", [True, False])
def test_the_built_model_is_the_counted_one(mlp, shared):
    config = small(mlp=mlp, moe={"shared_expert": shared})
    with torch.device("meta"):
        built = Transformer(config)
    listed = [
        (w.name.replace("*", str(i)), w.shape, w.role, w.blocks)
        for w in weights(config)
        for i in range(w.copies)
    ]
    assert sorted(listed) == sorted(
        (r.name, r.shape, r.role, r.blocks) for r in assign_roles(built)
    )
    assert parameters(config).total == sum(p.numel() for p in built.parameters())


def test_every_expert_matrix_starts_uniform_in_its_own_fan_in():
    model = Transformer(small(width=128))
    initialize(model, 0)
    stacks = model.blocks[0].mlp
    for weight, fan_in in (
        (stacks.experts.up.weight, 128),
        (stacks.experts.down.weight, 128),
        (stacks.router.weight, 128),
    ):
        assert weight.abs().max() <= fan_in**-0.5
        torch.testing.assert_close(weight.std().item(), (3 * fan_in) ** -0.5, rtol=0.03, atol=0)
    assert not torch.equal(stacks.experts.up.weight[0], stacks.experts.up.weight[1])


def test_flops_equal_those_of_a_counted_run(monkeypatch):
    monkeypatch.setattr(
        moe, "has_grouped_product", lambda *_: False
    )  # torch counts no grouped product on a CPU
    config = small()
    model, tokens = Transformer(config), torch.randint(0, 96, (2, 32))
    initialize(model, 0)
    in_place = {torch.ops.aten.addmm_: lambda out, a, b, **_: 2 * a[0] * a[1] * b[1]}
    counts = []
    for train in (False, True):
        counter = FlopCounterMode(display=False, custom_mapping=in_place)
        with counter, sdpa_kernel(SDPBackend.MATH), torch.set_grad_enabled(train):
            loss = model(tokens, tokens).loss
            if train:
                loss.backward()
        counts.append(counter.get_total_flops() / tokens.numel())
    assert counts[0] == pytest.approx(sum(forward_flops(config, causal=False).values()), rel=0.01)
    assert counts[1] == pytest.approx(training_flops(config, causal=False), rel=0.01)


def test_recomputation_changes_and_counts_nothing():
    found = []
    for recompute in (False, True):
        model, tokens = Transformer(small(), recompute=recompute), torch.arange(64).view(2, 32)
        initialize(model, 0)
        output = model(tokens, tokens)
        loss, routing = output.loss, output.routing
        (loss + routing.mass.square().sum()).backward()
        assert routing.load.sum((1, 2)).tolist() == [64 * 3] * 2
        found.append([loss, *routing, *(p.grad for p in model.parameters())])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_counting_without_a_head():
    model, tokens = Transformer(small()), torch.arange(64).view(2, 32)
    initialize(model, 0)
    expected = model(tokens, tokens).routing
    model.head.forward = None
    output = model(tokens, head=False)
    assert output.loss is None
    torch.testing.assert_close(output.routing, expected, rtol=0, atol=0)


def test_the_optimizer_updates_every_experts_matrices_on_their_own():
    """Gate and up of each expert keep their own norm on the sphere; the step of one ignores the
    others' gradients."""
    steps = []
    for factor in (1.0, 100.0):
        model, tokens = Transformer(small()), torch.arange(64).view(2, 32)
        initialize(model, 0)
        element = {"rule": "adamw", "lr": 1e-3}
        options = dict.fromkeys(("embedding", "head", "vector"), element)
        options["matrix"] = {"rule": "muonh", "lr": 0.1, "compute_dtype": torch.float32}
        optimizer = MatrixOptimizer(parameter_groups(assign_roles(model), options), lr=1e-3)
        up = model.blocks[0].mlp.experts.up.weight
        names = [
            name
            for owner, name, rows, cols in optimizer.views()
            if owner == "blocks.0.mlp.experts.up.weight"
        ]
        assert names == [
            f"blocks.0.mlp.experts.up.weight[{e}].{b}" for e in range(15) for b in ("gate", "up")
        ]
        before = up.detach().clone().view(30, 64, 64)
        model(tokens, tokens).loss.backward()
        with torch.no_grad():
            up.grad[0, :64] *= factor
        optimizer.step()
        after = up.detach().view(30, 64, 64)
        torch.testing.assert_close(
            after.norm(dim=(1, 2)), before.norm(dim=(1, 2)), rtol=1e-5, atol=0
        )
        moved = (after - before).norm(dim=(1, 2)) / before.norm(dim=(1, 2))
        assert ((moved > 0.05) | (moved == 0)).all()
        steps.append(after)
    torch.testing.assert_close(steps[0], steps[1], rtol=1e-5, atol=1e-6)
