"""Sweeps on a real Slurm of two nodes on this machine: the same results, nothing lost and nothing
submitted twice.

Most tests submit a line of Python instead of a training run: what is tested is who knows what of
whom.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from archscale.errors import ConfigError, TrainingError
from archscale.sweep.launchers import slurm as launcher
from archscale.sweep.launchers.config import SlurmConfig
from archscale.sweep.launchers.slurm import LeftToSlurm, SlurmLauncher
from archscale.sweep.run import How, sweep
from tests.commands import ROOT
from tests.sweep.slurm import Sweep, cluster, missing
from tests.sweep.test_sweep import LR, events, grid, train_alone
from tests.train.tiny import tiny_data

SETTINGS = SlurmConfig(hours=0.5)


@pytest.fixture(scope="module")
def cluster_env(tmp_path_factory):
    if reason := missing():
        pytest.skip(reason)
    try:
        with cluster(tmp_path_factory.mktemp("slurm")) as variables:
            yield variables
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture
def slurm(cluster_env, monkeypatch, tmp_path):
    """Commands of Slurm in this process and in those that it starts; ends the jobs that a test has
    left."""
    for key, value in cluster_env.items():
        monkeypatch.setenv(key, value)
    for key in [
        key for key in os.environ if key.startswith(("SLURM_", "SUBMITIT_")) and key != "SLURM_CONF"
    ]:
        monkeypatch.delenv(key)
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    )
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(tmp_path)  # where the tasks start
    monkeypatch.setattr(launcher, "QUEUE", (0.3, 0.5))
    monkeypatch.setattr(launcher, "POLL", 0.1)
    monkeypatch.setattr(launcher, "GONE", 1.0)
    yield command
    command("scancel", "--user=root")


def command(*words):
    return subprocess.run(words, capture_output=True, text=True, timeout=30, check=False).stdout


def queue():
    """State by task, and the name of its job."""
    lines = command("squeue", "--noheader", "--array", "--states=all", "--format=%i|%T|%j").split()
    return {line.split("|")[0]: tuple(line.split("|")[1:]) for line in lines}


def count(path, then=""):
    """Python that counts its starts in a file as `n`."""
    return (
        f"import os, time, pathlib; p = pathlib.Path({str(path)!r}); n = len(p.read_text()) if"
        f" p.exists() else 0; p.write_text('x' * (n + 1)); {then}"
    )


# --- tasks


def test_a_crash_is_submitted_again_a_refusal_is_not_and_others_go_on(slurm, tmp_path):
    refused = "import sys; print('archscale: no (a): b'); sys.exit(2)"
    codes = {
        "twice": count(tmp_path / "n", "os.kill(os.getpid(), 9) if n < 1 else None"),
        "refused": refused,
        "crash": "print('last words'); 1 / 0",
        "good": "pass",
    }
    one = Sweep(tmp_path / "s", codes, retries=1)
    assert one.go() == {
        "refused": "no (a): b",
        "crash": "exit status 1: ZeroDivisionError: division by zero",
    }
    assert sorted(one.told("submitted")) == [
        ("crash", 1),
        ("crash", 2),
        ("good", 1),
        ("refused", 1),
        ("twice", 1),
        ("twice", 2),
    ]
    assert sorted(one.told("finished")) == [("good", 1), ("twice", 2)]
    assert (tmp_path / "s/logs/crash.log").read_text().count("last words") == 2
    # In a job that goes on with the sweep, what failed for good stays failed; a person's command
    # tries it again.
    tasks = len(queue())
    assert one.go(continued=True) == {
        "refused": "no (a): b",
        "crash": "exit status 1: ZeroDivisionError: division by zero",
    }
    assert (
        len(queue()) == tasks + 2
    )  # the two that finished are none of a launcher's business: a sweep leaves them out
    one.jobs = [job for job in one.jobs if job.name == "crash"]
    one.go()
    assert one.told("submitted")[-2:] == [("crash", 1), ("crash", 2)]


def test_a_requeued_task_goes_on_and_a_cancelled_one_is_not_tried_again(slurm, tmp_path):
    codes = {
        "requeued": count(tmp_path / "n", "time.sleep(60) if n < 2 else None"),
        "cancelled": "import time; time.sleep(60)",
    }
    one, done = Sweep(tmp_path / "s", codes), []

    def starts():
        return len((tmp_path / "n").read_text()) if (tmp_path / "n").exists() else 0

    def tick():
        started, tasks = one.told("started"), {}
        for line in map(json.loads, (one.folder / "sweep.jsonl").read_text().splitlines()):
            if line["event"] == "submitted":
                tasks[line["run"]] = line["task"]
        if not done and len(started) == 2 and starts() == 1:
            done.append(slurm("scontrol", "requeue", tasks["requeued"]))
        if (
            len(done) == 1 and len(started) == 3 and starts() == 2
        ):  # submitit's own signal before a time limit
            done.append(slurm("scancel", "--signal=USR2", tasks["requeued"]))
            slurm("scancel", tasks["cancelled"])
        if queue()[tasks["requeued"]][0] == "PENDING":
            slurm("scontrol", "update", f"jobid={tasks['requeued']}", "StartTime=now")

    assert one.go(tick) == {"cancelled": "cancelled in Slurm"}
    assert one.told("finished") == [("requeued", 1)]
    assert one.told("requeued") == [("requeued", 1)] * 2
    assert (tmp_path / "n").read_text() == "xxx"
    assert len(one.told("submitted")) == 2


def test_killed_with_9_it_attaches_to_what_is_queued_and_submits_nothing_twice(slurm, tmp_path):
    """Killed while one run trains and one waits; then once more just after a submission that it had
    no time to note."""
    codes = {
        name: count(tmp_path / name, f"time.sleep({seconds})")
        for name, seconds in (("a", 4), ("b", 1), ("c", 0))
    }
    one = Sweep(tmp_path / "s", codes, at_once=1)
    script = f"""
