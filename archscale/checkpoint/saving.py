"""Checkpoints through torch.distributed.checkpoint: any layout saves, any layout loads.

`Saver.save` copies the state and returns; a thread writes the copy. A checkpoint is the directory
`step_00001000`: it is written under a temporary name and renamed once every rank has finished, so a
directory with that name is whole; a store renames nothing, and it is whole there once it has
`state.json`, which is written last. It holds the model, all optimizer state, the host's random
state of each rank, and `state.json`: step, the config and data that it belongs to, and the size and
checksum of every file.
"""

from __future__ import annotations

import copy
import datetime
import os
import re
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from archscale.checkpoint.directory import (
    STATE,
    Recorded,
    discard,
    prune,
    read_state,
    recorded_files,
    shares,
    state_text,
    wrong_files,
)
from archscale.checkpoint.fragments import Computed, Stored
from archscale.checkpoint.place import BrokenUpload, Place, StoreError, StorePath
from archscale.checkpoint.reader import DirectReader
from archscale.checkpoint.reading import EMA, WEIGHTS
from archscale.checkpoint.reasons import first_failure, os_error_of, reason, why_not_written
from archscale.checkpoint.snapshot import Snapshot
from archscale.checkpoint.writer import SummedWriter, reader_of, write_summed
from archscale.config import CheckpointConfig
from archscale.distributed import (
    Fragment,
    agree,
    gather_objects,
    is_distributed,
    portable,
    rank,
    same_everywhere,
    world_size,
)
from archscale.errors import DAMAGED, CheckpointError, DamagedCheckpoint, explain_os_error
from archscale.files import step_directory, sync_names
from archscale.optim import MatrixOptimizer

# Seconds that ranks wait for each other while they write, between two of which the slowest writes
# all that it has.
TIMEOUT = datetime.timedelta(hours=1)
GRACE = 20.0  # seconds that a save is given when training has failed
TENSORS = re.compile(r"__(\d+)_\d+\.distcp$")  # torch's names: of the rank that wrote, and a number
# Seconds before a save is begun again that a store has broken off for a reason that may pass.
AGAIN = (5.0, 20.0, 60.0)


class _Job(NamedTuple):
    """What one checkpoint is made of; nothing of it changes any more."""

    content: dict[str, Tensor]
    random_state: bytes
    state: dict[str, Any]
    since: int | None  # of losses that are not finite, or of skipped steps


