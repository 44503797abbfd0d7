"""Files behind URLs: s3://, gs://, https://, hf:// and whatever else fsspec knows."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from archscale.data.preparing.sources.compressed import buffered
from archscale.data.preparing.sources.units import Part, shown
from archscale.data.preparing.trouble import UnreadableFile
from archscale.errors import ArchscaleError, DataError

_READ_BYTES = 1 << 20
_EXTRAS = {"hf": "hf"}  # the extra that has what a protocol needs; of the others, remote


def is_remote(path: str) -> bool:
    return "://" in path


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """Turns whatever a file system raises into one line: each has dozens of classes of its own."""
    try:
        yield
    except (ArchscaleError, GeneratorExit):
        raise
    except ImportError as error:
        protocol = url.partition("://")[0]
        remedy = f"pip install archscale[{_EXTRAS.get(protocol, 'remote')}]"
        reason = " ".join(str(error).split())
        raise DataError(f"cannot read {protocol}://: {reason}", shown(url), remedy) from error
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, FileNotFoundError):
            reason = "no such file"
        remedy = "check the URL, the network and your credentials"
        raise UnreadableFile(f"cannot read the file: {reason}", shown(url), remedy) from error


def list_files(pattern: str) -> list[Part]:
    """The files that a URL matches, with their sizes, in order.

    Raises:
        DataError: there are none, or they cannot be listed.
    """
    with _explained(pattern):
        import fsspec

        system, path = fsspec.url_to_fs(pattern)
        if _is_pattern(pattern) and not _is_file(system, path):
            listing = system.glob(path, detail=True).values()
        else:
            listing = [system.info(path)]
        files = sorted(
            (system.unstrip_protocol(entry["name"]), entry.get("size"))
            for entry in listing
            if entry["type"] == "file"
        )
    if not files:
        raise DataError("no file matches", shown(pattern), "correct the source's path")
    return [Part(name, size=size) for name, size in files]


def _is_pattern(url: str) -> bool:
    """In https://, "?" begins the query."""
    return "*" in url or (not url.startswith("http") and any(c in url for c in "?["))


def _is_file(system: Any, path: str) -> bool:
    return "*" not in path and system.isfile(path)


@contextmanager
def opened_anywhere(url: str) -> Iterator[Any]:
    """A remote file that can be read from anywhere.

    Raises:
        UnreadableFile: also while it is read.
    """
    with _explained(url):
        import fsspec

        system, path = fsspec.url_to_fs(url)
        with system.open(path, "rb") as file:
            yield file


@contextmanager
def opened(url: str) -> Iterator[io.BufferedReader]:
    """A remote file that is read from beginning to end.

    Raises:
        UnreadableFile: also while it is read.
    """
    with opened_anywhere(url) as file:
        yield buffered(iter(lambda: file.read(_READ_BYTES), b""))
