"""Runs that start with weights of others: continued pre-training, and annealing on a mixture."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from archscale.checkpoint.directory import read_state
from archscale.checkpoint.reading import StoredWeights
from archscale.checkpoint.target import find_target
from archscale.cli import app
from archscale.config import Config, dump_config
from archscale.data.training_data import open_training_data
from archscale.distributed import fragment
from archscale.errors import ArchscaleError
from archscale.files import step_directory
from archscale.plan.plan import make_plan
from archscale.plan.transfer import transfer_of
from archscale.train.build import build_model
from archscale.train.initial_weights import initial_weights
from archscale.train.loading import load_model
from tests.checkpoint.test_commands import change_state
from tests.data.conftest import FINGERPRINT, VOCAB, write_dataset
from tests.export.runs import MUP, make_run
from tests.golden.curves import FOLDER
from tests.golden.curves import VOCAB as GOLDEN_VOCAB
from tests.huggingface.stock import write_directory
from tests.train.tiny import LAYOUTS, config, crash_after, run, tiny_data

STEPS = 6


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two data sets of one tokenizer, whose texts begin alike and are none of each other's."""
    folder = tmp_path_factory.mktemp("sets")
    ids = np.array(json.loads((FOLDER / "tokens.json").read_text()))
    for name, part in zip(("web", "code"), np.array_split(ids, 2)):
        write_dataset(folder / name, [part[:-150]], [part[-150:]], GOLDEN_VOCAB)
    return folder


