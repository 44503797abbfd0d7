"""Tensors of a checkpoint's files, read from the disk into the memory where they belong, and summed
up on the way.

torch's own reader allocates each tensor anew, reads it there and copies it, and the first touch of
fresh memory takes longer than the disk does. A file whose checksum is to be compared is read from
its beginning to its end, so that each byte comes from the disk once.
"""

from __future__ import annotations

import concurrent.futures
import io
import math
import os
import pickle
import struct
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, LoadPlan, LoadPlanner
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem
from torch.futures import Future

from archscale.checkpoint.directory import Recorded, hexadecimal, wrong_checksum, wrong_size

BLOCK = 2 << 20  # bytes that are read at a time, while those before are summed up
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
    memory of the host, and all others by way of one buffer.

    Args:
        compared: what files are to be, by name: those of them that hold tensors of a plan are read
            whole and compared.

    Attributes:
        unread: the rest of them.
        problems: what is wrong with those read.
    """

    def __init__(self, path: Path, compared: Mapping[str, Recorded] | None = None):
        super().__init__(path)
        self._buffer = bytearray()
        self.unread: dict[str, Recorded] = dict(compared or {})
        self.problems: list[str] = []

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, dict[int, list[ReadItem]]] = defaultdict(lambda: defaultdict(list))
        for item in plan.items:
            place = self.storage_data[item.storage_index]
            by_file[place.relative_path][place.offset].append(item)
        for name, items in by_file.items():
            with open(Path(self.path) / name, "rb", buffering=0) as file:
                recorded = self.unread.pop(name, None)
                if recorded and (problem := wrong_size(Path(self.path) / name, recorded)):
                    self.problems.append(problem)
                    continue
                summed = recorded is not None and recorded.crc32 is not None
                with _SummedStream(file) if summed else _Stream(file) as stream:
                    for offset in sorted(items):
                        self._read(stream, offset, items[offset], planner)
                    if recorded and (problem := stream.difference(name, recorded)):
                        self.problems.append(problem)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read(
        self, stream: _Stream, offset: int, items: Sequence[ReadItem], planner: LoadPlanner
    ) -> None:
        """Read what is stored at an offset, for all items that want it or a part of it."""
        length = self.storage_data[items[0].storage_index].length
        if items[0].type == LoadItemType.BYTE_IO:
            content = memoryview(bytearray(length))
            stream.read(offset, content)
            for item in items:
                planner.load_bytes(item, io.BytesIO(content))
            return
        record = find_record(stream.file, offset, length)
        targets = [planner.resolve_tensor(item).detach() for item in items]
        if len(items) == 1 and record.plain and _is_whole(items[0], targets[0], record):
            stream.read(record.start, _bytes_of(targets[0]))
        else:
            stored = self._buffered(stream, record)
            for item, target in zip(items, targets):
                part = stored
                for dim, (start, size) in enumerate(zip(item.storage_offsets, item.lengths)):
                    part = part.narrow(dim, start, size)
                target.copy_(part)
        for item, target in zip(items, targets):
            planner.commit_tensor(item, target)

    def _buffered(self, stream: _Stream, record: Record) -> Tensor:
        """The tensor in the buffer, which the next one overwrites."""
        if not record.bytes:
            return torch.empty(record.shape, dtype=record.dtype)
        if len(self._buffer) < record.bytes:
            self._buffer = bytearray(record.bytes)
        content = memoryview(self._buffer)[: record.bytes]
        stream.read(record.start, content)
        stream.settle()
        flat = torch.frombuffer(content, dtype=record.dtype)
        return flat.as_strided(record.shape, record.stride, record.offset)


def _is_whole(item: ReadItem, target: Tensor, record: Record) -> bool:
    """Whether the target's memory takes the bytes of the record as they are."""
    whole = tuple(item.lengths) == record.shape and not any(item.storage_offsets)
    direct = target.device.type == "cpu" and target.is_contiguous()
    return whole and direct and target.dtype == record.dtype


class _Stream:
    """Parts of an unbuffered file, read in the order of the file."""

    def __init__(self, file: BinaryIO):
        self.file = file

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def read(self, start: int, content: memoryview) -> None:
        """Fill `content`, whose memory may be used by others once the stream has settled.

        Raises:
            EOFError: the file ends before.
        """
        read_into(self.file, start, content)

    def settle(self) -> None:
        """Wait until what was read is not needed any more."""

    def difference(self, name: str, recorded: Recorded) -> str | None:
        """What the file is not that it was recorded to be, as far as the stream knows."""
        return None


class _SummedStream(_Stream):
    """Reads what lies between the parts too, and sums up all of it.

    A thread computes the checksum of one block while the next comes from the disk.
    """

    def __init__(self, file: BinaryIO):
        super().__init__(file)
        self._summing = ThreadPoolExecutor(1)
        self._last: concurrent.futures.Future[None] | None = None
        self._gaps = [bytearray(BLOCK), bytearray(BLOCK)]  # for what is not kept
        self._at = self._crc = 0

    def __exit__(self, *_: object) -> None:
        self._summing.shutdown()

    def read(self, start: int, content: memoryview) -> None:
        if start < self._at:
            raise ValueError(f"records overlap at byte {start}")
        self._skip(start)
        self._read_on(content)

    def settle(self) -> None:
        if self._last is not None:
            self._last.result()

    def difference(self, name: str, recorded: Recorded) -> str | None:
        self._skip(recorded.bytes)
        self.settle()
        crc = hexadecimal(self._crc)
        return None if crc == recorded.crc32 else wrong_checksum(name, crc, recorded)

    def _skip(self, end: int) -> None:
        """Read to that byte and keep nothing."""
        while self._at < end:
            # Not the memory of the block before, which may not be summed up yet.
            self._gaps.reverse()
            self._read_on(memoryview(self._gaps[0])[: min(BLOCK, end - self._at)])

    def _read_on(self, content: memoryview) -> None:
        for begin in range(0, len(content), BLOCK):
            block = content[begin : begin + BLOCK]
            read_into(self.file, self._at, block)
            self._at += len(block)
            self.settle()  # so that one block waits to be summed up, and no more
            self._last = self._summing.submit(self._sum, block)

    def _sum(self, block: memoryview) -> None:
        self._crc = zlib.crc32(block, self._crc)


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
    while len(content):
        count = os.preadv(file.fileno(), [content], start)
        if not count:
            raise EOFError(f"{getattr(file, 'name', 'the file')} ends too early")
        content, start = content[count:], start + count


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
