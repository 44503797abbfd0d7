"""Which checkpoint a run continues from, and what may be otherwise from there on: longer where no
step before it would have been another, or as `--extend`, `--decay-from` and `--reset` say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archscale.checkpoint.changes import (
    DATA,
    OPTIMIZER,
    RESETS,
    SCHEDULE,
    Change,
    Origins,
    recorded,
)
from archscale.checkpoint.directory import checkpoint_id, read_state
from archscale.checkpoint.history import (
    Start,
    differing_keys,
    entry_of,
    identity,
    saved_config,
    trained_samples,
)
from archscale.checkpoint.place import Place, checkpoints_of, place_of
from archscale.config import Config
from archscale.data.training_data import TrainingData
from archscale.errors import CheckpointError, ConfigError
from archscale.files import checkpoint_steps
from archscale.plan.transfer import transfer_of
from archscale.train.rates import Rates

# Keys that decide how long a run is and how its rates go; one may end with all that is below it.
TOKENS, PLANNED = "training.tokens", "parameterization.planned_tokens"
LENGTH = (TOKENS, "schedule", PLANNED)
EXTENDED = (  # what --extend may change besides
    "parameterization.base.lr",
    "parameterization.token_exponent",
    "optimizer.element.lr_ratio",
)
RESET_KEYS = {
    OPTIMIZER: ("optimizer", "parameterization"),
    DATA: ("data", "data_set", "seed"),
    SCHEDULE: LENGTH,
}
RESET_TEXTS = {
    OPTIMIZER: "the weights stay, momenta and all other state of the optimizer start anew",
    DATA: "the order of the data starts with its first window",
    SCHEDULE: "schedule and warm-up start anew",
}


@dataclass(frozen=True)
class Wishes:
    """What a user wants to be otherwise from a checkpoint on.

    Attributes:
        extend: rates and schedule are planned anew over another length.
        reset: what starts anew, of `RESETS`.
        decay_from: the checkpoint with which the decay of the learning rate begins.
        tokens_given: whether the command itself gives `training.tokens`, which is then the end of
            that decay.
    """

    extend: bool = False
    reset: tuple[str, ...] = ()
    decay_from: Place | None = None
    tokens_given: bool = False

    def check(self, resume: str) -> None:
        """Refuse combinations that mean nothing.

        Raises:
            ConfigError: naming both options.
        """
        for part in self.reset:
            if part not in RESETS:
                raise ConfigError(
                    f"nothing is called {part}", "--reset", f"choose {' or '.join(RESETS)}"
                )
        path = resume not in ("auto", "never")
        if self.decay_from is not None:
            others = {"--extend": self.extend, "--reset": self.reset, "--resume": resume != "auto"}
            for option, given in others.items():
                if given:
                    raise ConfigError(
                        f"--decay-from says where the run goes on and how, and {option} is given",
                        option,
                        "leave one of the two out",
                    )
        elif self.reset and not path:
            raise ConfigError(
                f"--reset {self.reset[0]} would happen again whenever the command is started again",
                "--reset",
                "name the checkpoint at which it happens, once, with --resume PATH",
            )
        elif self.extend and resume == "never":
            raise ConfigError(
                "--resume never starts a run, which cannot be extended",
                "--extend",
                "leave one of the two out",
            )
        elif self.extend and SCHEDULE in self.reset:
            raise ConfigError(
                "--reset schedule starts the schedule anew, --extend plans the one that goes on",
                "--extend",
                "leave one of the two out",
            )


AS_BEFORE = Wishes()


def check_start(
    start: Start,
    config: Config,
    data: TrainingData,
    run_dir: Path,
    resume: str,
    wishes: Wishes = AS_BEFORE,
) -> Start:
    """`start`, with what is otherwise from there on, which is printed; after checking that its
    checkpoint belongs to this trajectory or may become part of it.

    Args:
        config: resolved; under `--decay-from` with the decay.
        resume: `auto`, `never` or a path, as of `archscale train`.

    Raises:
        ConfigError: a key that would change the trajectory, or a wish that cannot be met.
        CheckpointError: another version wrote the checkpoint; or the directory holds another run.
    """
    source = start.checkpoint
    if source is None:
        if wishes.extend:
            raise CheckpointError(
                "there is no checkpoint to extend", str(run_dir), "leave out --extend"
            )
        return start
    now = Continuation(source, config, data, wishes)
    if (wishes.reset or wishes.decay_from) and not start.rewinds:
        _check_done(now.state, run_dir, config, place_of(resume), wishes)
        now = Continuation(source, config, data, AS_BEFORE)
    elif wishes.decay_from:
        _refuse_to_abandon(run_dir, config, start, now.step)
    changes = now.changes()
    return Start(source, start.rewinds, start.own, tuple(changes))


class Continuation:
    """A checkpoint, and the run that shall continue it."""

    def __init__(self, source: Place, config: Config, data: TrainingData, wishes: Wishes):
        self.source, self.config, self.data, self.wishes = source, config, data, wishes
        self.state = read_state(source)
        self.step = int(self.state["step"])
        self.before = saved_config(source, self.state)
        self.origins = Origins.of_state(self.state)
        self._lines: list[str] = []  # printed once nothing is refused any more

    def changes(self) -> list[Change]:
        """What the next checkpoints record as changed here; prints a line for each.

        Raises:
            ConfigError: a key that must not differ.
        """
        keys = differing_keys(self.source, self.state, self.config, self.data)
        wishes = self.wishes
        free = tuple(key for part in wishes.reset for key in RESET_KEYS[part])
        planned = LENGTH + (EXTENDED if wishes.extend else ())
        for key, (was, wanted) in keys.items():
            if not (_below(key, free) or _below(key, planned)):
                raise ConfigError(
                    f"{key} is {wanted}, the checkpoint's run has {was}",
                    str(self.source),
                    "restore the value, or start another run with --run-dir",
                )
        self._check_resets()
        length = {key: pair for key, pair in keys.items() if not _below(key, free)}
        changes = [self._change("reset", parts=list(wishes.reset))] if wishes.reset else []
        for part in wishes.reset:
            self._lines.append(f"--reset {part} at step {self.step}: {self._reset_text(part)}")
        if wishes.extend:
            changes += self._extension(length)
        elif length:
            self._check_past(length)
            if not wishes.decay_from:
                self._lines.append(
                    f"goes on from step {self.step} with another length or schedule"
                    f" ({_listing(length)}): every step before would have been the same"
                )
        if wishes.decay_from:
            tokens = schedule_tokens(self.state)
            changes.append(self._change("decay", tokens=tokens, planned_tokens=self._planned()))
            self._lines.append(
                f"decays from step {self.step} ({tokens:,} tokens) to step"
                f" {self.origins.schedule.step + self.config.steps} ({self.config.tokens:,} tokens)"
            )
        self._describe_initial_weights()
        for line in self._lines:
            print(line, flush=True)
        return changes

    def _describe_initial_weights(self) -> None:
        wanted = self.config.training.init_from
        if wanted is not None and wanted != self.before.training.init_from:
            self._lines.append(
                f"training.init_from {wanted} is not read: the run goes on from step {self.step}"
            )

    def _change(self, kind: Any, **details: Any) -> Change:
        return Change(kind, self.step, checkpoint_id(self.state), details)

    def _planned(self) -> int:
        return self.before.parameterization.planned_tokens or self.before.tokens

    # --- resets

    def _check_resets(self) -> None:
        """Refuses resets that nothing follows, and what none can make right."""
        last = self.origins.schedule.step + self.config.steps
        if self.wishes.reset and SCHEDULE not in self.wishes.reset and last <= self.step:
            raise ConfigError(
                f"no step is left after a reset: the run ends with step {last}",
                str(self.source),
                f"give more than {schedule_tokens(self.state)} for {TOKENS}, or name an older"
                " checkpoint",
            )
        if OPTIMIZER in self.wishes.reset:
            was, now = (transfer_of(config).logit_scale for config in (self.before, self.config))
            if was != now:
                raise ConfigError(
                    f"the logits would be scaled by {now:g}, and were by {was:g}: with the same"
                    " weights it would be another model",
                    "parameterization",
                    "keep a parameterization and rule of the same scale, or start another run",
                )
        if DATA in self.wishes.reset:
            known, new = (fingerprints(d) for d in (self.state["data"], identity(self.data)))
            if known and new and known != new:
                raise ConfigError(
                    "the new data set was made with another tokenizer than the checkpoint's",
                    "data.train",
                    "prepare the new data with the tokenizer of the old",
                )

    def _reset_text(self, part: str) -> str:
        text = RESET_TEXTS[part]
        if part == SCHEDULE:
            context = self.config.model.context
            done = trained_samples(self.state) * context
            text += f", over {self.config.tokens:,} tokens more after the {done:,} so far"
        return text

    # --- length

    def _with_length(self) -> Config:
        """The checkpoint's config with the length and schedule of the new one."""
        before, now = self.before, self.config
        training = before.training.model_copy(update={"tokens": now.tokens})
        parameterization = before.parameterization.model_copy(
            update={"planned_tokens": now.parameterization.planned_tokens}
        )
        return before.model_copy(
            update={
                "schedule": now.schedule,
                "training": training,
                "parameterization": parameterization,
            }
        )

    def _rates(self) -> tuple[Rates, Rates]:
        return Rates(self.before, self.origins), Rates(self._with_length(), self.origins)

    def _since(self) -> int:
        """The step from which on the run has had the rates of the checkpoint's config."""
        steps = [change.step for change in recorded(self.state) if change.changes_rates]
        return max([self.origins.schedule.step, *steps])

    def _check_past(self, length: Mapping[str, tuple[Any, Any]]) -> None:
        """Refuses keys with which a step before the checkpoint would have been another."""
        was, now = self._rates()
        if now.steps < self.step:
            raise self._too_short(now)
        what = _listing(length)
        if difference := first_difference(was, now, self._since(), self.step):
            raise ConfigError(
                f"{what}: {difference}", str(self.source), self._remedy(was, set(length))
            )

    def _remedy(self, was: Rates, keys: set[str]) -> str:
        restore = "restore the value" if len(keys) == 1 else "restore the values"
        restore += ", or start another run with --run-dir"
        if was.batches.at(self.step) != Rates(self.config, self.origins).batches.at(self.step):
            return restore
        extend = f"--extend plans rates and schedule anew from step {self.step} on"
        planned, held = self._planned(), self._with_length().parameterization
        if held.applied_token_exponent and held.planned_tokens != planned:
            held = held.model_copy(update={"planned_tokens": planned})
            config = self._with_length().model_copy(update={"parameterization": held})
            now = Rates(config, self.origins)
            if not first_difference(was, now, self._since(), self.step):
                return f"{extend}, {PLANNED}={planned} holds the rates and keeps the trajectory"
        return f"{extend}; or {restore}"

    def _too_short(self, now: Rates) -> ConfigError:
        return ConfigError(
            f"{TOKENS} {self.config.tokens} ends with step {now.steps}, and the checkpoint is of"
            f" step {self.step}",
            str(self.source),
            f"give more than {schedule_tokens(self.state)}, or go back to an older checkpoint with"
            " --resume PATH",
        )

    def _extension(self, length: Mapping[str, tuple[Any, Any]]) -> list[Change]:
        """The plan of the rest anew; nothing where an earlier start has done it already."""
        if not length:
            if any(change.kind == "extend" for change in recorded(self.state)):
                return []
            raise ConfigError(
                f"--extend changes nothing: {TOKENS} and schedule are the checkpoint's",
                str(self.source),
                f"give another {TOKENS}, or leave out --extend",
            )
        was, now = Rates(self.before, self.origins), Rates(self.config, self.origins)
        if now.steps <= self.step:
            raise self._too_short(now)
        if was.batches.at(self.step)[0] != now.batches.at(self.step)[0]:
            raise ConfigError(
                f"with another ramp of the batch {self.step} steps are other windows of the data"
                " than were trained on",
                "schedule.batch_ramp_tokens",
                "restore its keys, or use --resume PATH --reset schedule in place of --extend",
            )
        peaks = [rates.transfer.roles["matrix"].lr for rates in (was, now)]
        self._lines.append(
            f"--extend at step {self.step}: {self.before.tokens:,} → {self.config.tokens:,} tokens"
            f" ({was.steps:,} → {now.steps:,} steps), peak rate {peaks[0]:.4g} → {peaks[1]:.4g},"
            f" rate of step {self.step + 1} {was.at(self.step):.4g} → {now.at(self.step):.4g}"
        )
        return [self._change("extend", keys={key: list(pair) for key, pair in length.items()})]


