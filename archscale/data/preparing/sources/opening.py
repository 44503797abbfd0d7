"""Files opened for reading: local or remote, decompressed, and from anywhere in them."""

import errno
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from archscale.data.preparing.sources import remote
from archscale.data.preparing.sources.compressed import BUFFER_BYTES, compression, decompressing
from archscale.data.preparing.sources.globbing import match_files
from archscale.data.preparing.sources.units import Part, byte_ranges, shown
from archscale.data.preparing.trouble import Trouble, UnreadableFile
from archscale.errors import DataError, explain_os_error

# Of the process or the network, not of the file.
_PASSING = {
    errno.EAGAIN,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.EMFILE,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ENOTCONN,
    errno.ESTALE,
    errno.ETIMEDOUT,
}


class Content(NamedTuple):
    """The decompressed content of a file.

    Attributes:
        stream: to read from.
        size: bytes of the content; None where only reading tells.
        compressed: the file is not the content.
    """

    stream: io.BufferedReader
    size: int | None
    compressed: bool

    def read_on(self, trouble: Trouble) -> None:
        """After an error that stops the work: what looks like a wrong record may be a damaged file,
        which its checksum tells at the end.

        Raises:
            DamagedFile: it is.
        """
        if trouble.on_error == "stop" and self.compressed:
            while self.stream.read(BUFFER_BYTES):
                pass


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turns an `OSError` into an error that names `path`: an `UnreadableFile`, or for what passes a
    plain `DataError`, which no recipe skips."""
    try:
        yield
    except OSError as error:
        cause, remedy = explain_os_error(error, "check the path")
        refusal = DataError if error.errno in _PASSING else UnreadableFile
        raise refusal(f"cannot read the file: {cause}", shown(str(path)), remedy) from error


@contextmanager
def open_file(path: str) -> Iterator[io.BufferedReader]:
    """A file as it is, to be read from anywhere if its file system can.

    Raises:
        UnreadableFile: also while it is read.
    """
    if remote.is_remote(path):
        with remote.open_file(path) as file:
            yield file
    else:
        with reading(path), open(path, "rb") as file:
            yield file


@contextmanager
def opened(path: str) -> Iterator[Content]:
    """The content of a file; if that is not compressed, it can be read from anywhere.

    Raises:
        UnreadableFile, DamagedFile: also while it is read.
    """
    with open_file(path) as file:
        stream = decompressing(file, path)
        compressed = stream is not file
        size = None
        if not compressed and not remote.is_remote(path):
            size = os.fstat(file.fileno()).st_size
        yield Content(stream, size, compressed)


def list_files(pattern: str, example: str) -> list[Part]:
    """The files that a path or pattern matches, with their sizes, in order.

    Raises:
        DataError: there are none.
    """
    if remote.is_remote(pattern):
        return remote.list_files(pattern)
    parts = []
    for name, _ in match_files(pattern, example):
        with reading(name):
            parts.append(Part(name, size=os.path.getsize(name)))
    return parts


def cut_large(part: Part, limit: int) -> list[Part]:
    """A large local file in parts of `limit` bytes; if it is compressed or remote, as it is."""
    if remote.is_remote(part.path) or part.size is None or part.size <= limit:
        return [part]
    try:
        with open_file(part.path) as file:
            compressed = compression(file.read(16)) is not None
    except UnreadableFile:
        # Reading it says so, or counts it.
        return [part]
    if compressed:
        return [part]
    return byte_ranges(part.path, part.size, limit, part.cut)
