"""Jobs that lose processes, nodes and the network between them, and go on."""

import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from archscale import distributed
from archscale.checkpoint.directory import STATE
from archscale.config import dump_config
from archscale.files import METRICS, OWNER, checkpoint_steps, step_directory
from archscale.train import stopping
from archscale.train.ownership import process_start, sole_owner, this_process
from tests import namespaces
from tests.commands import Launched, launch, start
from tests.train.test_ownership import leave
from tests.train.tiny import config, tiny_data

STEPS, EVERY = 80, 10
LONG = 400.0  # seconds within which a job has ended, however busy the machine is
# torchrun's own default waits half a minute for more nodes.
SOON = {"last_call_timeout": 5}


def test_the_micro_batch_follows_the_number_of_ranks():
    of_24 = config("nowhere")
    assert of_24.for_world_size(2) is of_24
    assert [of_24.for_world_size(n).training.micro_batch for n in (3, 8, 24)] == [4, 3, 1]
    assert of_24.for_world_size(5) is of_24
    assert of_24.world_sizes() == [1, 2, 3, 4, 6, 8, 12, 24]
    pairs = config("nowhere", parallel={"replicate": 2}, training={"batch_tokens": 12 * 16})
    assert pairs.world_sizes() == [2, 4, 6, 12]


def test_ranks_meet_apart_from_those_of_earlier_starts():
    store, prefixes = dist.HashStore(), {}

    def come(number: int) -> None:
        prefixes[number] = distributed.meet(store, number, 3, 20)

    for first in (0, 2):  # rank 0 comes first, and last, where the entries of all others are old
        earlier = dict(prefixes)
        order = sorted(range(3), key=lambda number: (number + first) % 3)
        ranks = [threading.Thread(target=come, args=(number,)) for number in order]
        for rank in ranks:
            rank.start()
            time.sleep(0.1)
        for rank in ranks:
            rank.join(20)
        assert len(set(prefixes.values())) == 1
        assert prefixes != earlier
    with pytest.raises(dist.DistStoreError, match=r"ranks \[1\] did not come"):
        distributed.meet(dist.HashStore(), 0, 2, 0.2)


