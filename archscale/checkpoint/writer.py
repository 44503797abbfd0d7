"""Files of a checkpoint: summed up and forced onto the disk, or sent to a store, while they are
written.

torch.distributed.checkpoint writes through streams that its storage hands out. Ours compute the
checksum of what passes, so that nothing is read a second time, and begin to force it onto the disk
while more is coming, so that little is left to wait for at the end. What they write any
`torch.distributed.checkpoint.FileSystemReader` reads.
"""

from __future__ import annotations

import contextlib
import io
import os
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem

from archscale.checkpoint.directory import CHUNK, Recorded, hexadecimal
from archscale.checkpoint.place import Place, StoreError, StorePath, place_of
from archscale.checkpoint.reader import DirectReader

AHEAD = 64 << 20  # bytes that are written before they are forced onto the disk
_torch_checksums = threading.Lock()  # whoever holds it may change torch's setting


class _Summed(io.RawIOBase):
    """What is written from its beginning to its end, summed up on the way."""

    def __init__(self) -> None:
        self._crc = self._bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), CHUNK):  # small enough to be in a cache when written
            chunk = view[start : start + CHUNK]
            self._crc = zlib.crc32(chunk, self._crc)
            self._bytes += len(chunk)
            self._put(chunk)
        return len(view)

    def _put(self, chunk: memoryview) -> None:
        raise NotImplementedError

    def abandon(self) -> None:
        """Close it as it is."""
        raise NotImplementedError

    def tell(self) -> int:
        return self._bytes

    def flush(self) -> None:
        """Nothing waits here: `close` does it."""

    @property
    def recorded(self) -> Recorded:
        return Recorded(self._bytes, hexadecimal(self._crc))


class SummedFile(_Summed):
    """A new file, whole on the disk once `close` returns.

    Raises:
        OSError: from any call; also of what was forced onto the disk before.
    """

    def __init__(self, path: Path):
        super().__init__()
        self._path, self._file = path, open(path, "wb", buffering=1 << 20)  # noqa: SIM115
        self._forced = 0
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="checkpoint sync")
        self._forcing: list[Future[None]] = []

    def _put(self, chunk: memoryview) -> None:
        self._file.write(chunk)
        if self._bytes - self._forced >= AHEAD and all(f.done() for f in self._forcing):
            self._forced = self._bytes
            self._forcing.append(self._disk.submit(self._force))

    def _force(self) -> None:
        os.fsync(self._file.fileno())

    def fileno(self) -> int:
        return self._file.fileno()

    def close(self) -> None:
        if self.closed:
            return
        super().close()
        try:
            self._file.flush()
            for forced in self._forcing:
                forced.result()  # the system reports an error of the disk once
            self._force()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Close it as it is."""
        super().close()
        self._disk.shutdown()
        with contextlib.suppress(OSError):  # what is not written will not be
            self._file.close()


class SummedObject(_Summed):
    """An object in a store, which is there once `close` returns.

    Raises:
        StoreError: from any call; `BrokenUpload` where the cause may pass.
    """

    def __init__(self, path: StorePath):
        super().__init__()
        self._path, self._stream = path, path.upload()
        self.failure: StoreError | None = None

    def _put(self, chunk: memoryview) -> None:
        self._call(lambda: self._stream.write(chunk))
        Sent.bytes += len(chunk)

    def _call(self, request: Callable[[], Any]) -> None:
        try:
            request()
        except Exception as error:  # every store raises its own
            self.failure = self._path.broken(error)
            raise self.failure from error

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._call(self._stream.close)

    def abandon(self) -> None:
        super().close()
        if self._stream.closed:
            return
        with contextlib.suppress(Exception):  # what is left of it counts for nothing
            discard = getattr(self._stream, "discard", None)
            if discard is None:
                self._stream.close()
            else:  # or a store keeps, and charges for, the parts that it has
                self._stream.closed = True
                discard()


class Sent:
    """What this process has sent to stores: a store shows nothing of an object before its end.

    Attributes:
        bytes: of all uploads.
    """

    bytes = 0


def summed(path: Place) -> SummedFile | SummedObject:
    """A new file or object."""
    return SummedObject(path) if isinstance(path, StorePath) else SummedFile(path)


class _SummedFiles(FileSystem):
    """The local file system; `recorded` has what was written, by name."""

    def __init__(self) -> None:
        self.recorded: dict[str, Recorded] = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.IOBase]:  # type: ignore[override]
        if mode != "wb":
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        file = summed(place_of(path))
        try:
            with _no_second_checksums():
                yield file
            file.close()
        except RuntimeError as error:  # torch's serializer raises one of its own over ours
            raise getattr(file, "failure", None) or error from error
        finally:
            file.abandon()
        self.recorded[place_of(path).name] = file.recorded

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        super().rename(path, new_path)
        self.recorded[Path(new_path).name] = self.recorded.pop(Path(path).name)


class _StoredObjects(_SummedFiles):
    """A store as torch wants it; the paths are `StorePath`s."""

    @contextlib.contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[io.IOBase]:
        with path.open() if mode == "rb" else super().create_stream(path, mode) as stream:
            yield stream

    def concat_path(self, path: Any, suffix: str) -> Any:
        return path / suffix

    def init_path(self, path: Any) -> Any:
        return path

    def rename(self, path: Any, new_path: Any) -> None:
        path.copy_to(new_path)
        path.unlink()
        self.recorded[new_path.name] = self.recorded.pop(path.name)

    def mkdir(self, path: Any) -> None:
        path.mkdir()

    def exists(self, path: Any) -> bool:
        return bool(path.is_file())

    def rm_file(self, path: Any) -> None:
        path.unlink()


class _StoreReader(FileSystemReader):
    """torch's reader from a store: each piece of a tensor is asked for at once."""

    def __init__(self, path: StorePath):
        super().__init__(".")
        self.fs: _StoredObjects = _StoredObjects()
        self.path: Any = path

    def _slice_file(self, file: Any, sinfo: Any) -> IO[bytes]:
        file.seek(sinfo.offset)
        return io.BytesIO(file.read(sinfo.length))


