"""Token ids of a remote file: from its copy in the cache, and by ranges of bytes until there is
one."""

import hashlib
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from archscale.data.cache import Cache, the_cache
from archscale.data.remote import RemotePath
from archscale.errors import DataError

_CHUNK = 1 << 24  # bytes asked for at a time where a whole file is copied
_AGAIN = 60.0  # seconds until copying, or looking whether the object is the same, is tried again


class RemoteTokens:
    """[count] token ids, of which slices are read; the first one asks for a copy in the background.

    Args:
        place: the file.
        dtype: of its ids.
        offset: bytes before the first.
        count: how many.
        verify: raises DataError for a copy that is damaged; None: its size is all that is known.

    Raises:
        DataError: from reading: the object changed since it was opened, its copy is damaged, or the
            store cannot be read.
    """

    def __init__(
        self,
        place: RemotePath,
        dtype: np.dtype,
        offset: int,
        count: int,
        verify: Callable[[Path], object] | None = None,
    ):
        self._place, self._dtype, self._offset, self._count = place, dtype, offset, count
        self._verify = verify
        self._version = place.version()
        # Without a mark of the version, a copy would be read for ever, whatever stands there.
        self._cache = the_cache() if self._version.tag else None
        mark = f"{place.url}\n{self._version.size}\n{self._version.tag}"
        self._name = f"{hashlib.sha256(mark.encode()).hexdigest()[:32]}-{place.name}"
        self._checked = time.monotonic()
        self._asked = -_AGAIN
        self._failure: DataError | None = None

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(self._count)
        first = self._offset + start * self._dtype.itemsize
        last = self._offset + max(start, stop) * self._dtype.itemsize
        cache = self._cache
        if cache is not None and (copy := cache.read(self._name, self._version.size)) is not None:
            return copy[first:last].view(self._dtype)
        if self._failure is not None:
            raise self._failure
        if cache is not None and cache.writable and time.monotonic() - self._asked > _AGAIN:
            self._asked = time.monotonic()
            _WORKER.ask(self, cache)
        if time.monotonic() - self._checked > _AGAIN:
            self._checked = time.monotonic()
            self._refuse_other()
        return np.frombuffer(self._read(first, last), self._dtype)

    @property
    def copied(self) -> Path | None:
        """The copy that is read; None where there is none."""
        path = self._cache and self._cache.directory / self._name
        return path if path and path.exists() else None

    def copy(self, cache: Cache) -> bool:
        """Copies the whole file into the cache; whether it is there now."""
        return cache.add(self._name, self._version.size, self._download)

    def copy_or_remember(self, cache: Cache) -> None:
        """As `copy`, in a thread of its own: the next read raises what went wrong."""
        try:
            self.copy(cache)
        except DataError as error:
            self._failure = error
        except Exception as error:
            self._failure = DataError(f"cannot copy it: {error}", str(self._place), _READ_AGAIN)

    def _download(self, file: BinaryIO) -> None:
        for start in range(0, self._version.size, _CHUNK):
            file.write(self._read(start, min(start + _CHUNK, self._version.size)))
        file.flush()
        self._refuse_other()
        if self._verify is not None:
            try:
                self._verify(Path(file.name))
            except DataError as error:
                raise DataError(error.what, str(self._place), error.remedy) from error

    def _read(self, start: int, stop: int) -> bytes:
        try:
            return self._place.read_bytes(start, stop)
        except FileNotFoundError as error:
            raise _deleted(self._place) from error

    def _refuse_other(self) -> None:
        """DataError where another object has taken the place of the one that was opened."""
        try:
            version = self._place.version()
        except FileNotFoundError as error:
            raise _deleted(self._place) from error
        if version != self._version:
            problem = "another object stands there since it was opened"
            raise DataError(problem, str(self._place), _READ_AGAIN)


_READ_AGAIN = "check that nobody writes there, then give the same command again"


def _deleted(place: RemotePath) -> DataError:
    return DataError("the object was deleted since it was opened", str(place), _READ_AGAIN)


class _Worker:
    """A thread that copies files, one after another, as long as the process lives."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[RemoteTokens, Cache]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._guard = threading.Lock()

    def ask(self, tokens: RemoteTokens, cache: Cache) -> None:
        self._queue.put((tokens, cache))
        with self._guard:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(
                    target=self._work, daemon=True, name="archscale-cache"
                )
                self._thread.start()

    def _work(self) -> None:
        while True:
            tokens, cache = self._queue.get()
            tokens.copy_or_remember(cache)


_WORKER = _Worker()
