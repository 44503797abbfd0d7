"""A self-test of crash and resume: a config's first steps on this machine, once straight on and
then killed, in other layouts and by another engine, compared step by step.

Every run is the config's own, with its own schedule, and is killed once its last compared step is
saved: a run that was made shorter would have other rates.
"""

from __future__ import annotations

import importlib.util
import math
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from archscale.bench.curves import Lines, Outcome, compare_closely, compare_exactly
from archscale.bench.supervised import SupervisedRun
from archscale.checkpoint.difference import Difference, compare_checkpoints
from archscale.config import Config, load_config
from archscale.errors import ArchscaleError, ConfigError, TrainingError, explain_os_error
from archscale.files import CHECKPOINTS, step_directory
from archscale.plan.devices import this_device
from archscale.plan.preflight import plan_config, refuse
from archscale.terminal import table

SPARE = 4  # checkpoints that training may write after the last compared one before it is killed
# Weights or an optimizer state that differ by more than this share of their norm are not those of
# the same run: a momentum of 0.95 that begins anew still misses half of itself 13 steps later,
# while rounding in bfloat16 moves all of a state by a few hundredths at most.
LOST = 0.5


@dataclass(frozen=True)
class Request:
    """What to test.

    Attributes:
        overrides: of the config, `key=value`.
        steps: that are compared; fewer where the run is shorter.
        processes: None: replicate × shard of the config, or else what the machine has, at most two
            on CPUs.
        kills: at random instants.
        seed: of these instants.
        limit: seconds that each start of a run may take.
        directory: for the runs, that does not exist yet; None: a temporary one in `runs`.
    """

    config: Path
    overrides: Sequence[str] = ()
    steps: int = 12
    processes: int | None = None
    kills: int = 3
    seed: int = 0
    limit: float = 900.0
    directory: Path | None = None


@dataclass(frozen=True)
class Case:
    """One way to come to the last step.

    Attributes:
        layout: in words.
        overrides: of the config, beyond those of the request.
        kills: how often it is killed on the way.
        resumes: starts from the checkpoint in the middle of the straight run.
        exact: must be the same bits.
        left_out: why it cannot be tried.
    """

    name: str
    layout: str
    processes: int
    overrides: tuple[str, ...] = ()
    kills: int = 0
    resumes: bool = False
    exact: bool = False
    left_out: str | None = None


