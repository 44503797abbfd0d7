"""Fragments in torch.distributed.checkpoint: what any engine holds of a tensor, saved and loaded in
the tensor's own shape.

Every sharding is a set of intervals [lo, hi) of the row-major flattened tensor. DCP knows boxes, so
an interval is cut into the few boxes that it consists of: at most 2 d − 1 of a d-dimensional
tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from archscale.distributed import Fragment

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets and sizes by dimension


def boxes(shape: Sequence[int], lo: int, hi: int) -> list[Box]:
    """The interval [lo, hi) of the row-major flattened `shape`, as boxes in ascending order; none
    when it is empty."""
    if lo >= hi:
        return []
    if len(shape) <= 1:
        return [((lo,), (hi - lo,))] if shape else [((), ())]
    rest = tuple(shape[1:])
    row = math.prod(rest)
    first, last = -(-lo // row), hi // row  # whole rows are [first, last)
    if first > last:  # within one row
        return _inside(last, rest, lo - last * row, hi - last * row)
    pieces = _inside(first - 1, rest, lo - (first - 1) * row, row) if lo < first * row else []
    if first < last:
        pieces.append(((first, *(0 for _ in rest)), (last - first, *rest)))
    return pieces + (_inside(last, rest, 0, hi - last * row) if last * row < hi else [])


def _inside(row: int, rest: tuple[int, ...], lo: int, hi: int) -> list[Box]:
    return [((row, *offsets), (1, *sizes)) for offsets, sizes in boxes(rest, lo, hi)]


class Stored(Tensor):
    """A `Fragment` as DCP sees it (`torch.distributed._checkpointable`): it has the whole shape,
    holds a few boxes, and takes part in no arithmetic."""

    _pieces: dict[tuple[int, ...], Tensor]

    @staticmethod
    def __new__(cls, fragment: Fragment) -> Stored:
        data, pieces, at = fragment.data, {}, 0
        for offsets, sizes in boxes(fragment.shape, fragment.lo, fragment.lo + data.numel()):
            count = math.prod(sizes)
            pieces[offsets] = data[at : at + count].view(sizes)
            at += count
        return cls._of(fragment.shape, data.dtype, data.device, pieces)

    @classmethod
    def _of(
        cls,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        pieces: dict[tuple[int, ...], Tensor],
    ) -> Stored:
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)  # type: ignore[attr-defined]
        self._pieces = pieces
        return self

    def copied(self, copy: Callable[[str, Tensor], Tensor]) -> Stored:
        """The same boxes with other memory: `copy` makes a tensor on the CPU from one and a name
        that the other boxes here have not. Each box gets memory of its own, since DCP copies what
        is part of something larger once more."""
        pieces = {offsets: copy(str(offsets), piece) for offsets, piece in self._pieces.items()}
        return self._of(self.shape, self.dtype, torch.device("cpu"), pieces)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(
            f"{func} of a stored fragment: only checkpoints read and write it"
        )

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        return [
            WriteItem(
                MetadataIndex(fqn, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, TensorProperties(dtype=self.dtype), self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(torch.Size(offsets), torch.Size(piece.shape))
            for offsets, piece in self._pieces.items()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self._pieces[tuple(index.offset)]


class Computed(Stored):
    """A whole float32 tensor that does not exist yet: DCP plans with its shape, and it is computed
    when it is written."""

    _compute: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, shape: Sequence[int], compute: Callable[[], Tensor]) -> Computed:  # type: ignore[override]
        self = cls._of(shape, torch.float32, torch.device("cpu"), {})
        assert isinstance(self, Computed)
        self._compute = compute
        return self

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size([0] * len(self.shape)), self.shape)]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self._compute()
