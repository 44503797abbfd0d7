"""Whether files are those of the last time, by content."""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from archscale.data.preparing.sources.units import shown
from archscale.data.preparing.trouble import UnreadableFile
from archscale.errors import explain_os_error

# of a file's beginning and end go into its fingerprint: all of a small one, O(1) of a huge one
_END_BYTES = 1 << 20


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


def fingerprint_files(files: Iterable[tuple[str, Path]]) -> str:
    """sha256 over names, sizes, and the first and last MiB of each file: a change elsewhere in a
    larger file that keeps its size is not seen. Not times: a copy of the same files is the same
    source."""
    total = hashlib.sha256()
    for name, path in files:
        with reading(path), open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            digest = hashlib.sha256(file.read(_END_BYTES))
            file.seek(max(_END_BYTES, size - _END_BYTES))
            digest.update(file.read(_END_BYTES))
        line = f"{name}\0{size}\0{digest.hexdigest()}\n"
        total.update(line.encode("utf-8", "surrogateescape"))
    return total.hexdigest()
