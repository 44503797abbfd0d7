"""The folder of a run's checkpoints: which there are, whether they are whole, and what they say.

A checkpoint is the directory `step_00001000`: it is written under a temporary name and renamed once
every rank has finished, so a directory with that name is whole; in a store, which renames nothing,
it is whole once it holds `state.json`. That has the step, the config and data that it belongs to,
its own identity and that of the checkpoint before it, and the size and CRC-32 of every file.

The checksums find what fails by chance: disks, memory, networks, copies that stopped half-way. They
are no proof against somebody who changes a checkpoint on purpose. CRC-32 is the fastest that
Python's standard library has: several times the rate of SHA-256, and of most disks.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from archscale.checkpoint.place import STATE, Place, StorePath
from archscale.errors import CheckpointError, explain_os_error
from archscale.files import checkpoint_steps, step_directory

FORMAT = 3
READABLE = (2, FORMAT)  # format 2 has the sizes of files, and no checksums
READERS = 4  # files that a process reads at a time
CHUNK = 4 << 20  # bytes that are summed up and written at a time
READ = 256 << 10  # bytes that are read and summed up at a time: more do not stay in a cache


class Recorded(NamedTuple):
    """What a checkpoint says of one of its files; `crc32` as 8 hexadecimal digits, None where it
    was written before there were any."""

    bytes: int
    crc32: str | None


def newest_valid(
    directory: Place,
    warn: Callable[[str], None],
    before: int | None = None,
    counts: Callable[[Place], bool] = lambda path: True,
    damaged: dict[Place, str] | None = None,
) -> Place | None:
    """The newest checkpoint (of a step below `before`, and that `counts`) whose files are all there
    in their full size; `warn` hears of the ones passed over.

    Args:
        damaged: checkpoints that are known to be damaged, and how; those found here are added.
            `warn` has heard of these.
    """
    damaged = {} if damaged is None else damaged
    for step in reversed(checkpoint_steps(directory)):
        path = step_directory(directory, step)
        if (before is not None and step >= before) or path in damaged or not counts(path):
            continue
        problem = damage(path)
        if problem is None:
            return path
        damaged[path] = problem
        warn(passed_over(path, problem))
    return None


def passed_over(path: Place, problem: str) -> str:
    """The warning of a damaged checkpoint."""
    return f"checkpoint {path} is damaged ({problem}): trying an older one"


def discard_after(directory: Place, step: int) -> None:
    """Delete the checkpoints of later steps."""
    for later in checkpoint_steps(directory):
        if later > step:
            discard(step_directory(directory, later))


def prune(
    directory: Place, keep: int, not_finite_since: int | None, keep_every: int | None = None
) -> None:
    """Delete all checkpoints but those of `kept_steps`."""
    steps = checkpoint_steps(directory)
    kept = kept_steps(steps, keep, keep_every, not_finite_since)
    for step in steps:
        if step not in kept:
            discard(step_directory(directory, step))


def kept_steps(
    steps: Sequence[int], keep: int, keep_every: int | None, not_finite_since: int | None
) -> dict[int, str]:
    """Which of these checkpoints, in ascending order, stay, each with the first reason that
    applies: the newest `keep`, those of steps that `keep_every` divides, and the newest one from
    before the loss was not finite.

    Args:
        not_finite_since: first step of the losses that are not finite up to now, if any. That loss
            is the work of the weights of the step before: where there is a checkpoint of these, the
            one before it stays too.
    """
    kept = dict.fromkeys(steps[-keep:], f"of the newest {keep}")
    for step in steps:
        if keep_every and step % keep_every == 0:
            kept.setdefault(step, f"a multiple of {keep_every}")
    if not_finite_since is not None:
        for end in (not_finite_since, not_finite_since - 1):
            for step in [step for step in steps if step < end][-1:]:
                kept.setdefault(step, f"from before the loss was not finite at {not_finite_since}")
    return kept


def recorded_files(state: Mapping[str, Any]) -> dict[str, Recorded]:
    """What a checkpoint's `state` says of its files, by name."""
    return {
        name: Recorded(entry, None)
        if isinstance(entry, int)
        else Recorded(entry["bytes"], entry["crc32"])
        for name, entry in state["files"].items()
    }


def damage(path: Place) -> str | None:
    """What is missing from or cut short in a checkpoint; None when every file is there in its full
    size. Reads nothing but `state.json`."""
    try:
        files = recorded_files(read_state(path))
    except CheckpointError as error:
        return error.what if STATE in error.what else f"{STATE}: {error.what}"
    for name, recorded in files.items():
        if problem := wrong_size(path / name, recorded):
            return problem
    return None


def wrong_files(path: Place, files: Mapping[str, Recorded]) -> list[str]:
    """What is wrong with those files of a checkpoint that are not as they were written; every byte
    is read."""
    with ThreadPoolExecutor(READERS) as readers:
        problems = readers.map(lambda name: wrong_content(path / name, files[name]), files)
        return [problem for problem in problems if problem]