def reader_of(path: Place, compared: Mapping[str, Recorded] | None = None) -> FileSystemReader:
    """What DCP reads a checkpoint with.

    Args:
        compared: as of `DirectReader`; none in a store.
    """
    if isinstance(path, StorePath):
        assert not compared
        return _StoreReader(path)
    return DirectReader(path, compared)


class SummedWriter(FileSystemWriter):
    """torch's writer into `path`, through `SummedFile`s and `SummedObject`s.

    Copies nothing: tensors must have memory of their own, and be on the CPU to be written as they
    are.

    Args:
        file_per_tensor: otherwise there is one file for each process, during whose writing torch
            keeps all tensors that are in it.
    """

    def __init__(self, path: Place, *, file_per_tensor: bool = False):
        # Each file forces itself onto the disk. Nothing is copied ahead from a GPU: that would use
        # the streams of whichever device this thread has.
        super().__init__(
            ".",
            single_file_per_rank=not file_per_tensor,
            sync_files=False,
            per_thread_copy_ahead=0,
        )
        self.path: Any = path
        self.fs = _StoredObjects() if isinstance(path, StorePath) else _SummedFiles()

    @property
    def recorded(self) -> dict[str, Recorded]:
        """What this process has written, by name."""
        return self.fs.recorded  # type: ignore[attr-defined]


@contextlib.contextmanager
def _no_second_checksums() -> Iterator[None]:
    """torch computes a checksum of each tensor that nobody reads, at a quarter of the rate of ours.

    The setting is one of the process in some versions of torch and one of the thread in others:
    whoever changes it puts it back before anybody else may.
    """
    with _torch_checksums:
        before = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)
        try:
            yield
        finally:
            torch.serialization.set_crc32_options(before)


def write_summed(path: Place, content: bytes) -> Recorded:
    """Write a file and force it onto the disk; returns what `state.json` says of it."""
    if isinstance(path, StorePath):
        path.write_bytes(content)
        return Recorded(len(content), hexadecimal(zlib.crc32(content)))
    file = SummedFile(path)
    try:
        file.write(content)
        file.close()
    finally:
        file.abandon()
    return file.recorded
