"""Settings of clusters, and the files that a sweep writes for Kubernetes and SkyPilot; nothing here
is started."""

import json
import re
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from archscale.errors import ConfigError
from archscale.sweep.grid import read_grid
from archscale.sweep.launchers.config import KubernetesConfig, SkyPilotConfig
from archscale.sweep.launchers.files import (
    LONGEST_NAME,
    kubernetes_job,
    kubernetes_name,
    skypilot_task,
    write_kubernetes,
)
from archscale.sweep.launchers.local import Job
from archscale.sweep.planning import plan_runs
from archscale.sweep.run import How, sweep
from tests.commands import launch
from tests.sweep.test_sweep import BOWL, LR, bowl, grid, pretend, pretend_run
from tests.train.tiny import tiny_data

SKY = {
    "sweep_dir": "/shared/s",
    "mounts": {"/shared": {"source": "s3://bucket", "mode": "MOUNT_CACHED"}},
}
PODS = {"image": "registry/archscale:1", "claim": "shared"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("data"))


# --- settings


@pytest.mark.parametrize(
    ("keys", "pattern"),
    [
        ({"slurm": {}}, r"hours"),
        ({"slurm": {"hours": 1, "gpu": 1}}, r'unknown key "?gpu"? \(slurm.gpu in '),
        ({"slurm": {"hours": 0}}, r"hours.*above 0"),
        (
            {"slurm": {"hours": 1, "extra": {"output": "x"}}},
            r"sbatch's output is not for a grid to set .slurm.extra.output",
        ),
        (
            {"slurm": {"hours": 1, "nodes": 2}},
            r"1 process of a run do not divide among 2 nodes .*slurm.nodes",
        ),
        (
            {"slurm": {"hours": 1, "gpus_per_node": 4}, "processes": 8},
            r"8 processes on a machine need as many GPUs, it has 4",
        ),
        ({"kubernetes": {"image": "a"}}, r"claim"),
        (
            {"kubernetes": {**PODS, "gpus": 1}, "processes": 2},
            r"2 processes .* it has 1 \(kubernetes.gpus",
        ),
        (
            {"kubernetes": {**PODS, "mount": "work"}},
            r"work is not an absolute path \(kubernetes.mount",
        ),
        (
            {"kubernetes": {**PODS, "pod": {"volumes": []}}},
            r"the Job sets volumes itself \(kubernetes.pod.volumes",
        ),
        (
            {"skypilot": {**SKY, "sweep_dir": "/home/s"}},
            r"/home/s is not below any of /shared.*skypilot.sweep_dir",
        ),
        (
            {"skypilot": {**SKY, "mounts": {"/shared": "s3://bucket"}}},
            r"files in /shared could not be .*skypilot.mounts./shared",
        ),
        ({"skypilot": {**SKY, "accelerators": "8 H100"}}, r"8 H100 is no accelerator"),
        (
            {"skypilot": {**SKY, "accelerators": "L4"}, "processes": 2},
            r"2 processes .* it has 1 \(skypilot.accelerators",
        ),
    ],
    ids=lambda value: None if isinstance(value, str) else json.dumps(value)[:60],
)
def test_settings_that_cannot_work_are_one_line(tmp_path, data, keys, pattern):
    path = grid(tmp_path, data, seeds=1, **keys)
    with pytest.raises(ConfigError, match=pattern) as caught:
        read_grid(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("how", "options", "pattern"),
    [
        (How("slurm"), {}, "--launcher slurm needs a section `slurm` .*add `slurm: {hours"),
        (How("kubernetes"), {}, "needs a section `kubernetes`"),
        (How("skypilot"), {}, "needs a section `skypilot`"),
        (How(wait=False), {}, r"--no-wait\): leave it out, or add --launcher slurm"),
        (How("skypilot", jobs=2), {}, "SkyPilot decides how many .*--jobs"),
        (How(jobs=2), {"index": 0}, "it trains one run, here and once .*--index"),
        (How(retries=0), {"collect_only": True}, "it trains nothing .*--collect"),
        (How(), {"index": 0, "dry_run": True}, "--index"),
        (
            How(),
            {"index": 2},
            r"there is no run 2: the 2 runs of .* count from 0 \(--index\): give at most 1",
        ),
    ],
    ids=lambda value: value.launcher if isinstance(value, How) else None,
)
def test_options_that_do_not_go_together_are_refused(tmp_path, data, how, options, pattern):
    with pytest.raises(ConfigError, match=pattern):
        sweep(grid(tmp_path, data, seeds=2), sweep_dir=tmp_path / "s", how=how, **options)
    assert not (tmp_path / "s").exists()


