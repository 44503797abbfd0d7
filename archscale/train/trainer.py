"""A training run: from a config to metrics, checkpoints and a trained model, resuming by itself."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ParamSpec

import torch

import archscale
from archscale import distributed
from archscale.checkpoint.abandoned import leave_one_history
from archscale.checkpoint.changes import Origins
from archscale.checkpoint.choosing import load_newest, start_from_newest
from archscale.checkpoint.directory import discard_after, read_state
from archscale.checkpoint.history import Lineage, Start, identity
from archscale.checkpoint.place import Place, checkpoints_of
from archscale.checkpoint.saving import Saver, load_checkpoint
from archscale.config import Config, dump_config
from archscale.data.loader import Loader
from archscale.data.stored import check_document_mask, run_tokenizer
from archscale.data.tokenizer import keep_tokenizer
from archscale.data.training_data import TrainingData, open_training_data
from archscale.data.validation import ValidationSet, validation_sets
from archscale.errors import (
    ArchscaleError,
    CheckpointError,
    ConfigError,
    DataError,
    TrainingError,
    one_line,
)
from archscale.files import (
    CONFIG,
    ENVIRONMENT,
    MANIFEST,
    METRICS,
    PLAN,
    TOKENIZER,
    step_directory,
    write_atomically,
)
from archscale.model import initialize
from archscale.optim.roles import assign_roles
from archscale.plan.devices import this_device
from archscale.plan.passes import data_figures, many_passes, much_padding, source_tokens
from archscale.plan.plan import Plan, make_plan
from archscale.plan.preflight import refuse
from archscale.plan.text import counting_pass_share, mixture_rows, packing_text, reading_text
from archscale.telemetry.guard import Guard, not_finite_since
from archscale.telemetry.profiling import ProfiledSteps, Profiler
from archscale.telemetry.sinks import last_line, read_lines
from archscale.telemetry.tensorboard import check_tensorboard
from archscale.telemetry.tracking import check_wandb
from archscale.train import stopping
from archscale.train.balance import LoadedExperts
from archscale.train.build import (
    build_engine,
    build_optimizer,
    check_engine,
    cpp_compiler,
    manifest,
)
from archscale.train.continuing import AS_BEFORE, Wishes, check_start
from archscale.train.decaying import decaying
from archscale.train.ema import RunningAverage
from archscale.train.evaluate import Evaluation, of_average
from archscale.train.initial_weights import InitialWeights, initial_weights, load
from archscale.train.live import LiveEvaluation
from archscale.train.ownership import owned_with, sole_owner
from archscale.train.precision import refuse_other_precision, with_kept_precision
from archscale.train.profiled import out_of_memory, prepare
from archscale.train.rates import Rates
from archscale.train.readings import FallBack, Judgement, Readings
from archscale.train.record import Recorder
from archscale.train.same_data import refuse_other_data
from archscale.train.step import Seen, Supervision, train_step
from archscale.train.stopping import Stopped
from archscale.train.watchdog import Arrivals, Watchdog

CHECKS = 600.0  # seconds that rank 0 may take to check the data, while the others wait

P = ParamSpec("P")


def _ended_by_signals(train: Callable[P, dict[str, Any]]) -> Callable[P, dict[str, Any]]:
    """`train` that hears signals from its first line on, and leaves its process group when one has
    ended it."""

    @functools.wraps(train)
    def listening(*args: P.args, **kwargs: P.kwargs) -> dict[str, Any]:
        stopping.forget_status()
        with stopping.listening() as signals:
            signals.begin()
            try:
                return train(*args, **kwargs)
            except Stopped as stopped:
                stopping.leave_status(stopped.status)
                first = os.environ.get("LOCAL_RANK", "0") == "0" and not signals.from_agent
                if first and (agent := stopping.elastic_agent()):
                    stopping.tell(agent)
                distributed.stop()
                raise
            except Exception as error:
                # A rank that has ended at once is missed by the others.
                if not signals.asked or isinstance(error, ArchscaleError):
                    raise
                name, cause = stopping.name(signals.asked), one_line(repr(error))[:200]
                signals.end(f"stopped by {name} without saving, after {cause}")

    return listening


@_ended_by_signals
def train(
    config: Config,
    run_dir: Path,
    resume: str = "auto",
    wishes: Wishes = AS_BEFORE,
    profiled: ProfiledSteps | None = None,
) -> dict[str, Any]:
    """Run `config` to its end in `run_dir`; returns a summary (steps, tokens, losses, seconds,
    whether it was done already).

    Args:
        resume: `auto` (newest checkpoint of the run directory, if any), `never`, or the path of a
            checkpoint.
        wishes: what shall be otherwise from the checkpoint on.
        profiled: steps of which rank 0 writes a trace.

    Raises:
        ArchscaleError: user errors, before the first step wherever that can be known.
        Stopped: a signal has ended it, after a checkpoint.
    """
    checkpoints = checkpoints_of(run_dir, config.checkpoint)
    stopping.current().checkpoints = checkpoints
    wishes.check(resume)
    if wishes.decay_from is not None:
        config, resume = decaying(config, run_dir, wishes), str(wishes.decay_from)
    world = distributed.launched_world_size()
    data = open_training_data(
        config.data, config.model.context, config.seed, config.model.vocab_size
    )
    validation = validation_sets(config.data, data)
    asked = config.training
    config = with_kept_precision(config, run_dir, resume)
    if distributed.may_change_size():
        config = config.for_world_size(world)
    plan = make_plan(
        config.with_vocab(data.vocab_size),
        world_size=world,
        device=this_device(),
        sources=source_tokens(data),
    )
    refuse(plan)  # before any process group starts
    config = plan.config
    if config.training.compile and not torch.cuda.is_available() and not cpp_compiler():
        raise ConfigError(
            "there is no C++ compiler", "training.compile", "install g++, or set it to false"
        )
    check_document_mask(config.data, data.eos_id)
    check_engine(config)
    check_wandb(config.telemetry.wandb.mode)
    check_tensorboard(config.telemetry.tensorboard)
    stuck_after = config.telemetry.stuck_after
    # While training the watchdog comes first, with stacks.
    device = distributed.start(max(CHECKS, stuck_after + 60) if stuck_after else 3600.0)
    if asked.precision == "auto":
        refuse_other_precision(config.precision)
    if config.training.micro_batch != asked.micro_batch and distributed.rank() == 0:
        print(
            f"micro-batch {config.training.micro_batch} instead of"
            f" {asked.micro_batch} on {world} ranks"
        )
    if distributed.restarts() and resume == "never":
        resume = "auto"  # after a crash of this very job
    # No clean-up when something fails: a rank that failed alone would wait here for ranks that wait
    # for it elsewhere.
    refuse_other_data(data, validation)
    with sole_owner(run_dir, *owned_with(run_dir, checkpoints)):

        def make() -> Run:
            _check_data(data, validation)
            return Run(plan, run_dir, data, validation, device, profiled)

        summary = run_from_newest(run_dir, resume, wishes, plan, data, make)
        stopping.current().finished()
        distributed.stop()
    return summary


def run_from_newest(
    run_dir: Path,
    resume: str,
    wishes: Wishes,
    plan: Plan,
    data: TrainingData,
    make: Callable[[], Run],
) -> dict[str, Any]:
    """What the run that `make` makes returns of its end, from the newest checkpoint that is not
    damaged. It is made once: a second one may not fit into the device's memory.

    Raises:
        ArchscaleError, Stopped: as `train`.
    """
    run: Run | None = None

    def go(start: Start) -> dict[str, Any]:
        nonlocal run
        start = distributed.on_rank_zero(
            lambda: check_start(start, plan.config, data, run_dir, resume, wishes)
        )
        initial = initial_weights(start, plan.config, data)
        if run is None:
            run = make()
        else:
            run.start_anew()
        return run.go(start, initial)

    checkpoints = checkpoints_of(run_dir, plan.config.checkpoint)
    return start_from_newest(run_dir, checkpoints, resume, go)


def _check_data(data: TrainingData, validation: Sequence[ValidationSet]) -> None:
    """Read what rank 0 alone has to; DataError on every rank."""
    distributed.on_rank_zero(data.check)
    for held in validation:
        distributed.on_rank_zero(lambda: held.split.check(data.vocab_size))  # noqa: B023


class Run:
    """Everything that one run holds while it trains."""

    def __init__(
        self,
        plan: Plan,
        run_dir: Path,
        data: TrainingData,
        validation: Sequence[ValidationSet],
        device: torch.device,
        profiled: ProfiledSteps | None = None,
    ):
        assert plan.transfer is not None, "a plan without problems has a transfer"
        assert plan.shard is not None
        self.plan, self.config, self.transfer = plan, plan.config, plan.transfer
        self.run_dir, self.data, self.device = run_dir, data, device
        config = self.config
        # Otherwise each process begins at random: nothing here draws from that state, but
        # checkpoints hold it.
        torch.manual_seed(config.seed)
        self.engine = build_engine(config, data.eos_id, self.transfer, device, plan.shard)
        self._profiled = profiled
        self._profiler = Profiler()
        self.experts = self._experts_without_history()
        self.ema = self._running_average()
        self.roles = assign_roles(self.engine.module)
        self.optimizer = build_optimizer(config, self.roles, self.transfer.roles, self.engine)
        guard = config.telemetry.guard
        self.guard = None if guard.mode == "off" else Guard(**guard.model_dump())
        self.lineage = Lineage()
        self.checkpoints = checkpoints_of(run_dir, config.checkpoint)
        self.saver = Saver(self.checkpoints, config.checkpoint)
        self._follow(self.lineage.origins)
        self._fell_back_to: int | None = None  # step that the last fall-back went to
        self._not_finite_since: int | None = None  # first step of the losses now that are not
        self._own = True  # the checkpoint that it starts from is its own
        self._initialized_from: dict[str, Any] | None = None
        # Metrics of the last step before a signal, whose evaluation is still to come.
        self._unfinished: dict[str, Any] | None = None
        self._signals = stopping.current()
        self.evaluation = Evaluation.of_run(config, validation, device)
        self.live = distributed.agree(lambda: LiveEvaluation(config, device))

    # --- the loop

    def go(self, start: Start, initial: InitialWeights | None = None) -> dict[str, Any]:
        """Train to the end.

        Args:
            initial: weights to begin with, where no checkpoint is to be continued.

        Raises:
            TrainingError: the guard has no older checkpoint to fall back to, or has fallen back
                `max_fallbacks` times.
            Stopped: a signal has ended it, after a checkpoint.
        """
        started = time.monotonic()
        self.lineage, self._own = Lineage(start), start.own
        if initial is not None:
            assert start.checkpoint is None
            self._begin_with(initial)
        step = 0 if start.checkpoint is None else self._restore(start.checkpoint, start.rewinds)
        unfinished = distributed.on_rank_zero(lambda: self._not_written(self._unfinished))
        if step >= self.rates.steps and not unfinished:
            if not start.own:
                raise distributed.same_everywhere(
                    CheckpointError(
                        f"no step is left after step {step}",
                        str(start.checkpoint),
                        "give more training.tokens, or an older checkpoint",
                    )
                )
            return self._summary(step, started, already_done=True)
        if self._profiled is not None:
            last = self.rates.steps
            self._profiler = prepare(self._profiled, step, last, self.run_dir, self.device)
        distributed.on_rank_zero(
            lambda: leave_one_history(self.run_dir, self.checkpoints, start, step)
        )
        distributed.on_rank_zero(self._describe)
        watchdog = Watchdog(self.run_dir, self.config.telemetry.stuck_after)
        config = self.config
        recorder = Recorder(
            config.resolved(), config.telemetry, self.rates.steps, self.run_dir, step, start.own
        )
        profiler = contextlib.closing(self._profiler)
        with contextlib.closing(watchdog), recorder, self.saver, profiler:
            if unfinished:
                evaluated = self._evaluate(unfinished, recorder, watchdog)
                recorder.write([unfinished | (evaluated or {})])
            if self.ema:
                self.ema.begin()
            while step < self.rates.steps:
                try:
                    step = self._train(step, recorder, watchdog)
                except torch.OutOfMemoryError as error:
                    raise out_of_memory(error, self.run_dir) from error
                except FallBack as cause:
                    with self._signals.unhurried():
                        step = self._fall_back(cause, recorder)
            with self._signals.unhurried():
                self.saver.wait()
        return self._summary(step, started)

    def _train(self, step: int, recorder: Recorder, watchdog: Watchdog) -> int:
        """Train the steps after `step` to the end; returns the last step's number."""
        config, guard = self.config, self.guard
        loader = Loader(
            self.data,
            self.windows,
            config.training.micro_batch,
            distributed.rank(),
            distributed.world_size(),
            step,
        )
        peak = self.plan.device.peak if self.plan.device else None
        readings = Readings(
            config.model,
            config.telemetry,
            self.batches,
            config.optimizer.grad_clip,
            self.optimizer,
            peak and peak * distributed.world_size(),
            self.data.packed is not None,
        )
        arrivals, judged = Arrivals(self.device), Judgement(guard)
        ballot = distributed.Ballot(lambda: self._signals.asked, lambda: self.saver.failed)
        interval = time.monotonic()
        try:
            for micro_batches in self._profiler.around(loader, step):
                lr = self._set_lr(step)
                step += 1
                last = step == self.rates.steps
                evaluating = self._evaluates and (step % config.eval.every == 0 or last)
                saving = step % config.checkpoint.every == 0 or last
                reading = readings.due(step) or evaluating or saving
                probe = readings.look(step, reading)
                ballot.begin()
                measured, seen = train_step(
                    self.engine,
                    self.optimizer,
                    micro_batches,
                    self.device,
                    config.optimizer.grad_clip,
                    self.experts,
                    probe,
                    Supervision(
                        judged.allow if guard and guard.acts else None, arrivals.all_reduce
                    ),
                )
                self._average(judged.applied)
                readings.add(step, lr, measured)
                asked, failed = ballot.end()
                self._signals.trained()
                if failed:
                    self.saver.wait()  # which says why, on every rank
                watchdog.pat()
                exhausted = guard is not None and guard.exhausted
                if not (reading or exhausted or asked):
                    continue
                # A step that is read for a signal alone shows what every step does.
                looked = reading or exhausted
                lines = judged.annotate_events(
                    readings.read(
                        seen if looked else Seen(None, None),
                        time.monotonic() - interval,
                        judged.applied and looked,
                    ),
                    watch=looked,
                )
                if exhausted:
                    recorder.write(lines)
                    raise FallBack(step, judged.cause)
                if reading:
                    lines[-1] |= arrivals.read(lines[-1]["step_seconds"])
                for line in lines:
                    self._not_finite_since = not_finite_since(self._not_finite_since, line)
                self._unfinished = lines.pop() if evaluating else None
                if self._unfinished and not asked:
                    evaluated = self._evaluate(self._unfinished, recorder, watchdog, ballot)
                    if evaluated is not None:
                        lines.append(self._unfinished | evaluated)
                        self._unfinished = None
                        line = lines[-1]
                        self._not_finite_since = not_finite_since(self._not_finite_since, line)
                recorder.write(lines)
                asked = self._save_if_due(step, saving, asked, ballot)
                if asked and not (last and self._unfinished is None):
                    raise self._stopped(asked, step)
                watchdog.pat()
                interval = time.monotonic()
                if last:
                    break
        finally:
            loader.close()
        return step

    def _not_written(self, line: dict[str, Any] | None) -> dict[str, Any] | None:
        """The line, if metrics.jsonl has none of its step."""
        written = read_lines(self.run_dir / METRICS) if line else []
        return None if line and any(each["step"] == line["step"] for each in written) else line

    @property
    def _evaluates(self) -> bool:
        """Whether there is anything to evaluate."""
        return bool(self.evaluation.sets or self.live)

    def _evaluate(
        self,
        line: dict[str, Any],
        recorder: Recorder,
        watchdog: Watchdog,
        ballot: distributed.Ballot | None = None,
    ) -> dict[str, float] | None:
        """What evaluation adds to the metrics in `line`; None where a signal, which the `ballot`
        asks for, has ended it. Samples are written here, and `line` has an event where results are
        missing."""

        def leave() -> bool:
            watchdog.pat()
            return ballot is not None and ballot.ask()[0] > 0

        metrics = self.evaluation.metrics(self.engine, leave)
        if metrics is not None and self.ema:
            self.saver.before_changes()
            with self.ema.in_place_of_weights():
                averaged = self.evaluation.metrics(self.engine, leave)
            metrics = None if averaged is None else metrics | of_average(averaged)
        if metrics is None or not self.live:
            return metrics
        live = self.live.results(self.engine, leave)
        if live is None:
            return None
        recorder.write_samples(line, live.samples)
        if live.events:
            line["event"] = "; ".join(filter(None, [line.get("event"), *live.events]))
        return metrics | live.figures

    def _save_if_due(self, step: int, saving: bool, asked: int, ballot: distributed.Ballot) -> int:
        """Save where `step` is due to be saved, where a signal was `asked` for, and where its
        evaluation was left for one; returns the signal that the ranks have heard by now."""
        if self._unfinished is not None and not asked:
            asked = ballot.ask()[0]
        # In a streak of skipped steps the weights have not changed. The last step saves all the
        # same, so that the run counts as finished.
        bad = self.guard is not None and self.guard.skipped > 0
        if asked or (saving and (step == self.rates.steps or not bad)):
            with self._signals.unhurried():
                first_skipped = step - self.guard.skipped + 1 if self.guard and bad else None
                self._save(step, first_skipped)
                if asked:
                    self.saver.wait()
            if not asked and (asked := ballot.ask()[0]):  # while it saved
                with self._signals.unhurried():
                    self.saver.wait()
        return asked

    def _stopped(self, number: int, step: int) -> Stopped:
        """How a run ends whose last step is saved."""
        self._signals.finished()
        if distributed.rank() == 0:
            print(
                f"archscale: stopped by {stopping.name(number)} at step {step}: checkpoint"
                f" {step_directory(self.checkpoints, step)}; the same command goes on",
                file=sys.stderr,
                flush=True,
            )
        return Stopped(number)

    def _restore(self, source: Place, rewinds: bool = False) -> int:
        """Load a checkpoint; returns its step.

        Raises:
            DamagedCheckpoint: parts of it may have been loaded.
        """
        anew = self.lineage.resets_optimizer(read_state(source))
        optimizer = None if anew else self.optimizer
        ema = None if self.ema is None else self.ema.fragments()
        state = load_checkpoint(source, self.engine.weights(), optimizer, ema=ema)
        self.lineage.restore(state, rewinds)
        self._follow(self.lineage.origins)
        self.engine.weights_changed()
        if anew:
            self._start_optimizer_anew()
        self._restore_average(state)
        if self.experts:
            self.experts.restore(state.get("experts"), self.device)
        if self.guard and state.get("guard"):
            self.guard.load(state["guard"])
        self._not_finite_since = state.get("not_finite_since")
        self._fell_back_to = state.get("fell_back_to")
        self._initialized_from = state.get("initialized_from")
        # A branch begins with the step after.
        self._unfinished = state.get("unfinished") if self._own else None
        return int(state["step"])

    def _running_average(self) -> RunningAverage | None:
        decay = self.config.training.ema
        return None if decay is None else RunningAverage(decay, self.engine)

    def _experts_without_history(self) -> LoadedExperts | None:
        moe = self.config.model.moe
        return None if moe is None else LoadedExperts(moe)

    def start_anew(self) -> None:
        """As when it was made: parts of a damaged checkpoint may have been loaded."""
        torch.manual_seed(self.config.seed)
        initialize(self.engine.module, self.config.seed, self.engine.weights())
        self.engine.weights_changed()
        self._start_optimizer_anew()
        self.experts = self._experts_without_history()
        self.ema = self._running_average()

    def _start_optimizer_anew(self) -> None:
        """As at a start, with the norms that the weights have now."""
        self.optimizer.state.clear()
        roles = self.transfer.roles
        self.optimizer = build_optimizer(self.config, self.roles, roles, self.engine)

    def _begin_with(self, initial: InitialWeights) -> None:
        """Load weights before the first step.

        Raises:
            CheckpointError: they cannot be read, or are not finite.
            ConfigError: the rule cannot train them.
        """
        loaded = load(initial, self.engine, self.config)
        try:
            self._start_optimizer_anew()
        except ValueError as error:  # of a matrix that is zero, by norms that all ranks know
            raise distributed.same_everywhere(
                ConfigError(
                    one_line(str(error)),
                    "training.init_from",
                    "set optimizer.matrix.rule to one without a sphere, such as orscale_lm",
                )
            ) from error
        self._initialized_from = loaded.record
        lines = [f"starts with the weights of {loaded.name}", *loaded.scaled]
        radii = self.optimizer.radii()
        if len(radii):
            lines.append(
                f"R of {len(radii)} matrices on the sphere is the norm of the loaded weights:"
                f" {radii.min():.4g} to {radii.max():.4g}"
            )
        if distributed.rank() == 0:
            print("\n".join(lines), flush=True)

    def _average(self, applied: bool) -> None:
        """Take the weights after a step into their running average, if there is one."""
        if self.ema and applied:
            self.ema.update()

    def _restore_average(self, state: dict[str, Any]) -> None:
        """Go on with the running average that is loaded, or say why there is none."""
        said = None
        if self.ema:
            said = self.ema.restore(state)
        elif state.get("ema"):
            said = (
                "training.ema is null: the running average of the checkpoint of step"
                f" {state['step']} is not continued"
            )
        if said and distributed.rank() == 0:
            print(said, flush=True)

    def _save(self, step: int, skipped_since: int | None = None) -> None:
        """Save; checkpoints from before the steps that were skipped up to now stay."""
        state = {"step": step, "config": self.config.resolved(), "data": identity(self.data)}
        state |= {"guard": self.guard and self.guard.state(), **self.lineage.next(step)}
        state["not_finite_since"] = self._not_finite_since
        state |= {"fell_back_to": self._fell_back_to, "unfinished": self._unfinished}
        state["initialized_from"] = self._initialized_from
        state["experts"] = self.experts and self.experts.state()
        ema = None
        if self.ema:
            state["ema"], ema = self.ema.state(), self.ema.fragments()
        self.saver.save(self.engine.weights(), self.optimizer, state, skipped_since, ema)

    def _fall_back(self, cause: FallBack, recorder: Recorder) -> int:
        """To the newest checkpoint from before the bad steps, or from before the last fall-back if
        no good step has followed it; returns its step."""
        assert self.guard is not None
        directory = self.checkpoints
        first = cause.step - self.guard.skipped + 1
        before = (
            self._fell_back_to
            if self._fell_back_to is not None and first == self._fell_back_to + 1
            else first
        )
        self.saver.wait()
        self.guard.fallbacks += 1
        spent = self.guard.fallbacks > self.guard.max_fallbacks
        step = None if spent else load_newest(directory, before, recorder.event, self._restore)
        if step is None:
            reason = (
                f"{self.guard.max_fallbacks} fall-backs did not help"
                if spent
                else "there is no older checkpoint"
            )
            raise distributed.same_everywhere(
                TrainingError(
                    f"{self.guard.skipped} steps in a row were skipped at step {cause.step}"
                    f" ({cause}), and {reason}",
                    str(self.run_dir),
                    "lower the learning rate or look at the data of these steps; the checkpoints"
                    " are kept",
                )
            )
        # What lies after it was saved on the way that is given up: a crash must not resume from
        # there.
        distributed.on_rank_zero(lambda: discard_after(directory, step))
        self.guard.skipped = 0
        self._fell_back_to = step
        recorder.rewind(step)
        recorder.event(
            f"skipped steps {first} to {cause.step} and fell back to the checkpoint of step {step}"
            f" ({cause})"
        )
        return step

    def _follow(self, origins: Origins) -> None:
        """Take schedule and data from where they begin."""
        self.rates = Rates(self.config, origins, self.transfer)
        self.batches, self.windows = self.rates.batches, origins.windows(self.config.batches)
        total = self.rates.steps
        figures, trained = self.plan.figures, self._tokens(total)
        figures["training"] |= {"steps": total, "trained_tokens": trained}
        context = self.config.model.context
        read = trained - origins.data.samples * context  # of these data
        figures["data"] = data_figures(source_tokens(self.data), read, context)

    def _tokens(self, step: int) -> int:
        """Tokens of the first `step` steps."""
        return self.batches.at(step)[0] * self.config.model.context

    def _set_lr(self, step: int) -> float:
        """Set every role's rate for the step after `step`; returns the matrices'."""
        factor = self.rates.multiplier(step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.transfer.roles[group["role"]].lr * factor
        return self.transfer.roles["matrix"].lr * factor

    # --- start and finish

    def _describe(self) -> None:
        """What a run directory says of the run before its first step."""
        config = self.config
        dump_config(config, self.run_dir / CONFIG)
        write_atomically(self.run_dir / PLAN, json.dumps(self.plan.as_dict(), indent=1))
        write_atomically(self.run_dir / ENVIRONMENT, json.dumps(environment(self.device), indent=1))
        write_atomically(
            self.run_dir / MANIFEST, json.dumps(manifest(self.roles, self.optimizer), indent=1)
        )
        try:
            keep_tokenizer(run_tokenizer(config.data), self.run_dir / TOKENIZER)
        except DataError as error:  # training does without
            print(f"archscale: warning: the run keeps no tokenizer: {error}", file=sys.stderr)
        count = sum(math.prod(row.shape) for row in self.roles)
        matrices = sum(1 for row in self.roles if row.role == "matrix")
        layout = f"{distributed.world_size()} × {self.device.type} in {config.precision}"
        print(
            f"{config.name}: {count:,} parameters, {matrices} stored matrices under"
            f" {config.optimizer.matrix.rule}, {self.rates.steps} steps of {config.batch_tokens:,}"
            f" tokens on {layout}, run directory {self.run_dir}",
            flush=True,
        )
        print(reading_text(self.plan.figures["data"], count))
        self._describe_data()
        if share := counting_pass_share(self.plan.figures["flops"]):
            print(
                "balance over the whole batch at accumulation > 1: a counting pass adds"
                f" {share:.1%} to the work, and model.moe.balance_scope: previous does without"
            )

    def _describe_data(self) -> None:
        figures = self.plan.figures["data"]
        for name, row in mixture_rows(figures).items():
            print(f"{name}: {row}")
        if not self.data.mixed and (packed := packing_text(figures["sources"][0])):
            print(f"documents are {packed}")
        for advice in filter(None, (many_passes(self.config, figures), much_padding(figures))):
            print(f"archscale: warning: {advice}", file=sys.stderr)
        evaluated = {held.name for held in self.evaluation.sets}
        without = [source.name for source in self.data.sources if source.name not in evaluated]
        if self.data.mixed and without:
            names = ", ".join(without)
            print(f"no val_loss/<name>: {names} (validation text shorter than a window, or none)")

    def _summary(self, step: int, started: float, already_done: bool = False) -> dict[str, Any]:
        summary: dict[str, Any] = {
            "steps": step,
            "tokens": self._tokens(step),
            "seconds": time.monotonic() - started,
            "already_done": already_done,
            "rank": distributed.rank(),
            "not_finite_since": self._not_finite_since,
            "run_dir": str(self.run_dir),
            "checkpoint": str(step_directory(self.checkpoints, step)),
        }
        last = last_line(self.run_dir)
        # A crash may have cut the line of the last step short.
        if last.get("step") == step:
            names = ("loss", "val_loss", "val_loss_ema", "val_bits_per_byte")
            summary |= {name: last[name] for name in names if name in last}
        return summary


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, git revision and host: what a record needs to be repeated."""
    checkout = Path(__file__).parents[2]
    revision = None
    if shutil.which("git") and (checkout / ".git").exists():
        command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40"]
        revision = (
            subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
            or None
        )
    return {
        "archscale": archscale.__version__,
        "git": revision,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "device": (
            torch.cuda.get_device_name()
            if device.type == "cuda"
            else f"cpu, {os.cpu_count()} cores"
        ),
        "world_size": distributed.world_size(),
        "threads": torch.get_num_threads(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
