"""A run on a mixture: one trajectory, a loss for each source, and no other mixture on resuming."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from archscale.checkpoint.history import other_trajectory
from archscale.config import Config
from archscale.data.shards import TOKEN_BYTES
from archscale.distributed import rank
from archscale.errors import ConfigError
from archscale.sweep.table import config_cells
from archscale.train.trainer import train
from tests.data.conftest import write_dataset
from tests.golden.curves import FOLDER, VOCAB
from tests.train.tiny import config, crash_after, run


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """web, code and, without a window of validation text, wiki; a token of web is 4 bytes long, one
    of code 2."""
    folder = tmp_path_factory.mktemp("sets")
    ids = np.array(json.loads((FOLDER / "tokens.json").read_text()))
    for name, part, held, length in zip(
        ("web", "code", "wiki"), np.array_split(ids, 3), (150, 100, 10), (4, 2, 1)
    ):
        path = write_dataset(folder / name, [part[:-held]], [part[-held:]], VOCAB)
        np.save(path / TOKEN_BYTES, np.full(VOCAB, length, np.int32))
    return folder


def mixed(folder: Path, steps: int = 6, val: str | None = None, **weights: float) -> Config:
    """By default 6 : 2 : 2."""
    weights = weights or {"web": 0.6, "code": 0.2, "wiki": 0.2}
    mixture = [
        {"name": name, "path": str(folder / name), "weight": weight}
        for name, weight in weights.items()
    ]
    return config(
        "",
        "muonh",
        steps,
        data={"train": None, "val": val, "mixture": mixture},
        checkpoint={"every": 3},
        telemetry={"every": 1},
    )


def losses(lines: list[dict]) -> list[float]:
    return [line["loss"] for line in lines]


def crashed_and_resumed(made: Config, folder: str) -> list[dict]:
    crash_after(made, folder, 5)
    return run(made, folder)


def test_a_mixture_has_one_trajectory(pool: Callable, sets: Path, tmp_path: Path) -> None:
    """Bitwise after a crash, and within rounding on two processes."""
    made = mixed(sets)
    straight = run(made, str(tmp_path / "straight"))
    assert losses(straight) == losses(crashed_and_resumed(made, str(tmp_path / "alone")))
    assert losses(straight)[-1] < losses(straight)[0]
    for lines in pool(2).run(crashed_and_resumed, made, str(tmp_path / "two")):
        np.testing.assert_allclose(losses(lines), losses(straight), rtol=1e-5)
        for key in ("val_loss", "val_loss/web", "val_loss/code"):
            np.testing.assert_allclose(lines[-1][key], straight[-1][key], rtol=1e-5)


def train_of_own_disk(made: list[Config], folder: str) -> None:
    train(made[rank()], Path(folder))


def test_ranks_with_other_data_stop_together(pool: Callable, sets: Path, tmp_path: Path) -> None:
    """Before the first step, whether it is training or validation that differs."""
    shutil.copytree(sets, tmp_path / "moved")
    write_dataset(tmp_path / "other/web", [np.arange(900) % 250], [np.arange(150)], VOCAB)
    held = mixed(sets, val=str(sets / "code")), mixed(sets, val=str(tmp_path / "other/web"))
    shutil.copytree(tmp_path / "other/web", tmp_path / "moved/code", dirs_exist_ok=True)
    for made, problem in (
        ([mixed(sets), mixed(tmp_path / "moved")], r"source code of data\.mixture has 900 tokens"),
        (held, r"data\.val has 150 tokens on rank 1, 100 on rank 0"),
    ):
        raised = pool(2).run(train_of_own_disk, made, str(tmp_path / "r"), expect_error=True)
        for name, message in raised:
            assert name == "ConfigError"
            assert re.match(problem, message)
    assert not (tmp_path / "r").exists()


def test_every_source_has_its_own_validation_loss(sets: Path, tmp_path: Path, capsys) -> None:
    last = run(mixed(sets, 2), str(tmp_path / "r"))[-1]
    names = {key.partition("/")[2] for key in last if key.startswith("val_loss/")}
    assert names == {"web", "code"}
    web, code = last["val_loss/web"], last["val_loss/code"]
    assert web != code
    assert last["val_loss"] == pytest.approx(0.75 * web + 0.25 * code, rel=1e-12)
    bits = last["val_loss"] / (0.75 * 4 + 0.25 * 2) / np.log(2)
    assert last["val_bits_per_byte"] == pytest.approx(bits, rel=1e-12)
    assert last["val_bits_per_byte/code"] == pytest.approx(code / 2 / np.log(2), rel=1e-12)
    printed = capsys.readouterr().out
    assert "no val_loss/<name>: wiki" in printed
    plan = json.loads((tmp_path / "r" / "plan.json").read_text())
    assert [row["name"] for row in plan["data"]["sources"]] == ["code", "web", "wiki"]
    given = run(mixed(sets, 2, str(sets / "code")), str(tmp_path / "given"))[-1]
    assert given["val_loss"] == given["val_loss/code"] == code
    assert given["val_loss/web"] == web


def test_another_mixture_is_not_resumed(sets: Path, tmp_path: Path) -> None:
    """Nor one by a run on a single data set, but the same in other words and at another place."""
    folder = str(tmp_path / "r")
    run(mixed(sets, 5, web=0.7, code=0.3), folder)
    shutil.copytree(sets, tmp_path / "moved")
    assert len(run(mixed(tmp_path / "moved", 5, code=3, web=7), folder)) == 5
    for other in (mixed(sets, 5, web=0.8, code=0.2), mixed(sets, 5, web=0.7, wiki=0.3)):
        with pytest.raises(ConfigError, match=r"^data\.mixture is \[.*, the checkpoint's run has"):
            run(other, folder)
    alone = config(str(sets / "web"), steps=5, checkpoint={"every": 3}, telemetry={"every": 1})
    with pytest.raises(ConfigError, match=r"^data\.mixture is None, the checkpoint's run has \["):
        run(alone, folder)
    shutil.rmtree(tmp_path / "moved" / "code")
    shutil.copytree(sets / "wiki", tmp_path / "moved" / "code")
    with pytest.raises(ConfigError, match=r"^data_set\.sources\.code\.(origin|tokens) is"):
        run(mixed(tmp_path / "moved", 5, web=0.7, code=0.3), folder)


def test_a_sweep_tells_mixtures_apart_by_their_proportions(sets: Path, tmp_path: Path) -> None:
    before = config_cells(mixed(sets, web=0.7, code=0.3))
    moved = config_cells(mixed(tmp_path, code=3, web=7))
    assert list(other_trajectory(before, moved)) == []
    other = config_cells(mixed(sets, web=0.6, code=0.4))
    assert list(other_trajectory(before, other)) == ["data.mixture"]
