"""What `launch/torchrun.sh` makes of signals and exit statuses, with a stand-in for torchrun."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.commands import ROOT, environment

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

# Listens after a while, as torchrun does when it has imported everything, notes each signal, and
# ends some time after the first.
TORCHRUN = f"""#!{sys.executable} -IS
import os, signal, sys, time
folder = os.path.dirname(os.path.abspath(__file__))
with open(folder + "/started", "w") as file:
    file.write(str(os.getpid()))
def wait(name):
    end = time.monotonic() + 30
    while not os.path.exists(folder + "/" + name) and time.monotonic() < end:
        time.sleep(0.02)
def note(number, frame):
    with open(folder + "/heard", "a") as file:
        file.write(signal.Signals(number).name + " ")
wait("imported")
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, note)
open(folder + "/listens", "w").close()
wait("heard")
wait("saved")
status = os.environ["THEIR_STATUS"]
with open(os.environ["ARCHSCALE_STATUS_FILE"], "w") as file:
    file.write(status)
sys.exit(int(os.environ["MY_STATUS"]))
"""


class Script:
    """The script at a terminal of its own, and what the stand-in does."""

    def __init__(self, folder: Path, theirs: str = "", mine: int = 1, done: str = ""):
        self.folder = folder
        (folder / "torchrun").write_text(TORCHRUN)
        (folder / "torchrun").chmod(0o755)
        for name in done.split():
            (folder / name).touch()
        variables = {"NPROC_PER_NODE": "1", "THEIR_STATUS": theirs, "MY_STATUS": str(mine)}
        variables["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"
        self.terminal, end = os.openpty()
        self.process = subprocess.Popen(
            ["bash", str(ROOT / "launch" / "torchrun.sh"), "config.yaml"],
            stdin=end,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment(variables),
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(end)
        self.when("started")

    def when(self, name: str) -> None:
        """Waits until the stand-in is there."""
        eventually(lambda: (self.folder / name).exists())

    def lets(self, name: str) -> None:
        """What the stand-in waits for."""
        (self.folder / name).touch()

    def send(self, how: str) -> None:
        """A signal by its name, or Ctrl-C at the terminal."""
        if how == "Ctrl-C":
            os.write(self.terminal, b"\x03")
        else:
            self.process.send_signal(signal.Signals[how])

    @property
    def heard(self) -> list[str]:
        """The signals that the stand-in has got."""
        path = self.folder / "heard"
        return path.read_text().split() if path.exists() else []

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.terminal)
        torchrun = self.folder / "started"
        if torchrun.exists() and Path(f"/proc/{torchrun.read_text()}").exists():
            os.kill(int(torchrun.read_text()), signal.SIGKILL)


@pytest.fixture
def script(tmp_path) -> Iterator[Callable[..., Script]]:
    started: list[Script] = []

    def start(**options) -> Script:
        started.append(Script(tmp_path, **options))
        return started[-1]

    yield start
    for running in started:
        running.close()


def eventually(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


SENT = [("SIGTERM", "SIGTERM", 75), ("SIGUSR1", "SIGUSR1", 75), ("Ctrl-C", "SIGINT", 130)]


@pytest.mark.parametrize(("how", "passed", "status"), [*SENT, ("SIGHUP", "SIGTERM", 75)])
def test_torchrun_gets_a_signal_once(script, how, passed, status):
    running = script(done="imported")
    running.when("listens")
    running.send(how)
    running.when("heard")
    for again in ("SIGTERM", "Ctrl-C"):
        running.send(again)
        time.sleep(0.1)
    assert running.heard == [passed]
    running.lets("saved")
    assert running.process.wait(30) == status
    assert running.heard == [passed]


@pytest.mark.parametrize(("how", "passed", "status"), SENT)
def test_a_signal_before_torchrun_listens_ends_it(script, how, passed, status):
    running = script()
    running.send(how)
    assert running.process.wait(30) == status
    assert not running.heard
    assert not Path(f"/proc/{(running.folder / 'started').read_text()}").exists()


@pytest.mark.parametrize(
    ("theirs", "mine", "status"), [("75\n", 1, 75), ("130\n", 1, 130), ("75\n", 0, 0), ("", 7, 7)]
)
def test_the_exit_status_is_that_of_the_processes(script, theirs, mine, status):
    running = script(theirs=theirs, mine=mine, done="imported heard saved")
    assert running.process.wait(30) == status
