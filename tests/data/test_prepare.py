"""Recipes: text in, a whole dataset or nothing out, the same for the same documents in any
order."""

import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from archscale.data.preparing.prepare import inspect, prepare, verify
from archscale.data.preparing.recipe import load_recipe
from archscale.data.preparing.sources import PythonStdlibSource
from archscale.data.preparing.work import open_work
from archscale.data.shards import MANIFEST, TOKEN_BYTES, ShardWriter, open_shard, read_manifest
from archscale.data.split import TokenSplit
from archscale.data.summary_text import render
from archscale.data.tokenizer import load_tokenizer, train_sentencepiece
from archscale.errors import DataError

WORDS = [
    "quick",
    "brown",
    "foxes",
    "jump",
    "over",
    "lazy",
    "dogs",
    "while",
    "bright",
    "cats",
    "watch",
    "walls",
]


def _text(i: int) -> str:
    rng = np.random.default_rng(i)
    return f"{i}:\n\t" + " ".join(rng.choice(WORDS, 30)) + "\n\n"


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory to stand in, with corpus/*.txt and recipe.yaml."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus" / "deep").mkdir(parents=True)
    for i in range(60):
        (tmp_path / "corpus" / ("deep" if i % 2 else "") / f"{i}.txt").write_text(_text(i))
    _recipe(tmp_path)
    return tmp_path


def _recipe(folder: Path, **changes: object) -> Path:
    recipe = {
        "name": "tiny",
        "sources": [{"kind": "text", "path": "corpus/**/*.txt"}],
        "tokenizer": {"kind": "sentencepiece", "train": {"vocab_size": 350}},
        "validation": 0.2,
        "output": "data/tiny",
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | changes))
    return path


def _documents(directory: str | Path, split: str) -> list[str]:
    tokenizer = load_tokenizer(directory)
    shards = sorted(Path(directory).glob(f"{split}_*.bin"))
    ids = np.concatenate([open_shard(shard) for shard in shards])
    ends = np.flatnonzero(ids == tokenizer.eos_id)
    assert ends[-1] == len(ids) - 1
    return [
        tokenizer.decode(part[part != tokenizer.eos_id].tolist())
        for part in np.split(ids, ends[:-1] + 1)
    ]


def test_every_document_is_there_once(work: Path) -> None:
    summary = prepare("recipe.yaml", shard_tokens=500)
    train, validation = _documents("data/tiny", "train"), _documents("data/tiny", "validation")
    assert sorted(train + validation) == sorted(_text(i) for i in range(60))
    assert summary["train"]["documents"] == len(train)
    assert summary["train"]["bytes"] == sum(len(text.encode()) for text in train)
    assert summary["train"]["shards"] > 2
    assert not summary["already_there"]
    assert verify("data/tiny") == []
    split = TokenSplit("data/tiny", "train", 64)
    split.check(350)
    assert split.num_tokens == summary["train"]["tokens"]
    assert split.token_bytes[split.tokens(0, split.num_tokens)].sum() == summary["train"]["bytes"]
    assert os.listdir("data") == ["tiny"]  # nothing half-written beside it


def test_the_split_depends_on_content_alone(work: Path) -> None:
    prepare("recipe.yaml")
    lines = [json.dumps({"text": _text(i), "id": i}) for i in reversed(range(60))]
    (work / "corpus.jsonl").write_text("\n\n".join(lines))
    _recipe(work, sources=[{"kind": "jsonl", "path": "corpus.jsonl"}], output="data/jsonl")
    summary = prepare("recipe.yaml")
    assert summary["fingerprint"] == load_tokenizer("data/tiny").fingerprint
    for split in ("train", "validation"):
        assert sorted(_documents("data/jsonl", split)) == sorted(_documents("data/tiny", split))


def test_duplicates_and_empty_documents_are_dropped_and_counted(work: Path) -> None:
    (work / "corpus" / "again.txt").write_text(_text(7))
    (work / "corpus" / "empty.txt").write_text("")
    summary = prepare("recipe.yaml")
    assert summary["dropped"] == {"duplicate": 1, "empty": 1, "unweighted": 0, "repaired": 0}
    assert summary["train"]["documents"] + summary["validation"]["documents"] == 60
    summary = prepare("recipe.yaml", ["deduplicate=false", "output=data/all"])
    assert summary["train"]["documents"] + summary["validation"]["documents"] == 61


