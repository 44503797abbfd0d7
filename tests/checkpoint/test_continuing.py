"""A run goes on longer, in another directory, with a decay, or with a part reset; what would change
its past is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint import load as load_dcp

from archscale.checkpoint.changes import Change
from archscale.checkpoint.directory import read_state
from archscale.checkpoint.history import Lineage, Start
from archscale.config import Config, load_config
from archscale.errors import CheckpointError, ConfigError
from archscale.files import checkpoint_steps, step_directory
from archscale.report.read import read_run
from archscale.report.run import write_run_page
from archscale.sweep.table import read_table
from archscale.train import trainer
from archscale.train.continuing import Wishes
from tests.train import tiny
from tests.train.tiny import tiny_data

CONSTANT = {"kind": "constant"}
HYPERP = {
    "kind": "hyperp",
    "base": {"depth": 2, "width": 24, "lr": 0.003, "tokens": 1920, "batch_tokens": 384},
}
STEP = 24 * 16  # tokens


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("data"))


def made(data: str, steps: int, schedule: dict = CONSTANT, **sections) -> Config:
    cheap = {
        "checkpoint": {"every": 2, "keep": 9},
        "telemetry": {"every": 1},
        "training": {"tokens": steps * STEP, "micro_batch": 12},
        "data": {"val": None},
    }
    return tiny.config(data, steps=steps, schedule=schedule, **cheap | sections)


def run(config: Config, folder: Path, resume: str = "auto", **wishes) -> list[tuple]:
    """Train as the command does; step, loss, gradient norm and rate of every line."""
    trainer.train(config, folder, resume, Wishes(**wishes))
    return curve(folder)


def curve(folder: Path) -> list[tuple]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"], line["grad_norm"], line["lr"]) for line in lines]


def checkpoint(folder: Path, step: int) -> str:
    return str(step_directory(folder / "checkpoints", step))


def state(folder: Path, step: int) -> dict:
    return read_state(Path(checkpoint(folder, step)))


def saved(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Everything that a checkpoint holds, by name."""
    path = checkpoint(folder, step)
    entries = FileSystemReader(path).read_metadata().state_dict_metadata
    content = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
    }
    load_dcp(content, checkpoint_id=path)
    return content


def assert_same_weights(one: Path, other: Path, step: int) -> None:
    a, b = saved(one, step), saved(other, step)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def killed(monkeypatch, config: Config, folder: Path, steps: int, *args, **wishes) -> None:
    """Train `steps` steps and stop as a crash would."""
    original, taken = trainer.train_step, []

    def stopping(*step_args, **kwargs):
        taken.append(1)
        if len(taken) > steps:
            raise KeyboardInterrupt
        return original(*step_args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(config, folder, *args, **wishes)


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory) -> Path:
    """A constant run of 8 steps."""
    folder = tmp_path_factory.mktemp("straight") / "r"
    run(made(data, 8), folder)
    return folder


@pytest.fixture(scope="module")
def short(data, tmp_path_factory) -> Path:
    """A constant run of 4 steps, to be copied."""
    folder = tmp_path_factory.mktemp("short") / "r"
    run(made(data, 4), folder)
    return folder


@pytest.fixture
def copied(short, tmp_path) -> Path:
    return Path(shutil.copytree(short, tmp_path / "r"))


# --- the same trajectory, longer


def test_a_constant_run_goes_on_as_the_longer_one(data, straight, copied, capfd):
    assert run(made(data, 8), copied) == curve(straight)
    assert "goes on from step 4 with another length or schedule (training.tokens 1536 → 3072)" in (
        capfd.readouterr().out
    )
    assert_same_weights(copied, straight, 8)
    with pytest.raises(
        ConfigError,
        match=r"training.tokens 1536 ends with step 4, and the checkpoint is of step 8 .*: give"
        r" more than 3072, or go back .* --resume PATH$",
    ):
        run(made(data, 4), copied)


