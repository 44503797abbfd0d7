"""One self-contained HTML file about a run, or about two side by side."""

from __future__ import annotations

from pathlib import Path

from archscale.errors import ArchscaleError, explain_os_error
from archscale.files import write_atomically
from archscale.report.figures import make_figures
from archscale.report.page import render
from archscale.report.read import RunRecord


def write_run_page(runs: list[RunRecord], path: Path) -> None:
    """Write the page of one or two runs, which may still be going on, to `path`.

    Raises:
        ArchscaleError: it cannot be written.
    """
    html = render(runs, make_figures(runs))
    try:
        write_atomically(path, html)
    except OSError as error:
        cause, remedy = explain_os_error(error, "give another with --out")
        raise ArchscaleError(f"cannot write the report: {cause}", str(path), remedy) from error
