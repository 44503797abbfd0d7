"""The test harness on itself: results, hangs, errors, deaths, time limits, and nothing left
behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.commands import ROOT, LaunchFailed, LaunchTimeout
from tests.pool import PoolTimeout, WorkerDied, WorkerError, launch, pool, start


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def eventually(condition, seconds=10.0):
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.05)
    return condition()


def rank_sum(tensor, scale=1):
    tensor = tensor + scale * dist.get_rank()
    dist.all_reduce(tensor)
    return tensor


def surroundings():
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS")
    os.environ["LEFT_BEHIND"] = "1"
    return (
        os.getpid(),
        {name: os.environ[name] for name in names},
        torch.get_num_threads(),
        torch.rand(1),
    )


def left_behind():
    return "LEFT_BEHIND" in os.environ, torch.rand(1)


def rank_zero_waits_alone():
    if dist.get_rank() == 0:
        dist.barrier()


def spin_in_python():
    while True:
        time.sleep(0.01)


def rank_one_raises():
    print("said before the error", flush=True)
    if dist.get_rank() == 1:
        raise KeyError("planted")
    dist.barrier()


def everyone_raises(kinds):
    raise {"key": KeyError, "value": ValueError}[kinds[dist.get_rank()]](f"on {dist.get_rank()}")


def rank_one_dies():
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def unpicklable():
    return lambda: None


def many_groups():
    for _ in range(20):
        dist.new_group([0, 1])
    return len(os.listdir("/proc/self/task"))


def sharded_gradient():
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(1)
    model: Any = torch.nn.Linear(6, 5)
    inputs = torch.randn(4, 6)
    model(inputs).square().mean().backward()
    expected = model.weight.grad.clone()
    model.zero_grad()
    fully_shard(model)
    model(inputs).square().mean().backward()
    grad = model.weight.grad
    torch.testing.assert_close(grad.full_tensor(), expected)
    return grad.to_local()


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_all_reduce(world_size):
    results = pool(world_size).run(rank_sum, torch.arange(3.0), scale=10)
    expected = world_size * torch.arange(3.0) + 10 * sum(range(world_size))
    assert len(results) == world_size
    assert all(torch.equal(result, expected) for result in results)


def test_workers_stay_and_look_like_torchrun(pool):
    first, second = pool(3).run(surroundings), pool(3).run(surroundings)
    assert [r[0] for r in first] == [r[0] for r in second] == pool(3).pids
    for rank, (_, env, threads, _) in enumerate(first):
        assert env == {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "3",
            "OMP_NUM_THREADS": "1",
        }
        assert threads == 1
    for leaked, random in pool(3).run(left_behind):
        assert not leaked
        assert torch.equal(random, first[0][3])  # every run starts from the same seed


def test_fully_shard_with_backward():
    shards = pool(2).run(sharded_gradient)
    assert [tuple(s.shape) for s in shards] == [(3, 6), (2, 6)]


@pytest.mark.parametrize("fn", [rank_zero_waits_alone, spin_in_python])
def test_a_hang_ends_with_stacks(fn):
    began = time.monotonic()
    pool(2).run(rank_sum, torch.zeros(1))
    pids = pool(2).pids
    with pytest.raises(PoolTimeout, match=f"in {fn.__name__}") as caught:
        pool(2).run(fn, timeout=1)
    assert time.monotonic() - began < 20
    assert "stacks of rank 0" in str(caught.value)
    assert "tests/test_pool.py" in str(caught.value)
    assert not any(map(alive, pids))
    assert pool(2).run(rank_sum, torch.zeros(1)) == [torch.ones(1)] * 2


def test_an_error_on_one_rank_is_reported_while_the_others_wait():
    began = time.monotonic()
    with pytest.raises(WorkerError, match="rank 1 of 2 raised KeyError: 'planted'") as caught:
        pool(2).run(rank_one_raises)
    assert time.monotonic() - began < 20
    assert (caught.value.rank, caught.value.type_name) == (1, "KeyError")
    assert "in rank_one_raises" in caught.value.traceback
    assert "said before the error" in str(caught.value)
    assert pool(2).run(rank_sum, torch.zeros(1)) == [torch.ones(1)] * 2


def test_expected_errors_and_when_the_workers_are_kept():
    pool(2).run(rank_sum, torch.zeros(1))
    pids = pool(2).pids
    alike = pool(2).run(everyone_raises, ["value", "value"], expect_error=True)
    assert alike == [("ValueError", "on 0"), ("ValueError", "on 1")]
    assert pool(2).run(rank_sum, torch.zeros(1), expect_error=True) == [None, None]
    assert pool(2).pids == pids
    mixed = pool(2).run(everyone_raises, ["value", "key"], expect_error=True)
    assert [name for name, _ in mixed] == ["ValueError", "KeyError"]
    pool(2).run(rank_sum, torch.zeros(1))
    assert not set(pool(2).pids) & set(pids)


def test_many_process_groups_over_many_tests():
    pool(2).run(rank_sum, torch.zeros(1))
    starts = pool(2).starts
    threads = [pool(2).run(many_groups)[0] for _ in range(8)]
    assert max(threads) < 480
    assert pool(2).starts == starts + 1


def test_what_cannot_be_sent():
    with pytest.raises(TypeError, match="not importable"):
        pool(2).run(lambda: 1)
    with pytest.raises(WorkerError, match="pickle"):
        pool(2).run(unpicklable)


def test_death_of_a_worker():
    began = time.monotonic()
    with pytest.raises(WorkerDied, match=r"rank 1 of 2 died \(exit code -9\)"):
        pool(2).run(rank_one_dies)
    pool(2).run(rank_sum, torch.zeros(1))
    os.kill(pool(2).pids[0], signal.SIGKILL)  # between two runs
    with pytest.raises(WorkerDied, match="rank 0 of 2 died"):
        pool(2).run(rank_sum, torch.zeros(1))
    assert time.monotonic() - began < 20
    assert pool(2).run(rank_sum, torch.zeros(1)) == [torch.ones(1)] * 2


@pytest.mark.slow
def test_nothing_outlives_a_killed_session(tmp_path):
    script = (
        "import os, signal, threading, time\n"
        "from tests.pool import pool, start\n"
        "pool(2).run(os.getpid)\n"
        "sleeper = start(['-n1', 'import time; time.sleep(60)'], module='timeit')\n"
        "print(*pool(2).pids, sleeper.process.pid, flush=True)\n"
        "threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()\n"
        "pool(2).run(time.sleep, 60)\n"
    )
    command, env = [sys.executable, "-c", script], os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    pids = list(map(int, done.stdout.split()))
    assert len(pids) == 3
    assert eventually(lambda: not any(map(alive, pids)))


PROGRAM = """
import os, subprocess, sys, time
rank = os.environ.get("RANK")
print(f"rank {rank} {sys.argv[1:]}", flush=True)
if "fail" in sys.argv:
    sys.exit("archscale: planted")
