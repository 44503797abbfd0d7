"""Checkpoints through torch.distributed.checkpoint: any layout saves, any layout loads.

A checkpoint is the directory `step_00001000`: it is written under a temporary name and renamed once every rank has
finished, so a directory with that name is whole. It holds the model, all optimizer state, and `state.json` (step, tokens,
data position); the host's random state of each rank stands beside it.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from archscale.distributed import agree, on_rank_zero, rank, world_size
from archscale.errors import CheckpointError
from archscale.optim import MatrixOptimizer

FORMAT = 1


def checkpoint_steps(directory: Path) -> list[int]:
    """Steps of the complete checkpoints under `directory`, ascending by step, never by clock."""
    found = directory.glob("step_*") if directory.is_dir() else ()
    return sorted(int(d.name[5:]) for d in found if d.name[5:].isdigit() and (d / "state.json").is_file())


def step_directory(directory: Path, step: int) -> Path:
    return directory / f"step_{step:08d}"


def save_checkpoint(
    directory: Path, model: nn.Module, optimizer: MatrixOptimizer, state: dict[str, Any], keep: int
) -> None:
    """Write `state["step"]`'s checkpoint on all ranks together, then prune all but the newest `keep`.

    Raises:
        CheckpointError: the directory cannot be written.
    """
    final = step_directory(directory, state["step"])
    partial = final.with_name(f".{final.name}.partial")

    def prepare() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def write() -> None:
        content = {
            "model": get_model_state_dict(model),
            "optimizer": get_optimizer_state_dict(model, optimizer),
        }
        dcp.save(content, checkpoint_id=partial)

    def finish() -> None:
        (partial / "state.json").write_text(json.dumps({"format": FORMAT, "world_size": world_size(), **state}))
        for path in partial.iterdir():
            _sync(path)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        _sync(directory)
        for step in checkpoint_steps(directory)[:-keep]:
            shutil.rmtree(step_directory(directory, step))

    try:
        on_rank_zero(prepare)
        write()
        agree(lambda: torch.save(torch.get_rng_state(), partial / f"rng_{rank()}.pt"))
        on_rank_zero(finish)
    except (OSError, CheckpointException) as error:
        raise CheckpointError(
            f"cannot write a checkpoint: {_reason(error)}", str(final), "free disk space or mend permissions"
        ) from error


def load_checkpoint(path: Path, model: nn.Module, optimizer: MatrixOptimizer | None) -> dict[str, Any]:
    """Restore model and optimizer in place, in whatever layout they have now; returns the saved `state`.

    Raises:
        CheckpointError: missing, of another format, model or rule, or damaged.
    """
    state = read_state(path)
    content: dict[str, Any] = {"model": get_model_state_dict(model)}
    if optimizer is not None:
        content["optimizer"] = get_optimizer_state_dict(model, optimizer)
    try:
        dcp.load(content, checkpoint_id=path, no_dist=world_size() == 1)
        model.load_state_dict(content["model"])
        if optimizer is not None:
            set_optimizer_state_dict(model, optimizer, content["optimizer"])
            random = path / f"rng_{rank()}.pt"
            if state["world_size"] == world_size() and random.is_file():
                torch.set_rng_state(torch.load(random, weights_only=True))
    except (CheckpointException, RuntimeError, ValueError, OSError) as error:
        raise CheckpointError(
            f"cannot load: {_reason(error)}",
            str(path),
            "use the checkpoint's own config, or an older checkpoint",
        ) from error
    return state


def read_state(path: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint."""
    try:
        state = json.loads((path / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            "not a complete checkpoint", str(path), "name a directory step_… that holds state.json"
        ) from error
    if state.get("format") != FORMAT:
        raise CheckpointError(
            f"format {state.get('format')}, not {FORMAT}", str(path), "load it with the version that wrote it"
        )
    return state


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return " ".join(str(error).split())[:300]
