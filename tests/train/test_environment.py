"""Where a run lies and what surrounds it: little can be written but the run directory, its path is
unusual, it is moved, its data are gone. What a terminal cannot show, and readers who leave, are in
tests/test_terminal.py."""

from __future__ import annotations

import errno
import functools
import os
import shutil
from pathlib import Path

import pytest

from archscale.config import dump_config
from tests.commands import ROOT
from tests.faults import Act, Change, failure
from tests.forks import Done, fork
from tests.train.faulty import command, contents, lines, reporting_command
from tests.train.tiny import config, tiny_data

ENDED = 100.0  # seconds within which a command has ended, however busy the machine is
NAME = "a run, ünïcödé & 'quotes'"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return tiny_data(tmp_path_factory.mktemp("data"))


def read_only_but(*writable: str) -> Act:
    """A machine on which nothing can be written but under these paths: the checkout is read-only,
    and so is home."""

    def act(change: Change) -> None:
        if change.kind != "sync" and not any(
            change.path.is_relative_to(path) for path in (*writable, "/dev", "/proc")
        ):
            raise failure(errno.EROFS, change)

    return act


def archscale(
    *argv: object, folder: Path, writable: Path | None = None, report: bool = False, **where
) -> Done:
    temporary = folder / "tmp"  # matplotlib does not start without a place for its cache
    temporary.mkdir(parents=True, exist_ok=True)
    allowed = (str(temporary), str(writable or temporary))
    act = functools.partial(read_only_but, *allowed)
    call = reporting_command if report else command
    arguments = [str(word) for word in argv]
    env = {"HOME": "/nonexistent", "MPLCONFIGDIR": "", "XDG_CACHE_HOME": "/nonexistent"}
    env["TMPDIR"] = str(temporary)
    child = fork(call, arguments, "/", act, "", folder=folder, env=env, **where)
    return child.wait(ENDED)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    """A run through a relative path with blanks and letters that are not ASCII, reached through a
    link, on a machine where nothing else can be written."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "disk").mkdir()
    (folder / "link").symlink_to("disk")
    dump_config(config(data, steps=2), folder / "c.yaml")
    done = archscale(
        *("train", "c.yaml", "--run-dir", f"link/{NAME}"),
        folder=folder / "logs",
        writable=folder / "disk",
        report=True,
        cwd=folder,
    )
    assert done.status == 0, done
    assert "Traceback" not in done.err
    return folder / "disk" / NAME


def test_a_run_needs_little_but_its_directory_to_be_written(trained):
    assert [line["step"] for line in lines(trained)] == [1, 2]
    assert (trained / "report.html").exists()
    assert contents(trained / "checkpoints" / "step_00000002")


def test_a_run_that_was_moved_and_whose_data_are_gone(data, trained, tmp_path):
    """Its tokenizer, config and weights lie in it."""
    moved = tmp_path / "elsewhere" / "moved"
    shutil.copytree(trained, moved)
    config_text = (moved / "config.yaml").read_text()
    (moved / "config.yaml").write_text(config_text.replace(data, "/nonexistent/tokens"))
    logs = tmp_path / "logs"
    at_once = functools.partial(archscale, folder=logs, writable=moved, cwd=Path("/"))
    done = at_once("generate", moved, "--prompt", "abcd", "--max-tokens", 3)
    assert done.status == 0, done
    assert done.out.startswith("abcd")
    done = at_once("report", moved)
    assert done.status == 0, done
    done = at_once("train", moved / "config.yaml", "--run-dir", moved)
    assert done.status == 2, done
    (line,) = done.err.splitlines()
    assert line.startswith("archscale: ")
    assert "/nonexistent/tokens" in line


@pytest.mark.parametrize(
    ("argv", "writes"),
    [
        (["plan", "c.yaml"], False),
        pytest.param(["data", "inspect", "DATA"], False, marks=pytest.mark.slow),
        pytest.param(["data", "verify", "DATA"], False, marks=pytest.mark.slow),
        pytest.param(["doctor"], False, marks=pytest.mark.slow),
        (["--version"], False),
        pytest.param(["report", "RUN", "--out", "page.html"], True, marks=pytest.mark.slow),
        pytest.param(
            ["fit", "points.csv", "--x", "x", "--y", "y", "--form", "power"],
            False,
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_commands_on_a_machine_that_cannot_be_written(data, trained, tmp_path, argv, writes):
    """From any directory."""
    dump_config(config(data, steps=2), tmp_path / "c.yaml")
    rows = "".join(f"{x},{3 * x**-0.5}\n" for x in (1, 2, 4, 8, 16))
    (tmp_path / "points.csv").write_text(f"x,y\n{rows}")
    words = [{"DATA": data, "RUN": str(trained)}.get(word, word) for word in argv]
    writable = tmp_path if writes else Path("/nonexistent")
    done = archscale(*words, folder=tmp_path / "logs", writable=writable, cwd=tmp_path)
    assert done.status == 0, done
    assert "Traceback" not in done.err
    assert done.out


@pytest.mark.parametrize(
    "closed",
    [
        pytest.param((1,), marks=pytest.mark.slow),
        pytest.param((2,), marks=pytest.mark.slow),
        (0, 1, 2),
    ],
)
def test_closed_streams(data, tmp_path, closed):
    """As `>&-` and some daemons leave them, which is not the same as a reader who has left."""
    dump_config(config(data, steps=2), tmp_path / "c.yaml")
    argv = ["train", str(tmp_path / "c.yaml"), "--run-dir", str(tmp_path / "r")]
    child = fork(closed_streams, closed, argv, folder=tmp_path / "logs", cwd=tmp_path)
    done = child.wait(ENDED)
    assert done.status == 0, done
    assert "Traceback" not in done.err
    assert [line["step"] for line in lines(tmp_path / "r")] == [1, 2]


def closed_streams(closed: tuple[int, ...], argv: list[str]) -> None:
    """`archscale train` in a new interpreter, which finds these descriptors closed."""
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-m", "archscale", *argv],
        preexec_fn=lambda: [os.close(descriptor) for descriptor in closed],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    sys.exit(done.returncode)
