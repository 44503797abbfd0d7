"""Jobs in worker processes, and the lines that say how far they are."""

import os
import signal
import time
from dataclasses import dataclass
from multiprocessing.util import Finalize
from pathlib import Path

import pytest

from archscale.data.preparing.jobs import Report, run_jobs
from archscale.data.preparing.progress import Progress
from archscale.errors import DataError


@dataclass(frozen=True)
class Write:
    """A job that writes its process number, after what `first` says."""

    result: Path
    first: str = ""
    size: int | None = 10

    @property
    def name(self) -> str:
        return self.result.name

    def run(self, report: Report) -> None:
        report(5)
        if self.first == "refuse":
            raise DataError("no", self.name, "try something else")
        if self.first == "disk":
            raise OSError(28, "No space left on device", str(self.result))
        if self.first == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.first == "crash":
            raise KeyError("a bug")
        if self.first == "clean up":
            Finalize(None, Path(self.result).with_suffix(".cleaned").touch, exitpriority=1)
        if self.first == "wait":
            time.sleep(60)
        self.result.write_text(str(os.getpid()))


def _jobs(folder: Path, **first: str) -> list[Write]:
    return [Write(folder / name, first.get(name, "")) for name in "abcdef"]


def test_jobs_that_are_done_are_not_done_again(tmp_path: Path) -> None:
    (tmp_path / "b").write_text("made before")
    lines: list[str] = []
    run_jobs("counted", _jobs(tmp_path), 2, lines.append)
    assert lines[0] == "counted already: 1 of 6 pieces"
    assert lines[-1].startswith("counted 0.0 MB in")
    assert (tmp_path / "b").read_text() == "made before"
    makers = {(tmp_path / name).read_text() for name in "acdef"}
    assert str(os.getpid()) not in makers
    lines.clear()
    run_jobs("counted", _jobs(tmp_path), 2, lines.append)
    assert lines == []


@pytest.mark.parametrize(
    ("first", "error", "message"),
    [
        ("refuse", DataError, r"no \(c\): try something else"),
        ("disk", OSError, "No space left"),
        ("die", DataError, r"a worker process was killed, .*memory.* \(c\): .*--workers"),
        ("crash", RuntimeError, r"(?s)c: a worker failed.*KeyError: 'a bug'"),
    ],
)
def test_a_failure_ends_the_others(
    tmp_path: Path, first: str, error: type[Exception], message: str
) -> None:
    """Also one that would take a minute."""
    began = time.monotonic()
    with pytest.raises(error, match=message):
        run_jobs("counted", _jobs(tmp_path, b="wait", c=first), 2, print)
    assert time.monotonic() - began < 50
    assert (tmp_path / "a").exists()


def test_workers_clean_up_behind_them(tmp_path: Path) -> None:
    run_jobs("counted", _jobs(tmp_path, a="clean up"), 2, print)
    assert (tmp_path / "a.cleaned").exists()


def test_progress() -> None:
    now, lines = 0.0, []
    progress = Progress("read", [8_000_000, 2_000_000], lines.append, lambda: now)
    progress.add(0, 1_000_000)
    now = 4.9
    progress.add(0, 1_000_000)
    assert lines == []
    now = 5.0
    progress.add(1, 50_000_000)  # of text, from a compressed file
    assert lines == ["read 4.0 of 10.0 MB, 0.8 MB/s, 8 s left"]
    now = 9.0
    progress.finish(1)
    now = 3700.0
    progress.finish(0)
    progress.end()
    assert lines[1:] == [
        "read 10.0 of 10.0 MB, 0.0 MB/s, 0 s left",
        "read 10.0 MB in 1 h 1 min",
    ]
    lines.clear()
    unknown = Progress("read", [None], lines.append, lambda: now)
    now += 10
    unknown.add(0, 30_000_000)
    assert lines == ["read 30.0 MB, 3.0 MB/s"]
