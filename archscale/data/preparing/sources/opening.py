"""Files opened for reading: local or remote, decompressed, and from anywhere in them."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from archscale.data.preparing.sources import remote
from archscale.data.preparing.sources.compressed import compression, decompressing
from archscale.data.preparing.sources.fingerprints import reading
from archscale.data.preparing.sources.globbing import match_files
from archscale.data.preparing.sources.units import Part, byte_ranges


class Content(NamedTuple):
    """The decompressed content of a file.

    Attributes:
        stream: to read from.
        size: bytes of the content; None where only reading tells.
    """

    stream: io.BufferedReader
    size: int | None


@contextmanager
def opened(path: str) -> Iterator[Content]:
    """A file to read; a local one that is not compressed can be read from anywhere.

    Raises:
        UnreadableFile, DamagedFile: also while it is read.
    """
    if remote.is_remote(path):
        with remote.opened(path) as file:
            yield Content(decompressing(file, path), None)
        return
    with reading(path), open(path, "rb") as file:
        stream = decompressing(file, path)
        yield Content(stream, os.fstat(file.fileno()).st_size if stream is file else None)


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
    with reading(part.path), open(part.path, "rb") as file:
        if compression(file.read(16)) is not None:
            return [part]
    return byte_ranges(part.path, part.size, limit, part.cut)
