"""Writers of other projects' files, from the published layouts."""

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

CODES = {"u1": 1, "i1": 2, "i2": 3, "i4": 4, "i8": 5, "f8": 6, "f4": 7, "u2": 8}


def write_llmc(
    path: Path, ids: np.ndarray, magic: int = 20240520, version: int = 1, dtype: str = "<u2"
) -> Path:
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids)
    path.write_bytes(header.tobytes() + ids.astype(dtype).tobytes())
    return path


def write_megatron(prefix: Path, documents: Sequence[np.ndarray], dtype: str = "u2") -> Path:
    """One sequence per document; returns the `.bin`."""
    item = np.dtype("<" + dtype)
    lengths = np.array([len(document) for document in documents], "<i4")
    pointers = (np.cumsum(lengths, dtype="<i8") - lengths) * item.itemsize
    borders = np.arange(len(documents) + 1, dtype="<i8")
    prefix.with_name(prefix.name + ".idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, CODES[dtype], len(lengths), len(borders))
        + lengths.tobytes()
        + pointers.astype("<i8").tobytes()
        + borders.tobytes()
    )
    ids = prefix.with_name(prefix.name + ".bin")
    ids.write_bytes(b"".join(document.astype(item).tobytes() for document in documents))
    return ids


def write_datatrove(
    path: Path, documents: Sequence[np.ndarray], tokenizer: str = "gpt2|2", dtype: str = "<u2"
) -> Path:
    tokens = sum(map(len, documents))
    path.write_bytes(b"".join(document.astype(dtype).tobytes() for document in documents))
    ends = np.cumsum([len(document) for document in documents]).astype("<u8")
    path.with_name(path.name + ".index").write_bytes(ends.tobytes())
    path.with_name(path.name + ".metadata").write_text(f"{tokenizer}\n{tokens}\n{tokens} T")
    return path