class Saver:
    """Writes the checkpoints of a run into `directory`; all ranks make one and call it together.

    It holds at most one copy of what this rank stores. Its thread uses a process group of its own
    and leaves alone what training uses: the global random state, the default group, streams.

        with Saver(directory, config.checkpoint) as saver:
            saver.save(engine.weights(), optimizer, {"step": 1000})   # training goes on
            saver.wait()                                              # the checkpoint is there

    Leaving it after an error waits for an unfinished save for `GRACE` seconds at most: other ranks
    may have died. Whoever goes on after that in the same process must leave the directory alone.
    """

    def __init__(self, directory: Place, settings: CheckpointConfig):
        self._directory, self._settings = directory, settings
        self._snapshot = Snapshot()
        self._hooked: MatrixOptimizer | None = None  # the optimizer that waits for the copies
        self._group: Any = None  # of the thread; made by the first save
        self._thread: threading.Thread | None = None
        self._begun = False  # a save whose outcome the ranks have not compared
        self._error: Exception | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.wait()
            if self._group is not None:
                dist.destroy_process_group(self._group)
                self._group = None
        elif self._thread is not None:
            self._thread.join(GRACE)

    def save(
        self,
        weights: Mapping[str, Fragment],
        optimizer: MatrixOptimizer,
        state: dict[str, Any],
        skipped_since: int | None = None,
        ema: Mapping[str, Fragment] | None = None,
    ) -> None:
        """Begin the checkpoint of `state["step"]`, once the one before is finished; everything may
        be changed when this returns. Afterwards older ones are deleted, as the settings say.

        Args:
            weights: float32 parameters by name.
            state: plain data that `load_checkpoint` gives back; `step` names the directory, and
                `not_finite_since` is what `prune` goes by.
            skipped_since: first of the steps up to now whose updates the guard has skipped, if any:
                checkpoints from before it stay, as from before a loss that is not finite.
            ema: a running average of the weights, by the same names.

        Raises:
            CheckpointError: this one (where saves are not asynchronous) or the one before could not
                be written; or there is no memory for the copy.
        """
        self.wait()
        if is_distributed() and self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        _accept_a_single_process()
        content = _content(weights, optimizer, ema)
        if self._settings.async_:
            content = agree(lambda: self._copy(content))
            if self._snapshot.from_gpu and self._hooked is not optimizer:
                optimizer.register_step_pre_hook(lambda *_: self._snapshot.before_changes())
                self._hooked = optimizer
        random_state = torch.get_rng_state().numpy().tobytes()
        since = state.get("not_finite_since") or skipped_since
        job = _Job(content, random_state, copy.deepcopy(state), since)
        self._begun = True
        if self._settings.async_:
            name = f"checkpoint of step {state['step']}"
            self._thread = threading.Thread(target=self._run, args=(job,), name=name, daemon=True)
            self._thread.start()
        else:
            self._run(job)
            self.wait()

    def _copy(self, content: dict[str, Tensor]) -> dict[str, Tensor]:
        try:
            return self._snapshot.take(content)
        except (RuntimeError, MemoryError) as error:
            raise CheckpointError(
                f"no memory for the copy of the state that is written: {reason(error)}",
                "checkpoint.async",
                "set it to false, or start fewer processes on this machine",
            ) from error

    def wait(self) -> None:
        """Until the last save is on the disk.

        Raises:
            CheckpointError: it could not be written; on every rank.
        """
        if not self._begun:
            return
        if self._thread is not None:
            self._thread.join()
        self._begun, self._thread, error, self._error = False, None, self._error, None
        failures = [failure for failure in gather_objects(portable(error)) if failure is not None]
        if failures:
            raise same_everywhere(failures[0])

    def before_changes(self) -> None:
        """Whoever changes what is being saved, other than by a step of the optimizer, calls this
        before: the device waits until it is copied."""
        self._snapshot.before_changes()

    @property
    def failed(self) -> bool:
        """This rank knows that the last save has failed: `wait` would raise on all of them."""
        return self._error is not None

    # --- the thread

    def _run(self, job: _Job) -> None:
        try:
            self._snapshot.wait()
            self._write(job)
        except Exception as error:  # raised by `wait`, on every rank
            self._error = error

    def _write(self, job: _Job) -> None:
        final = step_directory(self._directory, job.state["step"])
        for delay in (*AGAIN, None):
            try:
                return self._write_once(job, final)
            except (OSError, CheckpointException, StoreError) as error:
                # The same failure on every rank.
                if delay is None or not isinstance(first_failure(error), BrokenUpload):
                    cause, remedy = why_not_written(error)
                    raise CheckpointError(
                        f"cannot write a checkpoint: {cause}", str(final), remedy
                    ) from error
            time.sleep(delay)

    def _write_once(self, job: _Job, final: Place) -> None:
        """Under a temporary name, or into a store, where `state.json` comes last."""
        in_store = isinstance(final, StorePath)
        partial = final if in_store else final.with_name(f".{final.name}.partial")
        since, keep, keep_every = job.since, self._settings.keep, self._settings.keep_every
        writer = SummedWriter(partial)

        def prepare() -> None:
            if rank() == 0:
                # All losses up to here are known: what `keep` spares is enough meanwhile.
                prune(self._directory, keep, since, keep_every)
                if isinstance(partial, StorePath):
                    partial.remove_checkpoint()
                    partial.mkdir()
                else:
                    shutil.rmtree(partial, ignore_errors=True)
                    partial.mkdir(parents=True)
                    sync_names(partial.parent.parent)

        def write_random_state() -> dict[str, Recorded]:
            name = f"rng_{rank()}.bin"
            return {**writer.recorded, name: write_summed(partial / name, job.random_state)}

        def finish() -> None:
            if rank() == 0:
                write_summed(partial / STATE, state_text(job.state, files, world_size()).encode())
                if not isinstance(partial, StorePath):
                    assert isinstance(final, Path)
                    sync_names(partial)
                    discard(final)
                    os.replace(partial, final)
                    sync_names(final.parent)
                # No loss of the new one's weights is known: they may be the ones that give none.
                prune(self._directory, keep if since else max(keep, 2), since, keep_every)

        files: dict[str, Recorded] = {}
        try:
            self._together(prepare)
            dcp.save(
                job.content,
                storage_writer=writer,
                process_group=self._group,
                no_dist=self._group is None,
            )
            for written in self._together(write_random_state):
                files |= written
            self._together(finish)
        except (OSError, CheckpointException):
            if rank() == 0 and isinstance(partial, Path):  # it may be what fills the disk
                shutil.rmtree(partial, ignore_errors=True)
            raise

    def _together(self, work: Callable[[], Any]) -> list[Any]:
        """The results of `work` by rank; if it fails on any, the first failure is raised on all of
        them."""
        result, error = None, None
        try:
            result = work()
        except Exception as caught:
            error = caught
        if self._group is None:
            if error is not None:
                raise error
            return [result]
        answers = gather_objects((result, portable(error)), self._group)
        for _, failure in answers:
            if failure is not None:
                raise failure
        return [answer for answer, _ in answers]


