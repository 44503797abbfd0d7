"""`archscale report` as a user types it."""

import re
import subprocess
import sys

import pytest

from archscale.sweep.pages import report_if_possible
from tests.commands import ROOT, launch
from tests.report.made import make_run, metrics


def refused(result, pattern):
    lines = result.stderr.splitlines()
    assert result.returncode == 2
    assert len(lines) == 1, result.stderr
    assert re.fullmatch(r"archscale: .* \(.*\): .*", lines[0])
    assert re.search(pattern, lines[0]), lines[0]


def test_one_run_and_another_place(tmp_path):
    run = make_run(tmp_path / "run", metrics(20, layers=1), tail='{"step"')
    done = launch(["report", str(run)])
    assert (run / "report.html").stat().st_size > 10_000
    assert str(run / "report.html") in done.stdout
    assert "line 21 is cut short" in done.stderr
    launch(["report", str(run), "--out", str(tmp_path / "there.html")])
    assert (tmp_path / "there.html").exists()
    assert sorted(path.name for path in run.iterdir() if "report" in path.name) == ["report.html"]


@pytest.mark.parametrize("kind", ["missing", "empty", "foreign", "unwritable"])
def test_bad_input_is_one_line(tmp_path, kind):
    target, more = tmp_path / "target", []
    if kind == "unwritable":
        make_run(target, metrics(3, layers=1))
        more = ["--out", str(tmp_path / "no" / "such" / "folder.html")]
    elif kind != "missing":
        target.mkdir()
    if kind == "foreign":
        (target / "notes.md").write_text("nothing of ours")
    pattern = {
        "missing": "no such",
        "empty": "empty",
        "foreign": "not a run",
        "unwritable": "cannot write.*--out",
    }[kind]
    refused(launch(["report", str(target), *more], check=False), pattern)


def test_it_needs_no_torch(tmp_path):
    """A report is made wherever a run lies: no CUDA context, no long start."""
    run = make_run(tmp_path / "run", metrics(3, layers=1))
    code = (
        "import sys, pathlib, archscale.sweep.pages as r;"
        " r.write_report([pathlib.Path(sys.argv[1])]); print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(run)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "False", done.stderr


def test_a_trained_run_is_not_lost_to_a_page_that_cannot_be_made(tmp_path, monkeypatch, capsys):
    """Whatever drawing lacks, a library included."""
    run = make_run(tmp_path / "run", metrics(3, layers=1))
    monkeypatch.setitem(sys.modules, "archscale.report.run", None)
    assert report_if_possible(run) is None
    assert "archscale: warning: no report: " in capsys.readouterr().err
