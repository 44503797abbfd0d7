"""A file or directory behind a URL: `s3://`, `gs://`, `https://`, `hf://` and whatever else fsspec
speaks."""

import functools
import random
import time
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from archscale.errors import ArchscaleError, DataError, one_line

# Seconds to wait before a request that failed for a passing reason is made again.
DELAYS = (0.5, 1.0, 2.0, 4.0)
SILENCE = 30.0  # seconds after which a web server that does not answer has failed
REQUESTS = 16  # made at a time, where there are many
_PACKAGES = {
    "s3": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "http": "aiohttp",
    "https": "aiohttp",
    "hf": "huggingface_hub",
}
# What stores call the mark of an object's version, most exact first.
_TAGS = (
    "ETag",
    "etag",
    "md5Hash",
    "blob_id",
    "Last-Modified",
    "LastModified",
    "updated",
    "created",
    "mtime",
)


class Version(NamedTuple):
    """What tells an object from another that had its name: bytes, and the store's own mark."""

    size: int
    tag: str


def is_remote(path: object) -> bool:
    return "://" in str(path)


class RemotePath:
    """As much of `pathlib.Path` as reading data needs, and ranges of bytes.

    Requests that fail for a passing reason are repeated after each of `DELAYS`.

    Raises:
        DataError: from every request: a missing package, no network, no permission.
        FileNotFoundError: from every request for an object that is not there.

    Attributes:
        error: what is raised instead of `DataError`, by what is stored there.
        failed: how its text begins.
    """

    error: type[ArchscaleError] = DataError
    failed = "cannot read it"

    def __init__(self, url: str):
        self.url = url.rstrip("/")

    def __str__(self) -> str:
        return self.url

    def __repr__(self) -> str:
        return f"RemotePath({self.url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and other.url == self.url

    def __hash__(self) -> int:
        return hash(self.url)

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    def with_name(self, name: str) -> "RemotePath":
        return RemotePath(f"{self.url.rpartition('/')[0]}/{name}")

    def version(self) -> Version:
        """Asks the store, every time."""
        details = self._request("info")
        size = details.get("size")
        if details.get("type") == "directory":
            raise FileNotFoundError(self.url)
        if size is None:
            raise self.error("the server does not say how large it is", self.url, _COPY)
        tag = next((str(details[key]) for key in _TAGS if details.get(key)), "")
        return Version(int(size), tag)

    def is_file(self) -> bool:
        try:
            self.version()
        except FileNotFoundError:
            return False
        return True

    def read_bytes(self, start: int = 0, stop: int | None = None) -> bytes:
        """The content from byte `start` up to `stop`, or to the end."""
        if stop is None:
            return self._request("cat_file", **({"start": start} if start else {}))
        if stop <= start:
            return b""
        raw = self._request("cat_file", start=start, end=stop)
        if len(raw) > stop - start:
            raise self.error("the server sends whole files instead of ranges", self.url, _COPY)
        if len(raw) < stop - start:
            raise self.error(
                f"truncated: {len(raw)} of the {stop - start} bytes from byte {start} on",
                self.url,
                "check the object; it may have changed while it was read",
            )
        return raw

    def files(self) -> list["RemotePath"]:
        """Files of a directory or of a pattern with `*`, sorted by name; none where there is
        nothing."""
        if "*" in self.url or "?" in self.url or "[" in self.url:
            paths = self._request("glob")
        else:
            try:
                entries = self._request("ls", detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return []
            paths = [entry["name"] for entry in entries if entry["type"] == "file"]
        filesystem, _ = self._opened
        full = [path if is_remote(path) else filesystem.unstrip_protocol(path) for path in paths]
        return [RemotePath(url) for url in sorted(full) if url.rstrip("/") != self.url]

    @functools.cached_property
    def _opened(self) -> tuple[Any, str]:
        """fsspec's file system, and the path in it."""
        scheme = self.url.partition("://")[0]
        try:
            from fsspec.core import url_to_fs

            return url_to_fs(self.url, use_listings_cache=False, **_patience(scheme))
        except ImportError as error:
            package = _PACKAGES.get(scheme, "fsspec")
            problem = f"{scheme}:// needs the package {package}, which is not installed"
            raise self.error(problem, self.url, f"pip install {package}") from error
        except ValueError as error:
            raise self.error(
                f"cannot read {scheme}://: {one_line(str(error))}",
                self.url,
                f"use one of {', '.join(f'{name}://' for name in _PACKAGES)}, or a local path",
            ) from error

    def _request(self, method: str, *more: Any, **arguments: Any) -> Any:
        filesystem, path = self._opened
        call: Callable[..., Any] = getattr(filesystem, method)
        for attempt in range(len(DELAYS) + 1):
            try:
                return call(path, *more, **arguments)
            except Exception as error:  # every store raises its own
                reason = _reason(error)
                if isinstance(reason, FileNotFoundError) or _status(reason) in (404, 410):
                    raise FileNotFoundError(self.url) from error
                if isinstance(reason, NotADirectoryError):
                    raise
                if lasts(reason) or attempt == len(DELAYS):
                    raise self._problem(reason, attempt) from error
                # A generator of its own: nothing here may move the state of a seeded one.
                time.sleep(DELAYS[attempt] * random.SystemRandom().uniform(0.5, 1.5))
        raise AssertionError("the last attempt returns or raises")

    def _problem(self, error: BaseException, repeated: int) -> ArchscaleError:
        cause = one_line(str(error)) or type(error).__name__
        if lasts(error):
            remedy = "check the URL, and the credentials of this machine for that store"
        else:
            cause = f"{cause} (asked {repeated + 1} times)"
            remedy = "check the network and the store, then give the same command again"
        return self.error(f"{self.failed}: {cause}", self.url, remedy)


_COPY = "copy the files to a local directory, or to an object store"


def _patience(scheme: str) -> dict[str, Any]:
    """Options by which a server that accepts and does not answer fails after `SILENCE` seconds;
    aiohttp would wait for minutes. The stores' own packages have such limits."""
    if scheme not in ("http", "https"):
        return {}
    from aiohttp import ClientTimeout

    timeout = ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE)
    return {"client_kwargs": {"timeout": timeout}}


def _reason(error: BaseException) -> BaseException:
    """fsspec calls a file missing where the server could not be reached; the cause says which."""
    cause = error.__cause__
    if not isinstance(error, FileNotFoundError) or isinstance(cause, LookupError):
        return error
    return cause or error


def _status(error: BaseException) -> int | None:
    """HTTP status that a store's error carries."""
    status = getattr(error, "status", None)
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    elif response is not None:
        status = getattr(response, "status_code", status)
    return status if isinstance(status, int) else None


def lasts(error: BaseException) -> bool:
    """Whether asking again cannot help."""
    if isinstance(error, (PermissionError, ImportError, NotImplementedError, TypeError)):
        return True
    status = _status(error)
    if status is not None:
        return 400 <= status < 500 and status not in (408, 425, 429)
    return "Credential" in type(error).__name__
