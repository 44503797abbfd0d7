"""`.ds` of datatrove, which nanotron trains on: ids alone, of 2 or 4 bytes.

Beside `NAME.ds` stand `NAME.ds.metadata`, whose lines are tokenizer and bytes per id (`gpt2|2`;
before there were ids of 4 bytes, `gpt2`) and the number of tokens, and `NAME.ds.index` with the
document ends in tokens, uint64.

Format: `src/datatrove/pipeline/tokens/tokenizer.py` of github.com/huggingface/datatrove.
"""

import functools
from typing import NamedTuple

import numpy as np

from archscale.data.foreign.files import (
    COPY_AGAIN,
    ForeignFile,
    count_problem,
    disagree,
    whole_tokens,
)
from archscale.data.places import Place, map_tokens, read_start
from archscale.errors import DataError

KIND = "datatrove"
METADATA, INDEX, LOSS = ".metadata", ".index", ".loss"
_END = np.dtype("<u8")
_DTYPES: dict[int, np.dtype] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}


class _Metadata(NamedTuple):
    tokenizer: str | None
    id_bytes: int
    tokens: int


def read(place: Place) -> ForeignFile:
    """DataError if the file is truncated, disagrees with what stands beside it, or has a loss
    mask."""
    index, loss = (place.with_name(place.name + suffix) for suffix in (INDEX, LOSS))
    if loss.is_file():
        problem = f"{loss.name} masks the loss of some tokens, which archscale does not"
        remedy = f"move {loss.name} elsewhere to train on all tokens, or prepare the text anew"
        raise DataError(problem, str(place), remedy)
    start, size = read_start(place, 1024)
    metadata = _read_metadata(place.with_name(place.name + METADATA))
    index_size = read_start(index, 0)[1] if index.is_file() else None
    if index_size is not None and index_size % 8:
        problem = f"truncated: {index_size} bytes are no multiple of 8"
        raise DataError(problem, str(index), COPY_AGAIN)
    if metadata is not None:
        id_bytes = metadata.id_bytes
    else:
        id_bytes = _id_bytes(place, size, index, index_size)
    dtype = _DTYPES[id_bytes]
    tokens = whole_tokens(place, size, 0, dtype)
    if metadata is not None and metadata.tokens != tokens:
        raise count_problem(place, size, metadata.tokens, metadata.tokens * id_bytes)
    if index_size is not None and _last(index, index_size) != tokens:
        raise disagree(index, place, f"it ends at token {_last(index, index_size)} of {tokens}")
    return ForeignFile(
        place,
        KIND,
        size,
        dtype,
        0,
        tokens,
        start,
        documents=None if index_size is None else index_size // 8,
        tokenizer=None if metadata is None else metadata.tokenizer,
        verify=None if index_size is None else functools.partial(_verify, index, index_size, place),
    )


def _read_metadata(place: Place) -> _Metadata | None:
    if not place.is_file():
        return None
    try:
        first, count = place.read_bytes().decode().splitlines()[:2]
        name, bar, size = first.rpartition("|")
        id_bytes, tokens = (int(size) if bar else 2), int(count)
    except ValueError as error:
        problem = "foreign metadata: its lines are not TOKENIZER|BYTES and the number of tokens"
        raise DataError(problem, str(place), COPY_AGAIN) from error
    if id_bytes not in _DTYPES:
        raise DataError(f"ids of {id_bytes} bytes, not 2 or 4", str(place), COPY_AGAIN)
    named = name if bar else first
    return _Metadata(None if named == "Unknown Tokenizer" else named, id_bytes, tokens)


def _id_bytes(place: Place, size: int, index: Place, index_size: int | None) -> int:
    """Bytes per id, from the number of tokens that the index ends at."""
    if index_size is None:
        problem = f"neither {place.name}{METADATA} nor {index.name} is there: 2 or 4 bytes per id?"
        raise DataError(problem, str(place), "copy the files that stood beside it, too")
    last = _last(index, index_size)
    for id_bytes in _DTYPES:
        if last * id_bytes == size:
            return id_bytes
    raise disagree(index, place, f"it ends at token {last}, and the ids have {size} bytes")


def _last(index: Place, size: int) -> int:
    ends = map_tokens(index, _END, 0, size // 8)
    return int(ends[size // 8 - 1 : size // 8][0]) if size else 0


def _verify(index: Place, size: int, place: Place) -> None:
    ends = map_tokens(index, _END, 0, size // 8)[0 : size // 8]
    if (ends[1:] < ends[:-1]).any():
        raise disagree(index, place, "a document ends before the one before it")
