"""Whether files are those of the last time, by content."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from archscale.data.preparing.sources.units import shown
from archscale.data.preparing.trouble import UnreadableFile
from archscale.errors import explain_os_error


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turns an `OSError` into an `UnreadableFile` that names `path`."""
    try:
        yield
    except OSError as error:
        cause, remedy = explain_os_error(error, "check the path")
        raise UnreadableFile(f"cannot read the file: {cause}", shown(str(path)), remedy) from error


def hash_file(path: str | Path) -> str:
    """sha256 of a whole file, in hexadecimal digits."""
    with reading(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
