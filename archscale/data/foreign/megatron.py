"""`.bin` and `.idx` of Megatron-LM: the ids of one sequence after another, and an index of them.

The index is, little-endian: magic, version, dtype code, S sequences, D document borders; then the
sequences' tokens (int32 [S]), where each begins in bytes (int64 [S]), and the sequences at which
documents begin or end (int64 [D]).

Format: `megatron/core/datasets/indexed_dataset.py` of github.com/NVIDIA/Megatron-LM.
"""

import functools
import struct
from typing import NamedTuple

import numpy as np

from archscale.data.foreign.files import COPY_AGAIN, ForeignFile, disagree, whole_tokens
from archscale.data.places import Place, map_tokens, read_start
from archscale.errors import DataError

KIND = "Megatron"
_MAGIC, _OLD_MAGIC = b"MMIDIDX\x00\x00", b"TNTIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_FLOATS = {6: "float64", 7: "float32"}
_LENGTH, _INTEGER = np.dtype("<i4"), np.dtype("<i8")
_SEQUENCES = 1 << 20  # of the index, read at a time


class _Index(NamedTuple):
    place: Place
    dtype: np.dtype
    sequences: int
    borders: int
    start: bytes

    def part(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """int64 [stop - start] of "lengths", "pointers" or "documents"."""
        pointers = _HEADER.size + 4 * self.sequences
        tables: dict[str, tuple[int, np.dtype, int]] = {
            "lengths": (_HEADER.size, _LENGTH, self.sequences),
            "pointers": (pointers, _INTEGER, self.sequences),
            "documents": (pointers + 8 * self.sequences, _INTEGER, self.borders),
        }
        offset, dtype, count = tables[name]
        return map_tokens(self.place, dtype, offset, count)[start:stop].astype(np.int64)


def index_of(place: Place) -> Place:
    """The index beside a `.bin`."""
    return place.with_name(place.name.removesuffix(".bin") + ".idx")


def read(place: Place) -> ForeignFile:
    """DataError if `.bin` or `.idx` is of another kind, truncated, or they disagree."""
    index = _read_index(index_of(place))
    start, size = read_start(place, 1024)
    tokens = whole_tokens(place, size, 0, index.dtype)
    described = 0
    if index.sequences:
        last = slice(index.sequences - 1, index.sequences)
        length, pointer = (
            int(index.part(name, last.start, last.stop)[0]) for name in ("lengths", "pointers")
        )
        described = pointer + length * index.dtype.itemsize
    if described != size:
        raise disagree(index.place, place, f"its last sequence ends at byte {described} of {size}")
    return ForeignFile(
        place,
        KIND,
        size,
        index.dtype,
        0,
        tokens,
        index.start + start,
        documents=max(0, index.borders - 1),
        verify=functools.partial(_verify, index, place),
    )


def _read_index(place: Place) -> _Index:
    raw, size = read_start(place, 1024)
    if raw.startswith(_OLD_MAGIC):
        raise DataError(
            "an index of Megatron's old kind, which is not memory-mapped",
            str(place),
            "write the data anew with Megatron's tools/preprocess_data.py (--dataset-impl mmap)",
        )
    if not raw.startswith(_MAGIC):
        problem = "not an index of Megatron's: it does not begin with MMIDIDX"
        raise DataError(problem, str(place), COPY_AGAIN)
    if len(raw) < _HEADER.size:
        raise DataError(f"truncated: {size} bytes, less than a header", str(place), COPY_AGAIN)
    _, version, code, sequences, borders = _HEADER.unpack(raw[: _HEADER.size])
    anew = "write the data anew with Megatron's tools/preprocess_data.py"
    if version != 1:
        raise DataError(f"version {version}, but archscale reads 1", str(place), anew)
    if code not in _DTYPES:
        name = _FLOATS.get(code, f"of unknown type {code}")
        raise DataError(f"its ids are {name}, not whole numbers", str(place), anew)
    expected = _HEADER.size + 12 * sequences + 8 * borders
    if size == expected + sequences and sequences:
        problem = "its sequences have modes, as those of images and text together"
        raise DataError(problem, str(place), "give data of text alone")
    if size != expected:
        word = "truncated" if size < expected else "foreign bytes at its end"
        problem = f"{word}: {size} bytes where {sequences} sequences need {expected}"
        raise DataError(problem, str(place), COPY_AGAIN)
    return _Index(place, np.dtype(_DTYPES[code]), sequences, borders, raw)


def _verify(index: _Index, place: Place) -> None:
    """Every sequence begins where the one before it ends, and documents are made of sequences."""
    end = 0
    for start in range(0, index.sequences, _SEQUENCES):
        lengths = index.part("lengths", start, start + _SEQUENCES)
        pointers = index.part("pointers", start, start + _SEQUENCES)
        ends = end + np.cumsum(lengths) * index.dtype.itemsize
        wrong = (lengths < 0) | (pointers != ends - lengths * index.dtype.itemsize)
        if wrong.any():
            number = start + int(wrong.argmax())
            raise disagree(
                index.place, place, f"sequence {number} is not where the one before it ends"
            )
        end = int(ends[-1])
    borders = index.part("documents")
    sound = len(borders) == 0 or (
        borders[0] >= 0 and borders[-1] <= index.sequences and (np.diff(borders) >= 0).all()
    )
    if not sound:
        problem = f"its documents are not made of its {index.sequences} sequences"
        raise DataError(problem, str(index.place), COPY_AGAIN)
