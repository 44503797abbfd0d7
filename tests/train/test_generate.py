"""Continuing a prompt: with the tokenizer that the run was trained with, or not at all."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from archscale.checkpoint.history import other_trajectory
from archscale.data.preparing.prepare import prepare
from archscale.data.stored import trained_tokenizer
from archscale.errors import DataError
from tests.data.foreign_files import write_llmc
from tests.train.texts import continued
from tests.train.tiny import config, run, tiny_data


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a data set in `tokens` and a run on it in `run`."""
    folder = tmp_path_factory.mktemp("trained")
    run(config(tiny_data(folder), steps=2, model={"depth": 1}), str(folder / "run"))
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """A copy of it, with the run's `data.train` in the copy."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "run/config.yaml"
    path.write_text(path.read_text().replace(str(trained), str(tmp_path)))
    return tmp_path


def text_of(folder: Path) -> str:
    return continued(folder / "run", "abcd", 12)


def prepare_otherwise(folder: Path) -> None:
    """Another data set in the place of the first: another tokenizer, of the same size."""
    shutil.rmtree(folder / "tokens")
    for path in (folder / "text").iterdir():
        path.write_text(path.read_text().translate(str.maketrans("abcdefgh", "hacbedgf")))
    changes = [f"sources.0.path={folder}/text/*.txt", f"output={folder}/tokens"]
    prepare(folder / "recipe.yaml", changes)


def test_a_run_keeps_its_tokenizer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = text_of(folder)
    prepare_otherwise(folder)
    assert text_of(folder) == before
    shutil.rmtree(folder / "tokens")
    monkeypatch.chdir(folder / "text")
    assert text_of(folder) == before


def test_without_its_own_only_the_same_tokenizer_will_do(folder: Path) -> None:
    before = text_of(folder)
    shutil.rmtree(folder / "run/tokenizer")  # as in runs that were started before
    assert text_of(folder) == before
    prepare_otherwise(folder)
    with pytest.raises(DataError, match=r"was trained with \w+ .*tokens.*has it in .*run"):
        text_of(folder)
    shutil.rmtree(folder / "tokens")
    with pytest.raises(DataError, match="no data set"):
        text_of(folder)


def test_a_run_on_files_of_an_unknown_tokenizer_needs_one(folder: Path) -> None:
    """Which does not make it another trajectory."""
    shutil.rmtree(folder / "run/tokenizer")
    write_llmc(folder / "a.bin", np.arange(100))
    made = config(str(folder / "a.bin"))
    with pytest.raises(DataError, match=r"do not say which .*as data\.tokenizer in .*config\.yaml"):
        trained_tokenizer(folder / "run", made.data, {"tokenizer": ""})
    given = config(str(folder / "a.bin"), data={"tokenizer": str(folder / "tokens")})
    assert trained_tokenizer(folder / "run", given.data, {"tokenizer": ""}).vocab_size == 300
    for key in ("data_set.tokenizer", "data_set.sources.a.tokenizer"):
        assert list(other_trajectory({key: ""}, {key: "x"})) == []
        assert list(other_trajectory({key: "y"}, {key: "x"})) == [key]


def test_a_damaged_copy_is_named(folder: Path) -> None:
    kept = folder / "run/tokenizer"
    (kept / "tokenizer.model").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"not the tokenizer .*run/tokenizer/tokenizer\.model"):
        text_of(folder)
    (kept / "tokenizer.model").unlink()
    with pytest.raises(DataError, match=r"cannot read the tokenizer.*tokenizer\.model"):
        text_of(folder)
    description = json.loads((kept / "kept.json").read_text())
    (kept / "kept.json").write_text(json.dumps(description)[:40])
    with pytest.raises(DataError, match=r"damaged.*kept\.json"):
        text_of(folder)


def test_a_run_trains_where_the_tokenizer_is_missing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "tokens/tokenizer/tokenizer.model").unlink()
    run(config(str(folder / "tokens"), steps=1, model={"depth": 1}), str(folder / "again"))
    assert "warning: the run keeps no tokenizer" in capsys.readouterr().err
