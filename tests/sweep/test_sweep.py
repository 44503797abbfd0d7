"""`archscale sweep`: planned before it starts, the same results however often it is killed, fits at
its end."""

import csv
import json
import math
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml

from archscale.config import dump_config
from archscale.errors import ConfigError, DataError, TrainingError
from archscale.fit.groups import FitRequest, fit_table
from archscale.plan.devices import Device
from archscale.sweep.grid import read_grid
from archscale.sweep.planning import plan_runs
from archscale.sweep.run import How, _interrupted, _terminable, slots, sweep
from archscale.sweep.table import read_table
from archscale.sweep.view import last_line
from tests.pool import launch, start
from tests.test_cli import refused
from tests.train.tiny import config, run, tiny_data

ROOT = Path(__file__).parents[2]
STUDIES = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))
PUBLISHED = sorted((ROOT / "configs" / "sweeps" / "published").glob("*.yaml"))
LR = "parameterization.base.lr"
BOWL = {"form": "quadratic_log", "x": LR, "y": "val_loss"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("data"))


def grid(folder, data, steps=8, every=4, **keys):
    dump_config(
        config(data, steps=steps, checkpoint={"every": every}, telemetry={"every": 1}),
        folder / "base.yaml",
    )
    (folder / "g.yaml").write_text(
        yaml.safe_dump({"name": "g", "base": "base.yaml", **keys}, sort_keys=False)
    )
    return folder / "g.yaml"


def pretend(path, directory, loss):
    """Finished runs without training: `loss` of each run's config is its last val_loss."""
    for one in plan_runs(read_grid(path), directory):
        pretend_run(one, loss)


def pretend_run(one, loss):
    made, last = one.plan.config, one.directory / "checkpoints" / f"step_{one.steps:08d}"
    last.mkdir(parents=True)
    (last / "state.json").write_text("{}")
    dump_config(made, one.directory / "config.yaml")
    line = {
        "step": one.steps,
        "tokens": made.tokens,
        "loss": 1.0,
        "val_loss": loss(made),
        "time": time.time(),
    }
    (one.directory / "metrics.jsonl").write_text(json.dumps(line) + "\n")


