"""The bytes of a data set do not depend on who made it, in how many steps."""

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from archscale.data.preparing import beginnings, documents, duplicates, make_tokenizer
from archscale.data.preparing import prepare as module
from archscale.data.preparing.preparation import Preparation
from archscale.data.preparing.prepare import inspect, prepare, verify
from archscale.data.preparing.recipe import load_recipe
from archscale.data.preparing.source_files import HashFiles, hash_jobs
from archscale.data.preparing.sources import JsonlSource
from archscale.data.preparing.trouble import Trouble
from archscale.data.shards import MANIFEST, SOURCE_FILES, open_shard, read_manifest
from archscale.data.tokenizer import load_tokenizer
from archscale.errors import DataError
from tests.commands import ROOT
from tests.data.preparing.corpora import hashes, write_corpus, write_recipe, write_tokenizer

pytest.importorskip("tokenizers")

SHARD_TOKENS = 15_000
# Made by the one loop over all documents that stood here before there were units.
GOLDEN = {
    "token_bytes.npy": "6b519fdfcbed9826e7936ccdc34d39fa5ac43a640bd13bd6d6d73ea642a00f5f",
    "tokenizer/tokenizer.json": "6ab362a6b0d267fe388ea54b9da88bb4c39eaa56847214acea57cf7c4914ba4a",
    "train_00000.bin": "201d7f08bec63cd415db9fe8ef5664fa5c21b189810e88cf98c656dba7d48a91",
    "train_00001.bin": "fe518eece20fddffc33fa9fd90842cbd0a1aa20fcd176b28778604441b8a6fe0",
    "validation_00000.bin": "210c87f25ec89a078b42118799d37733d493c2689457e1474a72d95b62663a61",
}


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory to stand in, with a corpus that makes a dozen units, a tokenizer, a recipe."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(documents, "_LEAST_UNIT_BYTES", 3000)
    write_corpus(tmp_path)
    write_tokenizer(tmp_path / "tokenizer.json")
    write_recipe(tmp_path)
    return tmp_path


def _texts(split: str, directory: str = "data") -> list[str]:
    """The documents of a split, in order."""
    tokenizer, entry = load_tokenizer(directory), read_manifest(directory).splits[split]
    ids = np.concatenate([open_shard(f"{directory}/{shard.file}") for shard in entry.shards])
    ends = np.flatnonzero(ids == tokenizer.eos_id)
    return [tokenizer.decode(part[:-1].tolist()) for part in np.split(ids, ends + 1)[:-1]]


def test_the_bytes_are_those_of_one_loop(work: Path) -> None:
    summary = prepare("recipe.yaml", shard_tokens=SHARD_TOKENS)
    assert hashes(work / "data") == GOLDEN
    assert summary["dropped"] == {"empty": 2, "duplicate": 2, "unweighted": 0, "repaired": 0}
    assert verify("data") == []
    assert not list(work.glob(".*"))


def test_processes_and_cuts_change_nothing(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "_LEAST_UNIT_BYTES", 500)
    # So few rows to a bucket that there are many buckets.
    monkeypatch.setattr(duplicates, "_BUCKET_ROWS", 20)
    prepare("recipe.yaml", shard_tokens=SHARD_TOKENS, workers=2)
    assert hashes(work / "data") == GOLDEN


def _in_child(function: Callable[[], object]) -> int | None:
    """Runs it in a copy of this process, which ends without any cleaning up; its exit status."""

    def run() -> None:
        function()
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    return process.exitcode


def _kill_at_rename(number: int, after: bool) -> None:
    """Every result appears in a rename: kills this process before or after one of them."""
    renames = 0

    def counted(rename: Callable[..., None]) -> Callable[..., None]:
        def dangerous(*args: object) -> None:
            nonlocal renames
            renames += 1
            if renames == number and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            rename(*args)
            if renames == number:
                os.kill(os.getpid(), signal.SIGKILL)

        return dangerous

    os.replace, os.rename = counted(os.replace), counted(os.rename)


