"""Tasks of lm-eval, from the hub or from local files: found before anything is computed, then
scored."""

from __future__ import annotations

import contextlib
import functools
import io
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from archscale.distributed import rank
from archscale.errors import ConfigError, nearest, one_line
from archscale.inference.task_model import TaskModel

YAML = (".yaml", ".yml")
SEED = 1234  # of the examples that few-shot prompts show: lm-eval's own default


@dataclass(frozen=True)
class TaskScores:
    """What a model made of one task, or of a group of them.

    Attributes:
        figures: by name: the metric, and behind a comma the filter of answers where it has one.
        errors: standard errors of some of them.
        samples: how many documents; None for a group.
        fewshot: examples that its prompts show; None for a group.
    """

    name: str
    figures: Mapping[str, float]
    errors: Mapping[str, float]
    samples: int | None
    fewshot: int | None


class Tasks:
    """Tasks that are there, to be scored as often as needed.

    Args:
        names: of tasks, groups or tags, or paths of YAML files.
        folders: with YAML files of further tasks.
        fewshot: examples that prompts show; None: what each task says.
        where: the option or key that names the tasks, for messages.

    Raises:
        ConfigError: lm-eval is not installed or has no such task, or a task cannot be loaded.
    """

    def __init__(
        self,
        names: Sequence[str],
        folders: Sequence[Path] = (),
        fewshot: int | None = None,
        where: str = "--tasks",
    ):
        for folder in folders:
            if not folder.is_dir():
                raise ConfigError("no such directory", str(folder), "give one with task files")
        for name in names:
            if name.endswith(YAML) and not Path(name).is_file():
                raise ConfigError("no such task file", name, f"correct the path in {where}")
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            problem = f"the package {error.name!r} is not installed"
            raise ConfigError(problem, where, "pip install archscale[eval]") from error
        include = [str(folder) for folder in folders]
        # Its own tasks are thousands of files to look through, so local ones come first.
        manager = TaskManager(include_path=include, include_defaults=False)
        others: Callable[[], Any] | None = functools.partial(TaskManager, include_path=include)
        if _unknown(names, manager.all_tasks):
            manager, others = TaskManager(include_path=include), None
        for name in _unknown(names, manager.all_tasks):
            close = nearest(name, manager.all_tasks)
            raise ConfigError(
                f"lm-eval knows no task {name!r}",
                where,
                f"did you mean {close}?" if close else "give a name of lm-eval, or a YAML file",
            )
        with _without_bars(), _kept_random_state():
            try:
                self._loaded = _load(list(dict.fromkeys(names)), manager, others)
            except Exception as error:  # of the file, of the hub, of the data: the task's own
                cause = one_line(str(error))[:200] or type(error).__name__
                problem = f"cannot load {', '.join(names)}: {cause}"
                raise ConfigError(problem, where, "check the task and its data set") from error
        for task in self._loaded["tasks"].values():
            if fewshot is not None:
                task.set_config(key="num_fewshot", value=fewshot)
            elif task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)

    def score(
        self,
        model: TaskModel,
        batch_size: int,
        limit: int | None = None,
        errors: bool = True,
    ) -> list[TaskScores]:
        """Score the model on every task; all ranks together, and each has the results. Random
        states stay as they are.

        Args:
            limit: documents of each task, from its start; None: all.
            errors: whether to estimate standard errors, which takes time for some metrics.

        Raises:
            ConfigError: a task cannot be scored with this model.
            CheckpointError: its logits are not finite.
        """
        from lm_eval.evaluator import evaluate

        from archscale.inference.harness import HarnessModel

        for task in self._loaded["tasks"].values():
            task.set_fewshot_seed(seed=SEED)  # the same examples every time
        with _without_bars(), _kept_random_state():
            for seed in (random.seed, np.random.seed, torch.manual_seed):
                seed(SEED)
            try:
                results = evaluate(
                    HarnessModel(model, batch_size),
                    self._loaded,
                    limit=limit,
                    log_samples=False,
                    bootstrap_iters=100_000 if errors else 0,
                )
            except (ValueError, NotImplementedError, KeyError) as error:
                names = ", ".join(self._loaded["tasks"])
                problem = f"cannot score {names}: {one_line(str(error))[:200]}"
                raise ConfigError(problem, model.text.name, "leave the task out") from error
        return list(_scores(results))


def _load(names: list[str], manager: Any, others: Callable[[], Any] | None) -> Any:
    """The tasks and their data, from `manager` or, where that fails, from the one that `others`
    makes: the members of a local group may be tasks of lm-eval's own."""
    try:
        return manager.load(names)
    except Exception:
        if others is None:
            raise
        return others().load(names)


def _unknown(names: Sequence[str], known: Sequence[str]) -> list[str]:
    there = set(known)
    return [name for name in names if name not in there and not name.endswith(YAML)]


def _scores(results: Mapping[str, Any]) -> Iterator[TaskScores]:
    for name, row in results["results"].items():
        figures: dict[str, float] = {}
        errors: dict[str, float] = {}
        for key, value in row.items():
            metric, comma, filtered = key.partition(",")
            if not comma or isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            of = errors if metric.endswith("_stderr") else figures
            metric = metric.removesuffix("_stderr")
            of[metric if filtered == "none" else f"{metric},{filtered}"] = float(value)
        samples = results.get("n-samples", {}).get(name, {}).get("effective")
        yield TaskScores(name, figures, errors, samples, results.get("n-shot", {}).get(name))


@contextlib.contextmanager
def _kept_random_state() -> Iterator[None]:
    """Whatever is drawn inside, the state of every generator is as before."""
    python, numpy_state, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)
        torch.set_rng_state(cpu)
        if gpu is not None:
            torch.cuda.set_rng_state_all(gpu)


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Progress bars are for one terminal: where there is none, and on other ranks, they would be
    lines without end."""
    if rank() == 0 and sys.stderr.isatty():
        yield
        return
    with contextlib.redirect_stderr(io.StringIO()):
        yield
