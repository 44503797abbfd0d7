"""MatrixOptimizer under other libraries' wrappers gives the weights that one process gives, as
torch's AdamW does."""

import functools

import pytest
import torch

from tests.optim import wrapped

LAYOUTS = [
    (2, "ddp"),
    (2, "fsdp2"),
    (3, "fsdp2"),
    (4, "hsdp"),
    (2, "tp"),
    (3, "tp"),
    (4, "fsdp2 x tp"),
]


def assert_same_weights(expected, results):
    """Five float32 steps. Sums in another order change a gradient by a few units in the last place,
    relative to its largest elements; orthogonalization of these well-conditioned matrices amplifies
    that by less than ten, and a step moves a weight by 1e-2: 1e-6 is then the bound with a margin
    of ten."""
    for weights in results:
        assert weights.keys() == expected.keys()
        for name, value in weights.items():
            message = functools.partial("{name}: {}".format, name=name)
            torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-6, msg=message)


@pytest.mark.parametrize("which", ["adamw", "ours"])
@pytest.mark.parametrize(("world", "layout"), LAYOUTS)
def test_torch(pool, which, world, layout):
    # torch's tensor parallelism wants features that its ranks divide; FSDP2 cuts what is left of
    # them unevenly.
    hidden = 18 if "tp" in layout else 19
    results = pool(world).run(wrapped.with_torch, which, layout, hidden=hidden, timeout=60)
    assert_same_weights(wrapped.alone(which, hidden=hidden), results)


@pytest.mark.parametrize("which", ["adamw", "ours"])
@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_accelerate(pool, which, layout):
    assert_same_weights(
        wrapped.alone(which), pool(2).run(wrapped.with_accelerate, which, layout, timeout=100)
    )


@pytest.mark.parametrize("which", ["adamw", "ours"])
@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_fabric(pool, which, layout):
    assert_same_weights(
        wrapped.alone(which), pool(2).run(wrapped.with_fabric, which, layout, timeout=100)
    )


@pytest.mark.parametrize("which", ["adamw", "ours"])
def test_fabric_on_one_process(which):
    assert_same_weights(wrapped.alone(which), [wrapped.with_fabric(which, "one process")])


@pytest.mark.parametrize("which", ["adamw", "ours"])
def test_trainer_of_transformers(which, tmp_path):
    assert_same_weights(
        wrapped.alone_with_a_schedule(which), [wrapped.with_trainer(which, str(tmp_path))]
    )


SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in ((2, False), (1, True))]


@pytest.mark.parametrize(("stage", "bf16"), [(1, False), (3, False), *SLOW])
def test_deepspeed_refuses_by_name(pool, stage, bf16):
    """Flat partitions are no matrices. torch's AdamW trains on them, and MatrixOptimizer says so
    instead of doing nothing."""
    for moved in pool(2).run(wrapped.with_deepspeed, "adamw", stage, bf16, timeout=100):
        assert all(change.any() for change in moved.values())
    for kind, message in pool(2).run(
        wrapped.with_deepspeed, "ours", stage, bf16, timeout=100, expect_error=True
    ):
        assert kind == "ValueError"
        assert "'norm.weight'" in message or "'up.weight'" in message
        assert "parallel.engine=deepspeed" in message
