"""What commands say: the true cause, a remedy that helps and harms nothing. In one process, because
each start takes seconds."""

import errno
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from torch.distributed.checkpoint.api import CheckpointException

from archscale import __version__
from archscale.checkpoint import saving as checkpoint
from archscale.config import CheckpointConfig
from archscale.data.shards import MANIFEST
from archscale.errors import CheckpointError, explain_os_error
from tests.train.tiny import config, tiny_data

ROOT = Path(__file__).parents[1]
HARM = re.compile(r"\b(remove|delete)\b|\brm\b")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def run(command):
    return command


@pytest.fixture
def plan_file(tmp_path, data):
    """A config of 10 batches on the tiny data set."""
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(config(data, steps=10).resolved()))
    return path


# --- a
# user's own folder


@pytest.mark.parametrize(
    "words",
    [
        ["train", ROOT / "configs/quickstart.yaml", "--set", "data.train=FOLDER"],
        ["data", "inspect", "FOLDER"],
        ["data", "verify", "FOLDER"],
        ["data", "prepare", ROOT / "data_prep/python_stdlib.yaml", "--set", "output=FOLDER"],
    ],
    ids=lambda words: " ".join(map(str, words[:2])),
)
@pytest.mark.parametrize(
    "manifest", [None, "[]", "{", '{"format_version": 99}', '{"format_version": 1}']
)
def test_a_folder_of_the_user_is_not_to_be_removed(run, tmp_path, monkeypatch, words, manifest):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    if manifest is not None:
        (folder / MANIFEST).write_text(manifest)
    status, _, said = run(*(str(part).replace("FOLDER", str(folder)) for part in words))
    assert status == 2
    assert len(said.splitlines()) == 1
    assert not HARM.search(said.replace(str(folder), ""))
    if manifest is None:
        assert f"not a prepared data set: it has no {MANIFEST} ({folder})" in said
        assert (
            "give the directory of a prepared data set" in said
            or "into another directory with --set output=" in said
        )
    assert (folder / "thesis.tex").read_text() == "years of work"


def test_no_message_advises_to_remove_what_a_user_made():
    """Remedies that speak of removing speak of keys, axes and lines in a file."""
    advice = re.compile(
        r"(?i)\"[^\"\n]*\b(remove|delete)\b[^\"\n]*(directory|folder|data"
        r" ?set|checkpoint|\brun\b)[^\"\n]*\""
    )
    for path in (ROOT / "archscale").rglob("*.py"):
        for line in path.read_text().splitlines():
            assert '"""' in line or not advice.search(line), f"{path}: {line}"


# --- failed reads and writes