def test_wsd_goes_on_before_either_decay_begins(data, tmp_path, monkeypatch):
    long, short = (made(data, steps, {"kind": "wsd", "decay_ratio": 0.5}) for steps in (8, 6))
    expected = run(long, tmp_path / "long")
    killed(monkeypatch, short, tmp_path / "r", 3)
    assert run(long, tmp_path / "r") == expected
    assert_same_weights(tmp_path / "r", tmp_path / "long", 8)
    # Its last steps are in the decay of the short one, or of a shorter one.
    run(short, tmp_path / "done")
    for config in (long, made(data, 7, {"kind": "wsd", "decay_ratio": 0.5})):
        with pytest.raises(ConfigError, match=r"the rate of step 5 would have been .*--extend"):
            run(config, tmp_path / "done")


def test_hyperps_rates_follow_the_tokens_unless_they_are_planned_for(data, tmp_path):
    short = made(data, 4, parameterization=HYPERP)
    held = made(data, 8, parameterization=HYPERP | {"planned_tokens": 4 * STEP})
    run(short, tmp_path / "r")
    with pytest.raises(
        ConfigError,
        match=r"^training.tokens 1536 → 3072: the peak rate of every step before would have been"
        r" 0.002581, and was 0.003222 \(role matrix\) \(.*step_00000004\): --extend plans rates and"
        r" schedule anew from step 4 on, parameterization.planned_tokens=1536 holds the rates and"
        r" keeps the trajectory$",
    ):
        run(made(data, 8, parameterization=HYPERP), tmp_path / "r")
    assert run(held, tmp_path / "r") == run(held, tmp_path / "straight")
    assert_same_weights(tmp_path / "r", tmp_path / "straight", 8)


def test_a_schedule_may_differ_where_no_past_step_would(data, short, copied):
    wsd = {"kind": "wsd", "decay_ratio": 0.25}
    lines = run(made(data, 8, wsd), copied)
    assert lines[:4] == curve(short)
    assert lines[-1][3] < lines[5][3] == lines[0][3]


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"kind": "linear"}, "kind constant → linear, .*: the rate of step 2 would have been"),
        ({"kind": "constant", "warmup_tokens": STEP}, "the rate of step 1 would have been 0, and"),
        (
            {"kind": "constant", "batch_ramp_tokens": 2 * STEP, "batch_ramp_stages": 2},
            "the batch of step 1 would have been 12 sequences, and was 24",
        ),
    ],
)
def test_what_a_past_step_would_have_had_otherwise_is_named(data, copied, schedule, message):
    with pytest.raises(ConfigError, match=message):
        run(made(data, 8, schedule), copied)
    assert checkpoint_steps(copied / "checkpoints") == [2, 4]


# --- --extend


def test_extending_plans_the_rest_anew_once(data, tmp_path, monkeypatch, capfd):
    linear = {"kind": "linear"}
    folder, long = tmp_path / "r", made(data, 8, linear, parameterization=HYPERP)
    before = run(made(data, 4, linear, parameterization=HYPERP), folder)
    killed(monkeypatch, long, folder, 3, extend=True)
    assert (
        "--extend at step 4: 1,536 → 3,072 tokens (4 → 8 steps), peak rate 0.003222 → 0.002581,"
        " rate of step 5 0.0003222 → 0.00142\n"
    ) in capfd.readouterr().out
    lines = run(long, folder, extend=True)
    assert "--extend" not in capfd.readouterr().out
    assert lines[:4] == before
    peak = 0.003 * (8 * STEP / 1920) ** -0.32
    expected = [peak * (1 - 0.9 * step / 8) for step in range(4, 8)]
    assert [line[3] for line in lines[4:]] == pytest.approx(expected, rel=1e-12)
    assert run(long, folder) == lines
    [change] = state(folder, 6)["changes"]
    assert (change["kind"], change["step"]) == ("extend", 4)
    assert change["id"] == state(folder, 4)["id"]
    assert change["details"] == {"keys": {"training.tokens": [1536, 3072]}}
    assert state(folder, 8)["changes"] == [change]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"steps": 4}, "--extend changes nothing"),
        ({"steps": 3}, "ends with step 3, and the checkpoint is of step 4"),
        ({"steps": 8, "seed": 1}, "seed is 1, the checkpoint's run has 0"),
        (
            {"steps": 8, "schedule": {"batch_ramp_tokens": 4 * STEP, "batch_ramp_stages": 2}},
            "--reset schedule in place of --extend",
        ),
    ],
)
def test_what_cannot_be_extended(data, copied, sections, message):
    with pytest.raises(ConfigError, match=message):
        run(made(data, **sections), copied, extend=True)


