"""Checkpoints through torch.distributed.checkpoint: any layout saves, any layout loads.

A checkpoint is the directory `step_00001000`: it is written under a temporary name and renamed once
every rank has finished, so a directory with that name is whole. It holds the model, all optimizer
state, the host's random state of each rank, and `state.json`: step, the config and data that it
belongs to, and the size of every file.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from archscale.checkpoint.directory import FORMAT, discard, prune, read_state
from archscale.checkpoint.fragments import Stored
from archscale.distributed import Fragment, agree, on_rank_zero, rank, world_size
from archscale.errors import CheckpointError, explain_os_error
from archscale.files import step_directory, sync
from archscale.optim import MatrixOptimizer


def save_checkpoint(
    directory: Path,
    weights: Mapping[str, Fragment],
    optimizer: MatrixOptimizer,
    state: dict[str, Any],
    keep: int,
) -> None:
    """Write `state["step"]`'s checkpoint on all ranks together, then `prune` the others.

    Args:
        weights: float32 parameters by name.
        state: plain data that `load_checkpoint` gives back; `step` names the directory, and
            `not_finite_since` is what `prune` goes by.

    Raises:
        CheckpointError: the directory cannot be written.
    """
    final = step_directory(directory, state["step"])
    partial = final.with_name(f".{final.name}.partial")

    def prepare() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def write() -> None:
        with _quiet():
            dcp.save(_content(weights, optimizer), checkpoint_id=partial)

    def write_rng() -> None:
        (partial / f"rng_{rank()}.bin").write_bytes(torch.get_rng_state().numpy().tobytes())

    def finish() -> None:
        files = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
        text = json.dumps({"format": FORMAT, "world_size": world_size(), "files": files, **state})
        (partial / "state.json").write_text(text)
        for path in (*partial.iterdir(), partial):
            sync(path)
        discard(final)
        os.replace(partial, final)
        sync(directory)

    try:
        on_rank_zero(prepare)
        write()
        agree(write_rng)
        on_rank_zero(finish)
    except (OSError, CheckpointException) as error:
        cause, remedy = _why_not_written(error)
        raised = CheckpointError(f"cannot write a checkpoint: {cause}", str(final), remedy)
        # One that failed alone must not wait here.
        raised.on_every_rank = getattr(error, "on_every_rank", False)
        raise raised from error
    if rank() == 0:
        prune(directory, keep, state.get("not_finite_since"))


def load_checkpoint(
    path: Path, weights: Mapping[str, Fragment], optimizer: MatrixOptimizer | None = None
) -> dict[str, Any]:
    """Restore weights and optimizer in place, in whatever layout they have now; returns the saved
    `state`.

    Raises:
        CheckpointError: missing, of another format, model or rule, or damaged.
    """
    state = read_state(path)
    content = _content(weights, optimizer)
    try:
        saved = set(dcp.FileSystemReader(path).read_metadata().state_dict_metadata)
        if extra := sorted(
            name for name in saved - content.keys() if optimizer or name.startswith("model.")
        ):
            raise ValueError(f"it holds {extra[0]}, which this run has not")
        with _quiet():
            dcp.load(content, checkpoint_id=path)
        if optimizer is not None and state["world_size"] == world_size():
            content_rng = (path / f"rng_{rank()}.bin").read_bytes()
            torch.set_rng_state(torch.frombuffer(bytearray(content_rng), dtype=torch.uint8))
    except (CheckpointException, RuntimeError, ValueError, OSError, EOFError, KeyError) as error:
        remedy = "use the checkpoint's own config, or an older checkpoint"
        if isinstance(error, OSError):
            cause, remedy = explain_os_error(error, "use an older checkpoint")
        else:
            cause = _reason(error)
        raise CheckpointError(f"cannot load: {cause}", str(path), remedy) from error
    return state


def _content(
    weights: Mapping[str, Fragment], optimizer: MatrixOptimizer | None
) -> dict[str, Tensor]:
    """What DCP writes and fills, by `model.<name>` and `optimizer.<name>.<key>`."""
    content: dict[str, Fragment | Tensor] = {
        f"model.{name}": value for name, value in weights.items()
    }
    if optimizer is not None:
        for name, state in optimizer.fragments().items():
            content |= {f"optimizer.{name}.{key}": value for key, value in state.items()}
    return {
        name: Stored(value) if isinstance(value, Fragment) else value
        for name, value in content.items()
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """DCP warns that one process has no process group, which is what a single process is."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "torch.distributed is disabled, unavailable or uninitialized"
        )
        yield


def _why_not_written(error: BaseException) -> tuple[str, str]:
    """(cause, remedy) of a checkpoint that could not be written."""
    elsewhere = "train in another directory with --run-dir"
    first: BaseException | None = error
    if isinstance(error, CheckpointException) and error.failures:
        first = next(iter(error.failures.values()))[0]
    # torch's serializer raises an error of its own over the one of the operating system.
    while first is not None and not isinstance(first, OSError):
        first = first.__cause__ or first.__context__
    if first is None:
        return _reason(error), f"check that the directory can be written, or {elsewhere}"
    return explain_os_error(first, elsewhere, vanished=True)


def _reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