@pytest.mark.parametrize(
    ("number", "cause", "remedy"),
    [
        (errno.ENOSPC, "No space left on device", "free space or inodes"),
        (errno.EDQUOT, "Disk quota exceeded", "free space, ask for a larger quota"),
        (errno.EACCES, "Permission denied", "get permission for it"),
        (errno.EPERM, "Operation not permitted", "get permission for it"),
        (errno.EROFS, "Read-only file system", "train in another directory"),
        (
            errno.ENOENT,
            "No such file or directory: another process deleted it",
            "let only one process work there",
        ),
        (
            errno.ENOTDIR,
            "Not a directory: something else stands there",
            "train in another directory",
        ),
        (errno.EFBIG, "File too large", "raise the limit of `ulimit -f`"),
        (errno.EIO, "Input/output error", "check the device"),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_checkpoint_that_cannot_be_written(tmp_path, monkeypatch, number, cause, remedy, wrapped):
    """Also where torch's serializer hides the cause: `RuntimeError: unexpected pos` is raised over
    it."""

    def fail(*_, **__):
        try:
            raise OSError(number, os.strerror(number))
        except OSError:
            if not wrapped:
                raise
            try:
                raise RuntimeError(
                    "[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"
                )
            except RuntimeError as hidden:  # its context is the error of the system
                raise CheckpointException("", {0: (hidden, None)}) from None

    monkeypatch.setattr(dcp, "save", fail)
    with pytest.raises(CheckpointError) as caught:
        save(tmp_path / "checkpoints")
    assert caught.value.what == f"cannot write a checkpoint: {cause}"
    assert caught.value.remedy.startswith(remedy)
    assert ("free space" in caught.value.remedy) == (number in (errno.ENOSPC, errno.EDQUOT))


def save(directory: Path) -> None:
    with checkpoint.Saver(directory, CheckpointConfig()) as saver:
        saver.save({}, NoOptimizer(), {"step": 1})


class NoOptimizer:
    def fragments(self):
        return {}


def test_an_unknown_cause_is_not_given_another(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise CheckpointException("", {0: (RuntimeError("unexpected pos"), None)})

    monkeypatch.setattr(dcp, "save", fail)
    with pytest.raises(
        CheckpointError,
        match=r"RuntimeError: unexpected pos .*check that the directory can be written",
    ):
        save(tmp_path / "checkpoints")


def test_a_real_limit_of_the_system_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        CheckpointError, match=r"Not a directory: something else stands there .*--run-dir"
    ):
        save(tmp_path / "file")


def test_every_error_of_the_system_has_a_cause_and_a_remedy():
    for number in errno.errorcode:
        cause, remedy = explain_os_error(
            OSError(number, os.strerror(number)), "give another with --out"
        )
        assert cause.startswith(os.strerror(number))
        assert remedy
    assert explain_os_error(OSError("no number"), "give another") == ("no number", "give another")


def test_a_failure_that_nothing_foresees_is_one_line(run, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("archscale.fit.text.render", fail)
    (tmp_path / "t.csv").write_text("x,y\n1,1\n2,2.1\n4,3.9\n8,8.2\n16,15\n")
    command = [
        "fit",
        tmp_path / "t.csv",
        "--form",
        "power",
        "--x",
        "x",
        "--y",
        "y",
        "--replicates",
        "99",
    ]
    status, _, said = run(*command)
    assert (status, len(said.splitlines())) == (2, 1)
    assert "No space left on device (no file named): free space" in said
    monkeypatch.setenv("ARCHSCALE_DEBUG", "1")
    with pytest.raises(OSError, match="No space"):
        run(*command)


# --- plan


def test_tokens_a_parameter_follow_from_the_count_that_is_named(run, plan_file):
    status, printed, _ = run("plan", plan_file)
    assert status == 0
    figures = json.loads(run("plan", plan_file, "--json")[1])
    tokens, parameters = figures["training"]["tokens"], figures["model"]["parameters"]["total"]
    own, published = (
        f"{tokens / parameters:.2g}",
        f"{tokens / figures['model']['published_parameters']:.2g}",
    )
    (line,) = re.findall(r"^  tokens +(.*)$", printed, re.M)
    numbers = [
        float(number)
        for number in re.findall(r"(?<![\d,.])\d*\.?\d+(?= (?:for each|by the))", line)
    ]
    assert numbers == pytest.approx([float(own), float(published)], rel=0.05)
    assert f"for each of the {parameters:,} parameters" in line


def test_only_what_standard_reads_of_the_base_is_printed(run, plan_file):
    _, printed, _ = run("plan", plan_file, "--set", "parameterization.kind=standard")
    (line,) = re.findall(r"^  base +(.*)$", printed, re.M)
    assert re.fullmatch(r"lr [\d.]+", line)
    base = (
        "parameterization={kind: hyperp, base: {depth: 2, width: 32, lr: 0.01, tokens: 1e6,"
        " batch_tokens: 384}}"
    )
    assert "base" in run("plan", plan_file, "--set", base)[1]
    assert re.search(
        r"^  base +lr 0.01 at depth 2, width 32", run("plan", plan_file, "--set", base)[1], re.M
    )


def test_accumulation_is_whole_or_refused(run, plan_file):
    status, printed, said = run("plan", plan_file, "--set", "training.micro_batch=5")
    assert status == 2
    assert "micro_batch 5 does not divide" in said
    assert "accumulation" not in printed
    assert "micro-batch 5, which do not divide the batch" in printed
    _, printed, _ = run("plan", plan_file, "--set", "training.micro_batch=12")
    assert re.search(r"micro-batch 12, accumulation 2\b", printed)


def test_passes_over_the_data_and_a_remedy_that_helps(run, plan_file, data):
    manifest = json.loads((Path(data) / MANIFEST).read_text())
    tokens = manifest["splits"]["train"]["tokens"]
    _, printed, _ = run("plan", plan_file)
    assert f"{tokens:,} tokens, passed " in printed
    assert "repeated text" not in printed
    _, printed, _ = run("plan", plan_file, "--set", f"training.tokens={tokens * 450}")
    assert f"the run passes 450 times over its {tokens:,} tokens of data" in printed
    (fewer,) = re.findall(r"set training.tokens to at most (\d+)", printed)
    assert "repeated text" not in run("plan", plan_file, "--set", f"training.tokens={fewer}")[1]
    vocabulary = (
        "--set",
        "model.vocab_size=300",
        "--set",
        "data.train=nowhere",
        "--set",
        "data.val=null",
    )
    _, printed, _ = run("plan", plan_file, *vocabulary, "--set", f"training.tokens={tokens * 450}")
    assert "tokens and passes not known" in printed


def test_the_plan_of_a_mixture(run, plan_file, data, tmp_path):
    """Shares, tokens drawn and passes of each source, and one line where one is repeated."""
    tokens = json.loads((Path(data) / MANIFEST).read_text())["splits"]["train"]["tokens"]
    second = tmp_path / "second"
    shutil.copytree(data, second)
    mixture = f"[{{name: b, path: {second}, weight: 1}}, {{name: a, path: {data}, weight: 3}}]"
    mixed = ("--set", "data.train=null", "--set", f"data.mixture={mixture}")
    status, printed, _ = run("plan", plan_file, *mixed)
    assert status == 0
    assert f"{2 * tokens:,} tokens in a mixture of 2" in printed
    assert re.search(
        rf"a  0.75 of the run, 2,880 tokens: [\d.]+ passes over its {tokens:,}\n", printed
    )
    assert "repeated text" not in printed
    (a, b) = json.loads(run("plan", plan_file, *mixed, "--json")[1])["data"]["sources"]
    assert (a["name"], a["share"], a["drawn"], b["drawn"]) == ("a", 0.75, 2880, 960)
    context = config(data).model.context
    assert a["passes"] == 2880 / ((tokens - 1) // context * context)

    many = ("--set", f"training.tokens={tokens * 12}")
    _, printed, _ = run("plan", plan_file, *mixed, *many)
    assert f"the run passes 9 times over source a of {tokens:,} tokens: repeated text" in printed
    (fewer,) = re.findall(r"set training.tokens to at most (\d+)", printed)
    assert (
        "repeated text"
        not in run("plan", plan_file, *mixed, "--set", f"training.tokens={fewer}")[1]
    )
    manifest = json.loads((second / MANIFEST).read_text())
    manifest["tokenizer"]["fingerprint"] = "0" * 64
    (second / MANIFEST).write_text(json.dumps(manifest))
    for command in ("plan", "train"):
        status, _, said = run(command, plan_file, *mixed, "--set", "data.val=null")
        assert status == 2
        assert "source b of data.mixture was made with another tokenizer than source a" in said
    rare = ("--set", f"data.mixture={mixture.replace('weight: 1', 'weight: 1e-9')}")
    status, _, said = run("plan", plan_file, *mixed, *rare)
    assert status == 2
    assert "weight 1e-09 of source b is less than one sample in 1,048,576" in said


def test_a_mixture_whose_data_are_missing(run, plan_file, data):
    mixture = f"[{{name: a, path: {data}, weight: 1}}, {{name: b, path: nowhere, weight: 1}}]"
    mixed = ("--set", "data.train=null", "--set", f"data.mixture={mixture}")
    status, printed, _ = run("plan", plan_file, *mixed)
    assert status == 0  # a has the vocabulary
    assert re.search(r"advice\n  .*\(nowhere\): write a recipe with `output: nowhere`", printed)
    assert re.search(r"b +0.5 of the run, .*passes not known", printed)
    status, _, said = run("train", plan_file, *mixed)
    assert status == 2
    assert len(said.splitlines()) == 1
    assert "nowhere" in said
    status, _, said = run("plan", plan_file, *mixed[:-1], mixed[-1].replace(data, "gone"))
    assert status == 2
    assert "(gone): " in said
    assert "or give model.vocab_size" in said


def test_an_unknown_device_takes_its_figures(run, plan_file):
    device = ("--device", "RTX 9999")
    unknown = json.loads(run("plan", plan_file, "--json", *device)[1])["devices"][0]
    assert (unknown["peak_flops"], unknown["memory"], unknown["seconds"]) == (None, None, None)
    (given,) = json.loads(
        run("plan", plan_file, "--json", *device, "--peak", 100, "--memory", 24)[1]
    )["devices"]
    assert (given["peak_flops"], given["memory"], given["fits"]) == (100e12, 24 * 2**30, True)
    assert given["seconds"] > 0
    assert given["source"] == "peak and memory as given"
    known = json.loads(run("plan", plan_file, "--json", "--device", "h100", "--memory", 94)[1])[
        "devices"
    ][0]
    assert (known["peak_flops"], known["memory"]) == (989.4e12, 94 * 2**30)
    status, _, said = run("plan", plan_file, "--peak", 100)
    assert status == 2
    assert "--device" in said


# --- the command itself


@pytest.mark.parametrize("group", [[], ["data"], ["bench"]])
def test_a_command_alone_prints_its_help(run, group):
    status, printed, said = run(*group)
    assert (status, said) == (0, "")
    assert "Usage" in printed
    assert printed == run(*group, "--help")[1]


def test_the_version(run):
    assert run("--version") == (0, f"archscale {__version__}, torch {torch.__version__}\n", "")


def test_an_unknown_key_leads_to_ours(run, plan_file):
    for key, meant in (
        ("n_layers", "model.depth"),
        ("epochs", "training.tokens"),
        ("optimizer.name", "matrix.rule"),
    ):
        status, _, said = run("plan", plan_file, "--set", f"{key}=4")
        assert status == 2
        assert re.search(f"unknown key .*did you mean .*{re.escape(meant)}", said)


# --- data


def test_data_commands_print_tables_or_json(run, data, tmp_path, monkeypatch):
    status, printed, _ = run("data", "inspect", data)
    assert status == 0
    assert "{" not in printed.partition("the training split begins")[0]
    manifest = json.loads((Path(data) / MANIFEST).read_text())
    for split, entry in manifest["splits"].items():
        assert re.search(rf"^{split} +{entry['tokens']:,} +{entry['documents']:,} ", printed, re.M)
    summary = json.loads(run("data", "inspect", data, "--json")[1])
    assert summary["train"]["tokens"] == manifest["splits"]["train"]["tokens"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    for number in range(40):
        (tmp_path / "texts" / f"{number}.txt").write_text(
            f"text {number} of some words that repeat themselves " * 20
        )
    recipe = {
        "name": "r",
        "sources": [{"kind": "text", "path": "texts/*.txt"}],
        "validation": 0.2,
        "output": "made",
        "tokenizer": {"train": {"vocab_size": 300}},
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    status, printed, said = run("data", "prepare", "r.yaml", "--json")
    assert status == 0
    assert json.loads(printed)["output"] == "made"  # progress goes to standard error
    assert "training a tokenizer" in said
    assert re.search(r"^train +[\d,]+ +\d+ ", run("data", "prepare", "r.yaml")[1], re.M)