def verify_together(path: Place, but: Collection[str] = ()) -> str | None:
    """What is wrong with a checkpoint, the same on every rank, after reading every file, each on
    one rank; None when it is as it was written.

    Args:
        but: names of files that are not read.
    """

    def read() -> list[str]:
        files = recorded_files(read_state(path))
        left = {name: recorded for name, recorded in files.items() if name not in but}
        return wrong_files(path, shares(left, world_size())[rank()])

    try:
        return _first_problem(read)
    except CheckpointError as error:
        return error.what


def _first_problem(read: Callable[[], list[str]]) -> str | None:
    """The first that any rank has read, the same on all."""
    return next((problem for part in gather_objects(agree(read)) for problem in part), None)


def load_checkpoint(
    path: Place,
    weights: Mapping[str, Fragment],
    optimizer: MatrixOptimizer | None = None,
    *,
    ema: Mapping[str, Fragment] | None = None,
    verified: bool = False,
) -> dict[str, Any]:
    """Restore weights and optimizer in place, in whatever layout they have now; returns the saved
    `state`.

    Every file is compared with its checksum. Those of tensors are while they are read into their
    place, so that the disk is read once: weights and optimizer hold anything after an error.

    Args:
        ema: where a running average of the weights goes; left alone where the checkpoint has none.
            One that it has and that is not asked for is left out.
        verified: every file has just been compared.

    Raises:
        DamagedCheckpoint: it is not as it was written; on every rank.
        CheckpointError: missing, of another format, model or rule.
    """
    state = read_state(path)
    if optimizer is not None and "averaged" in state:
        raise same_everywhere(
            CheckpointError(
                "it holds averaged weights, and no optimizer state to go on with",
                str(path),
                "train on from it with --resume PATH --reset optimizer and another --run-dir",
            )
        )
    owned: dict[str, Recorded] = {}
    if not verified:
        files = recorded_files(state)
        # What a store sends is compared before: each piece of a tensor is asked for by itself.
        by_the_reader = () if isinstance(path, StorePath) else set(filter(TENSORS.match, files))
        _refuse_damaged(path, verify_together(path, by_the_reader))
        owned = {name: files[name] for name in by_the_reader if _reads_whole(name)}
    reader = reader_of(path, owned)

    def targets() -> dict[str, Tensor]:
        saved = set(reader.read_metadata().state_dict_metadata)
        has_average = any(name.startswith(EMA) for name in saved)
        content = _content(weights, optimizer, ema if has_average else None)
        if extra := sorted(
            name
            for name in saved - content.keys()
            if name.startswith(WEIGHTS) or (optimizer and not name.startswith(EMA))
        ):
            raise ValueError(f"it holds {extra[0]}, which this run has not")
        return content

    def random_state() -> Tensor | None:
        if optimizer is None or state["world_size"] != world_size():
            return None
        content = (path / f"rng_{rank()}.bin").read_bytes()
        return torch.frombuffer(bytearray(content), dtype=torch.uint8)

    try:
        # What fails on one rank fails on all: otherwise they would wait for each other.
        content = agree(targets)
        _accept_a_single_process()
        dcp.load(content, storage_reader=reader)
        if (before := agree(random_state)) is not None:
            torch.set_rng_state(before)
    except (CheckpointException, RuntimeError, ValueError, OSError, EOFError, KeyError) as error:
        # What is damaged need not look like a tensor.
        _refuse_damaged(path, verify_together(path))
        remedy = "use the checkpoint's own config, or an older checkpoint"
        if isinstance(error, OSError):
            cause, remedy = explain_os_error(error, "use an older checkpoint")
        else:
            cause = reason(error)
        raise CheckpointError(f"cannot load: {cause}", str(path), remedy) from error
    if isinstance(reader, DirectReader):
        _refuse_damaged(
            path, _first_problem(lambda: reader.problems + wrong_files(path, reader.unread))
        )
    return state


