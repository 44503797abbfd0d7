"""Every script in archscale/optim/examples, run as its first line says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import archscale.optim.examples
from tests.commands import launch

pytest.importorskip("sklearn")

from archscale.optim.examples.digits import ConvNet, accuracy
from archscale.optim.examples.one_process import train

SCRIPTS = {path.stem for path in Path(archscale.optim.examples.__file__).parent.glob("*.py")}


def check(printed: str) -> None:
    found = re.search(r"loss (\S+), held-out accuracy (\S+)", printed)
    assert found, printed
    loss, right = map(float, found.groups())
    assert loss < 0.1
    assert right > 0.95


@pytest.fixture
def one_thread():
    """Matrices this small are slower on two, much slower where other processes want the core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "rule",
    [
        "orscale",
        *(pytest.param(rule, marks=pytest.mark.slow) for rule in ("muon", "moonlight", "adamw")),
    ],
)
@pytest.mark.usefixtures("one_thread")
def test_a_convnet_learns_digits_with_every_parameter(rule):
    model, _ = train(rule)
    assert accuracy(model) > 0.95
    torch.manual_seed(0)
    for (name, p), start in zip(model.named_parameters(), ConvNet().parameters()):
        assert not torch.equal(p, start), name


SLOW = [
    pytest.param(script, marks=pytest.mark.slow)
    for script in ("ddp", "with_accelerate", "deepspeed_zero")
]


@pytest.mark.parametrize("script", ["fsdp2", *SLOW])
def test_a_script_on_two_ranks(script):
    if script == "with_accelerate":
        pytest.importorskip("accelerate")
    if script == "deepspeed_zero":
        pytest.importorskip("deepspeed")
    done = launch([], processes=2, module=f"archscale.optim.examples.{script}", timeout=100)
    check(done.stdout)


def accelerated_with_fsdp2():
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    from archscale.optim.examples import with_accelerate

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="SIZE_BASED_WRAP", min_num_params=10_000
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    # accelerate offers FSDP2 on accelerators only; its code runs on a CPU when told to.
    told = {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
    AcceleratorState._shared_state.update(told)
    assert accelerator.is_fsdp2
    try:
        return with_accelerate.train(accelerator)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_accelerate_with_fsdp2(pool):
    """Its `prepare` replaces the optimizer's parameters by shards after construction."""
    pytest.importorskip("accelerate")
    for printed in pool(2).run(accelerated_with_fsdp2, timeout=60):
        assert "(DTensor on 2 ranks)" in printed
        check(printed)


def test_every_script_is_run_here():
    source = Path(__file__).read_text()
    scripts = SCRIPTS - {"__init__", "digits", "one_process"}
    assert {script for script in scripts if f'"{script}"' in source} == scripts