def test_the_examples_of_a_missing_section_work(tmp_path, data):
    for launcher in ("slurm", "kubernetes", "skypilot"):
        path = grid(tmp_path, data, seeds=1)
        with pytest.raises(ConfigError) as caught:
            sweep(path, how=How(launcher), dry_run=True)
        [example] = re.findall("`([^`]*: {.*})`", caught.value.remedy)
        sweep(
            grid(tmp_path, data, seeds=1, **yaml.safe_load(example)),
            how=How(launcher),
            dry_run=True,
        )


# --- files


def test_kubernetes_gets_an_indexed_job(tmp_path, data, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pods = {
        **PODS,
        "gpus": 2,
        "cpus": 0.5,
        "memory_gb": 1.5,
        "namespace": "research",
        "env": {"A": "1"},
        "pod": {"nodeSelector": {"gpu": "h200"}},
    }
    path = grid(
        tmp_path, data, axes={LR: [0.002, 0.01, 0.02]}, processes=2, kubernetes=pods
    ).relative_to(tmp_path)
    sweep(path, ["eval.batches=1"], how=How("kubernetes", jobs=2, retries=5))
    out = capsys.readouterr().out
    assert "nothing is started yet: kubectl apply -f runs/g/kubernetes.yaml" in out
    job = yaml.safe_load((tmp_path / "runs/g/kubernetes.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    assert job["metadata"]["namespace"] == "research"
    spec = job["spec"]
    assert {
        key: spec[key]
        for key in ("completionMode", "completions", "parallelism", "backoffLimitPerIndex")
    } == {
        "completionMode": "Indexed",
        "completions": 3,
        "parallelism": 2,
        "backoffLimitPerIndex": 5,
    }
    refused, stopped, disrupted = spec["podFailurePolicy"]["rules"]
    assert refused["onExitCodes"]["values"] == [2]
    assert (stopped["action"], stopped["onExitCodes"]["values"]) == ("Ignore", [75])
    assert disrupted["action"] == "Ignore"
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # backoffLimitPerIndex and podFailurePolicy demand it
    assert pod["nodeSelector"] == {"gpu": "h200"}
    [container] = pod["containers"]
    assert container["command"] == [
        "archscale",
        "sweep",
        "g.yaml",
        "--set",
        "eval.batches=1",
        "--sweep-dir",
        "runs/g",
        "--index",
        "$(JOB_COMPLETION_INDEX)",
    ]
    assert container["resources"]["limits"] == {
        "cpu": "0.5",
        "memory": "1536Mi",
        "nvidia.com/gpu": "2",
    }
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }
    assert {"name": "shared", "persistentVolumeClaim": {"claimName": "shared"}} in pod["volumes"]
    assert [mount["mountPath"] for mount in container["volumeMounts"]] == ["/shared", "/dev/shm"]
    assert container["env"] == [{"name": "A", "value": "1"}]
    with pytest.raises(
        ConfigError, match=r"sweep directory is /elsewhere in the pods, .*kubernetes.mount"
    ):
        write_kubernetes(Path("/elsewhere"), KubernetesConfig(**PODS), "g", [], 1, None, 0, 1)


def test_a_job_without_wishes_leaves_them_to_the_cluster():
    job = kubernetes_job(KubernetesConfig(**PODS), "Große_Sache", ["archscale"], 2, None, 0, 1)
    assert job["spec"]["parallelism"] == 2
    assert job["spec"]["template"]["spec"]["containers"][0]["resources"] == {}
    assert "namespace" not in job["metadata"]


def test_names_for_kubernetes():
    names = ["lr", "lr_width", "lr-width", "LR", "9", "+", "x" * 80, "x" * 81]
    made = [kubernetes_name(name) for name in names]
    assert made[0] == "lr"
    assert made[2] == "lr-width"
    assert len(set(made)) == len(names)
    assert all(
        re.fullmatch("[a-z]([a-z0-9-]*[a-z0-9])?", name) and len(name) <= LONGEST_NAME
        for name in made
    )


def test_skypilot_gets_a_task_and_a_script_for_what_is_left(tmp_path, data, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sky = {
        **SKY,
        "accelerators": "H100:2",
        "use_spot": True,
        "setup": ["bash launch/install.sh"],
        "command": ".venv/bin/archscale",
    }
    path = grid(tmp_path, data, axes={LR: [0.002, 0.01]}, processes=2, skypilot=sky).relative_to(
        tmp_path
    )
    pretend(path, tmp_path / "runs/g", bowl)
    (tmp_path / "runs/g/lr0.01/metrics.jsonl").unlink()
    sweep(path, how=How("skypilot", retries=1))
    assert "nothing is started yet: bash runs/g/skypilot.sh" in capsys.readouterr().out
    task = yaml.safe_load((tmp_path / "runs/g/skypilot.yaml").read_text())
    assert task["resources"] == {
        "accelerators": "H100:2",
        "use_spot": True,
        "job_recovery": {"strategy": "EAGER_NEXT_REGION", "max_restarts_on_errors": 1},
    }
    assert (
        task["run"].splitlines()[1]
        == ".venv/bin/archscale sweep g.yaml --sweep-dir /shared/s --index $ARCHSCALE_RUN"
    )
    assert task["envs"] == {"ARCHSCALE_RUN": "0"}
    assert task["file_mounts"] == SKY["mounts"]
    assert task["setup"] == "set -e\nbash launch/install.sh\n"
    (tmp_path / "sky").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "sky").chmod(0o755)
    script = ["bash", "runs/g/skypilot.sh"]
    done = subprocess.run(
        script,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert (
        done.stdout
        == "jobs launch --yes --detach-run --name g-1 --env ARCHSCALE_RUN=1 runs/g/skypilot.yaml\n"
    ), done.stderr  # lr0.002 is finished


def test_a_task_on_cpus():
    task = skypilot_task(SkyPilotConfig(**SKY, cpus="8+"), "g", ["sweep", "a b.yaml"], 0)
    assert task["resources"]["cpus"] == "8+"
    assert "accelerators" not in task["resources"]
    assert "'a b.yaml'" in task["run"]
    assert "setup" not in task


# --- one run, by index


@pytest.mark.parametrize("tokens", ["3072", "'auto'"])
def test_the_run_that_finishes_last_tabulates_all(tmp_path, data, monkeypatch, capsys, tokens):
    """Training is pretended: what is tested is which run, and what happens then."""
    path = grid(
        tmp_path,
        data,
        axes={LR: [0.002, 0.005, 0.01, 0.02]},
        fit=[BOWL],
        derive={"training.tokens": tokens},
    )
    pretend(path, tmp_path / "other", bowl)
    seen = []

    def train_one(job: Job, cpu: bool):
        seen.append(job)
        (tmp_path / "s").mkdir(exist_ok=True)
        (tmp_path / "other" / job.name).rename(tmp_path / "s" / job.name)

    monkeypatch.setattr("archscale.sweep.run.train_one", train_one)
    for index in (2, 0, 3, 3, 1):
        assert not (tmp_path / "s/results.csv").exists()
        sweep(path, sweep_dir=tmp_path / "s", index=index)
    assert [job.name for job in seen] == ["lr0.01", "lr0.002", "lr0.02", "lr0.005"]
    assert seen[0].arguments[:2] == ("train", str(tmp_path / "s/configs/lr0.01.yaml"))
    assert "lr0.02: already finished" in capsys.readouterr().out
    assert (tmp_path / "s/results.csv").read_text().count("finished") == 4
    assert json.loads((tmp_path / "s/fits.json").read_text())[0]["refused"] is None


def test_collecting_trains_nothing(tmp_path, data, capsys):
    path = grid(tmp_path, data, axes={LR: [0.002, 0.01]})
    pretend(path, tmp_path / "s", bowl)
    for file in (tmp_path / "s/lr0.01").rglob("*"):
        if file.is_file():
            file.unlink()
    sweep(path, sweep_dir=tmp_path / "s", collect_only=True)
    assert "1 of 2 runs finished" in capsys.readouterr().out
    assert "lr0.002,finished" in (tmp_path / "s/results.csv").read_text()
    assert not (tmp_path / "s/logs").exists()


def test_a_second_stage_on_clusters_that_are_not_watched(tmp_path, data, monkeypatch, capsys):
    """Files say that more follows; the last run of the first stage does too; then the second stage
    has indices of its own."""
    pods = {"image": "a", "claim": "c", "mount": str(tmp_path)}
    path = grid(
        tmp_path,
        data,
        axes={LR: [0.002, 0.005, 0.01]},
        seeds=1,
        refine={"x": LR, "points": 1, "seeds": 2},
        kubernetes=pods,
    )
    sweep(path, sweep_dir=tmp_path / "s", how=How("kubernetes"))
    assert "1 more runs follow from `refine`" in capsys.readouterr().out
    with pytest.raises(
        ConfigError, match="there is no run 3: the 3 runs of .*; 1 more of `refine` once"
    ):
        sweep(path, sweep_dir=tmp_path / "s", index=3)
    seen = []

    def train_one(job: Job, cpu: bool):
        seen.append(job.name)
        made = read_grid(path)
        both = [run for run in [*made.runs(), *made._expand([1])] if run.name == job.name]
        pretend_run(plan_runs(made, tmp_path / "s", runs=both)[0], bowl)

    monkeypatch.setattr("archscale.sweep.run.train_one", train_one)
    for index in range(3):
        sweep(path, sweep_dir=tmp_path / "s", index=index)
    assert "1 more runs follow from `refine`" in capsys.readouterr().out
    assert not (tmp_path / "s/results.csv").exists()
    sweep(path, sweep_dir=tmp_path / "s", index=3)
    assert seen[3:] == ["lr0.01_seed1"]  # 0.32 / 24 is the planted optimum
    assert (tmp_path / "s/results.csv").read_text().count("finished") == 4


@pytest.mark.slow
def test_one_run_by_its_index(tmp_path, data):
    path = grid(tmp_path, data, steps=4, seeds=[0, 7])
    done = launch(["sweep", str(path), "--index", "1", "--sweep-dir", "s"], cwd=tmp_path)
    assert "seed7: finished in" in done.stdout
    assert (tmp_path / "s/logs/seed7.log").read_text() in done.stdout
    assert [run.finished for run in plan_runs(read_grid(path), tmp_path / "s")] == [False, True]
    (tmp_path / "s/seed0").write_text("a file where the run directory should be")
    done = launch(
        ["sweep", str(path), "--index", "0", "--sweep-dir", "s"], cwd=tmp_path, check=False
    )
    assert done.returncode == 2  # the exit status by which Kubernetes does not try it again
    assert "archscale: run seed0 failed: cannot write the run directory" in done.stderr


def test_a_time_limit_without_a_checkpoint_ends_the_run(tmp_path, monkeypatch):
    """What would be requeued for ever is told instead; a preemption early in its time is none of
    that."""
    import submitit

    from archscale.sweep.launchers.slurm_task import Task

    monkeypatch.setattr(submitit, "JobEnvironment", lambda: type("Here", (), {"job_id": "7_0"}))
    run = tmp_path / "run"
    checkpoint = run / "checkpoints" / "step_00000005"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").touch()
    task = Task(
        Job("a", ("train", "c.yaml", "--run-dir", str(run)), tmp_path / "a.log"),
        1,
        tmp_path,
        1,
        True,
        3600.0,
    )
    for age, step, ends in ((3500, 5, True), (3500, 4, False), (60, 5, False)):
        word = {"what": "started", "time": time.time() - age, "step": step}
        (tmp_path / "7_0.jsonl").write_text(json.dumps(word) + "\n")
        if not ends:
            assert task.checkpoint().function is task
            continue
        with pytest.raises(
            RuntimeError, match="no checkpoint in 1 h: raise slurm.hours, or lower checkpoint.every"
        ):
            task.checkpoint()