def _reads_whole(name: str) -> bool:
    """Whether this rank sums up that file of tensors: the one that has written it, where there is
    one of that number."""
    match = TENSORS.match(name)
    assert match is not None
    return int(match[1]) % world_size() == rank()


def _refuse_damaged(path: Place, problem: str | None) -> None:
    if problem is not None:
        remedy = "use an older checkpoint"
        raise same_everywhere(DamagedCheckpoint(DAMAGED + problem, str(path), remedy))


def write_weights(path: Path, weights: Mapping[str, Computed], state: dict[str, Any]) -> None:
    """Write weights alone as a checkpoint into the directory `path`, by one process and in the
    memory of one of them.

    Args:
        state: as for `Saver.save`; `config` has the seed that random states begin with.

    Raises:
        CheckpointError: from computing a weight.
        OSError: the directory cannot be written.
    """
    writer = SummedWriter(path, file_per_tensor=True)
    _accept_a_single_process()
    content = {f"{WEIGHTS}{name}": weight for name, weight in weights.items()}
    try:
        dcp.save(content, storage_writer=writer, no_dist=True)
    except CheckpointException as error:
        if isinstance(first := first_failure(error), CheckpointError):
            raise first from error
        raise os_error_of(error) or first from error
    generator = torch.Generator().manual_seed(state["config"]["seed"])
    random_state = write_summed(path / "rng_0.bin", generator.get_state().numpy().tobytes())
    files = {**writer.recorded, "rng_0.bin": random_state}
    write_summed(path / STATE, state_text(state, files, world_size=1).encode())


def _content(
    weights: Mapping[str, Fragment],
    optimizer: MatrixOptimizer | None,
    ema: Mapping[str, Fragment] | None = None,
) -> dict[str, Tensor]:
    """What DCP writes and fills, by `model.<name>`, `ema.<name>` and `optimizer.<name>.<key>`."""
    content: dict[str, Fragment | Tensor] = {
        f"{part}{name}": value
        for part, values in ((WEIGHTS, weights), (EMA, ema or {}))
        for name, value in values.items()
    }
    if optimizer is not None:
        for name, state in optimizer.fragments().items():
            content |= {f"optimizer.{name}.{key}": value for key, value in state.items()}
    return {
        name: Stored(value) if isinstance(value, Fragment) else value
        for name, value in content.items()
    }


def _accept_a_single_process() -> None:
    """DCP warns that one process has no process group, which is what a single process is.

    For good, since a thread that took the warning's suppression back would do so under others.
    """
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