from pathlib import Path
from tests.sweep.slurm import Sweep
one = Sweep(Path({str(one.folder)!r}), {codes!r}, at_once=1)
one.go()
"""
    process = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path)
    try:
        wait(lambda: one.folder.joinpath("sweep.jsonl").exists() and one.told("started"))
    finally:
        process.kill()
        process.wait()
    log = one.folder / "sweep.jsonl"
    log.write_text(
        "".join(
            line for line in log.read_text().splitlines(keepends=True) if '"run": "b"' not in line
        )
    )
    tasks = set(queue())
    assert one.go() == {}
    assert set(queue()) == tasks
    assert {(tmp_path / name).read_text() for name in codes} == {"x"}
    assert one.told("attached") == [("a", 1)]
    assert sorted(one.told("finished")) == [("a", 1), ("b", 1), ("c", 1)]


@pytest.mark.slow
def test_without_waiting_another_job_goes_on(slurm, tmp_path):
    """Here the command that it gives is refused, and its log says so."""
    one = Sweep(
        tmp_path / "s",
        {"a": "import time; time.sleep(2)", "b": "pass"},
        follow=["sweep", "nowhere.yaml"],
    )
    for _ in range(2):  # the second time everything is queued
        with pytest.raises(LeftToSlurm, match="2 runs are in Slurm's queue as s-"):
            one.go()
    names = [
        name
        for _, name in queue().values()
        if name.startswith(one.folder.joinpath("slurm/name").read_text().strip())
    ]
    assert sorted(name.endswith("-next") for name in names) == [False, False, True]
    wait(
        lambda: (
            (one.folder / "logs/sweep.log").exists()
            and "nowhere.yaml" in (one.folder / "logs/sweep.log").read_text()
        )
    )
    assert all(
        state == "COMPLETED"
        for state, name in queue().values()
        if name == names[0] and not name.endswith("-next")
    )
    assert one.go(continued=True) == {}
    assert len(one.told("submitted")) == 2


def wait(condition, seconds=100.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, (
            queue(),
            [path.read_text()[-2000:] for path in Path("s/slurm").glob("*.out")],
        )
        time.sleep(0.05)


def test_what_slurm_refuses_is_one_line(slurm, tmp_path):
    one = Sweep(tmp_path / "s", {"a": "pass"})
    one.write(event="sweep")
    launch = SlurmLauncher(SlurmConfig(hours=1, partition="nowhere"), one.folder, "s", None, 0)
    with pytest.raises(ConfigError, match="Slurm refuses the jobs: .*nvalid partition") as caught:
        launch(one.jobs, one.tell, lambda: None)
    assert "\n" not in str(caught.value)


def test_ends_that_no_sweep_saw_are_told(tmp_path):
    """Ends of runs that are finished; also of one whose task has not had the time to say so."""
    one = Sweep(tmp_path, {})
    for index, name in enumerate("abcd"):
        one.write(event="submitted", run=name, attempt=2, task=f"1_{index}")
    one.write(event="finished", run="c", attempt=2, task="1_2")
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm/1_0.jsonl").write_text(
        '{"time": 1, "what": "started"}\n{"time": 9, "what": "ended", "status": 0, "seconds": 8}\n'
    )
    (tmp_path / "slurm/1_1.jsonl").write_text('{"time": 1, "what": "started"}\n')
    found = launcher.unseen(tmp_path, "abcd")
    assert [(event.what, event.job.name, event.attempt, event.task) for event in found] == [
        ("finished", "a", 2, "1_0"),
        ("finished", "b", 2, "1_1"),
    ]
    assert found[0].seconds == 8


def test_without_slurm_it_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="there is no sbatch here .*login node"):
        SlurmLauncher(SETTINGS, tmp_path, "s", None, 0)


# --- whole sweeps


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("data"))


def alone(path, folder):
    """results.csv of the grid with all runs trained in this process."""
    train_alone(path, folder)
    return (folder / "results.csv").read_text()


@pytest.mark.timeout(300)  # five times the import of torch: a minute where cores are busy
def test_a_sweep_on_slurm_has_the_results_of_this_machine(slurm, tmp_path, data, capsys):
    keys = {
        "slurm": {"hours": 0.5, "setup": ["export GREETING=hello"]},
        "axes": {LR: [0.002, 0.01]},
    }
    expected = alone(grid(tmp_path, data, **keys), tmp_path / "alone")
    with pytest.raises(ConfigError, match="needs a section `slurm` .*add `slurm: {hours"):
        sweep(grid(tmp_path, data, axes={LR: [0.002]}), sweep_dir=tmp_path / "s", how=How("slurm"))
    keys["axes"] = {LR: [0.002, 0.01, 0.02]}
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "lr0.02").write_text("a file where the run directory should be")
    with pytest.raises(
        TrainingError, match=r"1 of 3 runs failed: lr0.02: cannot write the run directory"
    ):
        sweep(grid(tmp_path, data, **keys), sweep_dir=tmp_path / "s", how=How("slurm"))
    assert (tmp_path / "s" / "results.csv").read_text().splitlines()[:3] == expected.splitlines()
    assert [
        len(events(tmp_path / "s", what)) for what in ("submitted", "started", "finished", "failed")
    ] == [3, 3, 2, 1]
    out = capsys.readouterr().out
    assert (
        "a task of a Slurm array each: 1 process on 1 node, 0 GPUs and 1 core a node, requeued"
        " after 0.5 h" in out
    )
    assert "3/3" not in out
    assert "lr0.02: failed: cannot write" in out


def archscale(*words, until=None):
    """A command in a process that Slurm's tasks do not count as part of; killed with -9 once
    `until` holds."""
    with open("out", "w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "archscale", *map(str, words)], stdout=out, stderr=out
        )
    try:
        wait(lambda: process.poll() is not None or (until and until()), 300)
        assert until or process.returncode == 0, Path("out").read_text()
    finally:
        process.kill()
        process.wait()
    return Path("out").read_text()


@pytest.mark.slow
def test_a_killed_sweep_attaches_and_ends_as_if_left_alone(slurm, tmp_path, data):
    path = grid(
        tmp_path, data, steps=24, every=4, axes={LR: [0.002, 0.01, 0.05]}, slurm={"hours": 0.5}
    )
    expected = alone(path, tmp_path / "alone")
    killed = tmp_path / "killed"
    words = ["sweep", path, "--launcher", "slurm", "--sweep-dir", killed, "--jobs", "2"]
    archscale(*words, until=lambda: list(killed.glob("lr*/checkpoints/step_*")))
    archscale(
        *words, until=lambda: (killed / "sweep.jsonl").read_text().count('"event": "sweep"') == 2
    )
    archscale(*words)
    assert (killed / "results.csv").read_text() == expected
    assert sorted(events(killed, "submitted")) == ["lr0.002", "lr0.01", "lr0.05"]
    assert sorted(events(killed, "finished")) == [
        "lr0.002",
        "lr0.01",
        "lr0.05",
    ]  # also those that ended while no sweep looked on
    assert not events(killed, "requeued")
    name = (killed / "slurm/name").read_text().strip()
    assert [job for _, job in queue().values()].count(name) == 3


@pytest.mark.slow
def test_a_sweep_left_to_slurm_collects_its_results_there(slurm, tmp_path, data):
    """One run crashes in its first attempt, so that the job that goes on submits it again, and
    another such job."""
    crash = (
        f'if [ "$SLURM_ARRAY_TASK_ID" = 1 ] && [ ! -e {tmp_path}/crashed ]; then touch'
        f" {tmp_path}/crashed; exit 7; fi"
    )
    path = grid(tmp_path, data, axes={LR: [0.002, 0.01]}, slurm={"hours": 0.5, "setup": [crash]})
    expected = alone(path, tmp_path / "alone")
    out = archscale("sweep", path, "--launcher", "slurm", "--sweep-dir", "s", "--no-wait")
    assert "2 runs are in Slurm's queue as g-" in out
    wait(lambda: Path("s/results.csv").exists(), 300)
    assert Path("s/results.csv").read_text() == expected
    assert len(events(Path("s"), "submitted")) == 3
    assert events(Path("s"), "failed") == ["lr0.01"]


@pytest.mark.slow
def test_a_run_on_two_nodes(slurm, tmp_path, data, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    path = grid(tmp_path, data, axes={LR: [0.002]}, processes=2, slurm={"hours": 0.5, "nodes": 2})
    sweep(path, sweep_dir=tmp_path / "s", how=How("slurm"))
    sweep(path, sweep_dir=tmp_path / "alone")
    assert (tmp_path / "s/results.csv").read_text() == (tmp_path / "alone/results.csv").read_text()