def test_a_weight_takes_a_share_by_content(work: Path) -> None:
    prepare("recipe.yaml", ["output=data/whole"])
    summary = prepare("recipe.yaml", ["sources.0.weight=0.5"])
    kept = summary["train"]["documents"] + summary["validation"]["documents"]
    assert kept + summary["dropped"]["unweighted"] == 60
    assert 15 < kept < 45
    for split in ("train", "validation"):  # no document changes sides, and both sides lose some
        assert set(_documents("data/tiny", split)) < set(_documents("data/whole", split))


def test_lone_surrogates_are_repaired_and_counted(work: Path) -> None:
    (work / "s.jsonl").write_text('{"text": "a \\ud800 b"}\n')
    sources = [{"kind": "text", "path": "corpus/**/*.txt"}, {"kind": "jsonl", "path": "s.jsonl"}]
    _recipe(work, sources=sources)
    summary = prepare("recipe.yaml")
    assert summary["dropped"]["repaired"] == 1
    left_out, repaired = (
        line for line in render(summary).splitlines() if line.startswith("documents ")
    )
    assert re.fullmatch("documents repaired +1", repaired)
    assert "repaired" not in left_out
    assert "a \ufffd b" in _documents("data/tiny", "train") + _documents("data/tiny", "validation")


def test_the_tokenizer_does_not_see_validation_text(work: Path, tmp_path: Path) -> None:
    summary = prepare("recipe.yaml")
    alone = train_sentencepiece(_documents("data/tiny", "train"), 350, tmp_path)
    assert alone.fingerprint == summary["fingerprint"]


def test_again_is_a_no_op_and_anything_else_is_refused(work: Path) -> None:
    prepare("recipe.yaml")
    stamp = (work / "data/tiny" / MANIFEST).stat().st_mtime_ns
    said: list[str] = []
    assert prepare("recipe.yaml", say=said.append)["already_there"]
    assert "already there" in said[0]
    assert (work / "data/tiny" / MANIFEST).stat().st_mtime_ns == stamp
    with pytest.raises(
        DataError, match=r"another recipe.*data/tiny.*into another directory with --set output="
    ):
        prepare("recipe.yaml", ["tokenizer.train.vocab_size=340"])
    (work / "corpus" / "0.txt").write_text(_text(0).upper())
    with pytest.raises(DataError, match="source files changed"):
        prepare("recipe.yaml")


