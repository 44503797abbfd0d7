"""Weights as safetensors files of a limited size, in the memory of one file."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from archscale.checkpoint.place import Place
from archscale.checkpoint.reading import StoredWeights
from archscale.errors import CheckpointError, ConfigError
from archscale.huggingface.safetensors_reader import INDEX, SINGLE, import_safetensors
from archscale.huggingface.weights import Source

NEEDED_BY = "archscale export"
_UNITS = {"kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def size_in_bytes(text: str) -> int:
    """`5GB` → 5·10⁹.

    Raises:
        ConfigError: not a positive number with a unit.
    """
    for unit, factor in _UNITS.items():
        number = text.strip().lower().removesuffix(unit.lower())
        if number != text.strip().lower():
            try:
                size = int(float(number) * factor)
            except (ValueError, OverflowError):
                break
            if size > 0:
                return size
    raise ConfigError(
        f"{text!r} is not a size", "--shard-size", "give a number and a unit, such as 5GB or 500MB"
    )


def check_weights(stored: StoredWeights, sources: Iterable[Source], where: Place) -> None:
    """Whether a checkpoint holds exactly these weights.

    Raises:
        CheckpointError: the first that is missing, too many, or of another shape.
    """
    expected = {source.name: source.shape for source in sources}
    for name in sorted(expected.keys() | stored.shapes.keys()):
        if expected.get(name) == stored.shapes.get(name):
            continue
        raise CheckpointError(
            f"weight {name}: {stored.shapes.get(name, 'missing')} in the checkpoint,"
            f" {expected.get(name, 'none')} by its config",
            str(where),
            "name another checkpoint",
        )


def write_weights(
    stored: StoredWeights,
    sources: list[Source],
    dtype: torch.dtype,
    shard_bytes: int,
    directory: Path,
    where: Place,
) -> int:
    """Write all pieces of all sources; returns the number of files.

    Args:
        shard_bytes: of one file, but for a single larger weight.
        where: the checkpoint, for messages.

    Raises:
        CheckpointError: a weight is not finite, or cannot be read.
        OSError: a file cannot be written.
    """
    safetensors = import_safetensors(NEEDED_BY)
    save_file = importlib.import_module("safetensors.torch").save_file
    shards = _shards(sources, dtype.itemsize, shard_bytes)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = [SINGLE]
    number = 0
    held: dict[str, Tensor] = {}
    for source in sources:
        weight = stored.read(source.name)
        if not weight.isfinite().all():
            raise CheckpointError(
                f"weight {source.name} is not finite: the run had diverged",
                str(where),
                "name a checkpoint from before that",
            )
        for piece in source.pieces:
            # A copy: a view would keep the whole source in memory, and safetensors refuses it.
            held[piece.name] = piece.take(weight).to(dtype, copy=True).contiguous()
            if len(held) == len(shards[number]):
                path = directory / names[number]
                path.touch()
                mode = path.stat().st_mode  # safetensors lets nobody else read what it writes
                try:
                    save_file(held, path, metadata={"format": "pt"})
                except safetensors.SafetensorError as error:  # of the file system, in its own words
                    raise OSError(" ".join(str(error).split())) from error
                path.chmod(mode)
                held, number = {}, number + 1
    if len(shards) > 1:
        files = {key: names[i] for i, shard in enumerate(shards) for key in shard}
        total = sum(sum(shard.values()) for shard in shards)
        content: dict[str, Any] = {"metadata": {"total_size": total}, "weight_map": files}
        (directory / INDEX).write_text(json.dumps(content, indent=2))
    return len(shards)


def _shards(sources: list[Source], itemsize: int, limit: int) -> list[dict[str, int]]:
    """Name → bytes of the weights of every file, in order."""
    shards: list[dict[str, int]] = [{}]
    for source in sources:
        for piece in source.pieces:
            size = itemsize * torch.Size(piece.shape(source.shape)).numel()
            if shards[-1] and sum(shards[-1].values()) + size > limit:
                shards.append({})
            shards[-1][piece.name] = size
    return shards
