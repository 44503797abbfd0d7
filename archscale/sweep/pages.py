"""`archscale report DIR …`: the page of what lies in a directory, a run or a sweep."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from archscale.errors import ArchscaleError
from archscale.files import REPORT


# What draws is imported where it is used: jinja2 and matplotlib take their time, and a run that has
# trained must not fail for lack of one.
def report_if_possible(directory: Path) -> Path | None:
    """`write_report` of one directory, for whoever has trained: a figure that cannot be drawn is a
    warning, and then there is no page."""
    try:
        return write_report([directory])
    except Exception as error:
        print(f"archscale: warning: no report: {type(error).__name__}: {error}", file=sys.stderr)
        return None


def write_report(directories: list[Path], out: Path | None = None) -> Path:
    """Write the report of runs or of one sweep; returns where it lies. What it is about
    may still be going on.

    Args:
        out: file to write; None: report.html in the first directory, for several runs
            report_and_<second>.html, or report_and_<second>_and_<number>_more.html there.

    Raises:
        ArchscaleError: a directory holds no run and no sweep, a sweep beside something else, or a
            file that cannot be written.
    """
    sweeps = [directory for directory in directories if (directory / "sweep.yaml").is_file()]
    if sweeps and len(directories) > 1:
        raise ArchscaleError(
            "a sweep is not compared with another directory",
            str(sweeps[0]),
            "name it alone, or run directories only",
        )
    if sweeps:
        return write_sweep_report(directories[0], out)
    from archscale.report.read import read_runs
    from archscale.report.run import write_run_page

    runs = read_runs(directories)
    for run in runs:
        _warn(run.directory, run.warnings)
    path = out or directories[0] / _name(directories)
    write_run_page(runs, path)
    return path


def _name(directories: list[Path]) -> str:
    if len(directories) == 1:
        return REPORT
    rest = f"_and_{len(directories) - 2}_more" if len(directories) > 2 else ""
    return f"report_and_{directories[1].resolve().name}{rest}.html"


def write_sweep_report(directory: Path, out: Path | None = None) -> Path:
    """Write the report of a sweep, finished or not; returns where it lies.

    Args:
        out: file to write; None: report.html in the sweep directory. Figures and tables lie beside
            it, in a folder of its name.

    Raises:
        ArchscaleError: the directory's sweep.yaml cannot be read, or nothing can be written.
    """
    from archscale.report.sweep import write_sweep_page
    from archscale.sweep.analysis import analyse
    from archscale.sweep.record import read_sweep

    sweep = read_sweep(directory)
    _warn(directory, sweep.warnings)
    path = out or directory / REPORT
    write_sweep_page(sweep, analyse(sweep), path)
    return path


def _warn(directory: Path, warnings: Iterable[str]) -> None:
    for warning in warnings:
        print(f"archscale: warning: {directory}: {warning}", file=sys.stderr)