def first_difference(was: Rates, now: Rates, since: int, step: int) -> str:
    """What would have been otherwise in the first step of those after `since` and up to `step` that
    would have been; empty where none would."""
    for role, settings in was.transfer.roles.items():
        other = now.transfer.roles[role]
        if (settings.lr, settings.weight_decay) != (other.lr, other.weight_decay) and since < step:
            return (
                f"the peak rate of every step before would have been {other.lr:.4g}, and was"
                f" {settings.lr:.4g} (role {role})"
            )
    for number in range(since, step):
        if was.batches.at(number) != now.batches.at(number):
            sizes = [rates.batches.at(number)[1] for rates in (was, now)]
            return (
                f"the batch of step {number + 1} would have been {sizes[1]} sequences, and was"
                f" {sizes[0]}"
                if sizes[0] != sizes[1]
                else f"step {number + 1} would have seen other windows"
            )
        if was.multiplier(number) != now.multiplier(number):
            return (
                f"the rate of step {number + 1} would have been {now.at(number):.4g}, and was"
                f" {was.at(number):.4g}"
            )
    return ""


def schedule_tokens(state: Mapping[str, Any]) -> int:
    """Tokens from the beginning of the schedule up to a checkpoint."""
    samples = trained_samples(state) - Origins.of_state(state).schedule.samples
    return int(samples * state["config"]["model"]["context"])