@pytest.mark.parametrize(("in_place", "after"), [(False, True), (True, False)])
def test_killed_at_any_write_the_same_command_goes_on(
    work: Path, monkeypatch: pytest.MonkeyPatch, in_place: bool, after: bool
) -> None:
    """The first run is killed at its first rename, the second at its second, until one is not."""
    monkeypatch.setattr(documents, "_LEAST_UNIT_BYTES", 12_000)
    if in_place:
        (work / "data").mkdir()

    def killed() -> None:
        _kill_at_rename(runs, after)
        prepare("recipe.yaml", shard_tokens=SHARD_TOKENS)

    runs = 1
    while (status := _in_child(killed)) == -signal.SIGKILL:
        runs += 1
    assert status == 0
    assert runs > 5
    assert prepare("recipe.yaml")["already_there"]
    assert hashes(work / "data") == GOLDEN
    prepare("recipe.yaml", ["output=undisturbed"], SHARD_TOKENS)
    records, undisturbed = work / "data" / SOURCE_FILES, work / "undisturbed" / SOURCE_FILES
    assert records.read_bytes() == undisturbed.read_bytes()
    manifest = read_manifest("undisturbed")
    assert read_manifest("data") == manifest.model_copy(
        update={"recipe": manifest.recipe | {"output": "data"}}
    )
    assert not list(work.glob(".*"))
    assert not list((work / "data").glob(".*"))


