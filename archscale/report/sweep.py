"""One self-contained HTML file about a sweep, its figures as SVG and PNG, its tables as CSV."""

from __future__ import annotations

from pathlib import Path

from archscale.errors import ArchscaleError, explain_os_error
from archscale.files import write_atomically
from archscale.report.plot import draw, png_bytes, svg_text
from archscale.report.records import Analysis, SweepRecord
from archscale.report.sweep_figures import make_figures
from archscale.report.sweep_page import Drawn, folder_of, render
from archscale.report.sweep_tables import csv_text, make_tables


def write_sweep_page(sweep: SweepRecord, found: Analysis, path: Path) -> None:
    """Write the page of a sweep, finished or not, to `path`; figures and tables lie beside it, in a
    folder of its name. The same runs give the same files, byte for byte.

    Raises:
        ArchscaleError: it cannot be written.
    """
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
            write_atomically(folder / name, content)
        write_atomically(path, html)
    except OSError as error:
        cause, remedy = explain_os_error(error, "give another with --out")
        where = str(error.filename or path)
        raise ArchscaleError(f"cannot write the report: {cause}", where, remedy) from error
