"""The commands `generate` and `chat`."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from archscale.export.export import export
from archscale.train import prompting
from archscale.train.loading import load_text_model
from archscale.train.prompting import Conversation, Options
from tests.export.runs import make_run
from tests.train.tiny import tiny_data

Command = Callable[..., tuple[int, str, str]]
MASK = {"data": {"document_mask": True}}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run in `run`, whose export is in `out`."""
    pytest.importorskip("safetensors")
    folder = tmp_path_factory.mktemp("made")
    make_run(tiny_data(folder), folder / "run", model={"context": 64})
    export(folder / "run", folder / "out", shard_size="5GB")
    return folder


def test_prompts_are_continued_as_each_alone(made: Path, command: Command, tmp_path: Path) -> None:
    """From arguments and a file; from an export as from the run."""
    prompts = ["abcd efgh", "", "é ab" * 20]
    (tmp_path / "prompts").write_text("\n".join(prompts[1:]) + "\n")
    options = ("--max-tokens", 9, "--temperature", 1, "--top-p", 0.9, "--seed", 5, "--json")
    both = ("--prompt", prompts[0], "--prompts", tmp_path / "prompts")
    status, out, err = command("generate", made / "run", *both, "--batch", 2, *options)
    assert status == 0, err
    together = json.loads(out)
    assert [each["prompt"] for each in together] == prompts
    assert {each["ended"] for each in together} <= {"length", "document"}
    for target in (made / "run", made / "out", made / "run/checkpoints/step_00000007"):
        alone = command("generate", target, "--prompt", prompts[0], *options)
        assert json.loads(alone[1]) == together[:1], alone
    status, out, _ = command("generate", made / "run", *both, "--max-tokens", 1)
    assert (status, out.split("\n\n")[0][:9]) == (0, prompts[0])


def test_a_stop_text_is_cut_off(made: Path, command: Command) -> None:
    options = ("--prompt", "abcd", "--temperature", 2, "--top-k", 0, "--max-tokens", 40, "--json")
    (whole,) = json.loads(command("generate", made / "run", *options)[1])
    text = whole["continuation"]
    stop = text[11:14]
    assert stop
    stopping = ("--stop", stop, "--stop", "not in the text")
    (cut,) = json.loads(command("generate", made / "run", *options, *stopping)[1])
    assert cut["continuation"] == text[: text.index(stop)]
    assert cut["ended"] == "stop"
    assert cut["tokens"] < whole["tokens"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a\udcff"], r"^character 2 of the prompt is not UTF-8 \(--prompt\): "),
        (["--prompt", "a", "--stop", "\udcff"], r"^character 1 of the stop text is not UTF-8"),
        (["--prompt", "a", "--stop", ""], r"an empty text would stop everything .*--stop"),
        (["--prompt", "a", "--top-p", 0], r"^0\.0 is no share of the probability \(--top-p\): "),
        (["--prompt", "a", "--top-p", 1.5], r"^1\.5 is no share"),
        (["--prompt", "a", "--top-p", "nan"], r"^nan is no share"),
        (["--prompt", "a", "--temperature", "inf"], r"^inf is no temperature \(--temperature\)"),
        ([], r"^there is no prompt \(--prompt\): "),
        (["--prompts", "empty"], r"^the file has no line \(empty\): "),
        (["--prompts", "absent"], r"^cannot read the prompts: No such file .*\(absent\): "),
        (["--prompts", "latin1"], r"^line 2 is not UTF-8 from byte 3 on \(latin1\): "),
    ],
)
def test_what_is_refused(
    arguments: list, message: str, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is loaded."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").touch()
    (tmp_path / "latin1").write_bytes("ab\ncdé".encode("latin1"))
    status, out, err = command("generate", tmp_path / "no run", *arguments)
    assert (status, out) == (2, "")
    (line,) = err.splitlines()
    assert re.search(message, line.removeprefix("archscale: "))


def test_targets_that_are_none(made: Path, command: Command, tmp_path: Path) -> None:
    def refused(target: Path) -> str:
        status, out, err = command("generate", target, "--prompt", "a")
        assert (status, out, err.count("\n")) == (2, "", 1)
        return err

    assert "no run with a whole checkpoint" in refused(tmp_path)
    assert "no run with a whole checkpoint" in refused(tmp_path / "absent")
    shutil.copytree(made / "out", tmp_path / "out")
    code = tmp_path / "out/modeling_archscale.py"
    ours = code.read_text()
    code.write_text(ours + "\nraise SystemExit('foreign code ran')\n")
    assert "needs code of its own" in refused(tmp_path / "out")
    code.unlink()
    assert "needs code of its own" in refused(tmp_path / "out")
    code.write_text(ours)
    settings = (tmp_path / "out/config.json").read_text()
    elsewhere = settings.replace("modeling_archscale.", "repository--modeling_archscale.")
    (tmp_path / "out/config.json").write_text(elsewhere)
    assert "needs code of its own" in refused(tmp_path / "out")
    (tmp_path / "out/config.json").write_text(settings)
    (tmp_path / "out/tokenizer.json").rename(tmp_path / "elsewhere")
    (tmp_path / "out/tokenizer.model").unlink(missing_ok=True)
    assert "no tokenizer there" in refused(tmp_path / "out")
    (tmp_path / "out/config.json").write_text("{")
    assert "not JSON" in refused(tmp_path / "out")