def test_nothing_to_extend(data, tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint to extend"):
        run(made(data, 4), tmp_path / "r", extend=True)
    assert not (tmp_path / "r").exists()


# --- branches


def test_a_branch_keeps_its_parentage_and_can_be_reported(data, straight, short, tmp_path):
    branch, named = tmp_path / "branch", checkpoint(short, 2)
    lines = run(made(data, 8), branch, named)
    assert lines == curve(straight)[2:]
    parent = {
        "step": 2,
        "id": state(short, 2)["id"],
        "run": "tiny",
        "checkpoint": named,
    }
    assert state(branch, 4)["parent"] == parent
    assert state(branch, 8)["resumed"] == [parent]
    assert state(branch, 6)["parent"] == {"step": 4, "id": state(branch, 4)["id"]}
    write_run_page([read_run(branch)], branch / "report.html")
    assert read_table([branch]).columns["tokens"] == [8 * STEP]
    # The old run's checkpoint may be gone by the time that the job is started again.
    moved = shutil.move(short, tmp_path / "elsewhere")
    try:
        assert run(made(data, 8), branch, named) == lines
    finally:
        shutil.move(moved, short)


# --- --decay-from


def test_a_decay_from_a_checkpoint_is_that_of_a_run_configured_so(
    data, straight, tmp_path, monkeypatch, capfd
):
    """Killed and started again it goes on, with the command as with the config that it wrote."""
    folder, constant = tmp_path / "decay", made(data, 8, {"kind": "constant", "decay_ratio": 0.4})
    old = tmp_path / "old"
    shutil.copytree(straight, old)
    named = Path(checkpoint(old, 4))
    killed(monkeypatch, constant, folder, 2, decay_from=named)
    assert "decays from step 4 (1,536 tokens) to step 7 (2,688 tokens)" in capfd.readouterr().out
    derived = load_config(folder / "config.yaml")
    assert (derived.schedule.kind, derived.tokens) == ("wsd", 7 * STEP)
    assert derived.schedule.decay_ratio == pytest.approx(3 / 7)
    shutil.copytree(folder, tmp_path / "plain")
    shutil.rmtree(old)
    lines = run(constant, folder, decay_from=named)
    expected = run(derived, tmp_path / "straight")
    assert lines == expected[4:]
    assert [line[3] for line in expected[:5]] == [0.003] * 5
    assert_same_weights(folder, tmp_path / "straight", 7)
    assert run(derived, tmp_path / "plain") == lines
    assert run(constant, folder, decay_from=named) == lines


def test_a_decay_keeps_the_rates_and_may_have_its_end_given(data, tmp_path):
    """In the run's own directory, from its newest checkpoint."""
    wsd = {"kind": "wsd", "decay_ratio": 0.5}
    config = made(data, 8, wsd, parameterization=HYPERP)
    run(config, tmp_path / "r")
    newest = tmp_path / "r" / "checkpoints" / "step_00000004"
    with pytest.raises(CheckpointError, match="a checkpoint of step 8, which the decay would give"):
        run(config, tmp_path / "r", decay_from=newest)
    for step in (6, 8):
        shutil.rmtree(checkpoint(tmp_path / "r", step))
    before = curve(tmp_path / "r")
    lines = run(
        made(data, 6, wsd, parameterization=HYPERP),
        tmp_path / "r",
        decay_from=newest,
        tokens_given=True,
    )
    assert lines[:4] == before[:4]
    peak = before[0][3]
    assert [line[3] for line in lines] == pytest.approx([peak] * 5 + [peak * 0.55])
    derived = load_config(tmp_path / "r" / "config.yaml")
    assert derived.parameterization.planned_tokens == 8 * STEP
    [change] = state(tmp_path / "r", 6)["changes"]
    assert change["details"] == {"tokens": 4 * STEP, "planned_tokens": 8 * STEP}


def test_what_cannot_decay(data, straight, tmp_path):
    wsd = {"kind": "wsd", "decay_ratio": 0.75}
    run(made(data, 4, wsd), tmp_path / "wsd")
    run(made(data, 2, {"kind": "linear"}), tmp_path / "linear")
    new, past = tmp_path / "new", Path(checkpoint(straight, 4))

    def refused(config, path, message, error=ConfigError, **given):
        with pytest.raises(error, match=message):
            run(config, new, decay_from=Path(path), **given)
        assert not new.exists()

    refused(made(data, 4, wsd), checkpoint(tmp_path / "wsd", 4), "step 4 decays already")
    refused(
        made(data, 8), checkpoint(tmp_path / "linear", 2), "its run has schedule.kind linear, which"
    )
    refused(made(data, 8, {"kind": "cosine"}), past, "the config has schedule.kind cosine")
    refused(made(data, 8), tmp_path / "nothing", "not a complete checkpoint", CheckpointError)
    refused(made(data, 4), past, "no step left to decay after the 1536", tokens_given=True)
    warm = {"kind": "constant", "warmup_tokens": 5 * STEP}
    refused(made(data, 8, warm), past, "warms up until 1920 tokens, and the checkpoint is of 1536")
    refused(made(data, 8, seed=3), past, "seed is 3")


# --- --reset


def test_an_optimizer_starts_anew_with_the_weights(data, tmp_path, monkeypatch, capfd):
    """Under another rule, whose radius is the norm of the weights that are loaded; once."""
    old, folder = tmp_path / "old", tmp_path / "new"
    run(made(data, 2, rule="muon"), old)
    sections = {"parameterization": {"base": {"lr": 0.001}}, "rule": "muonh"}
    config, named = made(data, 4, **sections), checkpoint(old, 2)
    killed(monkeypatch, config, folder, 1, named, reset=("optimizer",))
    assert "--reset optimizer at step 2: the weights stay" in capfd.readouterr().out
    assert not checkpoint_steps(folder / "checkpoints")
    lines = run(config, folder, named, reset=("optimizer",))
    assert [line[0] for line in lines] == [3, 4]
    assert [line[3] for line in lines] == [0.001, 0.001]
    assert lines[0][1] == run(made(data, 3, rule="muon"), tmp_path / "plain", named)[0][1]
    before, after = saved(old, 2), saved(folder, 4)
    for name in ("blocks.0.attention.out.weight", "blocks.1.mlp.down.weight"):
        norm = before[f"model.{name}"].norm().item()
        assert after[f"optimizer.{name}.radius"].item() == pytest.approx(norm, rel=1e-6)
    assert after["optimizer.head.norm.weight.step"].item() == 2
    [change] = state(folder, 4)["changes"]
    assert (change["kind"], change["details"]) == ("reset", {"parts": ["optimizer"]})
    assert run(config, folder, named, reset=("optimizer",)) == lines


def test_data_start_with_their_first_window(data, short, tmp_path, monkeypatch):
    """The first steps see the windows of a run's first steps; so does a resumption see those that
    follow."""
    seen = []
    original = trainer.train_step

    def looking(engine, optimizer, micro_batches, *args, **kwargs):
        seen.append(torch.cat([batch.inputs for batch in micro_batches]))
        return original(engine, optimizer, micro_batches, *args, **kwargs)

    monkeypatch.setattr(trainer, "train_step", looking)
    run(made(data, 4, seed=5), tmp_path / "other")
    expected = seen.copy()
    seen.clear()
    config, named = made(data, 8, seed=5), checkpoint(short, 4)
    folder = tmp_path / "new"
    killed(monkeypatch, config, folder, 3, named, reset=("data",))
    run(config, folder)
    # Step 7 twice: it was lost in the crash.
    for windows, wanted in zip(seen, [*expected[:3], *expected[2:]], strict=True):
        assert torch.equal(windows, wanted)
    assert state(folder, 8)["origins"]["data"] == {"step": 4, "samples": 4 * 24}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["tokens"] for line in lines] == [step * STEP for step in range(5, 9)]


