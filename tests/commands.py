"""`archscale` commands as tests run them: each in a process tree of its own, with a time limit.

done = launch(["plan", "config.yaml", "--json"])      # python -m archscale plan ...; raises on
                                                      failure
launch(["train", "config.yaml"], processes=2)         # the same under torchrun
assert launch(["train", "no.yaml"], check=False).returncode == 2

running = start(["train", "config.yaml"], processes=2)   # crash and signal tests
...
running.signal(signal.SIGTERM, [pid for pid, rank in running.tree().items() if rank == 1])
running.kill()                                           # or running.wait(timeout)
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TAG = (  # environment variable by which the processes of one command are found
    "ARCHSCALE_TEST_LAUNCH"
)
RANK_VARIABLES = {"RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"}
MASTER_VARIABLES = {"MASTER_ADDR", "MASTER_PORT"}
_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def die_with_parent(sig: int) -> None:
    """Lets the kernel send this signal to the calling process when the one that started it ends."""
    if _LIBC is not None:
        _LIBC.prctl(_PDEATHSIG, sig)


def read_text(path: Path) -> str:
    """The file's text, empty where there is none."""
    return path.read_text(errors="replace") if path.exists() else ""


class LaunchFailed(subprocess.CalledProcessError):
    """The exit status was not 0; the message ends with what was printed."""

    def __str__(self) -> str:
        return (
            f"{super().__str__()}\n--- stdout\n{self.stdout[-4000:]}\n---"
            f" stderr\n{self.stderr[-8000:]}"
        )


class LaunchTimeout(LaunchFailed):
    """Killed at its time limit; stderr ends with the Python stacks of all its processes."""


class Launched:
    """A command running in its own session; `launch` waits for one, crash tests hold and kill
    one."""

    def __init__(self, command: Sequence[str], env: dict[str, str], cwd: str | Path | None) -> None:
        self.command = list(command)
        self._tag = uuid.uuid4().hex
        self._folder = Path(tempfile.mkdtemp(prefix="archscale-launch-"))
        weakref.finalize(self, shutil.rmtree, self._folder, True)
        # Files, not pipes: an orphan that keeps a pipe open would keep the reader waiting.
        with open(self._folder / "out", "wb") as out, open(self._folder / "err", "wb") as err:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=env | {TAG: self._tag},
                cwd=cwd,
                start_new_session=True,
                preexec_fn=lambda: die_with_parent(
                    signal.SIGTERM
                ),  # torchrun ends its ranks on SIGTERM
            )
        _LAUNCHED.append(self)

    @property
    def output(self) -> tuple[str, str]:
        """Standard output and standard error so far."""
        return read_text(self._folder / "out"), read_text(self._folder / "err")

    def tree(self) -> dict[int, int | None]:
        """Process id → rank (None outside a rank) of every living process of this command.

        By an environment variable: torchrun gives its ranks sessions, and orphans lose their
        parent.
        """
        found: dict[int, int | None] = {}
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                text = path.read_bytes().decode(errors="replace")
                variables = dict(entry.partition("=")[::2] for entry in text.split("\0"))
                if variables.get(TAG) == self._tag:
                    rank = variables.get("RANK")
                    found[int(path.parent.name)] = None if rank is None else int(rank)
        return found

    def signal(self, sig: int, pids: Iterable[int] | None = None) -> None:
        """Sends a signal to these processes, by default to all of the tree."""
        for pid in list(self.tree() if pids is None else pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, sig)

    def kill(self) -> None:
        """SIGKILL to the whole tree, as a crash of the machine would."""
        for _ in range(100):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.signal(signal.SIGKILL)
            if self.process.poll() is not None and not self.tree():
                break
            time.sleep(0.02)
        if self in _LAUNCHED:
            _LAUNCHED.remove(self)

    def wait(self, timeout: float = 300.0, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Waits for the end; kills the tree at `timeout` and whatever outlives the command."""
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.signal(signal.SIGABRT)  # PYTHONFAULTHANDLER: every process prints its stacks
            time.sleep(1.0)
            self.kill()
            raise LaunchTimeout(
                -signal.SIGKILL, [*self.command, f"(limit {timeout:g} s)"], *self.output
            ) from None
        finally:
            self.kill()
        done = subprocess.CompletedProcess(self.command, status, *self.output)
        if check and status:
            raise LaunchFailed(status, done.args, done.stdout, done.stderr)
        return done


_LAUNCHED: list[Launched] = []


def kill_all() -> None:
    """Kills every command still running."""
    for launched in list(_LAUNCHED):
        launched.kill()


def environment(changes: dict[str, str | None]) -> dict[str, str]:
    """The environment of a command that a test starts; a None in `changes` unsets."""
    full = {k: v for k, v in os.environ.items() if k not in RANK_VARIABLES | MASTER_VARIABLES}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    full |= {
        "PYTHONPATH": path,
        "PYTHONFAULTHANDLER": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    if sys.platform == "linux":
        full["GLOO_SOCKET_IFNAME"] = "lo"
    for key, value in changes.items():
        full.pop(key, None)
        if value is not None:
            full[key] = value
    return full


def start(
    argv: Sequence[str],
    processes: int = 1,
    env: dict[str, str | None] | None = None,
    cwd: str | Path | None = None,
    module: str = "archscale",
) -> Launched:
    """Starts `python -m archscale *argv`, under torchrun if `processes` > 1; a None in `env`
    unsets."""
    python = [sys.executable]
    if processes > 1:
        python += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    full = environment(env or {})
    return Launched([*python, "-m", module, *map(str, argv)], full, cwd)


def launch(
    argv: Sequence[str],
    processes: int = 1,
    timeout: float = 300.0,
    env: dict[str, str | None] | None = None,
    check: bool = True,
    cwd: str | Path | None = None,
    module: str = "archscale",
) -> subprocess.CompletedProcess[str]:
    """Runs an archscale command to its end and returns it with its output; with `check`, a failure
    raises."""
    return start(argv, processes, env, cwd, module).wait(timeout, check)
