"""A dry run expects about what preparing gives; the ready recipes can be planned anywhere."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest
import yaml

from archscale.data.preparing import estimate as module
from archscale.data.preparing.estimate import estimate
from archscale.data.preparing.prepare import prepare
from archscale.data.preparing.recipe import load_recipe
from archscale.data.preparing.sources import HuggingFaceSource
from archscale.data.summary_text import render_estimate
from archscale.errors import DataError

RECIPES = Path(__file__).resolve().parents[3] / "data_prep"
HUB = {
    "fineweb_edu_gpt2": 10e9,
    "fineweb_edu": 100e9,
    "dclm": 40e9,
    "slimpajama": 627.5e9,
    "starcoder": 250e9,
}


def write_lines(path: Path, number: int, seed: int) -> None:
    generator = random.Random(seed)
    words = [
        "river",
        "stone",
        "market",
        "window",
        "lamp",
        "garden",
        "bread",
        "winter",
        "signal",
        "copper",
    ]
    text = "".join(
        json.dumps({"id": i, "text": " ".join(generator.choices(words, k=60))}) + "\n"
        for i in range(number)
    )
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt") as file:
        file.write(text)


def recipe_of(folder: Path, **changes: object) -> Path:
    recipe = {
        "name": "test",
        "sources": [{"kind": "jsonl", "path": str(folder / "*.jsonl*")}],
        "tokenizer": {"kind": "sentencepiece", "train": {"vocab_size": 360}},
        "validation": 0.1,
        "output": str(folder / "data"),
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | changes))
    return path


def test_expects_what_preparing_gives(tmp_path, monkeypatch) -> None:
    # units so small that most of the text is not read
    monkeypatch.setattr(module, "_UNIT_BYTES", 10_000)
    write_lines(tmp_path / "a.jsonl", 3_000, 1)
    write_lines(tmp_path / "b.jsonl.gz", 300, 2)
    recipe = recipe_of(tmp_path, deduplicate=False)
    expected = estimate(load_recipe(recipe), workers=2)
    assert not (tmp_path / "data").exists()
    made = prepare(recipe)
    splits = [made[split] for split in ("train", "validation")]
    # Documents have equal lengths but for the words drawn: a sample of tens of them is within 10 %.
    assert expected["text"] == pytest.approx(sum(s["bytes"] for s in splits), rel=0.1)
    assert expected["documents"] == pytest.approx(sum(s["documents"] for s in splits), rel=0.1)
    assert expected["tokens"] == pytest.approx(sum(s["tokens"] for s in splits), rel=0.1)
    assert expected["shards"] == 2 * expected["tokens"]
    assert expected["seconds"] > 0
    assert expected["notes"] == []
    text = render_estimate(expected)
    assert "time on 2 cores" in text
    assert "nothing was written" in text


def test_a_full_disk_is_expected(tmp_path, monkeypatch) -> None:
    write_lines(tmp_path / "a.jsonl", 300, 1)
    monkeypatch.setattr(module, "_free", lambda output: 1000)
    notes = estimate(load_recipe(recipe_of(tmp_path)))["notes"]
    assert any("has not enough room" in note for note in notes)


def test_validation_sources_are_expected_too(tmp_path) -> None:
    write_lines(tmp_path / "a.jsonl", 300, 1)
    write_lines(tmp_path / "held_out.json", 100, 2)
    own = [{"kind": "jsonl", "path": str(tmp_path / "held_out.json")}]
    expected = estimate(load_recipe(recipe_of(tmp_path, validation=own)))
    training, validation = expected["sources"]
    assert validation["source"] == f"validation: {own[0]['path']}"
    assert training["text"] == pytest.approx(3 * validation["text"], rel=0.1)
    assert expected["tokens"] == training["tokens"] + validation["tokens"]
    own[0]["path"] = str(tmp_path / "nope")
    with pytest.raises(DataError, match="no file matches"):
        estimate(load_recipe(recipe_of(tmp_path, validation=own)))


def test_an_output_that_is_taken_is_refused(tmp_path) -> None:
    write_lines(tmp_path / "a.jsonl", 30, 1)
    recipe = recipe_of(tmp_path)
    with pytest.raises(DataError, match="not a directory"):
        estimate(load_recipe(recipe, [f"output={recipe}"]))


@pytest.fixture
def without_network(monkeypatch) -> None:
    """The hub is out of reach, at once rather than after its own repetitions."""

    def unreachable(*_: object) -> object:
        raise DataError("cannot reach the hub", "its name", "check the network")

    monkeypatch.setattr(HuggingFaceSource, "units", unreachable)
    monkeypatch.setattr(module, "load_tokenizer", unreachable)


@pytest.mark.usefixtures("without_network")
@pytest.mark.parametrize("name", HUB)
def test_ready_recipes_are_planned_without_network(name: str) -> None:
    expected = estimate(load_recipe(RECIPES / f"{name}.yaml"))
    assert expected["tokens"] == HUB[name]
    assert any("not read here" in note for note in expected["notes"])
    assert any("shards take" in note for note in expected["notes"])
    assert "unknown" in render_estimate(expected)


@pytest.mark.usefixtures("without_network")
def test_without_a_published_size_the_hub_must_be_in_reach(tmp_path) -> None:
    source = {"kind": "huggingface", "name": "no/such-data-set"}
    with pytest.raises(DataError, match="cannot reach the hub"):
        estimate(load_recipe(recipe_of(tmp_path, sources=[source])))


@pytest.mark.parametrize("name", HUB)
def test_ready_recipes_read_files_of_their_schema(name: str, tmp_path, monkeypatch) -> None:
    """Rows as the data set has them, from a local file in place of the hub's."""
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    content = "content" if name == "starcoder" else "text"
    for file, seed in (("train", 1), ("validation", 2)):
        write_lines(tmp_path / f"{file}.jsonl", 200, seed)
        rows = [json.loads(line) for line in (tmp_path / f"{file}.jsonl").read_text().splitlines()]
        renamed = [{"meta": {"url": "x"}, content: row["text"]} for row in rows]
        (tmp_path / f"{file}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in renamed))
    overrides = [
        "sources.0.name=json",
        "sources.0.config=null",
        f"sources.0.data_files={tmp_path}/train.jsonl",
        "tokenizer={kind: sentencepiece, train: {vocab_size: 360}}",
        f"output={tmp_path}/data",
    ]
    if name == "slimpajama":
        overrides += [
            "validation.0.name=json",
            "validation.0.split=train",
            f"validation.0.data_files={tmp_path}/validation.jsonl",
        ]
    made = prepare(RECIPES / f"{name}.yaml", overrides)
    documents = made["train"]["documents"] + made["validation"]["documents"]
    assert documents == (400 if name == "slimpajama" else 200)