def test_resets_on_two_ranks_are_those_of_one(pool, data, short, tmp_path):
    named, wishes = checkpoint(short, 4), Wishes(reset=("optimizer", "data", "schedule"))
    config = made(data, 3, {"kind": "linear"}, rule="orscale_lm")
    alone = [line["loss"] for line in tiny.run(config, str(tmp_path / "alone"), named, wishes)]
    for lines in pool(2).run(tiny.run, config, str(tmp_path / "two"), named, wishes):
        assert [line["step"] for line in lines] == [5, 6, 7]
        assert [line["loss"] for line in lines] == pytest.approx(alone, rel=1e-5)


def test_a_schedule_starts_anew_over_as_many_tokens_more(data, short, tmp_path, monkeypatch):
    schedule = {
        "kind": "linear",
        "warmup_tokens": STEP,
        "batch_ramp_tokens": STEP,
        "batch_ramp_stages": 2,
    }
    config, named, folder = made(data, 4, schedule), checkpoint(short, 4), tmp_path / "new"
    killed(monkeypatch, config, folder, 4, named, reset=("schedule",))
    [(_, why)] = read_table([folder]).left_out
    assert why == "unfinished: step 8 of 9"
    lines = run(config, folder, named, reset=("schedule",))
    alone = run(config, tmp_path / "alone")
    assert [line[0] for line in lines] == [step + 4 for step, *_ in alone]
    assert [line[3] for line in lines] == [line[3] for line in alone]
    tokens = [json.loads(line)["tokens"] for line in (folder / "metrics.jsonl").open()]
    half = STEP // 2
    assert tokens[:3] == [4 * STEP + half, 4 * STEP + 2 * half, 4 * STEP + 4 * half]
    assert state(folder, lines[-1][0])["origins"]["schedule"] == {"step": 4, "samples": 96}
    assert read_run(folder).planned("training", "steps") == lines[-1][0]
    assert run(config, folder) == lines
    assert read_table([folder]).columns["step"] == [lines[-1][0]]