def test_finished_units_are_read_no_more(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line that is wrong stops the work after the units before it; corrected, its own file alone
    is read again."""
    monkeypatch.setattr(beginnings, "_TEXT_CHARS", 100)
    good = (work / "corpus_2.jsonl").read_text()
    (work / "corpus_2.jsonl").write_text(good + "{}\n")
    with pytest.raises(DataError, match=r"corpus_2\.jsonl:81.*the same command goes on"):
        prepare("recipe.yaml")
    assert len(list(work.glob(".data.work/units/*.json"))) > 5
    (work / "corpus_2.jsonl").write_text(good)
    # What is encoded already is changed without a trace: it must not matter.
    for path in (work / "corpus_0.jsonl", work / "corpus_1.jsonl"):
        status = path.stat()
        path.write_bytes(b" " * (status.st_size - 1) + b"\n")
        os.utime(path, ns=(status.st_mtime_ns, status.st_mtime_ns))
    prepare("recipe.yaml", shard_tokens=SHARD_TOKENS)
    assert hashes(work / "data") == GOLDEN


def test_a_changed_file_is_encoded_again(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beginnings, "_TEXT_CHARS", 100)
    path = work / "corpus_1.jsonl"
    good = path.read_text()
    (work / "corpus_2.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match="the same command goes on"):
        prepare("recipe.yaml")
    path.write_text(good.replace("river", "RIVER"))
    (work / "corpus_2.jsonl").write_text('{"text": "good"}\n')
    prepare("recipe.yaml")
    written = _texts("train") + _texts("validation")
    assert any("RIVER" in text for text in written)
    assert "good" in written


def test_a_changed_remote_file_is_encoded_again(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fsspec")
    monkeypatch.setattr(beginnings, "_TEXT_CHARS", 100)
    write_recipe(work, sources=[{"kind": "jsonl", "path": f"file://{work}/corpus_*.jsonl"}])
    paths = [work / f"corpus_{number}.jsonl" for number in range(3)]
    good = [path.read_text() for path in paths]
    paths[0].write_text(good[0].replace("river", "RIVER"))
    paths[2].write_text(good[2] + "{}\n")
    with pytest.raises(DataError, match="the same command goes on"):
        prepare("recipe.yaml")
    assert list(work.glob(".data.work/units/*.json"))
    paths[0].write_text(good[0])
    paths[2].write_text(good[2])
    prepare("recipe.yaml", shard_tokens=SHARD_TOKENS)
    assert hashes(work / "data") == GOLDEN
    assert prepare("recipe.yaml")["already_there"]
    paths[1].write_text(good[1].replace("river", "RIVER"))
    with pytest.raises(DataError, match=r"files changed since: file://.*corpus_1\.jsonl changed"):
        prepare("recipe.yaml")
    paths[1].rename(work / "corpus_9.jsonl")
    with pytest.raises(DataError, match=r"files changed since: file://.*corpus_1\.jsonl is gone"):
        prepare("recipe.yaml")


def test_changed_files_of_a_hub_data_set_are_encoded_again(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", work / "cache")
    monkeypatch.setattr(beginnings, "_TEXT_CHARS", 100)
    source = {"kind": "huggingface", "name": "json", "data_files": "corpus_*.jsonl"}
    write_recipe(work, sources=[source])
    path, last = work / "corpus_0.jsonl", work / "corpus_2.jsonl"
    good, good_last = path.read_text(), last.read_text()
    path.write_text(good.replace("river", "RIVER"))
    last.write_text(good_last + "{}\n")
    with pytest.raises(DataError, match="the same command goes on"):
        prepare("recipe.yaml")
    assert list(work.glob(".data.work/units/*.json"))
    path.write_text(good)
    last.write_text(good_last)
    prepare("recipe.yaml", shard_tokens=SHARD_TOKENS)
    assert hashes(work / "data") == GOLDEN
    assert prepare("recipe.yaml")["already_there"]


def test_where_remote_files_are_out_of_reach_the_data_set_stands(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fsspec")
    write_recipe(work, sources=[{"kind": "jsonl", "path": f"file://{work}/corpus_*.jsonl"}])
    prepare("recipe.yaml")

    def refuse(*_: object, **__: object) -> None:
        raise TimeoutError("no network")

    monkeypatch.setattr("fsspec.implementations.local.LocalFileSystem.glob", refuse)
    said: list[str] = []
    assert prepare("recipe.yaml", say=said.append)["already_there"]
    assert "changed is not known: cannot read the file: no network" in said[0]


def test_a_refused_file_leaves_nothing_when_nothing_was_done(work: Path) -> None:
    (work / "corpus_0.jsonl").write_text("{\n")
    with pytest.raises(DataError, match="not a JSON line"):
        prepare("recipe.yaml")
    assert not list(work.glob(".*"))
    assert not (work / "data").exists()


def test_parts_on_several_machines(work: Path) -> None:
    with pytest.raises(DataError, match=r"units are not encoded.*prepare recipe\.yaml` encodes"):
        prepare("recipe.yaml", finish=True)
    summary = prepare("recipe.yaml", part="2/3")
    assert (summary["part"], summary["output"]) == ("2/3", "data")
    assert not (work / "data").exists()
    prepare("recipe.yaml", part="1/3")
    with pytest.raises(DataError, match=r"--part 3/3`, or"):
        prepare("recipe.yaml", finish=True)
    prepare("recipe.yaml", part="3/3")
    prepare("recipe.yaml", finish=True, shard_tokens=SHARD_TOKENS)
    assert hashes(work / "data") == GOLDEN
    assert not list(work.glob(".*"))
    for bad in ("0/3", "4/3", "3", "a/b", "1/", "-1/3"):
        with pytest.raises(DataError, match="write it as 2/5"):
            prepare("recipe.yaml", ["output=other"], part=bad)


def test_parts_train_one_tokenizer(work: Path) -> None:
    pytest.importorskip("sentencepiece")
    tokenizer = {"kind": "sentencepiece", "train": {"vocab_size": 300}}
    write_recipe(work, tokenizer=tokenizer)
    prepare("recipe.yaml", ["output=whole"], SHARD_TOKENS)
    with pytest.raises(DataError, match=r"no part has trained the tokenizer"):
        prepare("recipe.yaml", finish=True)
    for part in ("2/2", "1/2"):
        prepare("recipe.yaml", part=part)
    prepare("recipe.yaml", finish=True, shard_tokens=SHARD_TOKENS)
    assert hashes(work / "data") == hashes(work / "whole")


def test_samples_are_kept_when_the_work_is_interrupted(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(make_tokenizer, "train_sentencepiece", interrupt)
    write_recipe(work, tokenizer={"kind": "sentencepiece", "train": {"vocab_size": 300}})
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        prepare("recipe.yaml", say=said.append)
    assert "the same command goes on" in said[-1]
    samples = list(work.glob(".data.work/samples/*.json"))
    assert len(samples) > 5
    with pytest.raises(DataError, match="no part has trained the tokenizer"):
        prepare("recipe.yaml", finish=True)
    assert list(work.glob(".data.work/samples/*.json")) == samples


@pytest.mark.parametrize("deduplicate", [True, False])
def test_validation_sources_of_ones_own(work: Path, deduplicate: bool) -> None:
    lines = (work / "corpus_0.jsonl").read_text().splitlines(keepends=True)
    held_out = [*lines[10:13], '{"text": "only for validation"}\n', lines[10]]
    (work / "held_out.jsonl").write_text("".join(held_out))
    validation = [{"kind": "jsonl", "path": "held_out.jsonl"}]
    summary = prepare(write_recipe(work, validation=validation, deduplicate=deduplicate))
    wanted = [json.loads(line)["text"] for line in held_out]
    validation_texts, training_texts = _texts("validation"), _texts("train")
    assert validation_texts == (wanted[:-1] if deduplicate else wanted)
    assert not set(training_texts) & set(wanted)
    # Of 240 documents 2 are empty, 3 are in validation, and one text is there three times.
    assert len(training_texts) == (233 if deduplicate else 235)
    assert summary["dropped"]["duplicate"] == (6 if deduplicate else 3)


def test_own_validation_text_does_not_train_the_tokenizer(work: Path) -> None:
    pytest.importorskip("sentencepiece")
    (work / "held_out.jsonl").write_text((work / "corpus_2.jsonl").read_text())
    tokenizer = {"kind": "sentencepiece", "train": {"vocab_size": 300}}
    own = [{"kind": "jsonl", "path": "held_out.jsonl"}]
    write_recipe(work, tokenizer=tokenizer, validation=own)
    prepare("recipe.yaml")
    held_out = (work / "held_out.jsonl").read_text().splitlines(keepends=True)
    for name in ("corpus_0.jsonl", "corpus_1.jsonl"):
        lines = (work / name).read_text().splitlines(keepends=True)
        (work / f"rest_of_{name}").write_text("".join(x for x in lines if x not in held_out))
    rest = [{"kind": "jsonl", "path": "rest_of_*.jsonl"}]
    (work / "other.jsonl").write_text('{"text": "something else"}\n')
    other = [{"kind": "jsonl", "path": "other.jsonl"}]
    write_recipe(work, tokenizer=tokenizer, sources=rest, validation=other, output="alone")
    prepare("recipe.yaml")
    assert load_tokenizer("alone").fingerprint == load_tokenizer("data").fingerprint


def test_a_change_anywhere_in_a_source_is_seen(work: Path) -> None:
    path = work / "corpus_1.jsonl"
    # More than 2 MiB, of little text.
    filler = json.dumps({"text": "x", "other": "y" * 10_000}) + "\n"
    path.write_text(filler * 110 + '{"text": "middle"}\n' + filler * 110)
    prepare("recipe.yaml")
    content = path.read_bytes()
    os.utime(path, (0, 0))
    assert prepare("recipe.yaml")["already_there"], "only the time is another one"
    path.write_bytes(content.replace(b"middle", b"mIddle"))
    with pytest.raises(DataError, match=r"source files changed since: corpus_1\.jsonl changed"):
        prepare("recipe.yaml")
    path.write_bytes(content)
    assert prepare("recipe.yaml")["already_there"]
    (work / "corpus_9.jsonl").write_text(filler)
    with pytest.raises(DataError, match=r"corpus_9\.jsonl is new"):
        prepare("recipe.yaml")
    (work / "corpus_9.jsonl").unlink()
    path.unlink()
    with pytest.raises(DataError, match=r"corpus_1\.jsonl is gone"):
        prepare("recipe.yaml")


def test_the_record_of_a_file_is_of_what_was_read(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not of what stands there when the record is made."""

    def changed_before_it_is_recorded(preparation: Preparation) -> list[HashFiles]:
        path.write_text(path.read_text().replace("river", "RIVER"))
        return hash_jobs(preparation)

    path = work / "corpus_1.jsonl"
    prepare("recipe.yaml", part="1/1")  # all units
    monkeypatch.setattr(module, "hash_jobs", changed_before_it_is_recorded)
    prepare("recipe.yaml", shard_tokens=SHARD_TOKENS)
    assert hashes(work / "data") == GOLDEN
    with pytest.raises(DataError, match=r"source files changed since: corpus_1\.jsonl"):
        prepare("recipe.yaml")


def test_another_tokenizer_at_the_same_path_is_seen(work: Path) -> None:
    prepare("recipe.yaml")
    path = work / "tokenizer.json"
    path.write_text(path.read_text() + "\n")
    with pytest.raises(DataError, match=r"another tokenizer than tokenizer\.json is now"):
        prepare("recipe.yaml")


def test_a_data_set_without_records_of_its_sources(work: Path) -> None:
    """As they were made before there were such records and some keys of recipes."""
    prepare("recipe.yaml")
    (work / "data" / SOURCE_FILES).unlink()
    manifest = json.loads((work / "data" / MANIFEST).read_text())
    for name in ("skipped", "fidelity"):
        del manifest[name]
    for name in ("on_error", "lossy"):
        del manifest["recipe"][name]
    (work / "data" / MANIFEST).write_text(json.dumps(manifest))
    said: list[str] = []
    assert prepare("recipe.yaml", say=said.append)["already_there"]
    assert "whether its source files changed is not known" in said[0]
    assert inspect("data")["train"]["documents"] > 0


def test_what_cannot_be_read_is_skipped_and_listed(work: Path) -> None:
    with open(work / "corpus_1.jsonl", "a") as file:
        file.write('{"text": null}\n{\n')
    summary = prepare(write_recipe(work, on_error="skip"), shard_tokens=SHARD_TOKENS)
    assert sum(summary["skipped"]["counts"].values()) == 2
    end = (work / "corpus_1.jsonl").stat().st_size - len("{\n")
    assert any(f"corpus_1.jsonl, byte {end:,}" in line for line in summary["skipped"]["examples"])
    assert hashes(work / "data") == GOLDEN
    assert inspect("data")["skipped"] == summary["skipped"]


def test_an_unreadable_file_is_skipped_until_it_can_be_read(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: object, *args: object, **keys: object) -> object:
        if str(path) == "corpus_1.jsonl":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return open_as_ever(path, *args, **keys)  # type: ignore[call-overload]

    open_as_ever = open
    monkeypatch.setattr("builtins.open", refuse)
    write_recipe(work, on_error="skip")
    assert prepare("recipe.yaml")["skipped"]["counts"] == {"unreadable file": 1}
    assert prepare("recipe.yaml")["already_there"]
    monkeypatch.setattr("builtins.open", open_as_ever)
    with pytest.raises(DataError, match=r"source files changed since: corpus_1\.jsonl"):
        prepare("recipe.yaml")


def test_the_look_at_a_source_with_a_small_weight_is_short(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beginnings, "_TEXT_CHARS", 10_000)
    lines = [json.dumps({"text": f"{i:0100}"}) + "\n" for i in range(12_000)]
    (work / "corpus_0.jsonl").write_text("".join(lines))
    texts_read = 0

    def counted(*args: object) -> Iterator[str]:
        nonlocal texts_read
        for text in read(*args):
            texts_read += 1
            yield text

    read = JsonlSource.read
    monkeypatch.setattr(JsonlSource, "read", counted)
    sources = [{"kind": "jsonl", "path": "corpus_0.jsonl", "weight": 0.01}]
    recipe = load_recipe(write_recipe(work, sources=sources))
    beginnings.first_texts(recipe, documents.list_units(recipe))
    # 1,000 characters are 10 documents of about 1,000; the whole 10,000 would be those of 10,000.
    assert texts_read < 3000


def test_a_tokenizer_that_loses_text(work: Path) -> None:
    (work / "corpus_0.jsonl").write_text(json.dumps({"text": "漢字 " * 300}) + "\n")
    said: list[str] = []
    with pytest.raises(DataError, match="loses.*lossy: true"):
        prepare("recipe.yaml", say=said.append)
    assert said == []
    assert not list(work.glob(".*"))
    summary = prepare("recipe.yaml", ["lossy=true"], say=said.append)
    assert "warning: " in said[0]
    assert "loses" in summary["fidelity"]
    assert "loses" in inspect("data")["fidelity"]
    assert prepare("recipe.yaml")["already_there"]


def test_nothing_of_a_users_is_removed(work: Path) -> None:
    mine = work / ".data.work" / "units"
    mine.mkdir(parents=True)
    (mine / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="work directory of this output is not archscale's"):
        prepare("recipe.yaml")
    assert (mine / "thesis.tex").read_text() == "years of work"


def test_a_reader_of_the_progress_that_goes_does_not_end_the_work(work: Path) -> None:
    command = [sys.executable, "-m", "archscale", "data", "prepare", "recipe.yaml"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    reading, writing = os.pipe()
    os.close(reading)
    process = subprocess.run(command, env=environment, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert process.returncode == 0
    assert process.stderr.count(b"\n") == 1  # that it goes on without a reader
    assert verify("data") == []


@pytest.mark.parametrize("trained", [False, True])
def test_training_documents_that_are_all_for_validation(work: Path, trained: bool) -> None:
    own = [{"kind": "jsonl", "path": "corpus_*.jsonl"}]
    changes = {"tokenizer": {"train": {"vocab_size": 300}}} if trained else {}
    with pytest.raises(DataError, match="'train' is empty: its documents are in validation too"):
        prepare(write_recipe(work, validation=own, **changes))


def test_what_was_skipped_is_listed_without_the_advice_to_skip_it() -> None:
    trouble = Trouble("skip")
    trouble.record("null text", DataError("no text", "a:1", "on_error: skip leaves it out"))
    assert trouble.examples == ["no text (a:1)"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc")
def test_a_place_where_nothing_can_be_made(work: Path) -> None:
    with pytest.raises(DataError, match="No such file or directory") as caught:
        prepare("recipe.yaml", ["output=/proc/data"])
    assert "deleted" not in str(caught.value)


def test_the_sources_of_a_finished_data_set_are_gone(work: Path) -> None:
    prepare("recipe.yaml")
    for path in work.glob("corpus_*"):
        path.unlink()
    with pytest.raises(DataError, match=r"data is already there, but its sources .*no file"):
        prepare("recipe.yaml")


def test_the_home_directory(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(work / "home"))
    assert prepare("recipe.yaml", ["output=~/data"])["output"] == str(work / "home" / "data")
    assert (work / "home" / "data" / MANIFEST).is_file()
    assert not (work / "~").exists()


@pytest.mark.parametrize("meanwhile", [False, True])
def test_what_a_user_puts_into_the_output_is_not_overwritten(work: Path, meanwhile: bool) -> None:
    """Between two commands, or while one of them works."""
    (work / "data" / "lost+found").mkdir(parents=True)
    mine = work / "data" / SOURCE_FILES

    def put(_: str) -> None:
        mine.write_text("years of work")

    if not meanwhile:
        prepare("recipe.yaml", part="1/2")
        put("")
    with pytest.raises(DataError, match=r"output has sources\.json and is not a prepared"):
        prepare("recipe.yaml", say=put)
    assert mine.read_text() == "years of work"
    mine.unlink()
    prepare("recipe.yaml", shard_tokens=SHARD_TOKENS)
    assert hashes(work / "data") == GOLDEN


@pytest.mark.parametrize("kind", ["link to an empty directory", "dangling link", "parents", "file"])
def test_outputs(work: Path, kind: str) -> None:
    output = work / "data"
    if kind == "link to an empty directory":
        (work / "disk").mkdir()
        output.symlink_to("disk")
    elif kind == "dangling link":
        output.symlink_to("nowhere")
    elif kind == "parents":
        output = work / "a" / "b" / "ünï" / "data"
    else:
        output.write_text("a file")
        with pytest.raises(DataError, match="is not a directory"):
            prepare("recipe.yaml")
        return
    prepare("recipe.yaml", [f"output={output}"], SHARD_TOKENS)
    assert hashes(output) == GOLDEN
    assert output.is_symlink() == (kind not in ("parents", "file"))
    assert prepare("recipe.yaml", [f"output={output}"])["already_there"]
    assert not list(work.glob(".*"))
