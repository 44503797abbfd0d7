"""Tasks and samples of a run while it trains, by the engine's own forward pass on any layout.

All ranks take part in every pass, in step. Nothing of training changes: no gradient is kept, and
random states are as before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from archscale.config import Config
from archscale.data.stored import run_tokenizer
from archscale.distributed import from_rank_zero
from archscale.errors import ConfigError
from archscale.inference.generate import Request
from archscale.inference.native import NativeModel
from archscale.inference.sampling import Sampling
from archscale.inference.scoring import Diverged, TransformerScores
from archscale.inference.task_model import TaskModel
from archscale.inference.tasks import Tasks
from archscale.inference.text_model import TextModel
from archscale.model.transformer import ModelOutput
from archscale.train.evaluate import Forwards

SAMPLE_TOKENS = 64  # most that a prompt is continued by


class Left(Exception):
    """Something has ended an evaluation."""


@dataclass
class LiveResults:
    """What an evaluation has found; the same on all ranks.

    Attributes:
        figures: `eval/<task>/<metric>` of every task.
        samples: the prompts, each with the text that continues it.
        events: why there are not all of them.
    """

    figures: dict[str, float] = field(default_factory=dict)
    samples: list[dict[str, str]] = field(default_factory=list)
    events: list[str] = field(default_factory=list)


class LiveEvaluation:
    """The tasks and samples that a run's config names.

    Args:
        config: of the run, resolved.

    Raises:
        ConfigError: a task is unknown, cannot be loaded or cannot be scored, or lm-eval is not
            installed.
        DataError: the tokenizer of the training data is not known.
    """

    def __init__(self, config: Config, device: torch.device):
        self._config, self._device = config, device
        self._samples = list(config.eval.samples)
        self._tasks = None
        if config.eval.tasks:
            self._tasks = Tasks(config.eval.tasks, where="eval.tasks")
        if self:
            self._tokenizer = run_tokenizer(config.data)
        if self._tasks is not None:
            self._tasks.rehearse(self._model(_no_forward))

    def __bool__(self) -> bool:
        """Whether there is anything to do."""
        return self._tasks is not None or bool(self._samples)

    def results(self, engine: Forwards, leave: Callable[[], bool]) -> LiveResults | None:
        """Figures of the tasks and texts of the prompts. A run that has diverged has none of those
        that need probabilities, and goes on.

        Args:
            leave: asked before every forward pass, with the same answer on all ranks; then there
                are no results.
        """

        def forward(*args: Any, **kwargs: Any) -> ModelOutput:
            if leave():
                raise Left
            return engine.forward(*args, **kwargs)

        model, results = self._model(forward), LiveResults()
        try:
            self._score_tasks(model, results)
            self._write_samples(model, results)
        except Left:
            return None
        except Diverged as error:
            results.events.append(f"tasks and samples left out: {error.what}")
        return results

    def _score_tasks(self, model: TaskModel, results: LiveResults) -> None:
        if self._tasks is None:
            return
        batch = self._config.training.micro_batch
        for name in self._tasks.names:
            try:
                scored = self._tasks.score(model, batch, errors=False, names=[name])
            except ConfigError as error:  # which every rank has
                results.events.append(f"task left out: {error.what}")
                continue
            for task in scored:
                results.figures |= {f"eval/{task.name}/{k}": v for k, v in task.figures.items()}

    def _write_samples(self, model: TaskModel, results: LiveResults) -> None:
        requests = [Request(model.text.tokens(text), SAMPLE_TOKENS) for text in self._samples]
        greedy = Sampling(temperature=0.0, top_k=None)
        texts = model.write(requests, greedy, self._config.training.micro_batch)
        results.samples += [
            {"prompt": prompt, "text": text} for prompt, text in zip(self._samples, texts)
        ]

    def _model(self, forward: Callable[..., ModelOutput]) -> TaskModel:
        config, device = self._config.model, self._device

        def same_forward(*args: Any, **kwargs: Any) -> ModelOutput:
            # A tie that falls otherwise on one rank would end a text there alone.
            output = forward(*args, **kwargs)
            assert output.logits is not None
            return output._replace(logits=from_rank_zero(output.logits.contiguous()))

        assert config.vocab_size is not None, "a resolved config"
        name = self._config.name
        native = NativeModel(same_forward, config.context, device)
        text = TextModel.of_run(native, self._tokenizer, name)
        scores = TransformerScores(forward, name, config.context, config.vocab_size, device)
        return TaskModel(text, scores, together=True)


def _no_forward(*args: Any, **kwargs: Any) -> ModelOutput:
    raise AssertionError("a rehearsal asks nothing of the model")
