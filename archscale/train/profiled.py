"""A run that is profiled, and one that ends for want of device memory."""

from __future__ import annotations

from pathlib import Path

import torch

from archscale import distributed
from archscale.errors import ConfigError, TrainingError
from archscale.telemetry.profiling import (
    PROFILE,
    ProfiledSteps,
    Profiler,
    record_memory,
    write_memory_snapshot,
)


def prepare(
    steps: ProfiledSteps, done: int, end: int, run_dir: Path, device: torch.device
) -> Profiler:
    """What writes the trace of these steps of a run that has done `done` of `end`; of none on ranks
    but 0, and where all of them are done. All ranks call it.

    Raises:
        ConfigError: the run has no such steps; on every rank.
    """
    record_memory(device)
    try:
        wanted = steps.after(done, end)
    except ConfigError as error:
        raise distributed.same_everywhere(error) from None
    if distributed.rank() != 0:
        return Profiler()
    if not wanted:
        print(f"no trace: steps {steps.first} to {steps.last} are done", flush=True)
        return Profiler()
    path = run_dir / PROFILE / "trace_rank0.json.gz"
    print(f"a trace of steps {wanted[0]} to {wanted[-1]} goes to {path}", flush=True)
    return Profiler(wanted, path, device)


def out_of_memory(error: torch.OutOfMemoryError, run_dir: Path) -> TrainingError:
    """The line that a run ends with whose device has no memory left. What the memory holds is
    written into the run directory."""
    path = run_dir / PROFILE / f"memory_rank{distributed.rank()}.pickle"
    written = write_memory_snapshot(path)
    cause = str(error).partition(". ")
    tried = cause[2].partition(". ")[0]  # "Tried to allocate 2.00 GiB"
    remedy = "lower training.micro_batch, or set training.activation_checkpoint: block"
    if written:
        remedy += "; pytorch.org/memory_viz shows what the file holds"
    return TrainingError(
        f"no memory left on the device: {' '.join(tried.split()) or cause[0]}",
        str(path if written else run_dir),
        remedy,
    )
