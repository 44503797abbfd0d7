"""Whether a checkpoint is whole: every byte is read and compared with its checksum, and every
tensor is there once.

Checksums show what became of a file after it was written. What they cannot show, such as a part of
a tensor that no rank wrote, the coverage of each tensor does.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from archscale.checkpoint.directory import read_state, recorded_files, wrong_files
from archscale.checkpoint.fragments import Box
from archscale.checkpoint.listing import folder_of
from archscale.checkpoint.place import Place
from archscale.errors import CheckpointError

METADATA = ".metadata"  # of torch.distributed.checkpoint: tensors, and where their chunks lie


def checkpoints_under(path: Place) -> list[Place]:
    """The checkpoint `path`, or all those of a run directory or a folder, in order of step.

    Raises:
        CheckpointError: there is none.
    """
    if (path / "state.json").exists() or (path / METADATA).exists():
        return [path]
    return folder_of(path).checkpoints()


def verify_all(paths: Sequence[Place], say: Callable[[str], None]) -> None:
    """Say of each checkpoint whether it is whole, and of damaged ones all that is wrong.

    Args:
        paths: checkpoints, run directories, or folders of checkpoints.

    Raises:
        CheckpointError: one is damaged, or a path holds none.
    """
    checkpoints = [checkpoint for path in paths for checkpoint in checkpoints_under(path)]
    damaged = []
    for path in checkpoints:
        problems, compared = problems_of(path)
        if problems and not path.exists():  # a run that is going on has pruned it
            continue
        for problem in problems:
            say(f"{path}: {problem}")
        if problems:
            damaged.append(path)
        else:
            say(f"{path}: whole{'' if compared else ' (written without checksums: sizes only)'}")
    if damaged:
        raise CheckpointError(
            f"{len(damaged)} of {len(checkpoints)} checkpoints damaged",
            str(damaged[0]),
            "train passes over damaged ones and resumes from the newest whole one before",
        )


def problems_of(path: Place) -> tuple[list[str], bool]:
    """(everything that is wrong with a checkpoint, each with the file's or tensor's name; whether
    its files were compared with checksums: one that was written without has sizes alone)."""
    try:
        state = read_state(path)
        files = recorded_files(state)
        step, ranks = int(state["step"]), int(state["world_size"])
    except CheckpointError as error:
        return [f"state.json: {error.what}"], False
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return [f"state.json: {type(error).__name__}: {error}"], False
    problems = wrong_files(path, files)
    needed = [METADATA, *(f"rng_{rank}.bin" for rank in range(ranks))]
    problems += [f"state.json names no {name}" for name in needed if name not in files]
    if path.name.startswith("step_") and path.name[5:].isdigit() and int(path.name[5:]) != step:
        problems.append(f"state.json is that of step {step}")
    if not problems:
        problems += _wrong_tensors(path)
    return problems, all(recorded.crc32 is not None for recorded in files.values())


def _wrong_tensors(path: Place) -> Iterator[str]:
    """What torch.distributed.checkpoint would stumble over, or not notice."""
    from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

    from archscale.checkpoint.writer import reader_of

    try:
        metadata = reader_of(path).read_metadata()
        tensors = sorted(metadata.state_dict_metadata.items())
        stored = metadata.storage_data
    except (
        OSError,
        EOFError,
        pickle.UnpicklingError,
        AttributeError,
        ImportError,
        ValueError,
        TypeError,
        KeyError,
        IndexError,
    ) as error:
        yield f"{METADATA} cannot be read: {type(error).__name__}: {error}"
        return
    for name, tensor in tensors:
        if not isinstance(tensor, TensorStorageMetadata):
            continue
        chunks = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in tensor.chunks]
        if problem := coverage_problem(tuple(tensor.size), chunks):
            yield f"tensor {name} {problem}"
        for offsets, _ in chunks:
            if problem := _misplaced(path, stored.get(MetadataIndex(name, offsets))):
                yield f"tensor {name}, chunk at {list(offsets)}: {problem}"


def _misplaced(path: Place, place: Any) -> str | None:
    """What is wrong with the place where `.metadata` says that a chunk lies."""
    if place is None:
        return f"{METADATA} names no file for it"
    file = path / place.relative_path
    if not file.is_file():
        return f"there is no file {place.relative_path}"
    if place.offset + place.length > file.stat().st_size:
        return f"it would end after the end of {place.relative_path}"
    return None


def coverage_problem(shape: tuple[int, ...], chunks: Sequence[Box]) -> str | None:
    """Why boxes do not cover every element of a tensor exactly once; None when they do."""
    for offsets, sizes in chunks:
        if len(offsets) != len(shape) or any(
            low < 0 or low + size > whole for low, size, whole in zip(offsets, sizes, shape)
        ):
            return f"has a chunk of {list(sizes)} at {list(offsets)}, outside of {list(shape)}"
    filled = sorted(chunk for chunk in chunks if math.prod(chunk[1]))
    # In order of their first row only those that reach beyond it can meet the next one.
    reaching: list[Box] = []
    for offsets, sizes in filled:
        reaching = [box for box in reaching if not shape or box[0][0] + box[1][0] > offsets[0]]
        for other in reaching:
            if _meet((offsets, sizes), other):
                return f"has chunks at {list(other[0])} and {list(offsets)} that overlap"
        reaching.append((offsets, sizes))
    covered, whole = sum(math.prod(sizes) for _, sizes in filled), math.prod(shape)
    return None if covered == whole else f"is incomplete: {covered:,} of {whole:,} elements"


def _meet(box: Box, other: Box) -> bool:
    return all(
        low < start + length and start < low + size
        for low, size, start, length in zip(*box, *other)
    )
