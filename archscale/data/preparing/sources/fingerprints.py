"""Whether a local file is that of the last time: by size and time, or by content."""

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

from archscale.data.preparing.sources.opening import reading
from archscale.data.preparing.sources.units import shown
from archscale.errors import DataError


class Stamp(NamedTuple):
    """Size in bytes and time of the last change of a file."""

    size: int
    mtime_ns: int


class LocalFile(NamedTuple):
    """A file as it was when it was listed; `name` does not depend on the machine."""

    name: str
    path: str
    stamp: Stamp

    def refuse_change(self) -> None:
        """DataError if it is another one now."""
        if stamp(self.path) != self.stamp:
            remedy = "give the same command again when nothing writes to it"
            raise DataError("the file changed while it was read", shown(self.path), remedy)


def stamp(path: str | Path) -> Stamp:
    """That of a file now.

    Raises:
        UnreadableFile: there is none.
    """
    with reading(path):
        status = os.stat(path)
    return Stamp(status.st_size, status.st_mtime_ns)


def hash_file(path: str | Path) -> str:
    """sha256 of a whole file, in hexadecimal digits."""
    with reading(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
