"""`.bin` of llm.c and modded-nanogpt: 256 int32 (magic, version, number of tokens, zeros), then the
ids.

Format: `dev/data/data_common.py` of github.com/karpathy/llm.c.
"""

from typing import NamedTuple

import numpy as np

from archscale.data.foreign.files import COPY_AGAIN, ForeignFile, count_problem
from archscale.data.places import Place, read_start
from archscale.data.shards import GIVE_PREPARED, MANIFEST
from archscale.data.shards import MAGIC as OWN_MAGIC
from archscale.errors import DataError

HEADER_BYTES = 1024


class _Kind(NamedTuple):
    name: str
    version: int
    dtype: np.dtype


_KINDS = {
    20240520: _Kind("llm.c", 1, np.dtype("<u2")),
    20240801: _Kind("llm.c (Llama 3)", 7, np.dtype("<u4")),
}
_EVALUATION = 20240522  # multiple-choice questions


def read(place: Place) -> ForeignFile:
    """DataError if the file is of another kind, truncated, or holds other than it announces."""
    raw, size = read_start(place, HEADER_BYTES)
    if raw.startswith(OWN_MAGIC):
        if place.with_name(MANIFEST).is_file():
            problem = "a shard of a prepared data set"
            raise DataError(problem, str(place), f"give the directory that holds its {MANIFEST}")
        problem = f"not a prepared data set: there is no {MANIFEST} beside its shard"
        raise DataError(problem, str(place), GIVE_PREPARED)
    if len(raw) < 12:
        raise DataError(f"truncated: {size} bytes, less than a header", str(place), COPY_AGAIN)
    magic, version, tokens = np.frombuffer(raw[:12], "<i4").tolist()
    if magic == _EVALUATION:
        problem = "multiple-choice questions of llm.c, not tokens of text"
        raise DataError(problem, str(place), "give its *_train_*.bin and *_val_*.bin files")
    if magic not in _KINDS:
        raise DataError(
            f"unknown file: it begins with {magic}, llm.c's with 20240520 or 20240801, and"
            f" Megatron's has {place.name.removesuffix('.bin')}.idx beside it",
            str(place),
            "give files of these kinds, or their text to `archscale data prepare`",
        )
    kind = _KINDS[magic]
    if version != kind.version:
        raise DataError(
            f"version {version} of {kind.name}'s format, but archscale reads {kind.version}",
            str(place),
            "write the file anew with the present llm.c or modded-nanogpt",
        )
    expected = HEADER_BYTES + tokens * kind.dtype.itemsize
    if tokens < 0 or size != expected:
        raise count_problem(place, size, tokens, expected)
    return ForeignFile(place, kind.name, size, kind.dtype, HEADER_BYTES, tokens, raw)
