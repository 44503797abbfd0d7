"""Runs in children (tests/forks.py) on storage that fails (tests/faults.py), and what they leave
in a run directory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from archscale.config import Config, dump_config
from archscale.distributed import Fragment
from archscale.files import CHECKPOINTS, METRICS, checkpoint_steps, step_directory
from tests.faults import Act, Storage
from tests.forks import Child, fork

SAVING = [  # values of checkpoint.async
    pytest.param(True, id="async"),
    pytest.param(False, id="sync", marks=pytest.mark.slow),
]


def command(argv: list[str], storage: str, act: Callable[[], Act] | None, log: str = "") -> None:
    """`archscale ARGV` in this process, on storage that acts, without a report, which would be most
    of its time; `log`: where the changes made to the storage are written in the end."""
    from archscale.sweep import pages

    pages.report_if_possible = lambda run_dir: None
    reporting_command(argv, storage, act, log)


def reporting_command(
    argv: list[str], storage: str, act: Callable[[], Act] | None, log: str = ""
) -> None:
    """`command`, with a report."""
    from archscale import cli

    torch.set_num_threads(1)
    tempfile.tempdir = None  # that of the environment, not of the process forked from
    sys.argv = ["archscale", *argv]
    watched = Storage(storage, act() if act else None)
    with watched:
        try:
            cli.main()
        finally:
            if log:
                rows = [
                    (change.number, change.kind, str(change.path)) for change in watched.changes
                ]
                Path(log).write_text(json.dumps(rows))


def train(
    made: Config,
    run_dir: Path,
    act: Callable[[], Act] | None = None,
    processes: int = 1,
    on_rank: int = 0,
    log: str = "",
    call: Callable = command,
) -> list[Child]:
    """Start `archscale train` of a config in `run_dir` on as many processes; the storage of one of
    them acts.

    Args:
        call: in place of `command`, to which it passes on what it is given.
    """
    folder = run_dir.parent
    path = folder / f"{run_dir.name}.yaml"
    dump_config(made, path)
    argv = ["train", str(path), "--run-dir", str(run_dir)]
    env: dict[str, str] = {}
    if processes > 1:
        env = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
    children = []
    for rank in range(processes):
        here = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        acts = act if rank == on_rank else None
        noted = log if rank == on_rank else ""
        children.append(
            fork(call, argv, str(run_dir), acts, noted, folder=folder / "logs", env=env | here)
        )
    return children


def recorded(argv: list[str], storage: str, act: Callable[[], Act] | None, log: str) -> None:
    """`command` that keeps what this process has before each of its updates, a line of JSON each:
    see `records`."""
    from archscale.train import trainer

    path, step = _record(Path(storage), os.environ.get("RANK", "0")), trainer.train_step

    def recording(engine, optimizer, micro_batches, *args):
        has: dict[str, torch.Tensor] = {"random state": torch.get_rng_state()}
        state = {"weights": engine.weights(), **optimizer.fragments()}
        for name, values in state.items():
            for key, value in values.items():
                has[f"{name} {key}"] = value.data if isinstance(value, Fragment) else value
        for number, batch in enumerate(micro_batches):
            has[f"inputs {number}"], has[f"targets {number}"] = batch.inputs, batch.targets
        with path.open("a") as file:
            file.write(json.dumps({key: digest(value) for key, value in has.items()}) + "\n")
        return step(engine, optimizer, micro_batches, *args)

    trainer.train_step = recording
    command(argv, storage, act, log)


def records(run_dir: Path, processes: int) -> list[list[dict[str, str]]]:
    """For each rank, before each update of all its lives: digests of weights, optimizer state, the
    host's random state and the tokens that it is about to train on."""
    paths = [_record(run_dir, str(rank)) for rank in range(processes)]
    return [[json.loads(line) for line in path.read_text().splitlines()] for path in paths]


def _record(run_dir: Path, rank: str) -> Path:
    return run_dir.with_name(f"{run_dir.name}_record_{rank}")


def digest(tensor: torch.Tensor) -> str:
    """What its values are, bit for bit."""
    # A copy, because FSDP cannot free the memory of what NumPy has looked at.
    values = tensor.detach().clone().contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()


def _free_port() -> str:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return str(listening.getsockname()[1])


def lines(run_dir: Path) -> list[dict]:
    """Those of metrics.jsonl, without what depends on the clock."""
    rows = [json.loads(line) for line in (run_dir / METRICS).read_text().splitlines()]
    timed = (
        "time",
        "tokens_per_second",
        "step_seconds",
        "mfu",
        "peak_",
        "straggler/",
        "checkpoint/",
    )
    return [{key: row[key] for key in row if not key.startswith(timed)} for row in rows]


def contents(checkpoint: Path) -> dict[str, str]:
    """A digest of every tensor of a checkpoint, weights and optimizer, and of every file of random
    state."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saved = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
        state = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in saved.items()
        }
        dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    random_states = {path.name: path.read_bytes() for path in checkpoint.glob("rng*")}
    return {name: digest(value) for name, value in state.items()} | {
        name: hashlib.sha256(value).hexdigest() for name, value in random_states.items()
    }


def last_contents(run_dir: Path) -> dict[str, str]:
    """`contents` of the newest checkpoint of a run."""
    checkpoints = run_dir / CHECKPOINTS
    return contents(step_directory(checkpoints, checkpoint_steps(checkpoints)[-1]))


def files(folder: Path) -> dict[str, bytes]:
    """Path below `folder` → content, of every file there."""
    found = {}
    for path in sorted(folder.rglob("*")):
        with contextlib.suppress(OSError):
            if path.is_file():
                found[os.path.relpath(path, folder)] = path.read_bytes()
    return found


def remains(run_dir: Path) -> list[str]:
    """What only a run that is going on has in its directory."""
    paths = [*run_dir.iterdir(), *(run_dir / CHECKPOINTS).iterdir()]
    return [path.name for path in paths if path.name.startswith(".") or path.name == "owner.json"]
