"""Tensors of a checkpoint's files, read from the disk into the memory where they belong.

torch's own reader allocates each tensor anew, reads it there and copies it, and the first touch of
fresh memory takes longer than the disk does.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, LoadPlan, LoadPlanner
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem
from torch.futures import Future

LOCAL_HEADER = struct.Struct("<26xHH")  # of a zip record: where the lengths of its names stand

# The classes by which a pickle names the dtype of a storage.
STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class Record(NamedTuple):
    """A tensor as `torch.save` has stored it in a file.

    Attributes:
        start: of its storage's bytes in the file.
        shape, stride, offset: of the tensor in that storage, in elements.
    """

    start: int
    bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @property
    def plain(self) -> bool:
        """Whether the storage is the tensor, row by row."""
        size = math.prod(self.shape) * self.dtype.itemsize
        rows = torch.empty(self.shape, device="meta").stride()
        return self.offset == 0 and self.bytes == size and (self.stride == rows or size == 0)


class DirectReader(FileSystemReader):
    """`FileSystemReader` of a local directory that reads whole tensors straight into contiguous
    memory of the host, and all others by way of one buffer."""

    def __init__(self, path: Path):
        super().__init__(path)
        self._buffer = bytearray()

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            by_file[self.storage_data[item.storage_index].relative_path].append(item)
        for name, items in by_file.items():
            items.sort(key=lambda item: self.storage_data[item.storage_index].offset)
            with open(Path(self.path) / name, "rb", buffering=0) as file:
                for item in items:
                    self._read(file, item, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read(self, file: BinaryIO, item: ReadItem, planner: LoadPlanner) -> None:
        place = self.storage_data[item.storage_index]
        if item.type == LoadItemType.BYTE_IO:
            content = memoryview(bytearray(place.length))
            read_into(file, place.offset, content)
            planner.load_bytes(item, io.BytesIO(content))
            return
        record = find_record(file, place.offset, place.length)
        target = planner.resolve_tensor(item).detach()
        whole = tuple(item.lengths) == record.shape and not any(item.storage_offsets)
        direct = target.device.type == "cpu" and target.is_contiguous()
        if whole and record.plain and direct and target.dtype == record.dtype:
            read_into(file, record.start, _bytes_of(target))
        else:
            stored = self._buffered(file, record)
            for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths)):
                stored = stored.narrow(dim, start, length)
            target.copy_(stored)
        planner.commit_tensor(item, target)

    def _buffered(self, file: BinaryIO, record: Record) -> Tensor:
        """The tensor in the buffer, which the next one overwrites."""
        if not record.bytes:
            return torch.empty(record.shape, dtype=record.dtype)
        if len(self._buffer) < record.bytes:
            self._buffer = bytearray(record.bytes)
        content = memoryview(self._buffer)[: record.bytes]
        read_into(file, record.start, content)
        flat = torch.frombuffer(content, dtype=record.dtype)
        return flat.as_strided(record.shape, record.stride, record.offset)


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor of the host."""
    if not tensor.numel():
        return memoryview(b"")
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def read_into(file: BinaryIO, start: int, content: memoryview) -> None:
    """Fill `content` from the byte `start` of an unbuffered file on.

    Raises:
        EOFError: the file ends before.
    """
    file.seek(start)
    while len(content):
        count = file.readinto(content)  # type: ignore[attr-defined]
        if not count:
            raise EOFError(f"{getattr(file, 'name', 'the file')} ends too early")
        content = content[count:]


def find_record(file: BinaryIO, start: int, length: int) -> Record:
    """The tensor that `torch.save` has written to these bytes of a file: a zip archive with the
    pickled tensor, and the bytes of its storage uncompressed.

    Raises:
        ValueError: it is something else.
    """
    try:
        with zipfile.ZipFile(_Slice(file, start, length)) as archive:
            infos = {info.filename.partition("/")[2]: info for info in archive.infolist()}
    except zipfile.BadZipFile as error:
        raise ValueError(f"no tensor at byte {start}: {error}") from error
    # Not through the archive: the checksums in it, which nobody else reads, are not written.
    content = memoryview(bytearray(infos["data.pkl"].file_size))
    read_into(file, _begin(file, start, infos["data.pkl"]), content)
    tensor = _Unpickler(io.BytesIO(content)).load()
    if not isinstance(tensor, _Described):
        raise ValueError(f"no tensor at byte {start}")
    info = infos[f"data/{tensor.key}"]
    begin = _begin(file, start, info)
    return Record(begin, info.file_size, tensor.dtype, tensor.shape, tensor.stride, tensor.offset)


def _begin(file: BinaryIO, start: int, info: zipfile.ZipInfo) -> int:
    """Where in the file a record's content begins, whose archive begins at `start`."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{info.filename} at byte {start} is compressed")
    header = memoryview(bytearray(LOCAL_HEADER.size))
    read_into(file, start + info.header_offset, header)
    return start + info.header_offset + LOCAL_HEADER.size + sum(LOCAL_HEADER.unpack(header))


class _Described(NamedTuple):
    """What the pickle of a tensor says of it; `key` names its storage."""

    key: str
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _described(
    storage: tuple[str, torch.dtype], offset: int, shape: Any, stride: Any, *_: Any
) -> _Described:
    """In place of `torch._utils._rebuild_tensor_v2`."""
    return _Described(*storage, offset, tuple(shape), tuple(stride))


class _Unpickler(pickle.Unpickler):
    """Reads the pickle of one tensor, and builds nothing else that it may name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _described
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        raise ValueError(f"a tensor's pickle names {module}.{name}")

    def persistent_load(self, pid: Any) -> tuple[str, torch.dtype]:
        _, dtype, key, *_ = pid  # ("storage", its class, its name, device, elements)
        return key, dtype


class _Slice(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, file: BinaryIO, start: int, length: int):
        self._file, self._start, self._length, self._at = file, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = (
            offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        )
        return self._at

    def readinto(self, buffer: Any) -> int:
        content = memoryview(buffer)[: max(0, self._length - self._at)]
        read_into(self._file, self._start + self._at, content)
        self._at += len(content)
        return len(content)