def train_alone(path, directory):
    """The sweep with all runs trained in this process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as a sweep gives its runs: sums are the same
    for one in plan_runs(read_grid(path), directory):
        run(one.plan.config, str(one.directory))
    torch.set_num_threads(threads)
    sweep(path, sweep_dir=directory)


def bowl(made) -> float:
    return 2.0 + 0.1 * math.log(made.parameterization.base.lr / (0.32 / made.model.width)) ** 2


# --- the plan


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.stem)
def test_every_study_can_be_planned(study, tmp_path, monkeypatch, capsys):
    """Without its data: the vocabulary is given."""
    monkeypatch.chdir(tmp_path)
    sweep(study, ["model.vocab_size=512"], dry_run=True)
    out = capsys.readouterr().out
    runs = int(out.split(" runs of ")[0].rpartition(" ")[2])
    rows = [
        line
        for line in out.splitlines()
        if line.rpartition("_seed")[2][:1].isdigit() and line.startswith("  ")
    ]
    assert 24 <= runs == len(rows)
    assert "FLOPs" in out
    content = yaml.safe_load(study.read_text())
    assert out.count("\n  then quadratic_log of val_loss") == sum(
        f["form"] == "quadratic_log" for f in content.get("fit", [])
    )
    assert ("more runs" in out) == ("refine" in content)
    assert not list(tmp_path.iterdir())  # nothing was started or written


def test_a_sweep_has_one_precision_wherever_it_goes_on(tmp_path, data):
    path, directory = grid(tmp_path, data, axes={LR: [0.01, 0.02]}), tmp_path / "s"
    auto = read_grid(path, ["training.precision=auto"])
    with_units, without = (Device("cpu", None, None, "", bf16=bf16) for bf16 in (True, False))

    def precisions(made, device=None, runs=None):
        planned = plan_runs(made, directory, device, runs)
        return [(run.grid.config.training.precision, run.plan.config.precision) for run in planned]

    assert precisions(auto, with_units) == [("bf16", "bf16")] * 2
    assert precisions(auto, without) == [("fp32", "fp32")] * 2
    # Nobody says what the cluster has: each run finds it on its own device.
    assert precisions(auto) == [("auto", "bf16")] * 2
    second = plan_runs(auto, directory, without)[1]
    dump_config(second.plan.config, second.directory / "config.yaml")
    for device in (with_units, without, None):
        assert precisions(auto, device) == [("fp32", "fp32")] * 2
        assert precisions(auto, device, auto.runs()[:1]) == [("fp32", "fp32")]
    assert precisions(read_grid(path), with_units) == [("fp32", "fp32")] * 2  # as it is given


def test_every_study_is_there_at_published_size():
    assert [path.name for path in PUBLISHED] == [path.name for path in STUDIES]


@pytest.mark.parametrize("study", PUBLISHED, ids=lambda path: path.stem)
def test_studies_at_published_size_can_be_planned(study, tmp_path, monkeypatch, capsys):
    """For the cluster that they name, without their data and without Slurm."""
    monkeypatch.chdir(tmp_path)
    sweep(study, how=How("slurm"), dry_run=True)
    out = capsys.readouterr().out
    assert int(out.split(" runs of ")[0].rpartition(" ")[2]) >= 10
    assert "GPUs and 64 cores a node" in out
    hours = float(out.split(" hours of h100")[0].rpartition(" ")[2].replace(",", ""))
    flops = float(out.split("in all ")[1].split(" FLOPs")[0])
    assert hours == pytest.approx(flops / (989.4e12 * 0.4 * 3600), rel=0.01)
    assert not list(tmp_path.iterdir())


def test_runs_that_do_not_fit_the_clusters_device_are_refused(tmp_path, capsys):
    overrides = [
        "training.micro_batch=64",
        "training.activation_checkpoint=none",
        "training.compile=false",
    ]
    grid = yaml.safe_load((PUBLISHED[0].parent / "lr_tokens.yaml").read_text())
    grid["axes"] = {"parameterization.base.lr": [0.01]}
    grid["refine"], grid["fit"], grid["processes"], grid["slurm"]["nodes"] = None, [], 8, 1
    grid["base"] = str(ROOT / "configs" / "hyperp" / "dense_d24.yaml")
    path = tmp_path / "g.yaml"
    for device, why in (("h100", "GB"), (None, None), ("h1000", "unknown device")):
        grid["slurm"]["device"] = device
        path.write_text(yaml.safe_dump(grid))
        if why is None:
            sweep(path, overrides, how=How("slurm"), dry_run=True)
            assert "hours of" not in capsys.readouterr().out
            continue
        with pytest.raises(ConfigError, match=why) as caught:
            sweep(path, overrides, how=How("slurm"), dry_run=True)
        assert "\n" not in str(caught.value)


def test_a_dry_run_without_data_and_vocabulary(tmp_path, data):
    path = grid(tmp_path, str(tmp_path / "nowhere"), seeds=2)
    with pytest.raises(DataError, match="nowhere.*archscale data prepare"):
        sweep(path, dry_run=True)
    sweep(path, ["model.vocab_size=300"], dry_run=True)
    with pytest.raises(DataError, match="nowhere"):
        sweep(path, ["model.vocab_size=300"], sweep_dir=tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_a_config_that_cannot_be_planned_is_named_by_its_values(tmp_path, data):
    path = grid(tmp_path, data, axes={"training.micro_batch": [4, 5, 7]})
    with pytest.raises(
        ConfigError, match=r"(?s)training.micro_batch 5 in .*and 1 more problem"
    ) as caught:
        sweep(path, dry_run=True)
    assert "\n" not in str(caught.value)
    path = grid(tmp_path, data, axes={"parameterization.kind": ["standard", "mup++"]})
    with pytest.raises(
        ConfigError, match=r"mup\+\+ does not know how muonh .*parameterization.kind mup\+\+ in"
    ):
        sweep(path, dry_run=True)


def test_room_for_runs_at_once(tmp_path, data, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    plans = [one.plan for one in plan_runs(read_grid(grid(tmp_path, data, seeds=12)), tmp_path)]
    cpu, small = Device("cpu", None, 64 * 10**9, ""), Device("cpu", None, 10**9, "")
    assert len(slots(plans, 1, None, cpu, [], cores=8).variables) == 8
    assert len(slots(plans, 3, None, cpu, [], cores=8).variables) == 2
    assert len(slots(plans, 1, None, cpu, [], cores=64).variables) == 12  # no more than runs
    assert len(slots(plans, 1, None, small, [], cores=8).variables) == 2  # 0.4 GB each
    assert {
        one["OMP_NUM_THREADS"] for one in slots(plans, 1, None, cpu, [], cores=8).variables
    } == {"1"}
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert slots(plans, 1, None, cpu, [], cores=8).variables == [{"OMP_NUM_THREADS": "4"}] * 2
    with pytest.raises(
        ConfigError, match=r"5 runs of .* do not fit into 1 GB \(--jobs\): set it to 2"
    ):
        slots(plans, 1, 5, small, [], cores=8)
    gpu = Device("h200", 1e15, 141 * 10**9, "")
    names = ["4", "5", "6", "7"]
    visible = [one["CUDA_VISIBLE_DEVICES"] for one in slots(plans, 2, None, gpu, names).variables]
    assert visible == ["4,5", "6,7"]
    assert [one["CUDA_VISIBLE_DEVICES"] for one in slots(plans, 1, 6, gpu, names).variables] == [
        "4",
        "5",
        "6",
        "7",
        "4",
        "5",
    ]
    with pytest.raises(ConfigError, match="5 processes of a run need as many GPUs, there are 4"):
        slots(plans, 5, None, gpu, names)
    with pytest.raises(ConfigError, match="2 runs of .* on a GPU do not fit"):
        slots(plans, 1, 5, Device("tiny", 1e15, 2 * 10**9 + 1_500_000, ""), names)


# --- results and fits


def test_results_and_fits_of_finished_runs(tmp_path, data, capsys):
    """Nothing is trained: every run is there. The planted optimum, 0.32 / width, comes back, and
    its law."""
    path = grid(
        tmp_path,
        data,
        axes={"model.width": [16, 32, 64], LR: [0.002, 0.005, 0.01, 0.02, 0.05]},
        derive={"model.aspect": None},
        fit=[{**BOWL, "group": "model.width"}, {**BOWL, "against": "model.width"}],
    )
    directory = tmp_path / "s"
    pretend(path, directory, bowl)
    sweep(path, sweep_dir=directory)
    out = capsys.readouterr().out
    assert "15 of 15 runs finished" in out
    table = read_table([directory / "results.csv"])
    assert table.rows[0].startswith("line 2")
    assert table.columns["run"][:2] == ["width16_lr0.002", "width16_lr0.005"]
    assert set(table.columns["status"]) == {"finished"}
    assert "time" not in table.columns
    assert {"model.width", LR, "val_loss", "tokens", "parameters", "flops"} <= table.columns.keys()
    by_width, law = json.loads((directory / "fits.json").read_text())
    assert [
        round(g["parameters"]["optimum"]["value"] * g["group"]["model.width"], 6)
        for g in by_width["groups"]
    ] == [0.32] * 3
    exponent = law["optimum"]["groups"][0]["parameters"]["exponent"]
    # No interval: the residuals of planted points are rounding, of which some processors leave too
    # little for one.
    assert abs(exponent["value"] + 1) < 1e-6
    assert "optimum" in out
    assert "[" in out
    assert f"report {directory}/report.html" in out
    assert (directory / "report" / "bowls.svg").exists()
    # `archscale fit` makes the same of both.
    for source in (directory, directory / "results.csv"):
        again = fit_table(
            read_table([source]), FitRequest("quadratic_log", [LR], "val_loss", ["model.width"])
        )
        assert [g.fit.estimates["optimum"].value for g in again.groups] == pytest.approx(
            [0.02, 0.01, 0.005]
        )
    shown = yaml.safe_load((directory / "sweep.yaml").read_text())
    assert shown["runs"]["width16_lr0.002"] == {"model.width": 16, LR: 0.002, "model.aspect": None}


def test_more_seeds_around_the_optimum(tmp_path, data, capsys, monkeypatch):
    """One seed everywhere, then two more at the three best rates; one run of the first stage and
    one of the second fail."""
    path = grid(
        tmp_path,
        data,
        axes={"model.width": [16, 32], LR: [0.002, 0.005, 0.01, 0.02, 0.05, 0.1]},
        derive={"model.aspect": None},
        seeds=1,
        refine={"x": LR, "seeds": 3},
        fit=[{**BOWL, "group": "model.width", "nearest": 3}],
    )
    directory, fail, asked = tmp_path / "s", {"width16_lr0.002_seed0", "width32_lr0.01_seed2"}, []
    at_once: list[int] = []
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(4))

    def train(jobs, variables, retries, tell, tick):
        asked.append([job.name for job in jobs])
        at_once.append(len(variables))
        made = read_grid(path)
        plans = plan_runs(made, directory, runs=[*made.runs(), *made._expand([1, 2])])
        for one in plans:
            if one.name in asked[-1] and one.name not in fail:
                pretend_run(one, bowl)
        return {name: "broke" for name in asked[-1] if name in fail}

    monkeypatch.setattr("archscale.sweep.launchers.choice.run_local", train)
    sweep(path, sweep_dir=directory, dry_run=True)
    assert (
        "then seeds 1, 2 at the 3 best parameterization.base.lr by val_loss: 12 more runs"
        in capsys.readouterr().out
    )
    with pytest.raises(
        TrainingError,
        match=r"2 of 24 runs failed: width16_lr0.002_seed0: broke.*width32_lr0.01_seed2",
    ):
        sweep(path, sweep_dir=directory)
    first, second = asked
    assert len(first) == 12
    near = {
        16: ("0.01", "0.02", "0.05"),
        32: ("0.005", "0.01", "0.02"),
    }  # the best are 0.02 and 0.01
    assert set(second) == {
        f"width{w}_lr{lr}_seed{s}" for w in near for lr in near[w] for s in (1, 2)
    }
    out = capsys.readouterr().out
    assert "24 runs of" in out
    assert "11 of them finished" in out
    [fit] = json.loads((directory / "fits.json").read_text())
    assert [group["points"] for group in fit["groups"]] == [9, 8]
    assert [group["parameters"]["optimum"]["value"] for group in fit["groups"]] == pytest.approx(
        [0.02, 0.01]
    )
    # Mended and started again, only those two are trained; then the dry run shows both stages.
    fail.clear()
    sweep(path, sweep_dir=directory)
    assert asked[2:] == [["width16_lr0.002_seed0"], ["width32_lr0.01_seed2"]]
    assert at_once == [4, 4, 1, 1]  # each stage has room of its own
    capsys.readouterr()
    sweep(path, sweep_dir=directory, dry_run=True)
    assert "24 runs of" in (out := capsys.readouterr().out)
    assert "24 of them finished" in out
    assert "more runs" not in out


def test_refine_by_what_no_run_has(tmp_path, data):
    keys = {"axes": {LR: [0.002, 0.005, 0.01]}, "seeds": 1}
    path = grid(tmp_path, data, **keys, refine={"x": LR, "seeds": 2, "y": "val_los"})
    with pytest.raises(
        ConfigError, match=r"no run has val_los \(refine.y in .*\): give one of step, tokens"
    ):
        sweep(path, dry_run=True)
    path = grid(tmp_path, data, **keys, refine={"x": LR, "seeds": 2, "y": "val_loss/zz"})
    with pytest.raises(ConfigError, match=r"no val_loss/zz without a source zz of data\.mixture"):
        sweep(path, dry_run=True)
    path = grid(tmp_path, data, **keys, refine={"x": LR, "seeds": 2, "y": "moe/none"})
    pretend(path, tmp_path / "s", bowl)
    with pytest.raises(
        ConfigError, match=r"no run has moe/none \(refine.y in .*\): give a column of results.csv"
    ):
        sweep(path, sweep_dir=tmp_path / "s")


def test_a_report_that_cannot_be_drawn_costs_no_results(tmp_path, data, capsys, monkeypatch):
    def fails(*_):
        raise RuntimeError("no fonts")

    monkeypatch.setattr("archscale.sweep.pages.write_sweep_report", fails)
    path = grid(tmp_path, data, seeds=2)
    pretend(path, tmp_path / "s", bowl)
    sweep(path, sweep_dir=tmp_path / "s")
    assert "warning: no report: RuntimeError: no fonts" in capsys.readouterr().err
    assert (tmp_path / "s" / "results.csv").exists()


def test_losses_that_are_not_finite_are_excluded_and_named(tmp_path, data, capsys):
    path = grid(tmp_path, data, axes={LR: [0.002, 0.005, 0.01, 0.02, 0.05, 0.1]}, fit=[BOWL])
    pretend(
        path,
        tmp_path / "s",
        lambda made: None if made.parameterization.base.lr > 0.09 else bowl(made),
    )
    sweep(path, sweep_dir=tmp_path / "s")
    assert "lr0.1: val_loss is not finite" in capsys.readouterr().out
    [fit] = json.loads((tmp_path / "s" / "fits.json").read_text())
    assert fit["excluded"] == [{"row": "lr0.1", "reason": "val_loss is not finite"}]
    assert fit["groups"][0]["points"] == 5


def test_a_diverged_run_is_finished_listed_and_in_no_fit(tmp_path, data, capsys):
    """Also where what is fitted is finite."""
    rates = [0.005, 0.01, 0.02, 0.05, 1e30]
    asked = {"form": "power", "x": LR, "y": "tokens_per_second"}
    path = grid(tmp_path, data, axes={LR: rates}, fit=[BOWL, asked])
    dump_config(config(data, "muon", 4, telemetry={"every": 1}), tmp_path / "base.yaml")
    pretend(path, tmp_path / "s", bowl)
    [diverging] = [one for one in plan_runs(read_grid(path), tmp_path / "s") if "e+30" in one.name]
    shutil.rmtree(diverging.directory)
    lines = run(diverging.plan.config, str(diverging.directory))
    reason = f"loss not finite since step {min(x['step'] for x in lines if x['loss'] is None)}"
    for line in (tmp_path / "s").glob("*/metrics.jsonl"):
        if line.parent.name != diverging.name:
            content = json.loads(line.read_text())
            line.write_text(json.dumps(content | {"tokens_per_second": 1 / content["val_loss"]}))
    capsys.readouterr()
    sweep(path, sweep_dir=tmp_path / "s")  # raises if a run had failed; starts none
    out = capsys.readouterr().out
    assert "5 of 5 runs finished" in out
    assert f"{diverging.name}: diverged, left out of all fits: {reason}" in out
    rows = list(csv.DictReader((tmp_path / "s" / "results.csv").open()))
    assert [row["status"] for row in rows] == ["finished"] * 4 + [f"diverged: {reason}"]
    assert "diverged" not in rows[0]
    bowl_fit, power = json.loads((tmp_path / "s" / "fits.json").read_text())
    assert bowl_fit["excluded"] == [{"row": diverging.name, "reason": "val_loss is not finite"}]
    assert power["excluded"] == [{"row": diverging.name, "reason": reason}]


def test_too_few_points_are_left_for_a_fit(tmp_path, data):
    path = grid(tmp_path, data, axes={LR: [0.002, 0.005, 0.01, 0.02]}, fit=[BOWL])
    pretend(
        path,
        tmp_path / "s",
        lambda made: None if made.parameterization.base.lr > 0.01 else bowl(made),
    )
    with pytest.raises(DataError, match="3 points are too few for quadratic_log, which needs 4"):
        sweep(path, sweep_dir=tmp_path / "s")
    assert json.loads((tmp_path / "s" / "fits.json").read_text())[0]["refused"]["what"].startswith(
        "3 points"
    )


def test_a_directory_with_another_run_is_refused(tmp_path, data):
    path = grid(tmp_path, data, seeds=2)
    pretend(path, tmp_path / "s", bowl)
    before = {p: p.read_bytes() for p in (tmp_path / "s").rglob("*") if p.is_file()}
    with pytest.raises(
        ConfigError,
        match=r"training.tokens is 3840, the run in .*has 3072.*seed 0 in .*and 1 more problem",
    ):
        sweep(grid(tmp_path, data, steps=10, seeds=2), sweep_dir=tmp_path / "s")
    assert before == {p: p.read_bytes() for p in (tmp_path / "s").rglob("*") if p.is_file()}


def test_one_sweep_at_a_time_and_a_writable_directory(tmp_path, data):
    import fcntl

    path = grid(tmp_path, data, seeds=1)
    pretend(path, tmp_path / "s", bowl)
    with open(tmp_path / "s" / "sweep.jsonl", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another sweep works in this directory"):
            sweep(path, sweep_dir=tmp_path / "s")
    sweep(path, sweep_dir=tmp_path / "s")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write the sweep directory.*--sweep-dir"):
        sweep(path, sweep_dir=tmp_path / "file" / "s")


def test_the_last_line_is_the_last_whole_one(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert last_line(tmp_path) == {"step": 2}
    assert last_line(tmp_path / "nowhere") == {}


# --- the command line


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (
            ["--launcher", "cloud"],
            "'cloud' is not one of 'local', 'slurm', 'kubernetes', 'skypilot'.*sweep --help",
        ),
        (["--jobs", "0"], "jobs.*sweep --help"),
        (
            [],
            (
                r"unknown key \"model.widht\" \(axes.model.widht in .*g.yaml\): did you mean"
                r" model.width\?"
            ),
        ),
    ],
    ids=["launcher", "jobs", "key"],
)
def test_refusals_are_one_line(tmp_path, data, arguments, pattern):
    path = grid(tmp_path, data, axes={"model.widht": [1]})
    refused(launch(["sweep", str(path), *arguments], check=False, cwd=tmp_path), pattern)
    assert not (tmp_path / "runs").exists()


def events(directory, what):
    lines = (directory / "sweep.jsonl").read_text().splitlines()
    return [line["run"] for line in map(json.loads, lines) if line["event"] == what]


def kill_sweep(command, folder, until):
    """Starts a sweep and kills its process, and only it, with -9 once `until` holds; waits for its
    runs to be gone."""
    job = start(command, cwd=folder)
    try:
        while not until():
            assert job.process.poll() is None, job.output
            time.sleep(0.005)
        os.kill(job.process.pid, signal.SIGKILL)
        end = time.monotonic() + 30
        while job.tree():
            assert time.monotonic() < end, "runs outlive their sweep"
            time.sleep(0.02)
    finally:
        job.kill()


@pytest.mark.slow
def test_a_diverging_run_is_started_once(tmp_path, data):
    """Through the commands, twice."""
    path = grid(tmp_path, data, axes={LR: [0.01, 1e30]})
    dump_config(config(data, "muon", 4, telemetry={"every": 1}), tmp_path / "base.yaml")
    for _ in range(2):
        out = launch(["sweep", str(path), "--sweep-dir", "s"], cwd=tmp_path).stdout
        assert "2 of 2 runs finished" in out
        assert "lr1e+30: diverged, left out of all fits: loss not finite since step " in out
    assert len(events(tmp_path / "s", "started")) == 2
    assert not events(tmp_path / "s", "failed")
    log = (tmp_path / "s" / "logs" / "lr1e+30.log").read_text()
    assert "diverged: loss not finite since step " in log.splitlines()[-1]


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)]
)
def test_signals_end_as_ctrl_c_does(number, status):
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt) as signalled, _terminable():
        signal.raise_signal(number)
    assert signal.getsignal(number) == before
    assert _interrupted(signalled.value, "interrupted", Path("s"), "rerun").status == status


@pytest.mark.timeout(300)  # five times the import of torch: a minute where cores are busy
def test_killed_with_9_and_started_again(tmp_path, data):
    """Two runs; the one left alone trains in this process, and a third cannot start."""
    path = grid(tmp_path, data, steps=20, every=4, axes={LR: [0.002, 0.01]})
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    train_alone(path, alone)
    command = ["sweep", str(path), "--sweep-dir", str(killed), "--jobs", "3"]
    kill_sweep(command, tmp_path, lambda: list(killed.glob("lr*/checkpoints/step_*")))
    assert not (killed / "results.csv").exists()
    path = grid(tmp_path, data, steps=20, every=4, axes={LR: [0.002, 0.01, 0.02]})
    (killed / "lr0.02").write_text("a file where the run directory should be")
    refused(
        launch(command, check=False, cwd=tmp_path),
        r"1 of 3 runs failed: lr0.02: cannot write the run directory.*logs/lr0.02.log",
    )
    assert events(killed, "finished").count("lr0.01") == 1
    assert events(killed, "started").count("lr0.01") == 2
    assert events(killed, "started").count("lr0.02") == 1  # refused, so not tried again
    assert (killed / "results.csv").read_text().splitlines()[:3] == (
        alone / "results.csv"
    ).read_text().splitlines()
    assert (
        (killed / "results.csv")
        .read_text()
        .splitlines()[3]
        .startswith("lr0.02,failed: cannot write")
    )


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "seeds", "kills"), [(1, 3, (3, 11, 19)), (2, 1, (1, 3, 5))])
def test_a_sweep_killed_three_times_ends_as_if_left_alone(tmp_path, data, processes, seeds, kills):
    """24 runs, and 8 of two processes each; the sweep is killed with -9 after so many
    finished runs."""
    path = grid(
        tmp_path,
        data,
        steps=24,
        every=4,
        axes={"model.width": [16, 24], LR: [0.002, 0.01, 0.05, 0.2]},
        seeds=seeds,
        derive={"model.aspect": None},
        processes=processes,
        fit=[{**BOWL, "group": "model.width"}],
    )
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    command = ["sweep", str(path), "--jobs", str(2 // processes), "--sweep-dir"]
    first = launch([*command, str(alone)], timeout=800, check=False, cwd=tmp_path)
    for count in kills:

        def partway(count=count):
            if not (killed / "sweep.jsonl").exists() or len(events(killed, "finished")) < count:
                return False
            running = set(events(killed, "started")) - set(events(killed, "finished"))
            return any(0 < last_line(killed / name).get("step", 0) < 20 for name in running)

        kill_sweep([*command, str(killed)], tmp_path, partway)
    last = launch([*command, str(killed)], timeout=800, check=False, cwd=tmp_path)
    assert first.returncode == last.returncode
    assert (killed / "results.csv").read_text() == (alone / "results.csv").read_text()
    assert len((alone / "results.csv").read_text().splitlines()) == 8 * seeds + 1
    assert json.loads((killed / "fits.json").read_text())[0]["groups"] == [
        {
            **group,
            "refused": (
                group["refused"]
                and {
                    **group["refused"],
                    "where": group["refused"]["where"].replace("alone", "killed"),
                }
            ),
        }
        for group in json.loads((alone / "fits.json").read_text())[0]["groups"]
    ]
    assert (
        len(events(killed, "finished")) == len(set(events(killed, "finished"))) == 8 * seeds
    )  # none was trained twice
    assert (
        max(events(killed, "started").count(name) for name in set(events(killed, "started"))) >= 2
    )