@pytest.fixture(scope="module")
def source(sets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of Adam on web, at a constant rate: norms are not those that it began with."""
    run_dir = tmp_path_factory.mktemp("source") / "run"
    schedule, parameterization = {"kind": "constant"}, {"base": {"lr": 0.01}}
    made = config(
        str(sets / "web"),
        "adamw",
        STEPS,
        schedule=schedule,
        parameterization=parameterization,
        checkpoint={"every": 3},
    )
    run(made, str(run_dir))
    return run_dir


def annealed(sets: Path, source: object, **sections: Any) -> Config:
    """Half web, half code, from the source's weights, at a rate that falls to 0."""
    mixture = [{"name": name, "path": str(sets / name), "weight": 1.0} for name in ("web", "code")]
    training = {"init_from": None if source is None else str(source)}
    made = {
        "data": {"train": None, "val": None, "mixture": mixture},
        "schedule": {"kind": "linear", "final_ratio": 0.0},
        "seed": 1,
        "checkpoint": {"every": 3},
    }
    return config("", "muonh", STEPS, **{**made, "training": training, **sections})


def losses(lines: list[dict]) -> list[float]:
    return [line["loss"] for line in lines]


def norms(run_dir: Path) -> dict[str, float]:
    """Frobenius norms of the matrices in its last checkpoint."""
    stored = StoredWeights(step_directory(run_dir / "checkpoints", STEPS))
    names = [name for name in stored.shapes if re.match(r"blocks.*(qkv|out|up|down)", name)]
    return {name: float(stored.read(name).norm()) for name in names}


def test_annealing_on_a_mixture(pool: Callable, sets: Path, source: Path, tmp_path: Path, capfd):
    """One process and FSDP2; on the sphere every matrix keeps the norm that it was loaded with."""
    made = annealed(sets, source)
    lines = run(made, str(tmp_path / "alone"))
    printed = capfd.readouterr().out
    scratch = run(annealed(sets, None), str(tmp_path / "scratch"))
    # Training of the source is not lost, and goes on.
    learnt = losses(scratch)[0] - losses(lines)[0]
    assert learnt > 0.5
    assert np.mean(losses(lines)[-4:]) < np.mean(losses(lines)[:4])
    assert losses(lines)[-1] < losses(scratch)[-1]
    rates = [line["lr"] for line in lines]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.2 * rates[0]
    kept, drawn = norms(source), norms(tmp_path / "scratch")
    for name, norm in norms(tmp_path / "alone").items():
        assert norm == pytest.approx(kept[name], rel=1e-5)
        assert norm != pytest.approx(drawn[name], rel=1e-3)
    assert f"starts with the weights of step {STEPS} of tiny ({source}" in printed
    assert re.search(
        r"R of \d+ matrices on the sphere is the norm of the loaded weights: \d\S* to \d", printed
    )
    state = read_state(step_directory(tmp_path / "alone" / "checkpoints", STEPS))
    parent = step_directory(source / "checkpoints", STEPS)
    origin = {"path": str(parent), "run": "tiny", "step": STEPS, "id": read_state(parent)["id"]}
    assert state["initialized_from"] == origin
    for there in pool(2).run(run, made, str(tmp_path / "fsdp2")):
        np.testing.assert_allclose(losses(there), losses(lines), rtol=1e-5)


def test_a_run_that_has_checkpoints_goes_on_from_them(sets, source, tmp_path, capfd):
    """Bitwise, whatever has become of the weights that it began with."""
    copied = shutil.copytree(source, tmp_path / "copied")
    made = annealed(sets, copied)
    straight = run(made, str(tmp_path / "straight"))
    crash_after(made, str(tmp_path / "r"), 2)  # before the first checkpoint: from the start again
    crash_after(made, str(tmp_path / "r"), 4)
    shutil.rmtree(copied)
    capfd.readouterr()
    other = annealed(sets, "elsewhere")
    assert losses(run(other, str(tmp_path / "r"))) == losses(straight)
    told = "training.init_from elsewhere is not read: the run goes on from step 3"
    assert told in capfd.readouterr().out
    state = read_state(step_directory(tmp_path / "r" / "checkpoints", STEPS))
    assert state["initialized_from"]["path"].startswith(str(copied))


def test_other_constants_of_training_leave_the_model_as_it_is(sets, tmp_path):
    """From a width that transfers with Depth-μP to one without either."""
    data = tiny_data(tmp_path)
    make_run(data, tmp_path / "run", "adamw", model={"depth_mup": True}, **MUP)
    made = config(data, "muonh", training={"init_from": str(tmp_path / "run")})
    read = open_training_data(made.data, made.model.context, made.seed)
    resolved = make_plan(made.with_vocab(read.vocab_size)).config
    found = initial_weights(no_checkpoint(), resolved, read)
    model = build_model(resolved, None, transfer_of(resolved))
    weights = {name: fragment(parameter) for name, parameter in model.named_parameters()}
    assert found.load(weights, resolved).scaled
    native = load_model(find_target(tmp_path / "run"))
    tokens = torch.randint(2, 300, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = native(tokens).logits
        assert expected.std() > 0.2
        torch.testing.assert_close(model(tokens).logits, expected, atol=2e-5, rtol=0)


def no_checkpoint() -> Any:
    from archscale.checkpoint.history import Start

    return Start(None)


# --- directories

EXPERTS = {"moe": {"sparsity": 4, "top_k": 2, "shared_expert": False}}
OTHERS: dict[str, tuple[int, dict[str, Any]]] = {
    **{name: LAYOUTS[name] for name in ("ddp2", "fsdp3", "hsdp4")},
    "ep2": (2, {"model": EXPERTS, "parallel": {"expert": 2}}),
    "ep2 fsdp2": (4, {"model": EXPERTS, "parallel": {"expert": 2}}),
    **{
        f"zero{stage}": (2, {"parallel": {"engine": "deepspeed", "zero_stage": stage}})
        for stage in (1, 2, 3)
    },
}


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=pytest.mark.slow) for name in ("fsdp2", *OTHERS)]
)
def test_every_layout_starts_with_the_same_weights(layout, pool, sets, tmp_path, capfd):
    """From a directory of transformers; the losses of three steps, the first without an update."""
    world, sections = {**LAYOUTS, **OTHERS}[layout]
    if layout.startswith("zero"):
        pytest.importorskip("deepspeed")
    model = sections.get("model", {})
    sections = {key: values for key, values in sections.items() if key != "model"}
    made = config(str(sets / "web"), "muonh", 3, model=model).with_vocab(GOLDEN_VOCAB)
    directory = write_directory(made.model, tmp_path / "in")
    training = {**sections.pop("training", {}), "init_from": str(directory)}
    alone = config(str(sets / "web"), "muonh", 3, model=model, training=training)
    expected = losses(run(alone, str(tmp_path / "alone")))
    assert "share a tokenizer" in capfd.readouterr().err  # there is none beside the weights
    assert (
        losses(run(config(str(sets / "web"), "muonh", 1, model=model), str(tmp_path / "s")))
        != (expected[:1])
    )
    spread = config(str(sets / "web"), "muonh", 3, model=model, training=training, **sections)
    for lines in pool(world).run(run, spread, str(tmp_path / "spread"), timeout=300):
        np.testing.assert_allclose(losses(lines), expected, rtol=1e-5)


# --- through the command


def train(made: Config, folder: Path, *options: str) -> str:
    """The line of an error that a user can cause; "" where there was none."""
    dump_config(made, folder / "c.yaml")
    command = ["train", str(folder / "c.yaml"), "--run-dir", str(folder / "r"), *options]
    done = CliRunner().invoke(app, command)
    if isinstance(done.exception, ArchscaleError):
        assert not (folder / "r" / "metrics.jsonl").exists()
        return str(done.exception)
    assert done.exit_code == 0, (done.output, done.exception)
    return ""


def test_another_model_is_refused_with_what_to_set(sets, source, tmp_path):
    model = {"depth": 3, "width": 32, "window": 4, "rope_theta": 500.0, "moe": {"top_k": 2}}
    model |= {"mlp": "relu2", "mlp_ratio": 2.0, "qk_norm": False, "gated_attention": False}
    made = annealed(sets, source, model=model)
    line = train(made, tmp_path)
    assert "the weights are of another model" in line
    assert "model.depth is 3" in line
    settings = re.search(r"set (.*), as `archscale config from` prints them$", line)[1].split(" ")
    assert "model.depth=2" in settings
    settings.append("training.tokens=384")
    options = [option for setting in settings for option in ("--set", setting)]
    assert train(made, tmp_path, *options) == ""


