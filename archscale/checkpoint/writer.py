"""Files of a checkpoint: summed up and forced onto the disk while they are written.

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
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem

from archscale.checkpoint.directory import CHUNK, Recorded, hexadecimal

AHEAD = 64 << 20  # bytes that are written before they are forced onto the disk
_torch_checksums = threading.Lock()  # whoever holds it may change torch's setting


class SummedFile(io.RawIOBase):
    """A new file, written from its beginning to its end; whole on the disk once `close` returns.

    Raises:
        OSError: from any call; also of what was forced onto the disk before.
    """

    def __init__(self, path: Path):
        self._path, self._file = path, open(path, "wb", buffering=1 << 20)  # noqa: SIM115
        self._crc = self._bytes = self._forced = 0
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="checkpoint sync")
        self._forcing: list[Future[None]] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), CHUNK):  # small enough to be in a cache when written
            chunk = view[start : start + CHUNK]
            self._crc = zlib.crc32(chunk, self._crc)
            self._file.write(chunk)
            self._bytes += len(chunk)
            if self._bytes - self._forced >= AHEAD and all(f.done() for f in self._forcing):
                self._forced = self._bytes
                self._forcing.append(self._disk.submit(self._force))
        return len(view)

    def _force(self) -> None:
        os.fsync(self._file.fileno())

    def tell(self) -> int:
        return self._bytes

    def fileno(self) -> int:
        return self._file.fileno()

    def flush(self) -> None:
        """Nothing waits here: `close` does it."""

    @property
    def recorded(self) -> Recorded:
        return Recorded(self._bytes, hexadecimal(self._crc))

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
        file = SummedFile(Path(path))
        try:
            with _no_second_checksums():
                yield file
            file.close()
        finally:
            file.abandon()
        self.recorded[Path(path).name] = file.recorded

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        super().rename(path, new_path)
        self.recorded[Path(new_path).name] = self.recorded.pop(Path(path).name)


class SummedWriter(FileSystemWriter):
    """torch's writer into `path`, through `SummedFile`s.

    Copies nothing: tensors must have memory of their own, and be on the CPU to be written as they
    are.
    """

    def __init__(self, path: Path):
        # Each file forces itself onto the disk. Nothing is copied ahead from a GPU: that would use
        # the streams of whichever device this thread has.
        super().__init__(path, sync_files=False, per_thread_copy_ahead=0)
        self.fs: _SummedFiles = _SummedFiles()

    @property
    def recorded(self) -> dict[str, Recorded]:
        """What this process has written, by name."""
        return self.fs.recorded


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


def write_summed(path: Path, content: bytes) -> Recorded:
    """Write a file and force it onto the disk; returns what `state.json` says of it."""
    file = SummedFile(path)
    try:
        file.write(content)
        file.close()
    finally:
        file.abandon()
    return file.recorded
