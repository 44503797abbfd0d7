"""Files as streams of bytes, whatever they are compressed with; told by their first bytes, since
names lie."""

import bz2
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import PurePath
from typing import Any, BinaryIO

from archscale.data.preparing.sources.units import shown
from archscale.data.preparing.trouble import DamagedFile
from archscale.errors import one_line

BUFFER_BYTES = 1 << 17
# At a time into the decompressor, which may give a thousand times as much.
_COMPRESSED_BYTES = 1 << 12
_ZSTD_WINDOW = 1 << 31  # the largest that the format has: `zstd --long=31`

_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"\xfd7zXZ\x00": "xz",
    b"\x5d\x00\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    **{bytes([0x50 + i]) + b"\x2a\x4d\x18": "zstd" for i in range(16)},
    **{b"BZh%d1AY&SY" % level: "bzip2" for level in range(1, 10)},
    **{b"BZh%d\x17rE8P\x90" % level: "bzip2" for level in range(1, 10)},
}
_SUFFIXES = {
    ".gz": "gzip",
    ".gzip": "gzip",
    ".zst": "zstd",
    ".zstd": "zstd",
    ".xz": "xz",
    ".bz2": "bzip2",
}
_ARCHIVES = {
    b"PK\x03\x04": "a zip archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"\x04\x22\x4d\x18": "an LZ4 file",
    b"\x1f\x9d": "a file of `compress`",
}


def compression(head: bytes) -> str | None:
    """gzip, zstd, xz or bzip2 by the first bytes of a file; None: not compressed."""
    return next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), None)


def _decompressors(kind: str) -> tuple[Callable[[], Any], tuple[type[Exception], ...]]:
    """What makes a decompressor of one member or frame, and what that raises."""
    if kind == "gzip":
        return lambda: zlib.decompressobj(wbits=31), (zlib.error,)
    if kind == "bzip2":
        return bz2.BZ2Decompressor, (OSError, ValueError)
    if kind == "xz":
        return lzma.LZMADecompressor, (lzma.LZMAError,)
    import zstandard

    context = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
    return context.decompressobj, (zstandard.ZstdError,)


def _damaged(path: str, kind: str, reason: str) -> DamagedFile:
    return DamagedFile(
        f"not a whole {kind} file: {reason}",
        shown(path),
        "copy the file again, or leave it out of the source's path",
    )


def _decompressed(file: BinaryIO, kind: str, path: str) -> Iterator[bytes]:
    """The content, in pieces, of all members or frames that follow one another."""
    make, errors = _decompressors(kind)
    decompressor = None
    data = file.read(_COMPRESSED_BYTES)
    while data:
        if decompressor is None:
            # Tapes and xz fill up with zeros.
            data = data.lstrip(b"\0")
            if not data:
                data = file.read(_COMPRESSED_BYTES)
                continue
            decompressor = make()
        try:
            piece = decompressor.decompress(data)
        except errors as error:
            reason = one_line(str(error)) or "the data are damaged"
            raise _damaged(path, kind, reason) from error
        if piece:
            yield piece
        data = b""
        if decompressor.eof:
            data, decompressor = decompressor.unused_data, None
        data = data or file.read(_COMPRESSED_BYTES)
    if decompressor is not None:
        raise _damaged(path, kind, "it ends too early")


class _Pieces(io.RawIOBase):
    """Pieces of bytes as a file."""

    def __init__(self, pieces: Iterator[bytes]):
        self._pieces = pieces
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._rest = memoryview(piece)
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


def buffered(pieces: Iterator[bytes]) -> io.BufferedReader:
    """Pieces of bytes as a file with lines."""
    return io.BufferedReader(_Pieces(pieces), BUFFER_BYTES)


def decompressing(file: io.BufferedReader, path: str) -> io.BufferedReader:
    """The content of a file: itself if it is not compressed.

    Raises:
        DamagedFile: a name that promises compressed data which are not there, or an archive.
            Damage further on is raised when it is reached.
    """
    head = file.peek(16)[:16]
    kind = compression(head)
    if kind is not None:
        return buffered(_decompressed(file, kind, path))
    promised = _SUFFIXES.get(PurePath(path).suffix.lower())
    if promised is not None:
        raise DamagedFile(
            f"called {PurePath(path).suffix} but not {promised}: {_description(file)}",
            shown(path),
            "copy the file again, or rename it if that is what it should hold",
        )
    archive = next((text for magic, text in _ARCHIVES.items() if head.startswith(magic)), None)
    if archive is not None:
        raise DamagedFile(f"{archive}, not text", shown(path), "unpack it")
    return file


def _description(file: io.BufferedReader) -> str:
    """What a file holds, by its beginning."""
    head = file.peek(40)[:40]
    if not head:
        return "it is empty"
    text = head.decode("utf-8", "replace")
    if text.replace("\n", " ").isprintable() and "\ufffd" not in text[:-1]:
        return f"it begins with the text {one_line(text)!r}"
    return f"it begins with the bytes {head[:8].hex(' ')}"
