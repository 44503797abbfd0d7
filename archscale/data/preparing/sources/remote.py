"""Files behind URLs: s3://, gs://, https://, hf:// and whatever else fsspec knows."""

import io
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from archscale.data.preparing.sources.units import Part, shown
from archscale.data.preparing.trouble import UnreadableFile
from archscale.errors import ArchscaleError, DataError, one_line

_READ_BYTES = 1 << 20
_EXTRAS = {"hf": "hf"}  # the extra that has what a protocol needs; of the others, remote

# What file systems of fsspec call the version of a file, that of its content first.
_MARKS = (
    "ETag",
    "etag",
    "checksum",
    "md5Hash",
    "Content-MD5",
    "Digest",
    "blob_id",
    "generation",
    "mtime",
    "LastModified",
    "last_modified",
    "Last-Modified",
    "modified",
    "updated",
    "created",
)


def is_remote(path: str) -> bool:
    return "://" in path


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """Turns whatever a file system raises into one line: each has dozens of classes of its own."""
    try:
        yield
    except ArchscaleError:
        raise
    except ImportError as error:
        protocol = url.partition("://")[0]
        remedy = f"pip install archscale[{_EXTRAS.get(protocol, 'remote')}]"
        reason = one_line(str(error))
        raise DataError(f"cannot read {protocol}://: {reason}", shown(url), remedy) from error
    except Exception as error:
        cause = _cause(error)
        plain = isinstance(cause, FileNotFoundError)
        reason = "no such file" if plain else one_line(str(cause))[:300] or type(cause).__name__
        remedy = "check the URL, the network and your credentials"
        # What is not there can be left out; the rest may be there when it is tried again.
        refusal = UnreadableFile if is_missing(error) else DataError
        raise refusal(f"cannot read the file: {reason}", shown(url), remedy) from error


def is_missing(error: BaseException) -> bool:
    """Whether an error of a file system says that a file is not there."""
    cause = _cause(error)
    return isinstance(cause, FileNotFoundError) or _status(cause) in (404, 410)


def _cause(error: BaseException) -> BaseException:
    """A web server that cannot be reached is a `FileNotFoundError` as well, by its cause."""
    while isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _status(error: BaseException) -> int | None:
    """The status in an error of HTTP: those of web servers, of object stores, of the hub."""
    response = getattr(error, "response", error)
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return getattr(response, "status", getattr(response, "status_code", None))


def list_files(pattern: str) -> list[Part]:
    """The files that a URL matches, with their sizes, in order.

    Raises:
        DataError: there are none, or they cannot be listed.
    """
    with _explained(pattern):
        from fsspec.core import url_to_fs

        system, path = url_to_fs(pattern)
        system.invalidate_cache()
        if _is_pattern(pattern) and not _is_file(system, path):
            listing = system.glob(path, detail=True).values()
        else:
            listing = [system.info(path)]
        parts = [_part(system, entry) for entry in listing if entry["type"] == "file"]
    if not parts:
        raise DataError("no file matches", shown(pattern), "correct the source's path")
    return sorted(parts, key=lambda part: part.path)


def _part(system: Any, entry: dict[str, Any]) -> Part:
    """A file as a listing describes it, or its store where the listing has no mark."""
    if not any(entry.get(key) for key in _MARKS):
        with suppress(FileNotFoundError):  # reading it says so, or counts it
            entry = entry | system.info(entry["name"])
    size = entry.get("size")
    words = [f"{key} {entry[key]}" for key in _MARKS if entry.get(key)][:1]
    if size is not None:
        words.append(f"{size} bytes")
    return Part(system.unstrip_protocol(entry["name"]), size=size, mark=", ".join(words))


def _is_pattern(url: str) -> bool:
    """In https://, "?" begins the query."""
    return "*" in url or (not url.startswith("http") and any(c in url for c in "?["))


def _is_file(system: Any, path: str) -> bool:
    return "*" not in path and system.isfile(path)


class _RemoteFile(io.RawIOBase):
    """A file of fsspec whose errors are explained."""

    def __init__(self, file: Any, url: str):
        self._file, self._url = file, url

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.seekable()

    def readinto(self, buffer: Any) -> int:
        with _explained(self._url):
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with _explained(self._url):
            return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        super().close()


def open_file(url: str) -> io.BufferedReader:
    """A remote file to read; from anywhere, if its file system can.

    Raises:
        UnreadableFile: it is not there.
        DataError: it cannot be reached; also while it is read.
    """
    with _explained(url):
        from fsspec.core import url_to_fs

        system, path = url_to_fs(url)
        return io.BufferedReader(_RemoteFile(system.open(path, "rb"), url), _READ_BYTES)
