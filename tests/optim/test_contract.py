"""The contract of `torch.optim.Optimizer`, property by property; where torch's AdamW can show it,
it is the control."""

import copy
import io
import pickle
import re
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from archscale.distributed import local_pieces
from archscale.optim import RULES, MatrixOptimizer, Rule, matrix_groups
from tests.optim import wrapped

CONTROL = [pytest.param(make, id=make) for make in ("adamw", "ours")]


def tensors(*shapes, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def parameters(*shapes, seed=0):
    return [nn.Parameter(t) for t in tensors(*shapes, seed=seed)]


def give_gradients(params, seed):
    for p, g in zip(params, tensors(*(p.shape for p in params), seed=100 + seed)):
        p.grad = g.to(p.dtype)


def build(params, rule="orscale_lm", **options):
    if rule == "torch":
        return torch.optim.AdamW(params, lr=0.02)
    options = {
        "weight_decay": 0.0 if RULES[rule].sphere else 0.1,
        "compute_dtype": torch.float32,
        "view": "stack",
    } | options
    return MatrixOptimizer(params, lr=0.02, rule=rule, **options)


def train(params, optimizer, seeds):
    for seed in seeds:
        give_gradients(params, seed)
        optimizer.step()
        optimizer.zero_grad()


# --- parameters are replaced


@pytest.mark.parametrize("rule", ["muonh", "orscale_lm", "adamw", "torch"])
def test_parameters_put_in_the_place_of_others_are_trained(rule):
    """Before the first step, as accelerate's preparation does."""
    expected, given, others = (parameters((6, 8), (4, 3)) for _ in range(3))
    straight = build(expected, rule)
    train(expected, straight, range(3))
    optimizer = build(given, rule)
    optimizer.param_groups[0]["params"] = others
    train(others, optimizer, range(3))
    for a, b, unused in zip(expected, others, given):
        assert torch.equal(a, b)
        assert not torch.equal(a, unused)
        assert unused not in optimizer.state


@pytest.mark.parametrize("rule", ["muonh", "orscale_lm", "adamw"])
def test_a_parameter_replaced_later_keeps_its_state(rule):
    expected, given = parameters((6, 8)), parameters((6, 8))
    straight, optimizer = build(expected, rule), build(given, rule)
    train(expected, straight, range(4))
    train(given, optimizer, range(2))
    others = [nn.Parameter(p.detach().clone()) for p in given]
    optimizer.param_groups[0]["params"] = others
    train(others, optimizer, range(2, 4))
    assert torch.equal(expected[0], others[0])


@pytest.mark.parametrize(
    ("replace", "message"),
    [
        (
            lambda groups: groups[0].update(params=parameters((48,))),
            r"'w'.*shape \(6, 8\).*shape \(48,\).*fully_shard",
        ),
        (lambda groups: groups[0].update(params=[]), "'w'.*1 parameters.*has 0 now.*fragments"),
        (lambda groups: groups.pop(), "'w'.*with 1 parameter groups.*has 0 now"),
        (
            lambda groups: groups[0].update(rule="muon"),
            "built with rule 'orscale_lm' and has 'muon' now",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_at_the_step(replace, message):
    (p,) = parameters((6, 8))
    optimizer = build([("w", p)])
    replace(optimizer.param_groups)
    give_gradients([p], 0)
    with pytest.raises(ValueError, match=message):
        optimizer.step()


def reshard_after_a_step():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    (value,) = tensors((6, 8))
    p = nn.Parameter(distribute_tensor(value, mesh, [Replicate()]))
    optimizer = build([("w", p)])
    p.grad = distribute_tensor(value, mesh, [Replicate()])
    optimizer.step()
    q = nn.Parameter(distribute_tensor(p.full_tensor().detach(), mesh, [Shard(0)]))
    q.grad = distribute_tensor(value, mesh, [Shard(0)])
    optimizer.param_groups[0]["params"] = [q]
    optimizer.step()


def test_momentum_of_another_sharding_is_not_lost_silently(pool):
    for kind, message in pool(2).run(reshard_after_a_step, timeout=30, expect_error=True):
        assert kind == "ValueError"
        assert "'w' has been replaced by one that is sharded otherwise" in message


# --- without a gradient


@pytest.mark.parametrize("rule", [*RULES, "torch"])
def test_what_has_no_gradient_is_left_alone(rule):
    """Frozen from the start, frozen later, and not used in one step: weights, state and the others'
    steps."""
    params, expected = parameters((6, 8), (5, 4), (4, 7)), parameters((6, 8), (5, 4), (4, 7))
    frozen, late, used = params
    frozen.requires_grad_(False)
    optimizer, straight = build(params, rule), build(expected, rule)
    train([late, used], optimizer, range(2))
    train(expected[1:], straight, range(2))
    assert frozen not in optimizer.state
    before, state = late.detach().clone(), copy.deepcopy(optimizer.state[late])
    for seed in (2, 3):
        give_gradients([used], seed)
        give_gradients(expected[2:], seed)
        optimizer.step()
        straight.step()
    assert torch.equal(late, before)
    assert all(torch.equal(optimizer.state[late][key], value) for key, value in state.items())
    assert torch.equal(frozen, expected[0])
    assert torch.equal(used, expected[2])
    frozen.requires_grad_()
    train(params, optimizer, [4])
    assert not torch.equal(frozen, expected[0])
    assert not torch.equal(late, before)


def test_a_step_without_any_gradient_says_so_once():
    optimizer = build(parameters((4, 4)))
    with pytest.warns(UserWarning, match="no gradient in any of its parameters"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def partly_without(
    rule: str, absent: str
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Weights and first buffers after three steps; in the second and third one parameter has no
    gradient on rank 1 ("some"), or on all ("none"), or zeros there ("zeros")."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    shapes = ((6, 8), (5, 4), (7, 3))
    params = [
        nn.Parameter(distribute_tensor(t, mesh, [Shard(0)]))
        for t in tensors(*shapes, dtype=torch.float64)
    ]
    optimizer = build(params, rule, compute_dtype=torch.float64)
    before = None
    for step in range(3):
        for p, g in zip(params, tensors(*shapes, seed=100 + step, dtype=torch.float64)):
            p.grad = distribute_tensor(g, mesh, [Shard(0)])
        here = step and (absent == "none" or dist.get_rank() == 1)
        if here and absent == "zeros":
            params[1].grad = params[1].grad * 0
        elif here:
            params[1].grad = None
        before = before if step > 1 else [p.full_tensor().detach().clone() for p in params]
        optimizer.step()
    buffers = [
        next(v for v in optimizer.state[p].values() if isinstance(v, DTensor)) for p in params
    ]
    scalars = [optimizer.state[p]["step"] for p in params if "step" in optimizer.state[p]]
    return (
        [p.full_tensor().detach() for p in params],
        [b.full_tensor() for b in buffers] + scalars,
        before,
    )


@pytest.mark.parametrize(
    "rule", ["muonh", "orscale_lm", "hybrid_momentum", "adamw", "adamh", "lion", "sgd", "lamb"]
)
def test_ranks_agree_on_what_has_no_gradient(pool, rule):
    """On some ranks only it counts as zero there; on none it is left alone, its momentum too.
    1e-12: float64, whose rounding is the only difference between a missing and a zero gradient."""
    for some, zeros in zip(
        *(pool(3).run(partly_without, rule, how, timeout=60) for how in ("some", "zeros"))
    ):
        for a, b in zip(some[0] + some[1], zeros[0] + zeros[1]):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for weights, _, before in pool(3).run(partly_without, rule, "none", timeout=60):
        assert torch.equal(weights[1], before[1])
        assert not torch.equal(weights[0], before[0])


def used_by_one_rank() -> list[torch.Tensor]:
    """DDP with a head that only rank 0 uses, and one that nobody does."""
    torch.manual_seed(0)
    net = nn.ModuleDict(
        {
            "body": nn.Linear(4, 6, bias=False),
            "used": nn.Linear(6, 3, bias=False),
            "idle": nn.Linear(6, 3, bias=False),
        }
    )

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            hidden = self.net["body"](x)
            return (
                self.net["used"](hidden).square().mean()
                if dist.get_rank() == 0
                else hidden.square().mean()
            )

    model = nn.parallel.DistributedDataParallel(Heads(), find_unused_parameters=True)
    optimizer = build(list(net.parameters()), "orscale_lm")
    before = [p.detach().clone() for p in net.parameters()]
    for step in range(3):
        model(torch.randn(5, 4, generator=torch.Generator().manual_seed(step))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [torch.stack([p.detach(), b]) for p, b in zip(net.parameters(), before)]


def test_ddp_with_parameters_that_not_all_use(pool):
    results = pool(2).run(used_by_one_rank, timeout=60)
    for after, before in zip(*results):
        torch.testing.assert_close(after, before, rtol=0, atol=0)  # the same on both ranks
    moved = [not torch.equal(*pair) for pair in results[0]]
    assert moved == [True, True, False]


# --- copies, state, hooks


@pytest.mark.parametrize("which", CONTROL)
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_train_on(which, how):
    net = wrapped.model()
    optimizer = wrapped.optimizer(which, net)

    def step(net, optimizer, seed):
        wrapped.loss(net, *wrapped.batch_of(seed, 1, 0)).backward()
        optimizer.step()
        optimizer.zero_grad()

    for seed in range(2):
        step(net, optimizer, seed)
    if how == "deepcopy":
        twin, twins_optimizer = copy.deepcopy((net, optimizer))
    elif how == "pickle":
        twin, twins_optimizer = pickle.loads(pickle.dumps((net, optimizer)))
    else:
        stream = io.BytesIO()
        torch.save((net, optimizer), stream)
        stream.seek(0)
        twin, twins_optimizer = torch.load(stream, weights_only=False)
    step(net, optimizer, 2)
    for p, q in zip(net.parameters(), twin.parameters()):
        assert not torch.equal(p, q)  # a copy that moves with the original would be none
    step(twin, twins_optimizer, 2)
    for p, q in zip(net.parameters(), twin.parameters()):
        assert torch.equal(p, q)


def own_group() -> list[torch.Tensor]:
    group = dist.new_group(list(range(dist.get_world_size())))
    params = parameters((6, 8))
    optimizer = build(params, process_group=group)
    train(params, optimizer, range(2))
    with pytest.raises(ValueError, match="process_group of its own cannot be pickled"):
        pickle.dumps(optimizer)
    twins, twin = copy.deepcopy((params, optimizer))
    train(params, optimizer, [2])
    train(twins, twin, [2])
    return [params[0].detach(), twins[0].detach()]


def test_a_deep_copy_shares_the_process_group(pool):
    for original, copied in pool(2).run(own_group, timeout=30):
        assert torch.equal(original, copied)


@pytest.mark.parametrize("rule", [*RULES, "torch"])
def test_cleared_state_starts_anew(rule):
    """As a new optimizer on the same weights, radius and calibration too (ReLoRA, restarts of
    moments)."""
    params = parameters((6, 8), (4, 3))
    optimizer = build(params, rule)
    train(params, optimizer, range(2))
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    fresh = build(twins, rule)
    optimizer.state.clear()
    train(params, optimizer, range(2, 4))
    train(twins, fresh, range(2, 4))
    for p, q in zip(params, twins):
        assert torch.equal(p, q)


def test_load_state_dict_hooks_run_and_may_change_what_is_loaded():
    params = parameters((6, 8))
    optimizer = build(params)
    train(params, optimizer, range(2))
    seen = []

    def double(_, state_dict):
        seen.append("before")
        return state_dict | {
            "state": {
                0: state_dict["state"][0] | {"momentum": state_dict["state"][0]["momentum"] * 2}
            }
        }

    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.register_load_state_dict_pre_hook(double)
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("after"))
    optimizer.load_state_dict(saved)
    assert seen == ["before", "after"]
    assert torch.equal(optimizer.state[params[0]]["momentum"], saved["state"][0]["momentum"] * 2)


@pytest.mark.parametrize("rule", ["orscale_lm", "adamw", "torch"])
def test_compiled_step(rule):
    params, expected = parameters((6, 8), (4, 3)), parameters((6, 8), (4, 3))
    optimizer, straight = build(params, rule), build(expected, rule)
    compiled = torch.compile(optimizer.step, backend="eager")
    for seed in range(3):
        give_gradients(params, seed)
        give_gradients(expected, seed)
        compiled()
        straight.step()
    for p, q in zip(
        params, expected
    ):  # torch compiles its own into other, equally rounded, operations
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


# --- schedulers


@pytest.mark.parametrize("rule", ["orscale_lm", "torch"])
def test_every_key_of_a_saved_group_survives(rule):
    params = parameters((6, 8))
    optimizer = build(params, rule)
    optimizer.param_groups[0]["mine"] = "kept"
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for seed in range(3):
        train(params, optimizer, [seed])
        scheduler.step()
    stream = io.BytesIO()
    torch.save(optimizer.state_dict(), stream)
    stream.seek(0)
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    twin = build(twins, rule)
    twin.load_state_dict(torch.load(stream, weights_only=True))
    assert (
        twin.param_groups[0].items()
        >= {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}.items()
    )
    assert twin.param_groups[0]["initial_lr"] == 0.02
    again = torch.optim.lr_scheduler.LambdaLR(twin, lambda step: 1 / (1 + step), last_epoch=2)
    for step in (scheduler, again):
        step.step()
    assert twin.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("scheduler", ["OneCycleLR", "CyclicLR"])
def test_cyclic_schedulers_cycle_the_momentum(scheduler):
    """μ of matrix groups; β₁ where the optimizer's own rule is Adam's, as torch's AdamW has it."""
    make = {
        "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=8),
        "CyclicLR": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    }[scheduler]
    for rule, key in (("muon", "momentum"), ("adamw", "betas")):
        params = parameters((6, 8))
        optimizer = build(params, rule)
        schedule, values = make(optimizer), set()
        for seed in range(6):
            train(params, optimizer, [seed])
            values.add(optimizer.param_groups[0][key])
            schedule.step()
        assert len(values) > 2


@pytest.mark.parametrize("rule", ["muon", "orscale_lm", "muonh", "adamw", "lamb", "lion"])
def test_a_learning_rate_may_be_a_tensor(rule):
    params, expected = parameters((6, 8)), parameters((6, 8))
    optimizer, straight = build(params, rule), build(expected, rule)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.02, dtype=torch.float64)
    train(params, optimizer, range(3))
    train(expected, straight, range(3))
    # η rounded to float32 or not: half a unit in the last place of a step, which moves a weight by
    # less than 1
    torch.testing.assert_close(params[0], expected[0], rtol=1e-6, atol=1e-6)


# --- state dicts


def checkpoints(which: str, form: str, path: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Weights after two and two more steps, straight and through a checkpoint in another process's
    model."""
    from torch.distributed.fsdp import fully_shard

    full = StateDictOptions(
        full_state_dict=True, cpu_offload=True
    )  # rank 0 has all of it, the others nothing
    options = {
        "sharded": StateDictOptions(),
        "sharded on the CPU": StateDictOptions(cpu_offload=True),
        "flat": StateDictOptions(flatten_optimizer_state_dict=True),
        "full": StateDictOptions(full_state_dict=True),
        "full on the CPU": full,
        "from rank 0": full,
    }[form]

    def make(seed):
        net = wrapped.model()
        with torch.no_grad():
            for p in net.parameters():
                p.add_(seed)
        fully_shard(net, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        return net, wrapped.optimizer(which, net)

    def steps(net, optimizer, seeds):
        for seed in seeds:
            wrapped.loss(net, *wrapped.batch(seed)).backward()
            optimizer.step()
            optimizer.zero_grad()

    net, optimizer = make(0)
    steps(net, optimizer, range(2))
    weights, state = get_state_dict(net, optimizer, options=options)
    twin, twins_optimizer = make(1)
    if form.startswith("sharded") or form == "flat":
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=path)
        content = dict(
            zip(("model", "optimizer"), get_state_dict(twin, twins_optimizer, options=options))
        )
        dcp.load(content, checkpoint_id=path)
        weights, state = content["model"], content["optimizer"]
    else:
        files = [io.BytesIO(), io.BytesIO()]
        for file, value in zip(files, (weights, state)):
            torch.save(value, file)
        if form == "full on the CPU":
            dist.broadcast_object_list(files, src=0)
        for file in files:
            file.seek(0)
        weights, state = (torch.load(file, weights_only=True) for file in files)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=form == "from rank 0")
    set_model_state_dict(twin, weights, options=options)
    set_optimizer_state_dict(twin, twins_optimizer, state, options=options)
    steps(net, optimizer, range(2, 4))
    steps(twin, twins_optimizer, range(2, 4))
    return tuple([p.full_tensor().detach() for p in m.parameters()] for m in (net, twin))


@pytest.mark.parametrize("which", CONTROL)
@pytest.mark.parametrize(
    "form", ["sharded", "sharded on the CPU", "flat", "full", "full on the CPU", "from rank 0"]
)
def test_state_dicts_of_torch_distributed(pool, tmp_path, which, form):
    for straight, resumed in pool(2).run(checkpoints, which, form, str(tmp_path), timeout=60):
        for a, b in zip(straight, resumed):
            assert torch.equal(a, b)


# --- odd gradients


@pytest.fixture
def float64_default():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_the_step_count_is_float32_whatever_the_default(float64_default):
    params = parameters((6, 8))
    optimizer = build(params, "adamw")
    train(params, optimizer, range(2))
    assert optimizer.state[params[0]]["step"].dtype == torch.float32


def test_bias_correction_of_float64_weights_is_float64():
    """1 − 0.95^t to float32 is off by 1e-7; against torch's AdamW, which counts in Python
    floats."""
    params = [nn.Parameter(t) for t in tensors((6, 8), dtype=torch.float64)]
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    ours = build(params, "adamw", weight_decay=0.01)
    theirs = torch.optim.AdamW(twins, lr=0.02, betas=(0.9, 0.95), weight_decay=0.01)
    train(params, ours, range(5))
    train(twins, theirs, range(5))
    torch.testing.assert_close(params[0], twins[0], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("rule", ["orscale_lm", "adamw", "lion", "sgd", "torch"])
def test_a_gradient_that_is_not_contiguous(rule):
    params, expected = parameters((6, 8)), parameters((6, 8))
    optimizer, straight = build(params, rule), build(expected, rule)
    for seed in range(2):
        give_gradients(expected, seed)
        params[0].grad = expected[0].grad.T.contiguous().T
        assert not params[0].grad.is_contiguous()
        optimizer.step()
        straight.step()
    assert torch.equal(params[0], expected[0])


def test_a_sparse_gradient_is_refused_by_name():
    embedding = nn.Embedding(10, 4, sparse=True)
    optimizer = build([("emb.weight", embedding.weight)], "adamw")
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match=r"'emb.weight' has a sparse gradient.*sparse=False"):
        optimizer.step()


# --- groups, views, shards


@pytest.mark.parametrize("rule", ["muonh", "orscale_lm", "adamw", "torch"])
def test_a_group_given_later_trains_as_if_given_at_once(rule):
    """Its parameters had no gradient before, so both ways start at the same weights."""
    params, expected = parameters((6, 8), (4, 3)), parameters((6, 8), (4, 3))
    optimizer, straight = build(params[:1], rule), build(expected, rule)
    train(params[:1], optimizer, range(2))
    train(expected[:1], straight, range(2))
    optimizer.add_param_group({"params": params[1:]})
    train(params, optimizer, range(2, 4))
    train(expected, straight, range(2, 4))
    for p, q in zip(params, expected):
        assert torch.equal(p, q)


def test_a_refused_group_leaves_the_optimizer_as_it_was():
    params, expected = parameters((6, 8)), parameters((6, 8))
    optimizer, straight = build([("w", params[0])]), build([("w", expected[0])])
    for group, message in (
        (
            {"params": [("conv", nn.Parameter(torch.ones(4, 3, 3)))], "view": None},
            "group 1: parameter 'conv'.*view=",
        ),
        (
            {"params": [("again", params[0])]},
            "group 1: parameter 'w' is given twice, also as 'again'",
        ),
        ({"params": [("v", nn.Parameter(torch.ones(3)))]}, "group 1: parameter 'v'.*rule='adamw'"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group(group)
    train(params, optimizer, range(2))
    train(expected, straight, range(2))
    assert torch.equal(params[0], expected[0])


def added_later() -> torch.Tensor:
    params = parameters((6, 8), (4, 3))
    optimizer = build(params[:1])
    train(params[:1], optimizer, range(2))
    optimizer.add_param_group({"params": params[1:]})
    train(params, optimizer, range(2, 4))
    return torch.cat([p.detach().flatten() for p in params])


def test_a_group_given_later_on_several_ranks(pool):
    expected = added_later()
    for weights in pool(2).run(added_later, timeout=30):
        torch.testing.assert_close(weights, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rule", ["muonh", "orscale_lm", "lamb"])
def test_a_convolution_kernel_steps_as_its_matrix(rule):
    """`view: flatten` gives what the flattened parameter gives; `stack` what each matrix gives."""
    kernel, stack = parameters((6, 4, 3), (6, 4, 3))
    flat, slices = (
        nn.Parameter(kernel.detach().flatten(1)),
        [nn.Parameter(m.clone()) for m in stack.detach()],
    )
    optimizers = [
        build(
            [{"params": [kernel], "view": "flatten"}, {"params": [stack], "view": "stack"}], rule
        ),
        build([flat, *slices], rule, view=None),
    ]
    for seed in range(3):
        gradient, gradients = tensors((6, 4, 3), (6, 4, 3), seed=seed)
        kernel.grad, stack.grad, flat.grad = (
            gradient.clone(),
            gradients.clone(),
            gradient.flatten(1).clone(),
        )
        for p, g in zip(slices, gradients):
            p.grad = g.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(kernel.flatten(1), flat, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        stack, torch.stack([p.detach() for p in slices]), rtol=1e-6, atol=1e-6
    )


PLACEMENTS = [
    ((2,), [Shard(1)]),
    ((3,), [Shard(1)]),
    ((3,), [Shard(2)]),
    ((2, 2), [Shard(0), Shard(1)]),
    ((2, 2), [Shard(1), Shard(0)]),
    ((2, 2), [Replicate(), Shard(1)]),
    ((2, 2), [Shard(1), Shard(1)]),
    ((2, 2), [Shard(1), Shard(2)]),
]
BOXES = [(5, 7), (3, 4), (18, 11), (1, 6), (4, 5, 6), (2, 3, 7)]


def placed(mesh_shape, placements, rule: str, steps: int):
    """Weights after some steps, and whether `local_pieces` says of each element where DTensor put
    it."""
    mesh = init_device_mesh("cpu", mesh_shape)
    shapes = [
        s for s in BOXES if all(not isinstance(p, Shard) or p.dim < len(s) for p in placements)
    ]
    right = True
    for shape in shapes:
        numbers = torch.arange(torch.Size(shape).numel()).view(shape)
        local = distribute_tensor(numbers, mesh, placements)
        named = [
            p.start + i * p.stride + j
            for p in local_pieces(local)
            for i in range(p.count)
            for j in range(p.length)
        ]
        right &= named == local.to_local().flatten().tolist()
    values = tensors(*shapes, dtype=torch.float64)
    params = [nn.Parameter(distribute_tensor(value, mesh, placements)) for value in values]
    optimizer = build(params, rule, compute_dtype=torch.float64)
    for step in range(steps):
        for p, g in zip(params, tensors(*shapes, seed=step, dtype=torch.float64)):
            p.grad = distribute_tensor(g, mesh, placements)
        optimizer.step()
    return right, [p.full_tensor().detach() for p in params]


@pytest.mark.parametrize(
    ("mesh_shape", "placements"), PLACEMENTS, ids=[str(p) for _, p in PLACEMENTS]
)
def test_shards_within_rows(pool, mesh_shape, placements):
    """Columns, both dimensions, experts' columns; uneven and empty ones; against one process, in
    float64."""
    shapes = [
        s for s in BOXES if all(not isinstance(p, Shard) or p.dim < len(s) for p in placements)
    ]
    for rule in ("orscale_lm", "muonh", "adamh"):
        params = [nn.Parameter(value) for value in tensors(*shapes, dtype=torch.float64)]
        optimizer = build(params, rule, compute_dtype=torch.float64)
        for step in range(2):
            for p, g in zip(params, tensors(*shapes, seed=step, dtype=torch.float64)):
                p.grad = g
            optimizer.step()
        ranks = mesh_shape[0] * (mesh_shape[1] if len(mesh_shape) > 1 else 1)
        for right, weights in pool(ranks).run(placed, mesh_shape, placements, rule, 2, timeout=60):
            assert right
            for a, b in zip(params, weights):
                torch.testing.assert_close(a.detach(), b, rtol=1e-10, atol=1e-12)


# --- what users' dicts and ranks do


def test_groups_can_be_used_twice():
    """Two optimizers from the same dicts are alike: nothing is taken out of them."""
    attention = nn.MultiheadAttention(8, 2, bias=False)
    groups = matrix_groups(attention)
    names = [MatrixOptimizer(groups, lr=lr, rule="muon").matrix_names() for lr in (0.1, 0.2)]
    assert (
        names[0]
        == names[1]
        == ["in_proj_weight.q", "in_proj_weight.k", "in_proj_weight.v", "out_proj.weight"]
    )
    assert MatrixOptimizer(groups, lr=0.2, rule="muon").param_groups[0]["lr"] == 0.2


def test_the_state_of_a_rule_of_ones_own_loads():
    mine = Rule("mine", shape="spectral")
    params = parameters((6, 8))
    optimizer = MatrixOptimizer(params, lr=0.02, rule=mine)
    train(params, optimizer, range(2))
    twin = MatrixOptimizer([nn.Parameter(params[0].detach().clone())], lr=0.02, rule=mine)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(
        *(o.state[o.param_groups[0]["params"][0]]["momentum"] for o in (optimizer, twin))
    )


def sharded_state_into_whole() -> bool:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    (value,) = tensors((2, 3))
    p = nn.Parameter(distribute_tensor(value, mesh, [Shard(0)]))
    optimizer = build([p])
    p.grad = distribute_tensor(tensors((2, 3), seed=5)[0], mesh, [Shard(0)])
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    whole = nn.Parameter(value.clone())
    other = build([whole])
    other.load_state_dict(saved)
    return torch.equal(other.state[whole]["momentum"], optimizer.state[p]["momentum"].full_tensor())


def test_a_sharded_state_fills_whole_parameters(pool):
    assert all(pool(2).run(sharded_state_into_whole, timeout=30))


def one_row_sharded_later(rule: str) -> torch.Tensor:
    """On rank 0 the shard of a matrix of one row is laid out as the whole one was, on rank 1 it is
    empty."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    (value,) = tensors((1, 4))
    optimizer = build([("w", nn.Parameter(value.clone()))], rule)
    p = nn.Parameter(distribute_tensor(value, mesh, [Shard(0)]))
    optimizer.param_groups[0]["params"] = [p]
    for seed in range(2):
        p.grad = distribute_tensor(tensors((1, 4), seed=seed)[0], mesh, [Shard(0)])
        optimizer.step()
    return p.full_tensor().detach()


@pytest.mark.parametrize("rule", ["muonh", "orscale_lm"])
def test_ranks_decide_together_what_becomes_of_the_state(pool, rule):
    params = parameters((1, 4))
    optimizer = build(params, rule)
    for seed in range(2):
        params[0].grad = tensors((1, 4), seed=seed)[0]
        optimizer.step()
    for weights in pool(2).run(one_row_sharded_later, rule, timeout=30):
        torch.testing.assert_close(weights, params[0].detach(), rtol=1e-6, atol=1e-6)


def refused_twice() -> list[str]:
    messages = []
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    (value,) = tensors((6, 8))
    p = nn.Parameter(value.clone())
    optimizer = build([("w", p)])
    p.grad = value.clone()
    optimizer.step()
    q = nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)]))
    q.grad = distribute_tensor(value, mesh, [Shard(0)])
    optimizer.param_groups[0]["params"] = [q]
    for _ in range(2):
        with pytest.raises(ValueError, match="sharded otherwise") as caught:
            optimizer.step()
        messages.append(str(caught.value))
    assert p in optimizer.state
    return messages


def test_a_refused_replacement_is_refused_again(pool):
    for first, second in pool(2).run(refused_twice, timeout=30):
        assert first == second


def test_a_parameter_moved_to_another_group_is_refused():
    a, b, c = parameters((4, 4), (4, 4), (4, 4))
    optimizer = build([{"params": [("a", a), ("b", b)]}, {"params": [("c", c)], "lr": 0.0}])
    optimizer.param_groups[0]["params"] = [a]
    optimizer.param_groups[1]["params"] = [b, c]
    give_gradients([a, b, c], 0)
    with pytest.raises(ValueError, match="group 0: parameter 'b'.*had 2 parameters.*has 1 now"):
        optimizer.step()


def test_a_weight_that_is_no_longer_contiguous_is_refused_by_name():
    convolution = nn.Conv2d(3, 4, 3, bias=False)
    optimizer = build(convolution.named_parameters(), "orscale_lm", view="flatten")
    convolution.to(memory_format=torch.channels_last)
    give_gradients([convolution.weight], 0)
    with pytest.raises(ValueError, match="'weight' is no longer contiguous"):
        optimizer.step()


def real_on_one_rank() -> None:
    with torch.device("cpu" if dist.get_rank() == 0 else "meta"):
        weight = nn.Parameter(torch.ones(4, 4))
    MatrixOptimizer([("w", weight)], lr=0.1, rule="muon")


def frozen_on_one_rank() -> None:
    weight = nn.Parameter(torch.ones(4, 4), requires_grad=dist.get_rank() == 0)
    MatrixOptimizer([("w", weight)], lr=0.1, rule="muon")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (real_on_one_rank, "'w' is on the meta device"),
        (frozen_on_one_rank, "the ranks have different parameters.*'w'"),
    ],
)
def test_what_one_rank_refuses_all_refuse(pool, make, message):
    for kind, text in pool(2).run(make, timeout=30, expect_error=True):
        assert kind == "ValueError"
        assert re.search(message, text)


