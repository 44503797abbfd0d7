"""Which local files a pattern matches: each real file once, in the order of their names."""

import fnmatch
import os
import re
from collections import deque
from collections.abc import Iterator
from glob import has_magic
from pathlib import Path
from typing import NamedTuple

from archscale.data.preparing.sources.units import shown
from archscale.errors import DataError, explain_os_error


class _Folder(NamedTuple):
    """A folder by the name under which it was reached ("": the current one), through how many
    symbolic links, and where it is."""

    links: int
    name: str
    real: str

    def inner(self, entry: "os.DirEntry[str] | _Named") -> tuple[int, str, str]:
        """Links, name and place of what is in it."""
        path = os.path.join(self.name, entry.name)
        if entry.is_symlink():
            return self.links + 1, path, os.path.realpath(path)
        return self.links, path, os.path.join(self.real, entry.name)


class _File(NamedTuple):
    """A file, through how many symbolic links it was reached, and where it is."""

    links: int
    name: str
    real: str


def match_files(pattern: str, example: str) -> list[tuple[str, Path]]:
    """(name, path) of the regular files that a pattern matches, sorted by name.

    `~` is the home directory; `**` stands for folders at any depth, through links as well; hidden
    files match only what begins with a dot. A file reached under several names through symbolic
    links is there once, if possible under a name without links. A pattern that is the name of an
    existing file is that file, whatever brackets it has.

    Args:
        example: a pattern for files of this kind, such as "*.txt", for the remedy.

    Raises:
        DataError: no file matches.
    """
    expanded = os.path.expanduser(pattern)
    if os.path.isfile(expanded):
        return [(expanded, Path(expanded))]
    if os.path.isdir(expanded):
        everything = f"{shown(pattern).rstrip('/')}/**/{example}"
        raise DataError("the path is a folder", shown(pattern), f"write {everything}")
    files = match(expanded)
    if not files:
        raise DataError(
            "no file matches",
            shown(pattern),
            "correct the source's path; relative ones start at the current directory",
        )
    return files


def match(pattern: str) -> list[tuple[str, Path]]:
    """As `match_files`, for a pattern without `~`; empty where no file matches."""
    root = "/" if pattern.startswith("/") else ""
    segments = [segment for segment in pattern.split("/") if segment]
    if not segments or pattern.endswith("/"):
        return []
    files: dict[str, _File] = {}
    for file in _expand(_Folder(0, root, os.path.realpath(root or ".")), segments):
        files[file.real] = min(file, files.get(file.real, file))
    return [(name, Path(name)) for name in sorted(file.name for file in files.values())]


def _expand(folder: _Folder, segments: list[str]) -> Iterator[_File]:
    """The regular files below a folder that match the segments of a pattern."""
    segment, *rest = segments
    if segment == "**":
        for inner in _folders(folder):
            # At the end, it matches the files at any depth.
            yield from _expand(inner, rest or ["*"])
        return
    for entry in _matching(folder, segment):
        if rest and entry.is_dir():
            yield from _expand(_Folder(*folder.inner(entry)), rest)
        elif not rest and entry.is_file():
            yield _File(*folder.inner(entry))


class _Named:
    """What `os.scandir` would give for a name that is not to be looked for: "..", or without
    wildcards."""

    def __init__(self, folder: _Folder, name: str):
        self.name = name
        self._path = os.path.join(folder.name, name)

    def is_symlink(self) -> bool:
        # The real path of ".." is not that of the folder with ".." behind it.
        return self.name in (".", "..") or os.path.islink(self._path)

    def is_dir(self) -> bool:
        return os.path.isdir(self._path)

    def is_file(self) -> bool:
        return os.path.isfile(self._path)


def _matching(folder: _Folder, segment: str) -> list["os.DirEntry[str] | _Named"]:
    if not has_magic(segment):
        return [_Named(folder, segment)]
    fits = re.compile(fnmatch.translate(segment)).match
    hidden = segment.startswith(".")
    return [
        entry
        for entry in _list(folder)
        if fits(entry.name) and (hidden or not entry.name.startswith("."))
    ]


def _list(folder: _Folder) -> list["os.DirEntry[str]"]:
    try:
        with os.scandir(folder.name or ".") as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        cause, remedy = explain_os_error(error, "correct the source's path")
        where = shown(folder.name or ".")
        raise DataError(f"cannot list the folder: {cause}", where, remedy) from error


def _folders(top: _Folder) -> Iterator[_Folder]:
    """A folder and all below it that are not hidden, each real one once; those behind links come
    last, or a folder would be known by a link to it that stands before it."""
    waiting = deque([top])
    behind_links: deque[_Folder] = deque()
    seen: set[str] = set()
    while waiting or behind_links:
        folder = waiting.popleft() if waiting else behind_links.popleft()
        if folder.real in seen:
            continue
        seen.add(folder.real)
        yield folder
        for entry in _list(folder):
            if entry.is_dir() and not entry.name.startswith("."):
                queue = behind_links if entry.is_symlink() else waiting
                queue.append(_Folder(*folder.inner(entry)))
