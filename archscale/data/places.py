"""Files here and behind URLs, read alike."""

import glob
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

from archscale.data.remote import RemotePath, is_remote
from archscale.data.remote_tokens import RemoteTokens
from archscale.errors import DataError

Place = Path | RemotePath
_TOKEN_FILES = (".bin", ".ds", ".idx")


class Tokens(Protocol):
    """[n] token ids; a slice of them is an array."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice) -> np.ndarray: ...


def locate(path: str | Place) -> Place:
    """A path, or what a URL names."""
    if isinstance(path, (Path, RemotePath)):
        return path
    return RemotePath(path) if is_remote(path) else Path(path)


def read_start(place: Place, count: int) -> tuple[bytes, int]:
    """The first `count` bytes, or all if there are fewer, and the size of the file. OSError if it
    cannot be read; DataError if it is remote."""
    if isinstance(place, RemotePath):
        size = place.version().size
        return place.read_bytes(0, min(count, size)), size
    with open(place, "rb") as file:
        return file.read(count), os.fstat(file.fileno()).st_size


def read_range(place: Place, start: int, stop: int) -> bytes:
    """Bytes `start` to `stop`. OSError if a local file cannot be read; DataError if a remote one
    cannot, or is shorter."""
    if isinstance(place, RemotePath):
        return place.read_bytes(start, stop)
    with open(place, "rb") as file:
        file.seek(start)
        return file.read(stop - start)


def map_tokens(
    place: Place,
    dtype: np.dtype,
    offset: int,
    count: int,
    verify: Callable[[Path], object] | None = None,
) -> Tokens:
    """The token ids in a file: memory-mapped and read-only where it is local. Arguments and errors
    as for `RemoteTokens`."""
    if count == 0:  # an empty file region cannot be mapped
        return np.empty(0, dtype)
    if isinstance(place, RemotePath):
        return RemoteTokens(place, dtype, offset, count, verify)
    # A plain view of the map: np.memmap's own slicing costs more than copying a window.
    return np.memmap(place, dtype, "r", offset, (count,)).view(np.ndarray)


def files_in(place: Place) -> list[Place]:
    """Files of a directory, those that match a pattern, or none; sorted by name.

    Raises:
        DataError: an entry is called as one of token ids, and is no file.
    """
    if isinstance(place, RemotePath):
        return list(place.files())
    if place.is_dir():
        paths = list(place.iterdir())
    elif place.exists():
        return []
    else:
        paths = [Path(name) for name in glob.glob(str(place), recursive=True)]
    for path in paths:
        if path.suffix in _TOKEN_FILES and not path.is_file():
            problem = "a link to nothing" if path.is_symlink() else "not a file"
            remedy = "restore the file, or move this entry elsewhere to read the others alone"
            raise DataError(f"{problem} among files of token ids", str(path), remedy)
    return [*sorted(path for path in paths if path.is_file())]