def test_resets_that_are_refused(data, short, copied, tmp_path):
    named = checkpoint(short, 4)
    for resume in ("auto", "never"):
        with pytest.raises(ConfigError, match="would happen again whenever .* --resume PATH"):
            run(made(data, 8), copied, resume, reset=("data",))
    for wishes, resume in [
        ({"extend": True, "reset": ("schedule",)}, named),
        ({"extend": True}, "never"),
        ({"decay_from": Path(named), "extend": True}, "auto"),
        ({"decay_from": Path(named), "reset": ("data",)}, "auto"),
        ({"decay_from": Path(named)}, named),
    ]:
        with pytest.raises(ConfigError, match="leave one of the two out"):
            run(made(data, 8), tmp_path / "new", resume, **wishes)
    with pytest.raises(ConfigError, match="seed is 1, the checkpoint's run has 0"):
        run(made(data, 8, seed=1), tmp_path / "new", named, reset=("schedule",))
    with pytest.raises(
        ConfigError, match="no step is left after a reset: the run ends with step 4"
    ):
        run(made(data, 4), tmp_path / "new", named, reset=("data",))
    # Continued without the reset, it would be passed over in silence.
    run(made(data, 6), tmp_path / "new", named)
    for wishes, missing in [
        ({"resume": named, "reset": ("data",)}, "--reset data"),
        ({"decay_from": Path(named)}, "--decay-from"),
    ]:
        with pytest.raises(CheckpointError, match=f"step 6 there continues .* without {missing}"):
            run(made(data, 6), tmp_path / "new", **wishes)


def test_a_fall_back_to_before_a_change_makes_it_there():
    config = tiny.config("d").resolved()
    older = {"step": 2, "id": "b", "config": config}
    lineage = Lineage(Start(Path("p"), changes=(Change("reset", 4, "a", {"parts": ["data"]}),)))
    lineage.restore({"step": 4, "id": "a", "config": config}, rewinds=True)
    assert lineage.origins.data.samples == 4 * 24
    assert not lineage.resets_optimizer(older)
    lineage.restore(older, rewinds=False)
    assert lineage.origins.data.samples == 2 * 24
    state = lineage.next(3)
    [change] = state["changes"]
    # The command that named the checkpoint has had its way: started again, it goes on.
    assert (change["step"], change["id"]) == (2, "a")
    assert [entry["id"] for entry in state["resumed"]] == ["a"]
