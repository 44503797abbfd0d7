"""Runs in children (tests/forks.py) on storage that fails (tests/faults.py), and what they leave
in a run directory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from archscale.config import Config, dump_config
from archscale.config.schema import NOT_YET
from archscale.files import CHECKPOINTS, METRICS, checkpoint_steps, step_directory
from tests.faults import Act, Storage
from tests.forks import Child, fork

CAN_SAVE_ASYNCHRONOUSLY = all(entry.key != "checkpoint.async" for entry in NOT_YET)
SAVING = [False, True] if CAN_SAVE_ASYNCHRONOUSLY else [False]  # values of checkpoint.async


def command(argv: list[str], storage: str, act: Callable[[], Act] | None, log: str = "") -> None:
    """`archscale ARGV` in this process, on storage that acts, without a report, which would be most
    of its time; `log`: where the changes made to the storage are written in the end."""
    from archscale import cli
    from archscale.sweep import pages

    torch.set_num_threads(1)
    pages.report_if_possible = lambda run_dir: None
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
) -> list[Child]:
    """Start `archscale train` of a config in `run_dir` on as many processes; the storage of one of
    them acts."""
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
            fork(command, argv, str(run_dir), acts, noted, folder=folder / "logs", env=env | here)
        )
    return children


def _free_port() -> str:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return str(listening.getsockname()[1])


def lines(run_dir: Path) -> list[dict]:
    """Of metrics.jsonl, without what depends on the clock."""
    rows = [json.loads(line) for line in (run_dir / METRICS).read_text().splitlines()]
    timed = ("time", "tokens_per_second", "step_seconds", "mfu", "straggler/", "checkpoint/")
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
    found = {
        name: value.view(-1).view(torch.uint8).numpy().tobytes() for name, value in state.items()
    }
    found |= {path.name: path.read_bytes() for path in checkpoint.glob("rng*")}
    return {name: hashlib.sha256(value).hexdigest() for name, value in found.items()}


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