if "hang" in sys.argv:
    subprocess.Popen(["sleep", "60"], start_new_session=True)
    def stuck_here(): time.sleep(60)
    stuck_here()
"""


@pytest.fixture
def program(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    return {"module": "program", "env": {"PYTHONPATH": str(tmp_path)}}


def test_launch(program):
    done = launch(["a", "b"], **program)
    assert (done.returncode, done.stdout) == (0, "rank None ['a', 'b']\n")
    assert launch(["fail"], check=False, **program).returncode == 1
    with pytest.raises(LaunchFailed, match="archscale: planted"):
        launch(["fail"], **program)


def test_launch_timeout_kills_the_tree_and_shows_stacks(program):
    with pytest.raises(LaunchTimeout, match="in stuck_here"):
        launch(["hang"], timeout=1, **program)


def test_ranks_of_a_launch_can_be_found_and_killed(program):
    running = start(["hang"], processes=2, **program)
    assert eventually(lambda: running.output[0].count("rank") == 2, 60)
    assert eventually(
        lambda: len(running.tree()) == 5
    )  # torchrun, two ranks, two sleeping children
    tree = running.tree()
    assert sorted({rank for rank in tree.values() if rank is not None}) == [0, 1]
    running.kill()
    assert not any(map(alive, tree))


def test_the_limit_of_a_test(tmp_path):
    (tmp_path / "conftest.py").write_text("from tests.conftest import *\n")
    (tmp_path / "test_slow.py").write_text(
        "import pytest, time\n"
        "@pytest.mark.timeout(0.5)\n"
        "def test_sleeps():\n    time.sleep(30)\n"
        "def test_next():\n    pass\n"
    )
    options = ["-q", "-p", "no:cacheprovider", f"--rootdir={tmp_path}"]
    command = [sys.executable, "-m", "pytest", *options, str(tmp_path)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60
    )
    assert "1 failed, 1 passed" in done.stdout
    assert "over its limit of 0.5 s" in done.stdout
    assert "in test_sleeps" in done.stderr