def wrong_size(file: Place, recorded: Recorded) -> str | None:
    """What is wrong with a file, as far as its size shows it."""
    if not file.is_file():
        return f"{file.name} is missing"
    if (size := file.stat().st_size) != recorded.bytes:
        change = "truncated" if size < recorded.bytes else "too long"
        return f"{file.name} is {change}: {size:,} bytes instead of {recorded.bytes:,}"
    return None


def wrong_content(file: Place, recorded: Recorded) -> str | None:
    """What is wrong with a file, by its size and its checksum, where there is one."""
    try:
        if (problem := wrong_size(file, recorded)) or recorded.crc32 is None:
            return problem
        crc = _checksum(file)
    except OSError as error:
        return f"{file.name} cannot be read: {explain_os_error(error, '')[0]}"
    return None if crc == recorded.crc32 else wrong_checksum(file.name, crc, recorded)


def wrong_checksum(name: str, crc: str, recorded: Recorded) -> str:
    """What is wrong with a file of that checksum."""
    return f"{name} has the checksum {crc} instead of {recorded.crc32}"


def _checksum(file: Place) -> str:
    crc, buffer = 0, memoryview(bytearray(READ))
    remote = isinstance(file, StorePath)
    with file.open() if isinstance(file, StorePath) else open(file, "rb", buffering=0) as stream:
        if hasattr(os, "posix_fadvise") and not remote:  # read on while the checksum is computed
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while count := stream.readinto(buffer):
            crc = zlib.crc32(buffer[:count], crc)
    return hexadecimal(crc)


def hexadecimal(crc: int) -> str:
    """A CRC-32 as `state.json` has it."""
    return f"{crc:08x}"


def shares(files: Mapping[str, Recorded], count: int) -> list[dict[str, Recorded]]:
    """The files divided into `count` parts of about equal bytes, each file in one of them."""
    parts: list[dict[str, Recorded]] = [{} for _ in range(count)]
    sizes = [0] * count
    for name in sorted(files, key=lambda name: (-files[name].bytes, name)):
        smallest = sizes.index(min(sizes))
        parts[smallest][name] = files[name]
        sizes[smallest] += files[name].bytes
    return parts


def state_text(state: Mapping[str, Any], files: Mapping[str, Recorded], world_size: int) -> str:
    """The content of `state.json`, with a checksum of its own."""
    content = {
        "format": FORMAT,
        "world_size": world_size,
        "files": {name: recorded._asdict() for name, recorded in files.items()},
        **state,
    }
    content = json.loads(json.dumps(content))  # keys as they will be read
    return json.dumps({**content, "crc32": _own_checksum(content)})


def _own_checksum(state: Mapping[str, Any]) -> str:
    """CRC-32 of what a `state.json` says, but for that checksum itself."""
    content = {key: value for key, value in state.items() if key != "crc32"}
    return hexadecimal(zlib.crc32(json.dumps(content, sort_keys=True).encode()))


def read_state(path: Place) -> dict[str, Any]:
    """`state.json` of a checkpoint.

    Raises:
        CheckpointError: it is missing, of another format, or not as it was written.
    """
    try:
        state = json.loads((path / STATE).read_text())
        if not isinstance(state, dict):
            raise ValueError(f"{STATE} holds no object")
    except PermissionError as error:
        cause, remedy = explain_os_error(error, "name another checkpoint")
        raise CheckpointError(f"cannot read {STATE}: {cause}", str(path), remedy) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(
            "not a complete checkpoint", str(path), f"name a directory step_… that holds {STATE}"
        ) from error
    if state.get("format") not in READABLE:
        raise CheckpointError(
            f"format {state.get('format')}, not {FORMAT}",
            str(path),
            "load it with the version that wrote it",
        )
    if not isinstance(state.get("files"), dict) or (
        state["format"] == FORMAT and state.get("crc32") != _own_checksum(state)
    ):
        raise CheckpointError(
            f"{STATE} is not as it was written", str(path), "use an older checkpoint"
        )
    return state


def checkpoint_id(state: dict[str, Any]) -> str:
    """What tells a checkpoint from all others, wherever it lies; one that was written before
    checkpoints had an `id` has the digest of its state."""
    digest = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
    return str(state.get("id") or digest[:16])


def discard(path: Place) -> None:
    """Delete a checkpoint; a crash half-way leaves a hidden directory, or in a store one without
    `state.json`, never half a checkpoint."""
    if isinstance(path, StorePath):
        path.remove_checkpoint()
    elif path.exists():
        hidden = path.with_name(f".{path.name}.deleted")
        shutil.rmtree(hidden, ignore_errors=True)
        os.replace(path, hidden)
        shutil.rmtree(hidden, ignore_errors=True)