def test_a_foreign_output_is_not_touched(work: Path) -> None:
    (work / "data/tiny").mkdir(parents=True)
    (work / "data/tiny" / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match=r"not a prepared data set.*data/tiny"):
        prepare("recipe.yaml")
    assert (work / "data/tiny" / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize(
    "stage", ["directory.write_atomically", "assemble.ShardWriter", "destination.sync"]
)
def test_a_failure_leaves_no_output(
    work: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(f"archscale.data.preparing.{stage}", fail)
        with pytest.raises(DataError, match="No space left on device.*the same command goes on"):
            prepare("recipe.yaml")
    published = stage == "destination.sync"  # after the rename, only its durability was in doubt
    assert Path("data/tiny").exists() == published
    assert prepare("recipe.yaml")["already_there"] == published
    assert verify("data/tiny") == []
    assert os.listdir("data") == ["tiny"]


def test_two_processes_do_not_share_a_directory(work: Path) -> None:
    with (
        open_work(Path("data/.tiny.work"), None, print),
        pytest.raises(DataError, match="another process is preparing"),
    ):
        prepare("recipe.yaml")


@pytest.mark.parametrize(("validation", "split"), [(1e-9, "validation"), (1 - 1e-9, "train")])
def test_no_split_is_empty(work: Path, validation: float, split: str) -> None:
    """Where all documents would go to one split, one goes to the other: the same one
    whether or not a tokenizer is trained, which does not see it when it is for validation."""
    summary = prepare("recipe.yaml", [f"validation={validation}"])
    assert (summary[split]["documents"], summary["dropped"]["duplicate"]) == (1, 0)
    alone = train_sentencepiece(_documents("data/tiny", "train"), 350, work)
    assert alone.fingerprint == summary["fingerprint"]
    tokenizer = {"kind": "sentencepiece", "path": "data/tiny/tokenizer/tokenizer.model"}
    _recipe(work, tokenizer=tokenizer, validation=validation, output="data/given")
    prepare("recipe.yaml")
    assert _documents("data/given", split) == _documents("data/tiny", split)


def test_a_corpus_of_one_document_is_refused_before_the_work(work: Path) -> None:
    for name in ("a", "b"):
        (work / f"{name}.same").write_text("one text")
    for pattern, reason in (("a.same", "only one document"), ("[ab].same", "all documents")):
        source = {"kind": "text", "path": pattern, "document": "file"}
        said: list[str] = []
        with pytest.raises(DataError, match=f"split 'validation' is empty: {reason}"):
            prepare(_recipe(work, sources=[source]), say=said.append)
        assert said == []
        assert not Path("data").exists() or os.listdir("data") == []


def test_a_trained_tokenizer_is_copied(work: Path) -> None:
    first = prepare("recipe.yaml")
    tokenizer = {"kind": "sentencepiece", "path": "data/tiny/tokenizer/tokenizer.model"}
    _recipe(work, tokenizer=tokenizer, output="data/second")
    assert prepare("recipe.yaml")["fingerprint"] == first["fingerprint"]
    assert verify("data/second") == []


def test_inspect(work: Path) -> None:
    prepare("recipe.yaml")
    found = inspect("data/tiny")
    assert found["train"]["tokens"] > 0
    assert found["tokenizer"] == "sentencepiece"
    assert any(word in found["excerpt"] for word in WORDS)


def test_verify_names_every_damaged_file(work: Path, flip) -> None:
    prepare("recipe.yaml", shard_tokens=500)
    directory = work / "data/tiny"
    flip(directory / "train_00000.bin", 200)
    (directory / "train_00001.bin").write_bytes(b"")
    flip(directory / "tokenizer" / "tokenizer.model", 100)
    problems = verify(directory)
    for name in ("train_00000.bin", "train_00001.bin", "tokenizer.model"):
        assert sum(name in problem for problem in problems) == 1
    assert all("\n" not in problem for problem in problems)
    (directory / MANIFEST).unlink()
    assert "not a prepared data set" in verify(directory)[0]


def test_a_damaged_manifest_is_named(work: Path) -> None:
    prepare("recipe.yaml")
    path = work / "data/tiny" / MANIFEST
    for damage, message in (
        (lambda manifest: manifest["splits"].pop("train"), "split 'train' is missing"),
        (lambda manifest: manifest["splits"]["train"]["shards"].clear(), "'train' is empty"),
        (lambda manifest: manifest["splits"]["train"].update(tokens=0), "'train' is empty"),
        (lambda manifest: manifest["splits"]["train"]["shards"][0].update(file="\0"), "file: "),
        (lambda manifest: manifest["fidelity"].update(other=1), "fidelity"),
    ):
        whole = path.read_text()
        manifest = json.loads(whole)
        damage(manifest)
        path.write_text(json.dumps(manifest))
        with pytest.raises(DataError, match=rf"foreign manifest.*{message}.*dataset\.json"):
            inspect("data/tiny")
        assert len(verify("data/tiny")) == 1
        path.write_text(whole)


def test_files_in_place_of_data_sets(work: Path) -> None:
    for path in ("recipe.yaml", "/dev/null"):
        with pytest.raises(DataError, match=r"not a directory .*give the directory"):
            inspect(path)
    with pytest.raises(DataError, match="root of the file system"):
        prepare("recipe.yaml", ["output=/"])


def test_verify_finds_a_shard_of_another_tokenizer(work: Path) -> None:
    prepare("recipe.yaml")
    tokens = open_shard("data/tiny/train_00000.bin").copy()
    with ShardWriter("data/tiny/train_00000.bin", 350, "ab" * 32) as writer:
        writer.write(tokens)
    problems = verify("data/tiny")
    assert len(problems) == 1
    assert "another tokenizer" in problems[0]
    assert "train_00000.bin" in problems[0]


def test_verify_finds_other_tokens_of_the_same_number(work: Path) -> None:
    prepare("recipe.yaml")
    fingerprint = read_manifest("data/tiny").tokenizer.fingerprint
    tokens = open_shard("data/tiny/train_00000.bin")[::-1].copy()
    with ShardWriter("data/tiny/train_00000.bin", 350, fingerprint) as writer:
        writer.write(tokens)
    (problem,) = verify("data/tiny")
    assert "other tokens than" in problem
    assert "train_00000.bin" in problem


def test_verify_compares_token_lengths(work: Path) -> None:
    prepare("recipe.yaml")
    np.save(work / "data/tiny" / TOKEN_BYTES, np.ones(350, np.int32))
    assert [TOKEN_BYTES in problem for problem in verify("data/tiny")] == [True]
    (work / "data/tiny" / TOKEN_BYTES).write_bytes(b"")
    assert [TOKEN_BYTES in problem for problem in verify("data/tiny")] == [True]


def test_another_tokenizer_in_the_dataset_is_refused(work: Path) -> None:
    prepare("recipe.yaml")
    prepare("recipe.yaml", ["output=data/other", "tokenizer.train.vocab_size=340"])
    other = (work / "data/other/tokenizer/tokenizer.model").read_bytes()
    (work / "data/tiny/tokenizer/tokenizer.model").write_bytes(other)
    with pytest.raises(
        DataError, match=r"not the tokenizer that the dataset was made with.*data/tiny"
    ):
        load_tokenizer("data/tiny")


TEXT = {"kind": "text", "path": "corpus/*.txt"}
BAD = [
    ({"sources": [TEXT | {"pth": 1}]}, r"unknown key 'sources\.0\.pth' .*did you mean 'path'\?"),
    (
        {"sources": [{"kind": "txt", "path": "x"}]},
        r"sources\.0: unknown kind of source 'txt' .*mean 'text'\?",
    ),
    ({"sources": [{"kind": "text"}]}, r"sources\.0\.path: Field required"),
    ({"sources": []}, r"sources: .*at least 1"),
    ({"sources": [TEXT | {"weight": 2}]}, r"sources\.0\.weight: .*less than or equal to 1"),
    ({"sources": [TEXT | {"weight": 0}]}, r"sources\.0\.weight: .*greater than 0"),
    (
        {"validation": [{"kind": "txt", "path": "x"}]},
        r"validation\.0: unknown kind of source 'txt' .*mean 'text'\?",
    ),
    ({"validation": [TEXT | {"pth": 1}]}, r"unknown key 'validation\.0\.pth' .*mean 'path'\?"),
    ({"validation": []}, r"validation: .*at least 1"),
    ({"validation": "some"}, r"validation: .*valid number"),
    ({"on_error": "ignore"}, r"on_error: .*'stop' or 'skip'"),
    ({"tokenizer": {"train": {"vocab_size": 10**8}}}, r"vocab_size: .*less than or equal"),
    ({"validaton": 0.1}, r"unknown key 'validaton' .*did you mean 'validation'\?"),
    ({"validation": 1.5}, r"validation: .*less than 1"),
    (
        {"tokenizer": {"train": {"vocab": 300}}},
        r"tokenizer\.train\.vocab_size: Field required|'tokenizer\.train\.vocab'",
    ),
    (
        {"tokenizer": {"train": {"vocab_size": 300, "sede": 1}}},
        r"'tokenizer\.train\.sede' .*did you mean 'seed'",
    ),
    ({"tokenizer": {"knd": "x", "path": "y"}}, r"'tokenizer\.knd' .*did you mean 'kind'"),
    ({"name": "\ud800"}, r"name: not Unicode text"),
    ({"output": "a\0b"}, r"output: .*NUL"),
    ({"tokenizer": {"path": "y", "eos": ""}}, r"tokenizer\.eos: .*at least 1"),
    ({"tokenizer": {}}, r"tokenizer: give either tokenizer\.path or tokenizer\.train"),
    (
        {"tokenizer": {"kind": "huggingface", "train": {"vocab_size": 300}}},
        r"huggingface needs tokenizer\.path",
    ),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_a_bad_recipe_names_the_key(work: Path, changes: dict, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load_recipe(_recipe(work, **changes))
    assert "recipe.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_or_foreign_recipe(work: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read the recipe.*nowhere\.yaml"):
        load_recipe("nowhere.yaml")
    for content in ("a: [", "- 1", ""):
        (work / "recipe.yaml").write_text(content)
        with pytest.raises(DataError, match=r"recipe\.yaml"):
            load_recipe("recipe.yaml")


def test_overrides(work: Path) -> None:
    recipe = load_recipe(
        "recipe.yaml", ["tokenizer.train.vocab_size=400", "sources.0.weight=0.25", "name=other"]
    )
    assert recipe.tokenizer.train is not None
    assert (recipe.tokenizer.train.vocab_size, recipe.sources[0].weight, recipe.name) == (
        400,
        0.25,
        "other",
    )
    for bad in ("name", "sources.7.weight=1", "name.x=1"):
        with pytest.raises(DataError, match="no such override"):
            load_recipe("recipe.yaml", [bad])


@pytest.mark.parametrize(
    ("source", "content", "message"),
    [
        ({"kind": "text", "path": "none/*.txt"}, b"", r"no file matches \(none/\*\.txt\)"),
        ({"kind": "text", "path": "bad"}, b"\xff\xfe", r"not utf-8 text.*\(bad\).*encoding"),
        (
            {"kind": "jsonl", "path": "bad"},
            b'{"text": "a"}\n{"text"',
            r"not a JSON line.*\(bad:2\)",
        ),
        (
            {"kind": "jsonl", "path": "bad"},
            b'{"body": "a"}\n',
            r"no text in field 'text'; there is: body \(bad:1\)",
        ),
        (
            {"kind": "jsonl", "path": "bad"},
            b"[1]\n",
            r"no text in field 'text'; there is: list \(bad:1\)",
        ),
    ],
)
def test_bad_sources_name_the_file(work: Path, source: dict, content: bytes, message: str) -> None:
    (work / "bad").write_bytes(content)
    with pytest.raises(DataError, match=message):
        prepare(_recipe(work, sources=[source]))
    assert not Path("data/tiny").exists()


@pytest.mark.parametrize(
    ("kind", "package", "remedy"),
    [
        ("parquet", "pyarrow", r"pip install archscale\[hf\]"),
        ("huggingface", "datasets", "pip install transformers datasets"),
    ],
)
def test_a_missing_package_is_named(
    work: Path, monkeypatch: pytest.MonkeyPatch, kind: str, package: str, remedy: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    key = "path" if kind == "parquet" else "name"
    with pytest.raises(DataError, match=rf"'{package}' is not installed .*{remedy}"):
        prepare(_recipe(work, sources=[{"kind": kind, key: "corpus/*.txt"}]))


def test_the_quick_start_recipe_is_valid() -> None:
    recipe = load_recipe(Path(__file__).parents[2] / "data_prep" / "python_stdlib.yaml")
    assert [source.kind for source in recipe.sources] == ["python_stdlib"]


def test_python_stdlib_source() -> None:
    source = PythonStdlibSource(kind="python_stdlib")
    names = [name for name, _ in source.files()]
    assert "argparse.py" in names
    assert names == sorted(names, key=Path)
    assert not [name for name in names if {"test", "tests", "site-packages"} & set(name.split("/"))]
    with_tests = source.model_copy(update={"include_tests": True}).files()
    assert {name for name, _ in with_tests} >= set(names)


def test_hugging_face_sources(work: Path) -> None:
    datasets = pytest.importorskip("datasets")
    prepare("recipe.yaml")
    texts = [_text(i) for i in range(60)]
    datasets.Dataset.from_dict({"body": texts}).to_parquet("t.parquet")
    (work / "t.jsonl").write_text("\n".join(json.dumps({"body": text}) for text in texts))
    for source in (
        {"kind": "parquet", "path": "t.parquet", "field": "body"},
        {"kind": "huggingface", "name": "json", "data_files": "t.jsonl", "field": "body"},
    ):
        output = f"data/{source['kind']}"
        prepare(_recipe(work, sources=[source], output=output))
        assert _documents(output, "train") != []
        for split in ("train", "validation"):
            assert sorted(_documents(output, split)) == sorted(_documents("data/tiny", split))
