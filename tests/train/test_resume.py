"""A crash changes nothing."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from archscale.checkpoint.directory import read_state, recorded_files, state_text
from archscale.checkpoint.saving import load_checkpoint
from archscale.config import dump_config
from archscale.errors import CheckpointError, ConfigError
from archscale.files import checkpoint_steps, step_directory
from tests.pool import start
from tests.train.tiny import LAYOUTS, config, crash_after, run, tiny_data


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("data"))


def write_state(path: Path, state: dict) -> None:
    """`state.json` as it would be written with another content."""
    text = state_text(state, recorded_files(state), state["world_size"])
    (path / "state.json").write_text(text)


def straight_and_resumed(
    data: str, folder: str, rule: str, sections: dict
) -> tuple[list[dict], list[dict]]:
    made = config(data, rule, 10, checkpoint={"every": 5}, model={"vocab_size": 317}, **sections)
    straight = run(made, folder + "/straight")
    crash_after(made, folder + "/crashed", 7)
    return straight, run(made, folder + "/crashed")


def curve(lines: list[dict]) -> list[tuple]:
    assert [line["step"] for line in lines] == list(range(1, 11))
    return [(line["loss"], line["grad_norm"], line["lr"]) for line in lines]


@pytest.mark.parametrize(
    ("rule", "layouts"),
    [("orscale_lm", ("ddp2", "fsdp3")), ("muonh", ("fsdp2",)), ("adamw", ("fsdp3",))]
    + [
        pytest.param(rule, ("ddp2", "fsdp2", "fsdp3"), marks=pytest.mark.slow)
        for rule in ("orscale_lm", "muonh", "adamw")
    ],
)
def test_ten_steps_equal_five_and_a_crash_and_five_bitwise(pool, data, tmp_path, rule, layouts):
    """A vocabulary that neither 2 nor 3 divides; of one layout the same sums in the same order."""
    straight, resumed = straight_and_resumed(data, str(tmp_path / "1"), rule, {})
    assert curve(straight) == curve(resumed)
    for layout in layouts:
        world, sections = LAYOUTS[layout]
        for straight, resumed in pool(world).run(
            straight_and_resumed, data, str(tmp_path / layout), rule, sections
        ):
            assert curve(straight) == curve(resumed)


def test_other_world_sizes_continue_the_same_curve(pool, data, tmp_path):
    """2 → 1 → 4 processes."""
    made = config(data, "orscale_lm", 12, checkpoint={"every": 4})
    expected = run(made, str(tmp_path / "alone"))
    folder = str(tmp_path / "moving")
    pool(2).run(crash_after, made, folder, 4)
    crash_after(made, folder, 4)
    for lines in pool(4).run(run, made, folder):
        np.testing.assert_allclose(
            [line["loss"] for line in lines], [line["loss"] for line in expected], rtol=1e-5
        )


def test_the_command_killed_and_repeated(data, tmp_path):
    """kill -9 of the whole job, then the same command."""
    made = config(data, "muonh", 30, checkpoint={"every": 3}, telemetry={"every": 1})
    dump_config(made, tmp_path / "c.yaml")
    straight = run(made, str(tmp_path / "straight"))
    command = ["train", str(tmp_path / "c.yaml"), "--run-dir", str(tmp_path / "r")]
    job = start(command, processes=2)
    while not checkpoint_steps(tmp_path / "r" / "checkpoints"):
        assert job.process.poll() is None, job.output
    job.signal(signal.SIGKILL)
    job.kill()
    assert start(command, processes=2).wait().returncode == 0
    lines = [
        json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines] == list(range(1, 31))
    np.testing.assert_allclose(
        [line["loss"] for line in lines], [line["loss"] for line in straight], rtol=1e-5
    )
    again = start(command, processes=2).wait()
    assert "already done" in again.stdout


def test_a_half_written_checkpoint_is_not_one(data, tmp_path):
    made = config(data, steps=4, checkpoint={"every": 2, "keep": 5})
    run(made, str(tmp_path / "r"))
    checkpoints = tmp_path / "r" / "checkpoints"
    (checkpoints / ".step_00000009.partial").mkdir()
    (checkpoints / "step_00000008").mkdir()
    assert checkpoint_steps(checkpoints) == [2, 4]


@pytest.mark.parametrize("harm", ["truncate", "remove", "flip a bit"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(data, tmp_path, capfd, harm):
    """The next newest whole one is used, and the bad file is named."""
    made = config(data, steps=6, checkpoint={"every": 2, "keep": 5})
    straight = run(made, str(tmp_path / "r"))
    bad = next(step_directory(tmp_path / "r" / "checkpoints", 6).glob("*.distcp"))
    if harm == "remove":
        bad.unlink()
    elif harm == "flip a bit":
        content = bytearray(bad.read_bytes())
        content[len(content) // 2] ^= 1
        bad.write_bytes(content)
    else:
        bad.write_bytes(bad.read_bytes()[:-7])
    again = run(made, str(tmp_path / "r"))
    assert [line["loss"] for line in again] == [line["loss"] for line in straight]
    how = "has the checksum" if harm == "flip a bit" else "is"
    assert f"({bad.name} {how}" in capfd.readouterr().err
    assert checkpoint_steps(tmp_path / "r" / "checkpoints") == [2, 4, 6]


def test_a_checkpoint_of_other_data_is_refused(data, tmp_path):
    made = config(data, steps=2)
    run(made, str(tmp_path / "r"))
    path = step_directory(tmp_path / "r" / "checkpoints", 2)
    content = read_state(path)
    content["data"]["tokens"] += 1
    write_state(path, content)
    with pytest.raises(ConfigError, match="data_set.tokens"):
        run(made, str(tmp_path / "r"))


def test_keep_prunes_by_step(data, tmp_path):
    run(config(data, steps=6, checkpoint={"every": 2, "keep": 2}), str(tmp_path / "r"))
    assert checkpoint_steps(tmp_path / "r" / "checkpoints") == [4, 6]


def test_refusals(data, tmp_path):
    run(config(data, steps=4, checkpoint={"every": 2}), str(tmp_path / "r"))
    with pytest.raises(
        ConfigError, match=r"seed is 1, the checkpoint's run has 0.*another run with --run-dir"
    ):
        run(config(data, steps=4, seed=1), str(tmp_path / "r"))
    with pytest.raises(CheckpointError, match="the run directory holds a run"):
        run(config(data, steps=4), str(tmp_path / "r"), resume="never")
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        run(config(data, steps=4), str(tmp_path / "new"), resume=str(tmp_path / "nothing"))
    whole = str(step_directory(tmp_path / "r" / "checkpoints", 4))
    with pytest.raises(ConfigError, match=r"model.aspect is"):
        run(config(data, steps=4, model={"width": 32}), str(tmp_path / "new2"), resume=whole)
    named = tmp_path / "copied" / "step_00000004"
    shutil.copytree(whole, named)
    (named / "rng_0.bin").write_bytes(bytes((named / "rng_0.bin").stat().st_size))
    with pytest.raises(CheckpointError, match="damaged: rng_0.bin has the checksum .*older"):
        run(config(data, steps=4), str(tmp_path / "new"), resume=str(named))
    content = read_state(Path(whole))
    content["config"]["optimizer"]["mutton"] = True
    write_state(Path(whole), content)
    with pytest.raises(
        CheckpointError,
        match=r"another version.*mutton.*step_00000004/state.json.*with that version.*--run-dir",
    ):
        run(config(data, steps=6), str(tmp_path / "r"))
    assert not (tmp_path / "new2").exists()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "state.json").write_text('{"format": 99}')
    with pytest.raises(CheckpointError, match="format 99"):
        load_checkpoint(Path(tmp_path / "broken"), {})
