"""Exact duplicates, found from the identities that stand in the tables of encoded units.

The rows are dealt into buckets by the first bits of the identity, each of which is sorted by
itself: memory is that of one bucket, however many documents there are.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from archscale.data.preparing.arrays import write_header
from archscale.data.preparing.encode import EncodedUnit

_BUCKET_ROWS = 1 << 21  # 50 MB, and as much again to sort them
_ROW = np.dtype([("high", "<u8"), ("low", "<u8"), ("number", "<u8")])


def mark_kept(units: Sequence[EncodedUnit], deduplicate: bool, folder: Path) -> Path:
    """Which documents stay: of equal ones the first, in the order of units; of a training document
    that is for validation too, only those for validation.

    Args:
        units: in order, those of validation sources first.
        deduplicate: whether equal documents of one split count as one.
        folder: to work in; emptied first.

    Returns:
        A .npy file, bool [documents of all units].
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    path = folder / "kept.npy"
    total = sum(unit.documents for unit in units)
    held_out = sum(unit.documents for unit in units if unit.unit.held_out)
    _write_true(path, total)
    kept = np.load(path, mmap_mode="r+")
    if deduplicate or held_out:
        for bucket in _deal(units, total, folder):
            rows = np.fromfile(bucket, _ROW)
            kept[rows["number"]] = _kept(rows, deduplicate, held_out)
            bucket.unlink()
    kept.flush()
    return path


def _write_true(path: Path, total: int) -> None:
    """A .npy file of bool [total], all true.

    It is written before it is mapped: on a full disk a write is an error, and touching a map of
    what has no room yet is the end of the process.
    """
    with open(path, "wb") as file:
        write_header(file, np.dtype(np.bool_), total)
        for start in range(0, total, _BUCKET_ROWS):
            file.write(b"\1" * min(_BUCKET_ROWS, total - start))


def _deal(units: Sequence[EncodedUnit], total: int, folder: Path) -> list[Path]:
    """The rows of all units in files by the first bits of the identity, each in the order of
    units."""
    bits = max(0, (total - 1) // _BUCKET_ROWS).bit_length()
    buckets = [folder / f"bucket_{number:05d}" for number in range(1 << bits)]
    first = 0
    for unit in units:
        table = unit.table()
        rows = np.empty(len(table), _ROW)
        rows["high"], rows["low"] = table["high"], table["low"]
        rows["number"] = np.arange(first, first + len(table))
        first += len(table)
        # In two steps, as a shift by all 64 bits is undefined.
        bucket = rows["high"] >> np.uint64(63 - bits) >> np.uint64(1)
        order = np.argsort(bucket, kind="stable")
        ends = np.searchsorted(bucket[order], np.arange(len(buckets)), side="right")
        for path, chosen in zip(buckets, np.split(order, ends[:-1])):
            if len(chosen):
                with open(path, "ab") as file:
                    file.write(rows[chosen].data)
    return [path for path in buckets if path.exists()]


def _kept(rows: np.ndarray, deduplicate: bool, held_out: int) -> np.ndarray:
    """bool [rows], for rows in the order of their numbers; those below `held_out` are for
    validation."""
    order = np.lexsort((rows["low"], rows["high"]))  # stable: equal ones stay in order
    ordered = rows[order]
    is_first = np.ones(len(rows), np.bool_)
    is_first[1:] = (ordered["high"][1:] != ordered["high"][:-1]) | (
        ordered["low"][1:] != ordered["low"][:-1]
    )
    stays = is_first
    if not deduplicate:
        firsts = ordered["number"][is_first]
        number_of_first = firsts[np.cumsum(is_first) - 1]
        stays = (ordered["number"] < held_out) | (number_of_first >= held_out)
    kept = np.empty(len(rows), np.bool_)
    kept[order] = stays
    return kept