def test_a_config_is_made_from_weights(sets, source, tmp_path):
    for path in (
        source,
        write_directory(annealed(sets, None).with_vocab(GOLDEN_VOCAB).model, tmp_path / "in"),
    ):
        done = CliRunner().invoke(app, ["config", "from", str(path)])
        assert done.exit_code == 0, done.exception
        (tmp_path / "base.yaml").write_text(done.stdout)
        plain = annealed(sets, path).resolved()
        rest = {key: plain[key] for key in ("data", "schedule", "optimizer")}
        text = json.dumps({"base": "base.yaml", **rest})
        (tmp_path / "c.yaml").write_text(text)
        training = {**plain["training"], "tokens": 384}
        options = [f"--set=training.{key}={json.dumps(v)}" for key, v in training.items()]
        options += [f"--run-dir={tmp_path / path.name}", "--set=model.context=16"]
        done = CliRunner().invoke(app, ["train", str(tmp_path / "c.yaml"), *options])
        assert done.exit_code == 0, done.exception
        planned = CliRunner().invoke(app, ["plan", str(tmp_path / "c.yaml"), *options[:-2]])
        assert planned.exit_code == 0, planned.output
        assert f"starts at the weights of {path}" in planned.output


def test_another_tokenizer_is_refused(sets, source, tmp_path):
    ids = np.arange(2000) % 60
    assert VOCAB > GOLDEN_VOCAB
    larger = write_dataset(tmp_path / "larger", [ids], [ids], VOCAB)
    made = annealed(sets, source, data={"train": str(larger), "val": None, "mixture": None})
    assert f"{VOCAB} token ids, the weights {GOLDEN_VOCAB} rows" in train(made, tmp_path)
    state = step_directory(shutil.copytree(source, tmp_path / "s") / "checkpoints", STEPS)
    change_state(state, data=read_state(state)["data"] | {"tokenizer": "0" * 64})
    made = annealed(sets, tmp_path / "s")
    assert f"tokenizer {FINGERPRINT[:12]}, the weights were trained with {'0' * 12}" in train(
        made, tmp_path
    )


def test_a_damaged_checkpoint_of_a_run_is_passed_over(sets, source, tmp_path, capfd):
    run_dir = shutil.copytree(source, tmp_path / "run")
    bad = next(step_directory(run_dir / "checkpoints", STEPS).glob("*.distcp"))
    bad.write_bytes(bytes(len(bad.read_bytes())))
    older, newest = (
        annealed(sets, None, training={"init_from": str(path), "tokens": 384})
        for path in (step_directory(source / "checkpoints", 3), run_dir)
    )
    expected = losses(run(older, str(tmp_path / "older")))
    assert losses(run(newest, str(tmp_path / "newest"))) == expected
    printed = capfd.readouterr()
    assert f"{bad.name} has the checksum" in printed.err
    assert "starts with the weights of step 3 of tiny" in printed.out
    state = read_state(step_directory(tmp_path / "newest" / "checkpoints", 1))
    assert state["initialized_from"]["step"] == 3


def test_what_is_no_source_is_a_line(sets, source, tmp_path):
    made = annealed(sets, None).with_vocab(GOLDEN_VOCAB)

    def refused(path: Path) -> str:
        return train(annealed(sets, path), tmp_path)

    assert "is no run, no checkpoint and no Hugging Face directory" in refused(tmp_path / "no")
    run_dir = shutil.copytree(source, tmp_path / "run")
    checkpoint = step_directory(run_dir / "checkpoints", STEPS)
    change_state(checkpoint, not_finite_since=5)
    assert "the run had diverged" in refused(run_dir)
    change_state(checkpoint, not_finite_since=None)
    bad = next(checkpoint.glob("*.distcp"))
    content = bytearray(bad.read_bytes())
    content[len(content) // 2] ^= 1
    bad.write_bytes(content)
    assert f"it is damaged: {bad.name}" in refused(checkpoint)
    change_state(step_directory(run_dir / "checkpoints", 3), not_finite_since=2)
    assert "the run had diverged" in refused(run_dir)
    shutil.rmtree(step_directory(run_dir / "checkpoints", 3))
    assert "no whole checkpoint" in refused(run_dir)
    shutil.rmtree(checkpoint)
    assert "no whole checkpoint" in refused(run_dir)

    write_directory(made.model, tmp_path / "in")
    for path in (source, tmp_path / "in"):
        said = refused(f"file://{path}")
        assert "runs and Hugging Face directories must be local paths" in said
        assert "a checkpoint in a store by itself" in said

    norm = "model.layers.0.post_attention_layernorm.weight"
    up = "model.layers.1.mlp.up_proj.weight"
    for change, said in (
        ({norm: None}, f"weight {norm}: missing in the files"),
        ({norm: torch.full((24,), torch.nan)}, "weight blocks.0.mlp_norm.weight is not finite"),
        ({up: torch.zeros(96, 24)}, "is zero: on the sphere"),
    ):
        shutil.rmtree(tmp_path / "in", ignore_errors=True)
        assert said in refused(write_directory(made.model, tmp_path / "in", **change))