def test_weights_of_an_export_are_all_there(made: Path, command: Command, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(made / "out", tmp_path / "out")
    path = tmp_path / "out/model.safetensors"
    weights = load_file(path)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path, {"format": "pt"})
    status, out, err = command("generate", tmp_path / "out", "--prompt", "a")
    assert (status, out) == (2, "")
    assert "no weight fits model.layers.1.mlp.up_proj.weight" in err


def test_weights_that_are_not_finite(made: Path, command: Command, monkeypatch) -> None:
    model = load_text_model(made / "run")
    with torch.no_grad():
        model.model._forward.head.norm.weight[0] = torch.inf
    monkeypatch.setattr(prompting, "load_text_model", lambda target: model)
    status, out, err = command("generate", made / "run", "--prompt", "a")
    assert (status, out) == (2, "")
    assert "logits that are not finite" in err


# --- chat


def test_chat_without_a_terminal_answers_lines(made: Path, command: Command) -> None:
    """As `generate` continues all that was said before, with a seed for each answer."""
    options = ("--max-tokens", 6, "--temperature", 1.5, "--top-k", 0)
    typed = "ab\nécd ab\r\n".encode()
    status, out, err = command("chat", made / "run", *options, typed=typed)
    assert (status, err) == (0, "")

    def answer(text: str, seed: int) -> str:
        asked = ("--prompt", text, "--seed", seed, "--json", *options)
        return json.loads(command("generate", made / "run", *asked)[1])[0]["continuation"]

    first = answer("ab\n", 0)
    second = answer(f"ab\n{first}\nécd ab\n", 1)
    assert out == f"{first}\n{second}\n"
    assert first != second


def test_chat_with_bytes_that_are_no_text(made: Path, command: Command) -> None:
    status, _, err = command("chat", made / "run", "--max-tokens", 1, typed=b"ab\n\xff\n")
    assert status == 2
    assert "line 2 is not UTF-8 from byte 1 on (standard input)" in err


def test_an_answer_that_is_stopped_stays_as_far_as_it_came(made: Path, capsys) -> None:
    options = Options(50, prompting.Sampling(2.0, None), stop=("\n",))
    conversation = Conversation(load_text_model(made / "run"), options)
    heard: list[str] = []

    def stop(text: str) -> None:
        heard.append(text)
        if len(heard) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conversation.answer("ab", stop)
    assert conversation.text == f"ab\n{''.join(heard)}\n"

    def lines() -> Iterator[str]:
        yield "ef"
        yield "gh"

    said = []
    conversation.answer = lambda line, hear: (
        said.append(line)
        or (_ for _ in ()).throw(  # type: ignore[method-assign]
            KeyboardInterrupt
        )
    )
    prompting.converse(conversation, lines())
    assert said == ["ef", "gh"]


def test_a_long_conversation_keeps_its_end(made: Path) -> None:
    model = load_text_model(made / "run")
    conversation = Conversation(model, Options(1, prompting.Sampling(0.0)))
    for _ in range(20):
        conversation.answer("abcd efgh ab", lambda text: None)
    assert conversation.text.rstrip("\n").count("\n") > 1
    # A line and an answer more than what the model reads, at most.
    assert len(model.tokenizer.encode(conversation.text)) <= model.model.context + 10


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_chat_on_a_terminal(made: Path) -> None:
    """Ctrl-C stops an answer and not the loop, which Ctrl-D ends."""
    master, slave = pty.openpty()
    program = "from archscale.cli import main; main()"
    arguments = ["chat", str(made / "run"), "--max-tokens", "1000000", "--temperature", "0"]
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdin=slave,
        stdout=slave,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        start_new_session=True,
    )
    os.close(slave)
    shown = b""

    def until(text: bytes) -> None:
        nonlocal shown
        end = time.monotonic() + 120
        while text not in shown:
            assert time.monotonic() < end, shown
            assert select.select([master], [], [], 120)[0], shown
            shown += os.read(master, 1000)
        shown = shown.partition(text)[2]

    try:
        for _ in range(2):
            until(b"> ")
            os.write(master, b"abcd\n")
            until(b"abcd\r\n")
            time.sleep(1)  # into the answer, which has no end
            os.write(master, b"\x03")
        until(b"> ")
        os.write(master, b"\x04")
        assert process.wait(60) == 0
        assert process.stderr is not None
        assert b"Ctrl-D ends" in process.stderr.read()
    finally:
        process.kill()
        process.wait()
        os.close(master)
