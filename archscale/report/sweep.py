"""`archscale report SWEEP_DIR`: one self-contained HTML file about a sweep, its figures as SVG and
PNG, its tables as CSV."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

from archscale.errors import ArchscaleError, explain_os_error
from archscale.report.plot import draw, png_bytes, svg_text
from archscale.report.sweep_figures import make_figures
from archscale.report.sweep_fits import analyse
from archscale.report.sweep_page import Drawn, folder_of, render
from archscale.report.sweep_read import read_sweep
from archscale.report.sweep_tables import csv_text, make_tables


def write_sweep_report(directory: Path, out: Path | None = None) -> Path:
    """Write the report of a sweep, finished or not; returns where it lies. The same runs give the
    same files, byte for byte.

    Args:
        out: file to write; None: report.html in the sweep directory. Figures and tables lie beside
            it, in a folder of its name.

    Raises:
        ArchscaleError: the directory's sweep.yaml cannot be read, or nothing can be written.
    """
    path = out or directory / "report.html"
    sweep = read_sweep(directory)
    for warning in sweep.warnings:
        print(f"archscale: warning: {directory}: {warning}", file=sys.stderr)
    found = analyse(sweep)
    tables, figures = make_tables(sweep, found), make_figures(found)
    contents: dict[str, bytes] = {
        f"{name}.csv": csv_text(rows).encode() for name, rows in tables.items()
    }
    drawn: Drawn = []
    for figure in figures:
        drawn.append((figure, [svg_text(draw([panel])) for panel in figure.panels]))
        whole = draw(figure.panels, min(figure.columns, len(figure.panels)))
        contents |= {
            f"{figure.name}.svg": svg_text(whole).encode(),
            f"{figure.name}.png": png_bytes(whole),
        }
    html = render(sweep, found, drawn, tables, path)
    folder = path.parent / folder_of(path)
    try:
        folder.mkdir(exist_ok=True)
        for name, content in contents.items():
            _write(folder / name, content)
        _write(path, html.encode())
    except OSError as error:
        cause, remedy = explain_os_error(error, "give another with --out")
        where = str(error.filename or path)
        raise ArchscaleError(f"cannot write the report: {cause}", where, remedy) from error
    return path


def _write(path: Path, content: bytes) -> None:
    """Atomically: whoever has the old one open never sees half a file."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