def test_clip_bounds_are_for_the_groups_with_a_ratio():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = MatrixOptimizer(matrix_groups(model), lr=0.1, rule="orscale", clip=(0.5, 1.0))
    assert [group["clip"] for group in optimizer.param_groups] == [(0.5, 1.0), None]


def test_diagnostics_after_a_group_is_added():
    params = parameters((6, 8), (4, 3))
    optimizer = build(params[:1])
    train(params[:1], optimizer, range(2))
    optimizer.add_param_group({"params": params[1:]})
    params[1].grad = torch.ones(4, 3)
    optimizer.step()
    seen = optimizer.diagnostics()
    torch.testing.assert_close(seen["weight_norm"][0], params[0].detach().norm())
    assert abs(seen["norm_drift"][0].item()) < 0.5


def test_the_warning_names_the_callers_line():
    optimizer = build(parameters((4, 4)))
    with pytest.warns(UserWarning, match="no gradient") as caught:
        optimizer.step()
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"compute_dtype": "bf16"}, ValueError, "compute_dtype 'bf16' is no dtype of torch"),
        ({"betas": (2.0, 0.9)}, ValueError, r"betas \(2.0, 0.9\) must lie in \[0, 1\)"),
        ({"adam_eps": -1.0}, ValueError, "adam_eps -1.0 must not be negative"),
        ({"view": "rows"}, ValueError, "unknown view 'rows'; one of stack, flatten"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        build(parameters((4, 4)), **options)


def test_a_set_of_parameters_is_refused_as_torch_does():
    with pytest.raises(TypeError, match="ordered"):
        MatrixOptimizer([{"params": set(parameters((4, 4)))}], lr=0.1)


def test_a_state_of_another_view_is_refused():
    stack = build([nn.Parameter(torch.ones(4, 3, 3))], "muon").state_dict()
    with pytest.raises(ValueError, match="saved.*view 'stack'.*'flatten'"):
        build([nn.Parameter(torch.ones(4, 3, 3))], "muon", view="flatten").load_state_dict(stack)


def test_construction_looks_at_each_parameter_once(monkeypatch):
    from archscale.optim import contract, layout, state

    checked, norms = [], []
    check, take = layout.check_parameter, state.weight_norms
    monkeypatch.setattr(
        layout, "check_parameter", lambda name, *rest: checked.append(name) or check(name, *rest)
    )
    for module in (contract, state):
        monkeypatch.setattr(
            module, "weight_norms", lambda *where: norms.append(where) or take(*where)
        )
    build([("a", nn.Parameter(torch.ones(4, 6))), ("b", nn.Parameter(torch.ones(3, 5)))])
    assert (checked, len(norms)) == (["a", "b"], 1)


def test_a_copy_refuses_a_wrong_group_at_once():
    optimizer = copy.deepcopy(build(parameters((6, 8))))
    with pytest.raises(ValueError, match="parameter group 1: parameter 'parameter 1' is not co"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(4, 6).mT)]})
    assert len(optimizer.param_groups) == 1
    train(optimizer.param_groups[0]["params"], optimizer, range(1))