def test_a_job_takes_the_directory_from_its_earlier_start(tmp_path, monkeypatch, capfd):
    """Though the earlier owner lives, as behind a cut network, or cannot be looked up."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job 7")
    other = subprocess.Popen(["sleep", "60"])
    try:
        for changes in ({"started": process_start(other.pid)}, {"host": "elsewhere"}):
            leave(tmp_path, pid=other.pid, **changes)
            with sole_owner(tmp_path):
                assert json.loads((tmp_path / OWNER).read_text())["pid"] == os.getpid()
        assert "waiting" not in capfd.readouterr().err
    finally:
        other.kill()
        other.wait()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert replace(this_process()).job == ""


@pytest.mark.parametrize(
    ("options", "variable", "any_number"),
    [
        (["--nnodes=1:4", "-m", "archscale"], None, True),
        (["--nproc-per-node=1", "--nnodes", "1:4", "-m", "archscale"], None, True),
        (["-m", "archscale"], "1:4", True),
        (["--nnodes=1:4"], "2", True),
        (["--nnodes=2"], "1:4", False),
        (["--nnodes", "2", "--max-restarts=3:4"], None, False),
        (["--nnodes=2:2"], None, False),
        (["--standalone"], None, False),
    ],
)
def test_whether_torchrun_takes_any_nodes(options, variable, any_number):
    """By the command line and the environment of its process."""
    command = ["sh", "-c", "read line", "torchrun", *options]
    env = {"PATH": os.defpath} | ({"PET_NNODES": variable} if variable else {})
    with subprocess.Popen(command, stdin=subprocess.PIPE, env=env) as agent:
        while not Path(f"/proc/{agent.pid}/cmdline").read_bytes():  # for a moment after its exec
            time.sleep(0.001)
        assert stopping.takes_any_nodes(agent.pid) == any_number


# --- whole jobs


class Job:
    """A run of 80 steps, a checkpoint every 10, and the machines that may train it."""

    def __init__(self, folder: Path) -> None:
        data = tiny_data(folder)
        shape = {"training": {"micro_batch": 2}, "checkpoint": {"every": EVERY, "keep": 2}}
        dump_config(config(data, steps=STEPS, telemetry={"every": 1}, **shape), folder / "c.yaml")
        self.folder, self.run_dir = folder, folder / "run"
        self.started: list[Launched] = []

    def command(self, run_dir: Path | None = None, stuck_after: float = 120) -> list[str]:
        options = ["--set", f"telemetry.stuck_after={stuck_after}"]
        options += ["--run-dir", str(run_dir or self.run_dir)]
        return ["train", str(self.folder / "c.yaml"), *options]

    def on(
        self,
        node: namespaces.Node,
        nodes: str = "1:2",
        stuck_after: float = 120,
        restarts: int = 3,
    ) -> Launched:
        command = self.command(stuck_after=stuck_after)
        launched = node.start(
            command,
            nodes,
            restarts,
            rendezvous=SOON,
            job=self.run_dir.name,
            env={"LOGLEVEL": "INFO"},  # torchrun says how many restarts are left
        )
        self.started.append(launched)
        return launched

    def step(self) -> int:
        """The last one in the metrics, 0 where there is none."""
        try:
            return json.loads((self.run_dir / METRICS).read_text().splitlines()[-1])["step"]
        except (OSError, ValueError, IndexError):
            return 0

    def ranks(self) -> int | None:
        try:
            return json.loads((self.run_dir / "environment.json").read_text())["world_size"]
        except (OSError, ValueError):
            return None

    def parent_after(self, step: int) -> int | None:
        """The step from which the first checkpoint after `step` was trained, None before it."""
        checkpoints = self.run_dir / "checkpoints"
        later = [number for number in checkpoint_steps(checkpoints) if number > step]
        state = later and json.loads((step_directory(checkpoints, min(later)) / STATE).read_text())
        return state["parent"]["step"] if state else None

    def until(self, met: Callable[[], object], what: str, limit: float = LONG) -> float:
        """Waits; returns the seconds it took."""
        began = time.monotonic()
        while not met():
            printed = "\n".join(launched.output[1][-3000:] for launched in self.started)
            assert time.monotonic() < began + limit, f"not within {limit} s: {what}\n{printed}"
            time.sleep(0.1)
        return time.monotonic() - began

    def check(self) -> None:
        """The curve is that of a run that nobody disturbs."""
        launch(self.command(self.folder / "calm"), timeout=LONG)
        calm, lived = (
            [json.loads(line) for line in (path / METRICS).read_text().splitlines()]
            for path in (self.folder / "calm", self.run_dir)
        )
        assert [line["step"] for line in lived] == list(range(1, STEPS + 1))
        assert [line["loss"] for line in lived] == pytest.approx(
            [line["loss"] for line in calm], abs=1e-5
        )


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    job = Job(tmp_path)
    yield job
    for launched in job.started:
        launched.kill()


@pytest.fixture
def network() -> Iterator[namespaces.Network]:
    if not namespaces.available():
        pytest.skip("network namespaces need root, ip and unshare")
    with namespaces.Network(2) as network:
        yield network


def pids(launched: Launched) -> list[int]:
    """Its ranks."""
    return [pid for pid, rank in launched.tree().items() if rank is not None]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_killed_process_costs_the_steps_since_the_checkpoint(job):
    running = start(job.command(), processes=2, env={"PET_MAX_RESTARTS": "3"})
    job.started.append(running)
    job.until(lambda: job.step() >= 25, "25 steps")
    before = job.step()
    running.signal(signal.SIGKILL, pids(running)[-1:])
    took = job.until(lambda: job.step() > before + 1, "going on")
    print(f"a killed process: {took:.1f} s until step {before} was behind")
    assert running.wait(LONG).returncode == 0
    job.check()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_lost_node_and_one_that_joins(job, network):
    """The node that is lost has rank 0 and owns the run directory; it is another one that joins."""
    first, second = network.nodes
    staying, leaving = job.on(first), job.on(second)
    job.until(lambda: job.step() >= 25 and job.ranks() == 2, "25 steps on both")
    before, began = job.step(), time.monotonic()
    leaving.kill()
    job.until(lambda: job.ranks() == 1, "the other one alone")
    after = job.step()
    saved = max(checkpoint_steps(job.run_dir / "checkpoints"))
    assert before - EVERY < saved <= after
    job.until(lambda: job.step() > before + 5, "going on alone")
    took = time.monotonic() - began
    print(f"a lost node: from step {before} back to {saved}; past it {took:.1f} s after the loss")
    joining = job.on(second)
    job.until(lambda: job.ranks() == 2, "both again")
    assert [each.wait(LONG).returncode for each in (staying, joining)] == [0, 0]
    job.check()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_node_that_joins_and_one_that_is_preempted_cost_no_step(job, network):
    """Torchrun ends the processes that train by SIGTERM when a node joins; they are not to end it.
    The one that joins uses up no restart."""
    first, second = network.nodes
    staying = job.on(first, restarts=1)
    job.until(lambda: job.step() >= 12, "12 steps alone")
    began = time.monotonic()
    leaving = job.on(second, restarts=1)
    job.until(lambda: job.ranks() == 2, "both")
    joined = stopped_at(staying)
    job.until(lambda: job.step() > joined, "going on with both")
    print(f"a node that joins: {time.monotonic() - began:.1f} s from its start past step {joined}")
    assert "attempts left" not in staying.output[1]
    job.until(lambda: job.parent_after(joined), "a checkpoint by both")
    assert job.parent_after(joined) == joined
    began = time.monotonic()
    leaving.signal(signal.SIGTERM, [leaving.process.pid])
    job.until(lambda: job.ranks() == 1, "the other one alone")
    preempted = stopped_at(leaving)
    job.until(lambda: job.step() > preempted, "going on alone")
    print(f"a preempted node: {time.monotonic() - began:.1f} s from SIGTERM past step {preempted}")
    job.until(lambda: job.parent_after(preempted), "a checkpoint alone")
    assert job.parent_after(preempted) == preempted
    assert leaving.wait(LONG, check=False).returncode == 1
    assert staying.wait(LONG).returncode == 0
    job.check()


def stopped_at(launched: Launched) -> int:
    """The last step that its rank 0 has saved after a signal."""
    return int(re.findall(r"stopped by SIGTERM at step (\d+): checkpoint", launched.output[1])[-1])


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("seconds", [6, 40])
def test_a_network_cut_for_a_while(job, network, seconds):
    """Shorter than `telemetry.stuck_after`: one slow step. Longer: both sides end, and go on when
    the network is back."""
    first, second = network.nodes
    both = [job.on(node, nodes="2", stuck_after=20) for node in (first, second)]
    job.until(lambda: job.step() >= 25, "25 steps")
    workers = {pid for launched in both for pid in pids(launched)}
    before = job.step()
    network.cut(second)
    time.sleep(seconds)
    ended = workers - {pid for launched in both for pid in pids(launched)}
    network.restore(second)
    took = job.until(lambda: job.step() > before + 5, "going on")
    print(f"cut for {seconds} s: past step {before} {took:.1f} s after its end")
    assert [each.wait(LONG).returncode for each in both] == [0, 0]
    causes = [each.output[1].count("made no progress") for each in both]
    assert (ended, causes) == (set(), [0, 0]) if seconds == 6 else ended == workers and all(causes)
    job.check()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_network_cut_for_good(job, network):
    """The isolated node gives up; the one with the rendezvous trains on alone to the end."""
    first, second = network.nodes
    namespaces.give_up_early(second)
    staying, isolated = [job.on(node, stuck_after=20) for node in (first, second)]
    job.until(lambda: job.step() >= 25 and job.ranks() == 2, "25 steps on both")
    network.cut(second)
    began = time.monotonic()
    assert isolated.wait(LONG, check=False).returncode != 0
    print(f"cut for good: the isolated node ended after {time.monotonic() - began:.1f} s")
    # Whichever is first: the agent, or the process that it watches.
    assert re.search("RendezvousConnectionError|rank 0 made no progress", isolated.output[1])
    assert staying.wait(LONG).returncode == 0
    assert re.search("rank 1 made no progress|rank 1 of 2 cannot reach", staying.output[1])
    assert job.ranks() == 1
    job.check()
