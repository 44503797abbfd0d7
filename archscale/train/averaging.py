"""The mean of several checkpoints' weights, as a run directory that every command takes for a run.

One tensor at a time is in memory, in float64. The mean is a plain one, also of weights that a rule
keeps on a sphere: the mean of points on a sphere lies inside it, so its norm is smaller, and
`Average` says by how much. It is not drawn back onto the sphere, because what averaging is for, the
lower loss, is that of the plain mean; and training that goes on from it with `--reset optimizer`
takes the norms as they are then.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from archscale.checkpoint.directory import checkpoint_id, read_state
from archscale.checkpoint.fragments import Computed
from archscale.checkpoint.history import absolute
from archscale.checkpoint.place import STATE, checkpoints_of
from archscale.checkpoint.reading import StoredWeights
from archscale.checkpoint.saving import write_weights
from archscale.checkpoint.target import Target, find_target, target_of
from archscale.config import Config, dump_config, load_config
from archscale.config.layers import flatten
from archscale.data.tokenizer import keep_tokenizer
from archscale.errors import CheckpointError, ConfigError, show
from archscale.files import (
    CHECKPOINTS,
    CONFIG,
    TOKENIZER,
    checkpoint_steps,
    free_directory,
    new_directory,
    step_directory,
)
from archscale.plan.transfer import transfer_of
from archscale.rules import get_rule

WHAT = "average"  # as messages name what is written


@dataclass
class Average:
    """What `average_checkpoints` has written.

    Attributes:
        checkpoint: in the run directory that was written.
        sources: path of every checkpoint that was averaged.
        on_sphere: the rule that keeps the matrices on a sphere; None: there is none.
        shrinkage: by weight matrix ‖mean‖ over the mean of the norms, at most 1 but for rounding.
    """

    checkpoint: Path
    sources: list[str]
    on_sphere: str | None
    shrinkage: dict[str, float] = field(default_factory=dict)

    def sentences(self) -> list[str]:
        """For people, a line each."""
        count = len(self.sources)
        what = f"mean of {count} checkpoints" if count > 1 else "running average of the weights"
        lines = [f"{self.checkpoint}: {what}"]
        if count > 1 and self.shrinkage:
            least = min(self.shrinkage, key=self.shrinkage.__getitem__)
            typical = sum(self.shrinkage.values()) / len(self.shrinkage)
            lines.append(
                f"norms of its matrices over those of the checkpoints: {typical:.5g} on average,"
                f" {self.shrinkage[least]:.5g} in {least}"
            )
            if self.on_sphere:
                lines.append(
                    f"{self.on_sphere} keeps matrices on spheres, and their mean lies inside:"
                    " it is left there"
                )
        return lines


def average_checkpoints(
    paths: Sequence[Path],
    out: Path,
    *,
    last: int | None = None,
    steps: Sequence[int] | None = None,
    ema: bool = False,
) -> Average:
    """Write the mean of checkpoints' weights as the run directory `out`: all of it or nothing.

    Its only checkpoint has the step, config and data of the newest one, and no optimizer state.

    Args:
        paths: checkpoints, or run directories for their newest; with `last` or `steps` one run
            directory.
        out: a directory that does not exist or is empty.
        last: average the newest so many of the run.
        steps: average those of these steps of the run.
        ema: take the running averages that `training.ema` has kept, of one checkpoint or several.

    Raises:
        CheckpointError: a checkpoint is missing, damaged or diverged, they are of different models,
            or there are too few.
        ConfigError: the options contradict each other, or `out` is in use or cannot be written.
        DataError: a run's tokenizer is gone, damaged or another one.
    """
    out = free_directory(out, WHAT)
    targets = _targets(paths, last, steps)
    _refuse_too_few(targets, ema)
    newest = max(targets, key=lambda target: target.step)
    for target in targets:
        _refuse_other_model(newest, target)
    stored = [StoredWeights(target.checkpoint, ema=ema) for target in targets]
    _refuse_other_shapes(stored, targets)
    rule = newest.config.optimizer.matrix.rule
    written = Average(
        step_directory(out / CHECKPOINTS, newest.step),
        [str(target.checkpoint) for target in targets],
        rule if get_rule(rule).sphere else None,
    )
    with new_directory(out, WHAT, CONFIG) as partial:
        checkpoint = step_directory(partial / CHECKPOINTS, newest.step)
        checkpoint.mkdir(parents=True)
        write_weights(checkpoint, _means(stored, targets, written), _state(targets, newest))
        keep_tokenizer(newest.tokenizer, partial / TOKENIZER)
        dump_config(_config(newest), partial / CONFIG)
    return written


def mean(weights: Iterable[Tensor]) -> tuple[Tensor, list[float]]:
    """The mean of equally shaped tensors in the dtype of the first, summed in float64; and their
    norms."""
    total, dtype, norms = torch.empty(0), torch.float32, list[float]()
    for weight in weights:
        if not norms:
            total, dtype = torch.zeros(weight.shape, dtype=torch.float64), weight.dtype
        norms.append(float(torch.linalg.vector_norm(weight, dtype=torch.float64)))
        total += weight
    return (total / len(norms)).to(dtype), norms


# --- which checkpoints


def parse_steps(text: str) -> list[int]:
    """`100,200` → [100, 200].

    Raises:
        ConfigError: something in it is no number.
    """
    numbers = [part.strip() for part in text.split(",")]
    if not all(number.isdecimal() for number in numbers):
        raise ConfigError(
            f"{text!r} is no list of steps", "--steps", "give numbers, such as 1000,2000"
        )
    return [int(number) for number in numbers]


def _targets(paths: Sequence[Path], last: int | None, steps: Sequence[int] | None) -> list[Target]:
    if last is None and steps is None:
        return [find_target(path) for path in paths]
    option = "--last" if steps is None else "--steps"
    if last is not None and steps is not None:
        raise ConfigError("--last and --steps both choose", option, "leave one of the two out")
    run_dir = paths[0]
    if len(paths) > 1 or (run_dir / STATE).is_file():
        raise ConfigError(
            f"{option} chooses among the checkpoints of one run directory",
            str(paths[-1]),
            f"name the run directory alone, or leave out {option}",
        )
    directory = checkpoints_of(run_dir)
    there = checkpoint_steps(directory)
    wanted = there[-last:] if last is not None else list(steps or ())
    if not there or (last is not None and last > len(there)):
        raise CheckpointError(
            f"{len(there)} checkpoints are there, {last or len(wanted)} were asked for",
            str(directory),
            "ask for fewer, or keep more in training with checkpoint.keep",
        )
    for step in wanted:
        if step not in there:
            listed = ", ".join(map(str, there))
            raise CheckpointError(
                f"there is no checkpoint of step {step}", str(directory), f"choose among {listed}"
            )
    return [target_of(run_dir, step_directory(directory, step)) for step in wanted]


def _refuse_too_few(targets: Sequence[Target], ema: bool) -> None:
    first = str(targets[0].checkpoint)
    if len(targets) < 2 and not ema:
        raise CheckpointError(
            "one checkpoint has no mean with others",
            first,
            "name several, or a run directory with --last N or --steps A,B",
        )
    names = [absolute(target.checkpoint) for target in targets]
    for name in names:
        if names.count(name) > 1:
            raise CheckpointError("it is named twice", name, "name each checkpoint once")


def _refuse_other_model(first: Target, other: Target) -> None:
    """Weights have a mean where they mean the same: of one architecture, one scale of the logits,
    one tokenizer."""
    known, here = _meaning(first), _meaning(other)
    for key in sorted(known.keys() | here.keys()):
        if known.get(key) != here.get(key):
            raise CheckpointError(
                f"it is of another model: {key} is {show(here.get(key))}, and"
                f" {show(known.get(key))} in {first.checkpoint}",
                str(other.checkpoint),
                "average checkpoints of one model",
            )


def _meaning(target: Target) -> dict[str, Any]:
    transfer, model = transfer_of(target.config), target.config.resolved()["model"]
    del model["aspect"]  # depth and width say it
    return {
        **flatten({"model": model}),
        "data.document_mask": target.config.data.document_mask,
        "the scale of the logits": transfer.logit_scale,
        "the scale of the router's logits": transfer.router_logit_scale,
        "the tokenizer": target.tokenizer.fingerprint[:12],
    }


def _refuse_other_shapes(stored: Sequence[StoredWeights], targets: Sequence[Target]) -> None:
    """The same config says the same shapes, unless somebody has changed a file on purpose."""
    for weights, target in zip(stored, targets):
        names = sorted(weights.shapes.keys() | stored[0].shapes.keys())
        for name in names:
            if weights.shapes.get(name) != stored[0].shapes.get(name):
                raise CheckpointError(
                    f"weight {name} is {weights.shapes.get(name, 'missing')}, and"
                    f" {stored[0].shapes.get(name, 'missing')} in {targets[0].checkpoint}",
                    str(target.checkpoint),
                    "average checkpoints of one model",
                )


# --- what is written


def _means(
    stored: Sequence[StoredWeights], targets: Sequence[Target], written: Average
) -> dict[str, Computed]:
    """The mean weights, each of which is computed when it is written."""

    def compute(name: str) -> Tensor:
        average, norms = mean(
            _finite(weights.read(name), name, target) for weights, target in zip(stored, targets)
        )
        if average.ndim > 1 and (whole := math.fsum(norms)):
            norm = float(torch.linalg.vector_norm(average, dtype=torch.float64))
            written.shrinkage[name] = norm * len(norms) / whole
        return average

    return {
        name: Computed(shape, lambda name=name: compute(name))  # type: ignore[misc]
        for name, shape in stored[0].shapes.items()
    }


def _finite(weight: Tensor, name: str, target: Target) -> Tensor:
    if not weight.isfinite().all():
        raise CheckpointError(
            f"weight {name} is not finite: the run had diverged",
            str(target.checkpoint),
            "name a checkpoint from before that",
        )
    return weight


def _state(targets: Sequence[Target], newest: Target) -> dict[str, Any]:
    """What the checkpoint says of itself: that of the newest one, with which it goes on, and what
    it is the mean of."""
    state, named = read_state(newest.checkpoint), [_named(target) for target in targets]
    kept = ("step", "data", "resumed", "changes", "origins")
    return {
        **{key: state[key] for key in kept if key in state},
        "config": _config(newest).resolved(),
        "id": uuid.uuid4().hex[:16],
        "parent": _named(newest),
        "not_finite_since": None,
        "averaged": named,
    }


def _named(target: Target) -> dict[str, Any]:
    """A checkpoint as `checkpoint.history` names one of another run directory."""
    return {
        "step": target.step,
        "id": checkpoint_id(read_state(target.checkpoint)),
        "run": target.config.name,
        "checkpoint": absolute(target.checkpoint),
    }


def _config(newest: Target) -> Config:
    """That of the checkpoint, with the data where the run directory says that they lie now."""
    config = newest.config
    here = config.checkpoint.model_copy(update={"directory": None})
    places = load_config(newest.run_dir / CONFIG).data
    return config.model_copy(update={"data": places, "checkpoint": here})
