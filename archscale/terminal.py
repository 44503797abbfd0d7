"""Standard output and standard error of every command: what a terminal cannot show is spelled out,
and a reader who leaves, such as `head`, is not a failure."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import shutil
import sys
from collections.abc import Sequence
from typing import Any

SPELLED = {
    **{"×": "x", "·": "*", "−": "-", "–": "-", "…": "...", "‖": "||", "′": "'", "½": "1/2"},
    **{"→": "->", "←": "<-", "≤": "<=", "≥": ">=", "≈": "~", "∝": "~", "±": "+/-", "∞": "inf"},
    **{"²": "^2", "³": "^3", "ᵀ": "^T", "√": "sqrt", "Σ": "sum ", "σ": "sigma", "η": "eta"},
    **{"λ": "lambda", "θ": "theta", "ρ": "rho", "μ": "mu", "Δ": "Delta", "⟨": "<", "⟩": ">"},
}


class ReaderLeft(BrokenPipeError):
    """Whoever read standard output has closed it."""


class _Pipe(io.FileIO):
    """A file descriptor whose reader may leave; what is written after that is lost.

    Attributes:
        essential: whether a command is over with its reader: the first write that does not arrive
            raises ReaderLeft.
        left: whether it has raised that.
        warning: said on standard error when the reader leaves and the command goes on.
    """

    essential = left = False
    warning = ""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            # On the descriptor itself, for what does not write through this object.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
        if self.essential:
            self.left = True
            raise ReaderLeft("standard output was closed")
        if self.warning:
            print(self.warning, file=sys.stderr, flush=True)
        return len(data)


def prepare() -> None:
    """Set up both streams of this process, once; one that something else has replaced stays as it
    is."""
    codecs.register_error("spelled", _spell)
    # Both first: once its reader has left, standard output may have to tell standard error.
    if sys.stderr is sys.__stderr__:
        sys.stderr = _outliving(2, sys.stderr)
    if sys.stdout is sys.__stdout__:
        sys.stdout = _outliving(1, sys.stdout)
        if pipe := _pipe_of(sys.stdout):
            pipe.essential = True


def go_on_without_reader() -> None:
    """From here on standard output is a log of work whose result lies elsewhere: when its reader
    leaves, the work goes on after a warning."""
    if pipe := _pipe_of(sys.stdout):
        pipe.essential = False
        pipe.warning = "archscale: warning: standard output was closed; the work goes on without it"


def reader_left() -> bool:
    """Whether the command is over because its reader left."""
    pipe = _pipe_of(sys.stdout)
    return pipe is not None and pipe.left


def flush() -> None:
    """Write out what is buffered, if anybody reads it."""
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()


def _outliving(descriptor: int, stream: Any) -> io.TextIOWrapper:
    """A stream like `stream` (None: it was closed before this process began), with `_Pipe` below
    it."""
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8")
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Pipe(descriptor, "w", closefd=False)),
        encoding=stream.encoding,
        errors="spelled",
        # Also where Python was told not to buffer at all.
        line_buffering=stream.line_buffering or stream.write_through,
    )


def _pipe_of(stream: Any) -> _Pipe | None:
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    return raw if isinstance(raw, _Pipe) else None


def _spell(error: UnicodeError) -> tuple[str, int]:
    """For `codecs.register_error`: characters that the encoding lacks, in ASCII."""
    assert isinstance(error, UnicodeEncodeError)
    lacking = error.object[error.start : error.end]
    ascii_only = (c.encode("ascii", "backslashreplace").decode() for c in lacking)
    return "".join(SPELLED.get(c, code) for c, code in zip(lacking, ascii_only)), error.end


def table(rows: Sequence[Sequence[str]], width: int | None = None) -> list[str]:
    """Lines of a table whose first row is its head, columns aligned; where they do not fit, a block
    for each row with a line for each of its cells.

    Args:
        width: columns of the terminal; None: those of this one, any where there is none.
    """
    if width is None:
        known = sys.stdout.isatty() or os.environ.get("COLUMNS")
        width = shutil.get_terminal_size().columns if known else sys.maxsize
    widths = [max(map(len, column)) for column in zip(*rows)]
    if sum(widths) + 2 * (len(widths) - 1) <= width:
        padded = ([f"{cell:<{size}}" for cell, size in zip(row, widths)] for row in rows)
        return ["  ".join(row).rstrip() for row in padded]
    head, *content = rows
    label = max(map(len, head))
    return [
        line
        for row in content
        for line in (
            f"{head[0]} {row[0]}",
            *(f"  {name:<{label}}  {cell}" for name, cell in zip(head[1:], row[1:]) if cell),
        )
    ]
