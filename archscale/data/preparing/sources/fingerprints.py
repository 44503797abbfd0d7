"""Whether files are those of the last time, by content."""

import errno
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from archscale.data.preparing.sources.units import shown
from archscale.data.preparing.trouble import UnreadableFile
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


def hash_file(path: str | Path) -> str:
    """sha256 of a whole file, in hexadecimal digits."""
    with reading(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
