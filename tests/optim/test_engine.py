"""`MatrixOptimizer` on one process: state, edge cases, refusals."""

import copy

import pytest
import torch
from torch import nn

from archscale.optim import RULES, MatrixOptimizer, Rule
from archscale.optim.orthogonalize import orthogonality_residual


def matrices(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def optimizer(params, rule="orscale_lm", **options):
    return MatrixOptimizer(
        params, lr=0.02, rule=rule, compute_dtype=torch.float32, **{"view": "stack", **options}
    )


@pytest.mark.parametrize("rule", RULES)
def test_state_dict_round_trip(rule):
    params = matrices((6, 8), (3, 4, 5))
    first = optimizer(params, rule)
    for seed in range(3):
        gradients(params, seed)
        first.step()
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    second = optimizer(twins, rule)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for seed in range(3, 6):
        for group, opt in ((params, first), (twins, second)):
            gradients(group, seed)
            opt.step()
    for p, twin in zip(params, twins):
        assert torch.equal(p, twin)


def test_radius_and_calibration_survive_perturbed_weights():
    """R and c belong to the initialization and are never taken from trained weights again."""
    params = matrices((6, 8))
    first = optimizer(params, "orscale_lm_sphere")
    gradients(params, 0)
    first.step()
    saved = copy.deepcopy(first.state_dict())
    twin = [nn.Parameter(params[0].detach() * 3)]
    second = optimizer(twin, "orscale_lm_sphere")
    second.load_state_dict(saved)
    gradients(twin, 1)
    second.step()
    torch.testing.assert_close(twin[0].norm(), first.state[params[0]]["radius"][0])
    assert torch.equal(second.state[twin[0]]["calibration"], first.state[params[0]]["calibration"])


@pytest.mark.parametrize("rule", RULES)
def test_bfloat16_momentum_and_parameters(rule):
    params = [nn.Parameter(torch.randn(8, 6).bfloat16())]
    opt = optimizer(params, rule, momentum_dtype=torch.bfloat16)
    gradients(params, 0)
    before = params[0].detach().clone()
    opt.step()
    state = opt.state[params[0]]
    assert state.get("momentum", state.get("exp_avg")).dtype == torch.bfloat16
    assert "exp_avg_sq" not in state or state["exp_avg_sq"].dtype == torch.float32
    assert params[0].dtype == torch.bfloat16
    assert not torch.equal(params[0], before)


@pytest.mark.parametrize("rule", RULES)
def test_zero_gradient_does_not_move_what_has_no_decay(rule):
    params = matrices((6, 8), (8, 6))
    before = [p.detach().clone() for p in params]
    opt = optimizer(params, rule)
    params[0].grad = torch.zeros_like(params[0])  # the other has no gradient at all: the same
    opt.step()
    for p, b in zip(params, before):
        assert torch.equal(p, b)


def test_no_decay_before_calibration():
    params = matrices((6, 8))
    before = params[0].detach().clone()
    opt = optimizer(params, "orscale_lm", weight_decay=0.5)
    params[0].grad = torch.zeros_like(params[0])
    opt.step()
    assert torch.equal(params[0], before)
    assert opt.state[params[0]]["calibration"].item() == 0
    gradients(params, 0)
    opt.step()
    assert opt.state[params[0]]["calibration"].item() > 0
    torch.testing.assert_close(opt.diagnostics()["trust_ratio"], torch.ones(1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("rule", ["muonh", "orscale_lm", "orscale", "adamh", "lamb"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_gradient_skips_the_matrix_and_lets_it_learn_again(rule, bad):
    params = matrices((6, 8), (6, 8))
    opt = optimizer(params, rule)
    gradients(params, 0)
    opt.step()
    before = [p.detach().clone() for p in params]
    gradients(params, 1)
    params[0].grad[2, 3] = bad
    opt.step()
    assert torch.equal(params[0], before[0])
    assert not torch.equal(params[1], before[1])
    assert opt.diagnostics()["bad"].tolist() == [True, False]
    gradients(params, 2)
    opt.step()
    assert params[0].isfinite().all()
    assert not torch.equal(params[0], before[0])


@pytest.mark.parametrize("rule", ["adamw", "lion", "sgd"])
def test_elementwise_rules_take_what_is_not_finite_for_zero(rule):
    params = matrices((6, 8))
    opt = optimizer(params, rule)
    gradients(params, 0)
    params[0].grad[2, 3] = float("nan")
    params[0].grad[0, 0] = float("inf")
    before = params[0].detach().clone()
    opt.step()
    assert params[0].isfinite().all()
    assert torch.equal(params[0][2, 3], before[2, 3])
    assert not torch.equal(params[0][1], before[1])


def test_zero_initialized_matrix():
    """Refused by name on the sphere; safe under the calibrated rule, with c = 0.2 √max(m, n) and r̂
    = r_min."""
    zero = nn.Parameter(torch.zeros(6, 8))
    with pytest.raises(ValueError, match="'out'.*zero.*sphere"):
        optimizer([("out", zero)], "muonh")
    opt = optimizer([("out", zero)], "orscale_lm")
    gradients([zero], 0)
    opt.step()
    seen = opt.diagnostics()
    torch.testing.assert_close(seen["calibration"], torch.tensor([0.2 * 8**0.5]))
    torch.testing.assert_close(seen["clipped_ratio"], torch.tensor([0.1]))
    assert zero.isfinite().all()
    assert zero.any()


def test_blocks_and_experts_are_separate_matrices():
    """Per block and per expert, ‖W‖ = R; a fused projection steps as its blocks would apart."""
    fused = matrices((12, 5))[0]
    parts = [nn.Parameter(fused.detach()[a:b].clone()) for a, b in ((0, 8), (8, 10), (10, 12))]
    one = optimizer([{"params": [fused], "blocks": [[("q", 8), ("k", 2), ("v", 2)]]}], "muonh")
    many = optimizer(parts, "muonh")
    for seed in range(3):
        gradients([fused], seed)
        for p, (a, b) in zip(parts, ((0, 8), (8, 10), (10, 12))):
            p.grad = fused.grad[a:b].clone()
        one.step()
        many.step()
    torch.testing.assert_close(fused, torch.cat([p.detach() for p in parts]))
    assert one.state[fused]["radius"].shape == (3,)


class Watching:
    keys = ("residual", "norm")
    gradients = ("norm",)

    def __call__(self, momentum, direction):
        return torch.stack([orthogonality_residual(direction), momentum.flatten(1).norm(dim=1)])

    def of_gradient(self, gradient):
        return gradient.flatten(1).norm(dim=1)[None]


def test_diagnostics():
    params = matrices((16, 8), (4, 8, 8))
    opt = optimizer([("a", params[0]), ("b", params[1])], "orscale_lm", weight_decay=0.1)
    opt.watch = Watching()
    gradients(params, 0)
    given = [params[0].grad.clone(), *params[1].grad.clone()]
    before = [p.detach().clone() for p in params]
    opt.step()
    seen = opt.diagnostics()
    assert opt.matrix_names() == ["a", "b[0]", "b[1]", "b[2]", "b[3]"]
    moved = [(params[0] - before[0]).norm() / before[0].norm()]
    moved += [((params[1] - before[1])[e].norm() / before[1][e].norm()) for e in range(4)]
    torch.testing.assert_close(seen["relative_update"], torch.stack(moved), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(seen["weight_norm"][0], before[0].norm())
    torch.testing.assert_close(
        seen["effective_decay"], torch.full((5,), 0.02 * 0.1), rtol=1e-4, atol=0
    )
    assert (seen["residual"] < 0.35).all()
    assert (seen["residual"] > 1e-6).all()
    norms = [
        params[0].new_tensor(1.95).mul(g.norm()) for g in given
    ]  # M̂ = μ M + G = 1.95 G at the first step
    torch.testing.assert_close(seen["norm"], torch.stack(norms))
    torch.testing.assert_close(seen["gradient_norm"], torch.stack(norms) / 1.95)
    opt.watch = None
    gradients(params, 1)
    opt.step()
    assert "residual" not in opt.diagnostics()


def test_user_rule():
    mine = Rule("mine", shape="moonlight", ratio="update", decay="coupled", clip=(0.2, 2.0))
    params = matrices((6, 8))
    opt = optimizer(params, mine, weight_decay=0.1)
    gradients(params, 0)
    opt.step()
    assert opt.param_groups[0]["rule"] == "mine"


def test_scheduler_and_closure_work():
    params = matrices((6, 8))
    opt = optimizer(params)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.0 if step else 1.0)
    gradients(params, 0)

    def closure():
        return 3.0

    assert opt.step(closure) == 3.0
    scheduler.step()
    before = params[0].detach().clone()
    gradients(params, 1)
    opt.step()
    assert torch.equal(params[0], before)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optimizer([]), "empty parameter list"),
        (
            lambda: optimizer([("norm", nn.Parameter(torch.ones(4)))]),
            "'norm'.*2-D matrices.*rule='adamw'",
        ),
        (lambda: optimizer(matrices((4, 4)), "moun"), "unknown rule 'moun'.*muon"),
        (lambda: MatrixOptimizer(matrices((4, 4)), lr=-1.0), "lr -1.0"),
        (lambda: optimizer(matrices((4, 4)), clip=(2.0, 1.0)), "crossed"),
        (
            lambda: optimizer(matrices((4, 4)), "muon", clip=(0.1, 1.0)),
            "'muon' has no trust ratio for clip: leave it at None",
        ),
        (lambda: optimizer(matrices((4, 4)) * 2), "parameter 0.*given twice"),
        (lambda: optimizer(matrices((4, 4)), orthogonalizer="svd"), "unknown orthogonalizer 'svd'"),
        (lambda: optimizer(matrices((4, 4)), "muonh", weight_decay=0.1), "no-op on the sphere"),
        (lambda: optimizer([("w", nn.Parameter(torch.ones(4, 6).mT))]), "'w' is not contiguous"),
        (
            lambda: optimizer([("w", nn.Parameter(torch.ones(4, 6, device="meta")))]),
            "'w' is on the meta device",
        ),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_state_of_other_shapes_or_another_rule_is_refused():
    saved = optimizer(matrices((4, 4))).state_dict()
    with pytest.raises(ValueError, match=r"'w'.*momentum has shape \(4, 4\), not \(4, 6\)"):
        optimizer([("w", matrices((4, 6))[0])]).load_state_dict(saved)
    with pytest.raises(ValueError, match="saved.*rule 'orscale_lm'.*saved with the same rule"):
        optimizer([("w", matrices((4, 4))[0])], "adamw").load_state_dict(saved)
    with pytest.raises(ValueError, match="other parameter groups"):
        optimizer(matrices((4, 4), (4, 4))).load_state_dict(saved)