def _below(key: str, prefixes: Sequence[str]) -> bool:
    return any(key == prefix or key.startswith(prefix + ".") for prefix in prefixes)


def _listing(keys: Mapping[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{key} {was} → {now}" for key, (was, now) in keys.items())


def fingerprints(data: Mapping[str, Any]) -> set[str]:
    """The known fingerprints in what `identity` gives."""
    sources = data["sources"].values() if "sources" in data else [data]
    return {source["tokenizer"] for source in sources if source["tokenizer"]}


def _check_done(
    state: Mapping[str, Any], run_dir: Path, config: Config, path: Place, wishes: Wishes
) -> None:
    """Refuses a checkpoint that continues `path` without the change that is wished for there: it
    would be passed over in silence."""
    names = entry_of(checkpoints_of(run_dir, config.checkpoint), path)
    ids = {entry["id"] for entry in state.get("resumed", []) if names(entry)}
    done = [change for change in recorded(state) if change.id in ids]
    parts = {part for change in done for part in change.parts}
    missing = [f"--reset {part}" for part in wishes.reset if part not in parts]
    if wishes.decay_from and not any(change.kind == "decay" for change in done):
        missing = ["--decay-from"]
    if missing:
        raise CheckpointError(
            f"step {state['step']} there continues {path} without {missing[0]}",
            str(run_dir),
            "give another --run-dir, or move the checkpoints after it away",
        )


def _refuse_to_abandon(run_dir: Path, config: Config, start: Start, step: int) -> None:
    """Refuses a decay in a directory whose own checkpoints would be moved aside for it."""
    steps = checkpoint_steps(checkpoints_of(run_dir, config.checkpoint))
    if steps and (not start.own or steps[-1] > step):
        raise CheckpointError(
            f"the directory has a checkpoint of step {steps[-1]}, which the decay would give up",
            str(run_dir),
            "give the decay a directory of its own with --run-dir",
        )
