"""The commands `generate` and `chat`: what a user gives, checked, and what is printed."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from archscale.errors import ArchscaleError, ConfigError, explain_os_error
from archscale.inference.generate import Continuation, NotFiniteError, Request, generate
from archscale.inference.sampling import Sampling
from archscale.inference.scoring import not_finite
from archscale.inference.text_model import TextModel
from archscale.train.loading import load_text_model


@dataclass(frozen=True)
class Options:
    """How texts are continued.

    Attributes:
        stop: texts that end a continuation.
        seed: of the draws of every text.
        batch: texts at a time.

    Raises:
        ConfigError: one of them is out of its range.
    """

    max_tokens: int
    sampling: Sampling
    stop: tuple[str, ...] = ()
    seed: int = 0
    batch: int = 8

    def __post_init__(self) -> None:
        temperature, top_p = self.sampling.temperature, self.sampling.top_p
        if not (math.isfinite(temperature) and temperature >= 0):
            raise ConfigError(f"{temperature} is no temperature", "--temperature", "give 0 or more")
        if not 0 < top_p <= 1:
            raise ConfigError(
                f"{top_p} is no share of the probability",
                "--top-p",
                "give more than 0 and at most 1",
            )
        for text in self.stop:
            if not text:
                raise ConfigError(
                    "an empty text would stop everything at once",
                    "--stop",
                    "give at least a character",
                )
            check_utf8(text, "the stop text", "--stop")


def check_utf8(text: str, what: str, where: str) -> None:
    """ConfigError if a text is none, such as bytes of a command line that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        problem = f"character {error.start + 1} of {what} is not UTF-8"
        raise ConfigError(problem, where, "give it as UTF-8 text") from error


def gather_prompts(prompts: Sequence[str], file: Path | None) -> list[str]:
    """The prompts of a command line and of a file with one a line.

    Raises:
        ConfigError: there is none, one is not UTF-8, or the file cannot be read.
    """
    for prompt in prompts:
        check_utf8(prompt, "the prompt", "--prompt")
    gathered = [*prompts, *([] if file is None else _lines_of(file))]
    if not gathered:
        raise ConfigError(
            "there is no prompt" if file is None else "the file has no line",
            "--prompt" if file is None else str(file),
            "give --prompt TEXT, or --prompts FILE with one a line",
        )
    return gathered


def _lines_of(file: Path) -> list[str]:
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        cause, remedy = explain_os_error(error, "name another file")
        raise ConfigError(f"cannot read the prompts: {cause}", str(file), remedy) from error
    return [_text_of(line, number, str(file)) for number, line in enumerate(lines, 1)]


def _text_of(line: bytes, number: int, where: str) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"line {number} is not UTF-8 from byte {error.start + 1} on", where, "write it as UTF-8"
        ) from error


def continue_prompts(
    model: TextModel,
    prompts: Sequence[str],
    options: Options,
    on_text: Callable[[int, str], None] | None = None,
) -> list[Continuation]:
    """The continuation of each prompt; `on_text` as of `inference.generate.generate`.

    Raises:
        CheckpointError: the weights give logits that are not finite.
    """
    requests = [
        Request(model.tokens(prompt), options.max_tokens, options.stop, options.seed)
        for prompt in prompts
    ]
    try:
        return generate(
            model.model,
            model.tokenizer,
            requests,
            options.sampling,
            batch=options.batch,
            ends=model.ends,
            on_text=on_text,
        )
    except NotFiniteError as error:
        raise not_finite(model.name, str(error)) from error


def print_continuations(
    target: Path, prompts: Sequence[str], options: Options, *, as_json: bool
) -> None:
    """Print each prompt with its continuation, a blank line between two; a single one on a terminal
    while it comes into being.

    Raises:
        CheckpointError, DataError: as `load_text_model` and `continue_prompts`.
    """
    model = load_text_model(target)
    live = len(prompts) == 1 and sys.stdout.isatty() and not as_json
    if live:
        _print_now(0, prompts[0])
    results = continue_prompts(model, prompts, options, _print_now if live else None)
    if as_json:
        print(json.dumps([_as_dict(*pair) for pair in zip(prompts, results)], indent=1))
    elif live:
        print()
    else:
        texts = (prompt + result.text for prompt, result in zip(prompts, results))
        print("\n\n".join(texts))


def _as_dict(prompt: str, result: Continuation) -> dict[str, str | int]:
    return {
        "prompt": prompt,
        "continuation": result.text,
        "tokens": len(result.tokens),
        "ended": result.ended,
    }


def _print_now(_: int, text: str) -> None:
    print(text, end="", flush=True)


# --- chat


class Conversation:
    """Lines and answers as one text, which the model continues.

    Attributes:
        text: what has been said; of a long conversation the end, as much as the model reads.
    """

    def __init__(self, model: TextModel, options: Options):
        self._model, self._options = model, options
        self._turns = 0
        self.text = ""

    def answer(self, line: str, on_text: Callable[[str], None]) -> None:
        """Say a line and hear the answer, by `on_text` as it comes; an answer that is interrupted
        stays as far as it has come.

        Raises:
            CheckpointError: as `continue_prompts`.
        """
        self.text = self._end(f"{self.text}{line}\n")
        seed = self._options.seed + self._turns  # or every answer would use the same draws
        options = Options(
            self._options.max_tokens, self._options.sampling, self._options.stop, seed
        )
        self._turns += 1
        prompt = self.text

        def hear(_: int, text: str) -> None:
            self.text += text
            on_text(text)

        try:
            continue_prompts(self._model, [prompt], options, hear)
        finally:
            if not self.text.endswith("\n"):
                self.text += "\n"

    def _end(self, text: str) -> str:
        tokenizer, context = self._model.tokenizer, self._model.model.context
        tokens = tokenizer.encode(text)
        return text if len(tokens) <= context else tokenizer.decode(tokens[-context:])


def chat(target: Path, options: Options) -> None:
    """Answer lines of standard input until it ends: on a terminal in a loop, otherwise each answer
    a line or more on standard output.

    Raises:
        ConfigError: a line is not UTF-8.
        CheckpointError, DataError: as `load_text_model` and `continue_prompts`.
    """
    model = load_text_model(target)
    conversation = Conversation(model, options)
    if sys.stdin.isatty():
        print(f"{model.name}: Ctrl-C stops an answer, Ctrl-D ends", file=sys.stderr)
        converse(conversation, _typed())
    else:
        for line in _piped():
            _say(conversation, line)


def converse(conversation: Conversation, lines: Iterable[str]) -> None:
    """Answer each line; Ctrl-C ends the answer alone."""
    for line in lines:
        try:
            _say(conversation, line)
        except KeyboardInterrupt:
            print(flush=True)


def _say(conversation: Conversation, line: str) -> None:
    conversation.answer(line, lambda text: print(text, end="", flush=True))
    print(flush=True)


def _typed() -> Iterator[str]:
    """Lines that somebody types, until Ctrl-D."""
    import readline  # noqa: F401  gives `input` its editing of lines

    while True:
        try:
            line = input("> ")
            check_utf8(line, "the line", "standard input")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:  # drops what was typed
            print()
        except (ArchscaleError, UnicodeDecodeError):
            print("archscale: not UTF-8, say it again", file=sys.stderr)
        else:
            yield line


def _piped() -> Iterator[str]:
    for number, line in enumerate(sys.stdin.buffer, 1):
        yield _text_of(line.rstrip(b"\r\n"), number, "standard input")
