"""The running average of the weights (`training.ema`): what it is, and that it only looks on."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from archscale.checkpoint.directory import read_state
from archscale.checkpoint.reading import StoredWeights
from archscale.checkpoint.saving import load_checkpoint
from archscale.cli import app
from archscale.data.training_data import open_training_data
from archscale.data.validation import validation_sets
from archscale.errors import ArchscaleError
from archscale.files import step_directory
from archscale.parallel import native
from archscale.plan.plan import make_plan
from archscale.train import trainer
from tests.train.tiny import LAYOUTS, config, crash_after, run, tiny_data

DECAY = 0.9  # reached by the warm-up in the update with t = 90: these runs are within it
SECTIONS = {
    "checkpoint": {"every": 1, "keep": 20},
    "eval": {"every": 4, "batches": 1},
    "training": {"ema": DECAY},
    "model": {"vocab_size": 317},  # which 3 ranks do not divide
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def made(data, tmp_path_factory) -> tuple[Path, list[dict]]:
    """A run of 8 steps on one process, with a checkpoint of every step, and its lines."""
    folder = tmp_path_factory.mktemp("made") / "run"
    return folder, run(config(data, "orscale_lm", 8, **SECTIONS), str(folder))


def step(run_dir: Path, number: int) -> Path:
    return step_directory(run_dir / "checkpoints", number)


def tensors(path: Path, ema: bool) -> dict[str, torch.Tensor]:
    stored = StoredWeights(path, ema=ema)
    return {name: stored.read(name) for name in stored.shapes}


def numbers(lines: list[dict]) -> list[tuple]:
    return [(line["loss"], line["grad_norm"], line.get("val_loss")) for line in lines]


def test_no_loss_depends_on_it(made, data, tmp_path):
    sections = SECTIONS | {"training": {}, "checkpoint": {"every": 100}}
    without = run(config(data, "orscale_lm", 8, **sections), str(tmp_path))
    assert numbers(made[1]) == numbers(without)
    assert ["val_loss_ema" in line for line in made[1]] == [False] * 3 + [True] + [False] * 3 + [
        True
    ]
    assert not any("val_loss_ema" in line for line in without)


def test_it_is_the_average_that_its_definition_says(made):
    run_dir, _ = made
    steps = [tensors(step(run_dir, number), ema=False) for number in range(1, 9)]
    averages = [tensors(step(run_dir, number), ema=True) for number in range(1, 9)]
    for name, average in averages[0].items():
        expected = average.double()
        for t, (weights, held) in enumerate(zip(steps[1:], averages[1:]), start=1):
            decay = min(DECAY, (1 + t) / (10 + t))
            expected = decay * expected + (1 - decay) * weights[name].double()
            # Seven float32 steps, of a rounding each that later ones shrink.
            bound = 7 * torch.finfo(torch.float32).eps * expected.abs().max()
            assert (held[name] - expected).abs().max() <= bound
        assert not torch.equal(averages[7][name], steps[7][name])
    assert read_state(step(run_dir, 8))["ema"] == {"updates": 8}


def test_it_is_evaluated_as_a_model_with_its_weights(made, data, tmp_path):
    """And `average --ema` writes it as the weights of a run."""
    run_dir, lines = made
    arguments = ["average", str(step(run_dir, 8)), "--ema", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, ["checkpoint", *arguments])
    assert done.exit_code == 0, done.output
    assert "running average of the weights" in done.stdout
    made_config = config(data, "orscale_lm", 8, **SECTIONS)
    read = open_training_data(made_config.data, made_config.model.context, made_config.seed)
    plan = make_plan(made_config.with_vocab(read.vocab_size))
    held = validation_sets(made_config.data, read)
    other = trainer.Run(plan, tmp_path, read, held, torch.device("cpu"))
    load_checkpoint(step(tmp_path / "out", 8), other.engine.weights())
    found = other.evaluation.metrics(other.engine)
    assert found is not None
    assert found["val_loss"] == lines[-1]["val_loss_ema"] != lines[-1]["val_loss"]


def test_export_takes_it(made, tmp_path):
    pytest.importorskip("tokenizers")
    load_file = pytest.importorskip("safetensors.torch").load_file
    for name, options in (("weights", []), ("average", ["--ema"])):
        arguments = ["export", str(made[0]), "--out", str(tmp_path / name), *options]
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output
    for name, ema in (("weights", False), ("average", True)):
        exported = load_file(tmp_path / name / "model.safetensors")["model.embed_tokens.weight"]
        assert torch.equal(exported, tensors(step(made[0], 8), ema)["embedding.weight"])
        # The card states the loss of these weights, and of no other ones.
        card, at = (tmp_path / name / "README.md").read_text(), made[1][-1]
        shown, hidden = (at[key] for key in ("val_loss_ema", "val_loss")[:: 1 if ema else -1])
        assert f"{shown:.4f}" in card
        assert f"{hidden:.4f}" not in card
        assert ("training loss" in card) == (not ema)
        assert ("these are the running average" in card) == ema


def straight_and_resumed(data: str, folder: str, sections: dict) -> tuple[list[dict], list[dict]]:
    merged = SECTIONS | {"checkpoint": {"every": 4}} | sections
    merged["training"] = SECTIONS["training"] | sections.get("training", {})
    made = config(data, "orscale_lm", 8, **merged)
    straight = run(made, folder + "/straight")
    crash_after(made, folder + "/crashed", 6)
    return straight, run(made, folder + "/crashed")


ZERO = {
    f"zero{stage}": (2, {"parallel": {"engine": "deepspeed", "zero_stage": stage}})
    for stage in (1, 2, 3)
}


@pytest.mark.parametrize(
    "layout",
    ["fsdp3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ddp2", *ZERO))],
)
def test_a_crash_changes_nothing_and_neither_do_layouts(pool, made, data, tmp_path, layout):
    if layout in ZERO:
        pytest.importorskip("deepspeed")
    world, sections = (LAYOUTS | ZERO)[layout]
    for straight, resumed in pool(world).run(straight_and_resumed, data, str(tmp_path), sections):
        assert [line.get("val_loss_ema") for line in straight] == [
            line.get("val_loss_ema") for line in resumed
        ]
    first, second = (tensors(step(tmp_path / name, 8), True) for name in ("straight", "crashed"))
    for name, average in first.items():
        assert torch.equal(average, second[name])
    # On to one process: as any two layouts (invariant of the losses, 1e-5).
    (step(tmp_path / "crashed", 8) / "state.json").unlink()
    lines = run(config(data, "orscale_lm", 8, **SECTIONS), str(tmp_path / "crashed"))
    assert lines[-1]["val_loss_ema"] == pytest.approx(made[1][-1]["val_loss_ema"], rel=1e-5)


def with_and_without(data: str, folder: str, sections: dict) -> list[list[tuple]]:
    made = []
    for name, training in (("with", SECTIONS["training"]), ("without", {})):
        merged = SECTIONS | {"checkpoint": {"every": 100}} | sections
        merged["training"] = {"precision": "bf16", **training}
        made.append(numbers(run(config(data, "orscale_lm", 8, **merged), f"{folder}/{name}")))
    return made


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fsdp2", *ZERO])
def test_weights_come_back_where_the_model_has_copies_of_them(pool, data, tmp_path, layout):
    """In bf16 engines hold a second copy of the weights, which has to follow them there and back:
    steps 5 to 8 come after an evaluation."""
    if layout in ZERO:
        pytest.importorskip("deepspeed")
    world, sections = (LAYOUTS | ZERO)[layout]
    for averaged, plain in pool(world).run(with_and_without, data, str(tmp_path), sections):
        assert averaged == plain


def test_switched_on_and_off_between_starts(data, tmp_path, capfd):
    without = SECTIONS | {"training": {}}
    crash_after(config(data, "orscale_lm", 8, **without), str(tmp_path), 2)
    crash_after(config(data, "orscale_lm", 8, **SECTIONS), str(tmp_path), 2)
    begun = "training.ema begins with the weights of step 2: the checkpoint has no running average"
    assert capfd.readouterr().out.count(begun) == 1
    assert read_state(step(tmp_path, 4))["ema"] == {"updates": 2}
    weights, average = tensors(step(tmp_path, 3), False), tensors(step(tmp_path, 3), True)
    before = tensors(step(tmp_path, 2), False)
    for name, tensor in average.items():  # the first decay is 1/10
        assert torch.equal(tensor, before[name].lerp(weights[name], 1 - 0.1))
    run(config(data, "orscale_lm", 8, **without), str(tmp_path))
    assert "running average of the checkpoint of step 4 is not continued" in capfd.readouterr().out
    with pytest.raises(ArchscaleError, match="no running average of the weights"):
        StoredWeights(step(tmp_path, 8), ema=True)


@contextlib.contextmanager
def poisoned(when: int):
    """The gradient of this step is NaN."""
    original, taken = native.clip_gradients, [0]

    def clip(grads, *args):
        grads = list(grads)
        taken[0] += 1
        if taken[0] == when:
            grads[3].view(-1)[0] = float("nan")
        return original(grads, *args)

    native.clip_gradients = clip
    try:
        yield
    finally:
        native.clip_gradients = original


def test_a_skipped_step_is_no_update(data, tmp_path):
    guard = {"telemetry": {"every": 1, "guard": {"mode": "act"}}}
    with poisoned(3):
        lines = run(config(data, "orscale_lm", 4, **SECTIONS | guard), str(tmp_path))
    assert lines[2]["event"].startswith("skipped")
    assert read_state(step(tmp_path, 4))["ema"] == {"updates": 3}


def test_the_plan_counts_it(data):
    plans = [
        make_plan(config(data, training=training).with_vocab(300)).figures
        for training in ({}, {"ema": DECAY})
    ]
    without, with_it = (figures["memory"] for figures in plans)
    parameters = with_it["terms"]["parameters"]
    assert with_it["terms"]["weight_average"] == parameters
    assert with_it["peak"] - without["peak"] == parameters
    for what in ("bytes", "host_copy"):
        assert plans[1]["checkpoint"][what] - plans[0]["checkpoint"][what] == parameters


@pytest.mark.parametrize("decay", [0, 1, -0.5, "often"])
def test_what_is_no_decay_is_refused(data, decay):
    with pytest.raises(ArchscaleError, match=r"training\.ema"):
        config(data, training={"ema": decay})