@dataclass
class _Test:
    """What all cases share.

    Attributes:
        steps: compared.
        every: steps between checkpoints.
        repeats: whether this machine gives the same bits for the same command.
        failures: by case what is wrong.
    """

    request: Request
    config: Config
    directory: Path
    steps: int
    every: int
    say: Callable[[str], None]
    expected: Lines = field(default_factory=dict)
    seconds_to_start: float = 0.0
    seconds_per_step: float = 0.0
    repeats: bool = True
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def middle(self) -> int:
        """Step of the checkpoint from which other layouts go on."""
        return self.every * (self.steps // self.every // 2)

    def run_of(self, case: Case) -> SupervisedRun:
        settings = (
            *self.request.overrides,
            "telemetry.every=1",
            "telemetry.wandb.mode=disabled",
            f"checkpoint.every={self.every}",
            "checkpoint.directory=null",
            f"training.precision={self.config.precision}",
            f"checkpoint.keep={self.steps // self.every + SPARE}",
            f"eval.every={max(1, self.middle)}",
            f"eval.batches={min(2, self.config.eval.batches)}",
            *case.overrides,
        )
        arguments = [str(self.request.config)]
        arguments += [word for setting in settings for word in ("--set", setting)]
        if case.resumes:
            source = step_directory(self.directory / "straight" / CHECKPOINTS, self.middle)
            arguments += ["--resume", str(source)]
        return SupervisedRun(
            case.name,
            arguments,
            self.directory / case.name,
            self.directory / f"{case.name}.log",
            case.processes,
            self.request.limit,
        )


def verify_resume(request: Request, say: Callable[[str], None]) -> str:
    """Run all cases; returns the table of their verdicts, whose last line is that of them all.

    Args:
        say: hears of progress.

    Raises:
        ConfigError: the config cannot be trained here.
        TrainingError: the straight run failed, or a case differs; the runs are kept.
    """
    config = load_config(request.config, request.overrides)
    config = config.with_precision(this_device().precision)
    processes = request.processes or _processes(config)
    plan = plan_config(config, world_size=processes)
    refuse(plan)
    config = plan.config
    if processes > _room():
        raise ConfigError(
            f"{processes} processes on a machine with {_room()} GPUs",
            "--processes",
            "give fewer: this tests a single machine",
        )
    steps = min(request.steps, config.steps)
    if steps < 2:
        raise ConfigError("the run has a single step", "training.tokens", "give it two or more")
    every = max((d for d in range(1, steps // 4 + 1) if steps % d == 0), default=1)
    directory = _make_directory(request.directory)
    test = _Test(request, config, directory, steps, every, say)
    size = plan.figures["checkpoint"]["disk"]
    say(
        f"{config.name}: steps 1 to {steps} of {config.steps}, checkpoints of {size / 1e6:,.1f} MB"
        f" every {_plural(every, 'step')}, in {directory}; each start of a run may take"
        f" {request.limit:g} s"
    )
    rows = [["case", "how", "verdict"]]
    try:
        for case in _cases(test, processes):
            rows.append([case.name, case.layout, _verdict(test, case)])
    except BaseException:
        say(f"the runs are kept in {directory}")
        raise
    lines = table(rows)
    if test.failures:
        say("\n".join(lines))
        name, problem = next(iter(test.failures.items()))
        raise TrainingError(
            f"{len(test.failures)} of {len(rows) - 1} cases failed: {name}: {problem}",
            str(directory),
            "runs and logs are kept there; look closer with `archscale checkpoint diff`",
        )
    shutil.rmtree(directory, ignore_errors=True)
    return "\n".join([*lines, _summary(test, rows)])


def _summary(test: _Test, rows: Sequence[Sequence[str]]) -> str:
    tried = sum(not verdict.startswith("left out") for _, _, verdict in rows[1:])
    repeats = "" if test.repeats else "; the machine does not repeat itself, so none is bitwise"
    return f"verdict: one trajectory in all {tried} cases that could be tried{repeats}"


# --- what is tried


def _room() -> float:
    """Processes that fit on this machine: one on each GPU, on CPUs any number."""
    return torch.cuda.device_count() if torch.cuda.is_available() else math.inf


def _processes(config: Config) -> int:
    parallel = config.parallel
    if parallel.shard != "auto":
        return parallel.replicate * parallel.shard
    return int(min(_room(), 2)) if math.isinf(_room()) else int(_room())


def _cases(test: _Test, processes: int) -> Iterator[Case]:
    """In order; the first gives the curve that the others are compared with."""
    request, config = test.request, test.config
    same = _layout(config, processes)
    yield Case("straight", same, processes)
    yield Case("again", same, processes, exact=True)
    yield Case("killed", same, processes, kills=min(request.kills, test.steps), exact=True)
    other = processes // 2 if processes > 1 else 2
    yield _other_layout(test, "fewer" if other < processes else "more", other, ())
    if processes > 1:
        sharded = config.shard_size(processes) > 1
        replicate, shard = (processes, 1) if sharded else (1, processes)
        sizes = (f"parallel.replicate={replicate}", f"parallel.shard={shard}")
        name = "replicated" if sharded else "sharded"
        yield _other_layout(test, name, processes, (*sizes, "parallel.expert=1"))
    yield _smaller_micro_batch(test, processes)
    yield _other_engine(test, processes)


def _layout(config: Config, processes: int) -> str:
    device = "GPU" if torch.cuda.is_available() else "CPU"
    return f"{_plural(processes, 'process')} on {device}"


def _other_layout(test: _Test, name: str, processes: int, sizes: tuple[str, ...]) -> Case:
    how = f"{_plural(processes, 'process')}, from step {test.middle}"
    whole = sizes or ("parallel.replicate=1", "parallel.shard=auto", "parallel.expert=1")
    if test.config.parallel.engine == "deepspeed" and sizes:
        return Case(name, how, processes, left_out="DeepSpeed shards over all ranks")
    if processes > _room():
        return Case(name, how, processes, left_out=f"this machine has {_room():g} GPU")
    micro = _micro_batch(test.config, processes)
    return _tried(test, Case(name, how, processes, whole), micro)


def _other_engine(test: _Test, processes: int) -> Case:
    parallel = test.config.parallel
    native = parallel.engine == "deepspeed"
    name = "native" if native else "deepspeed"
    sizes = ("parallel.replicate=1", "parallel.shard=auto", "parallel.expert=1")
    keys: tuple[str, ...] = ("zero_stage=2", "reshard_after_forward=true")
    if native:
        keys = ("zero_stage=1", "offload_optimizer=false", "deepspeed=null")
    overrides = (f"parallel.engine={name}", *sizes, *(f"parallel.{key}" for key in keys))
    how = f"{_plural(processes, 'process')}, from step {test.middle}"
    case = Case(name, how, processes, overrides)
    if not native and importlib.util.find_spec("deepspeed") is None:
        return replace(case, left_out="DeepSpeed is not installed")
    return _tried(test, case, test.config.training.micro_batch)


def _micro_batch(config: Config, processes: int) -> int:
    """The largest one up to the config's with which so many processes share every batch."""
    share = math.gcd(*config.batches.sizes) // processes
    limit = min(share, config.training.micro_batch)
    return next((n for n in range(limit, 0, -1) if share % n == 0), 1)


def _smaller_micro_batch(test: _Test, processes: int) -> Case:
    micro = test.config.training.micro_batch
    smaller = max((n for n in range(1, micro) if micro % n == 0), default=None)
    how = f"micro_batch {smaller} instead of {micro}, from step {test.middle}"
    case = Case("accumulated", how, processes)
    if smaller is None:
        return replace(case, layout=f"micro_batch {micro}", left_out="micro_batch is 1 already")
    return _tried(test, case, smaller)


def _tried(test: _Test, case: Case, micro_batch: int) -> Case:
    """The case with this micro-batch, resumed from the middle; left out where the config does not
    allow it."""
    overrides = (*case.overrides, f"training.micro_batch={micro_batch}")
    try:
        config = load_config(test.request.config, [*test.request.overrides, *overrides])
        refuse(plan_config(config, world_size=case.processes))
    except ConfigError as error:
        return replace(case, left_out=error.what)
    return replace(case, overrides=overrides, resumes=True)


# --- what comes of it


def _verdict(test: _Test, case: Case) -> str:
    """Run a case and compare it; notes what fails."""
    if case.left_out:
        test.say(f"{case.name}: left out: {case.left_out}")
        return f"left out: {case.left_out}"
    run = test.run_of(case)
    started = time.monotonic()
    test.say(f"{case.name}: {case.layout} …")
    kills = 0
    try:
        kills = _kill(test, case, run) if case.kills else 0
        run.until_saved(test.steps)
    except TrainingError as error:
        if case.name == "straight":
            raise
        test.failures[case.name] = f"{error.what} ({error.where})"
        return f"failed: {error.what}"
    if case.name == "straight":
        _take_as_reference(test, run, time.monotonic() - started)
        outcome = Outcome(None, f"{test.steps} steps: the reference")
    else:
        outcome = _compare(test, case, run)
    text = f"{_plural(kills, 'kill')}: {outcome.text}" if case.kills else outcome.text
    test.say(f"{case.name}: {text}, {time.monotonic() - started:.0f} s")
    if outcome.problem is not None:
        if case.name == "again":
            test.repeats = False
            return f"this machine does not repeat itself: {text}"
        test.failures[case.name] = outcome.problem
    elif case.name != "straight":
        shutil.rmtree(run.run_dir, ignore_errors=True)
    return text


def _kill(test: _Test, case: Case, run: SupervisedRun) -> int:
    """Kill the run at random instants: before its first step, or somewhere in a step and what
    follows it. Returns how often that succeeded."""
    chance = random.Random(test.request.seed)
    targets = sorted(chance.sample(range(test.steps), case.kills))
    for number, target in enumerate(targets, 1):
        scale = test.seconds_per_step if target else test.seconds_to_start
        reached = run.until_killed(target, chance.random() * scale, test.steps)
        if reached is None:
            test.say(f"{case.name}: all steps were done before kill {number} of {case.kills}")
            return number - 1
        test.say(f"{case.name}: kill {number} of {case.kills} after step {reached}")
    return len(targets)


def _take_as_reference(test: _Test, run: SupervisedRun, seconds: float) -> None:
    lines = run.lines()
    if missing := [step for step in range(1, test.steps + 1) if step not in lines]:
        raise TrainingError(
            f"step {missing[0]} has no line of metrics", str(run.run_dir), f"see {run.log}"
        )
    test.expected = lines
    times = [float(str(lines[step]["time"])) for step in (1, test.steps)]
    test.seconds_per_step = (times[1] - times[0]) / max(1, test.steps - 1)
    test.seconds_to_start = max(0.0, seconds - (times[1] - times[0]))


def _compare(test: _Test, case: Case, run: SupervisedRun) -> Outcome:
    """Curve and last weights beside those of the straight run."""
    first = test.middle + 1 if case.resumes else 1
    steps, lines = range(first, test.steps + 1), run.lines()
    exact = case.exact and (test.repeats or case.name == "again")
    if exact:
        outcome = compare_exactly(test.expected, lines, steps)
    else:
        bfloat16 = test.config.precision != "fp32"
        outcome = compare_closely(test.expected, lines, steps, bfloat16=bfloat16)
    if outcome.problem:
        return outcome
    straight, own = (
        step_directory(folder / CHECKPOINTS, test.steps)
        for folder in (test.directory / "straight", run.run_dir)
    )
    try:
        difference = compare_checkpoints(straight, own)
    except ArchscaleError as error:
        return Outcome(str(error), str(error))
    if exact:
        problem, text = difference.first_problem, difference.verdict
    else:
        problem, text = _far_apart(difference)
    if problem is not None:
        problem = f"curves agree, the checkpoints of step {test.steps} do not: {problem}"
        return Outcome(problem, problem)
    return Outcome(None, f"{outcome.text}; {text}")


def _far_apart(difference: Difference) -> tuple[str | None, str]:
    """What another layout cannot have done to a checkpoint, if anything; and how much it did."""
    for name, reason in difference.mismatched.items():
        return f"tensor {name}: {reason}", ""
    for part, gap in difference.parts.items():
        if gap > LOST:
            return f"{part} differs by {gap:.2g} of its norm: part of it was lost", ""
    gaps = [f"{part} {gap:.1g}" for part, gap in difference.parts.items() if gap]
    return None, f"shares of norms: {', '.join(gaps)}" if gaps else difference.verdict


def _make_directory(given: Path | None) -> Path:
    try:
        if given is None:
            Path("runs").mkdir(exist_ok=True)
            return Path(tempfile.mkdtemp(prefix="verify_resume_", dir="runs"))
        given.mkdir(parents=True)
    except OSError as error:
        cause, remedy = explain_os_error(error, "give another one with --dir")
        where = str(given or "runs")
        raise ConfigError(f"cannot make a directory: {cause}", where, remedy) from error
    return given


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 'es' if noun.endswith('s') else 's'}"
