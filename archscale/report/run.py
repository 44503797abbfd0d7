"""`archscale report DIR [DIR2]`: one self-contained HTML file about a run, about two side by side,
or about a sweep."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

from archscale.errors import ArchscaleError, explain_os_error
from archscale.report.figures import make_figures
from archscale.report.page import render
from archscale.report.read import read_runs


def write_report(directories: list[Path], out: Path | None = None) -> Path:
    """Write the report of one run, of two or of one sweep; returns where it lies. What it is about
    may still be going on.

    Args:
        out: file to write; None: report.html in the first directory, or report_and_<second>.html
            there for two runs.

    Raises:
        ArchscaleError: a directory holds no run and no sweep, a sweep beside something else, or a
            file that cannot be written.
    """
    sweeps = [directory for directory in directories if (directory / "sweep.yaml").is_file()]
    if sweeps and len(directories) > 1:
        raise ArchscaleError(
            "a sweep is not compared with another directory",
            str(sweeps[0]),
            "name it alone, or two run directories",
        )
    if sweeps:
        # With matplotlib and torch behind it, which the report of a run does not need.
        from archscale.report.sweep import write_sweep_report

        return write_sweep_report(directories[0], out)
    runs = read_runs(directories)
    for run in runs:
        for warning in run.warnings:
            print(f"archscale: warning: {run.directory}: {warning}", file=sys.stderr)
    name = "report.html" if len(runs) == 1 else f"report_and_{directories[1].resolve().name}.html"
    path = out or directories[0] / name
    html = render(runs, make_figures(runs))
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(html, encoding="utf-8")
        os.replace(temporary, path)  # whoever has the old one open never sees half a file
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        cause, remedy = explain_os_error(error, "give another with --out")
        raise ArchscaleError(f"cannot write the report: {cause}", str(path), remedy) from error
    return path
