"""`archscale eval`: from what a user names to figures of its model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from archscale import distributed
from archscale.checkpoint.target import Target
from archscale.data.training_data import open_training_data
from archscale.data.validation import validation_sets
from archscale.errors import ConfigError
from archscale.evaluation.perplexity import Measured, TokenText, measure, read_data, read_text
from archscale.evaluation.results import Evaluated, Result
from archscale.evaluation.subject import Subject, load_subject
from archscale.files import METRICS
from archscale.inference.tasks import Tasks, TaskScores
from archscale.telemetry.sinks import read_lines
from archscale.train.evaluate import Evaluation


@dataclass(frozen=True)
class Wanted:
    """What is to be measured; nothing: the run's own validation.

    Attributes:
        data: data sets, as `data.val`; their validation splits are read.
        texts: files of text.
        contexts: tokens that are read at once; none: the model's own.
        stride: of the windows; None: the context.
        most_tokens: of each data set and text; None: all.
        batch_size: sequences of one forward pass; None: as in training.
        tasks: of lm-eval, as of `inference.tasks.Tasks`.
        task_folders: with YAML files of further tasks.
        fewshot: examples that prompts show; None: what each task says.
        limit: documents of each task; None: all.
    """

    data: Sequence[str] = ()
    texts: Sequence[Path] = ()
    contexts: Sequence[int] = ()
    stride: int | None = None
    most_tokens: int | None = None
    batch_size: int | None = None
    tasks: Sequence[str] = ()
    task_folders: Sequence[Path] = ()
    fewshot: int | None = None
    limit: int | None = None

    @property
    def nothing(self) -> bool:
        return not (self.data or self.texts or self.tasks)


def evaluate(path: Path, wanted: Wanted) -> Evaluated:
    """Evaluate the model that `path` names; all ranks together, and each has the results.

    Raises:
        ArchscaleError: on all ranks alike.
    """
    device = distributed.start()
    subject = distributed.agree(lambda: load_subject(path, device))
    contexts = distributed.agree(lambda: _contexts(subject, wanted))
    texts = distributed.agree(lambda: list(_texts(subject, wanted)))
    tasks = distributed.agree(lambda: _tasks(wanted))
    batch = wanted.batch_size or subject.batch_size
    results = [_validation(subject, device, wanted.batch_size)] if wanted.nothing else []
    for text in texts:
        for context in contexts:
            stride = wanted.stride or context
            measured = measure(subject.model, text, context, stride, batch)
            results.append(_measured(measured, subject.model.context))
    if tasks is not None:
        scores = tasks.score(subject.task_model, batch, wanted.limit)
        results += [_scored(task, wanted) for task in scores]
    if subject.native is None:
        return Evaluated(str(path), results)
    target = subject.native[1]
    if target.abandoned:
        return Evaluated(str(path), results, None, target.step)
    tokens = _written(target).get("tokens")
    return Evaluated(str(path), results, target.run_dir, target.step, tokens)


def _contexts(subject: Subject, wanted: Wanted) -> Sequence[int]:
    """Context lengths to score texts at; ConfigError for one that the model does not have, or that
    the stride leaves gaps in."""
    most = subject.model.context
    contexts = wanted.contexts or [most]
    for option, given in (
        ("--context", wanted.contexts),
        ("--stride", wanted.stride),
        ("--tokens", wanted.most_tokens),
    ):
        if given and not (wanted.texts or wanted.data):
            raise ConfigError("there is no text to read", option, "give --data or --text")
    if max(contexts) > most:
        raise ConfigError(
            f"a context of {max(contexts)} tokens is longer than the model's {most}",
            "--context",
            f"give at most {most}",
        )
    if wanted.stride is not None and wanted.stride > min(contexts):
        raise ConfigError(
            f"a stride of {wanted.stride} tokens leaves out some between windows of"
            f" {min(contexts)}",
            "--stride",
            f"give at most {min(contexts)}",
        )
    return contexts


def _texts(subject: Subject, wanted: Wanted) -> Iterator[TokenText]:
    """Everything that is to be scored, opened.

    Raises:
        ArchscaleError: it cannot be read, or its tokens are another tokenizer's.
    """
    own = subject.data
    names = _names([*wanted.data, *map(str, wanted.texts)])
    for path in wanted.data:
        tokenizer = None if own is None else own.tokenizer
        vocabulary = subject.model.vocab_size
        text, split = read_data(path, names[path], tokenizer, vocabulary, wanted.most_tokens)
        subject.check_data(split, path)
        yield text
    start = subject.text.empty[-1]
    for file in wanted.texts:
        name = names[str(file)]
        yield read_text(file, name, subject.tokenizer, start, wanted.most_tokens)


def _names(paths: Sequence[str]) -> dict[str, str]:
    """The last part of each path as its name; the whole path where several end alike."""
    short = {path: path.rstrip("/").rpartition("/")[2] or path for path in paths}
    ends = list(short.values())
    return {path: end if ends.count(end) == 1 else path for path, end in short.items()}


def _tasks(wanted: Wanted) -> Tasks | None:
    if wanted.tasks:
        return Tasks(wanted.tasks, wanted.task_folders, wanted.fewshot)
    for option, value in (
        ("--task-path", wanted.task_folders),
        ("--fewshot", wanted.fewshot is not None),
        ("--limit", wanted.limit),
    ):
        if value:
            raise ConfigError("no task is named", option, "name some with --tasks, or leave it out")
    return None


def _scored(task: TaskScores, wanted: Wanted) -> Result:
    shots = "" if wanted.fewshot is None else f"k{wanted.fewshot}"
    limit = "" if wanted.limit is None else f"n{wanted.limit}"
    key = f"{task.name}@{shots}{limit}" if shots or limit else task.name
    settings = {"examples": task.fewshot, "documents": task.samples}
    errors = {f"{key}_stderr": value for key, value in task.errors.items()}
    return Result(
        "task",
        task.name,
        {key: value for key, value in settings.items() if value is not None},
        {**task.figures, **errors},
        {f"eval/{key}/{figure}": value for figure, value in task.figures.items()},
    )


def _measured(measured: Measured, context: int) -> Result:
    figures = measured.figures()
    settings: dict[str, Any] = {
        "context": measured.context,
        "stride": measured.stride,
        "tokens": measured.tokens,
    }
    if measured.size:
        settings["bytes"] = measured.size
    key = measured.key(context)
    metrics = {f"eval/{key}/{name}": value for name, value in figures.items()}
    return Result(measured.kind, measured.name, settings, figures, metrics)


def _validation(subject: Subject, device: torch.device, batch_size: int | None) -> Result:
    """The run's own validation, on the windows that training evaluates.

    Raises:
        ConfigError: it has none, their number is no multiple of the batch, or its data are not
            those that it was trained on.
    """
    if subject.native is None:
        raise distributed.same_everywhere(
            ConfigError(
                "an exported model has no validation data of its own",
                str(subject.path),
                "give --data or --text",
            )
        )
    model, target = subject.native

    def opened() -> Evaluation:
        config, own = target.config, subject.data
        assert own is not None
        windows = config.eval.batches * config.batch_size
        if batch_size is not None and windows % batch_size:
            raise ConfigError(
                f"the {windows} windows of the run's validation are no whole batches of"
                f" {batch_size}",
                "--batch",
                f"give a divisor of {windows}",
            )
        # How training documents are packed does not matter here, and takes time.
        places = own.model_copy(update={"packing": "concatenate"})
        training = open_training_data(
            places, config.model.context, config.seed, config.model.vocab_size
        )
        for split in training.splits:
            subject.check_data(split, str(split.path))
        sets = validation_sets(places, training)
        if not sets:
            problem = "the run has no validation data"
            raise ConfigError(problem, str(target.run_dir), "give --data or --text")
        return Evaluation.of_run(config, sets, device, batch_size)

    figures = distributed.agree(opened).metrics(SimpleNamespace(forward=model))
    assert figures is not None, "nothing asks it to stop"
    written = _written(target)
    recorded = {key: written[key] for key in figures if written.get(key) is not None}
    return Result("validation", "", {}, figures, figures, recorded)


def _written(target: Target) -> dict[str, Any]:
    """The line of the checkpoint's step in the run's metrics; empty where there is none, or only
    that of another history."""
    if target.abandoned:
        return {}
    lines = read_lines(target.run_dir / METRICS)
    return next((line for line in reversed(lines) if line["step"] == target.step), {})
