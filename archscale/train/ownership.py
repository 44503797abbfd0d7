"""One owner of a run directory: a second `train` there is refused, and a dead one is never in the
way.

The owner keeps `owner.json` in the directory and renews its time of modification. Nothing depends
on the locks of a file system, which shared ones implement in part or not at all: on the same
machine the process itself is looked up, from another one its signs of life are. Within one job the
launcher says who trains: what it has started again takes the directory from what it had before.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from archscale import distributed
from archscale.checkpoint.place import Place, StoreError, StorePath
from archscale.errors import ConfigError, TrainingError, explain_os_error
from archscale.files import CHECKPOINTS, CONFIG, OWNER
from archscale.train import stopping

BEAT = 10.0  # seconds between two signs of life
STALE = 60.0  # seconds without one after which an owner on another machine counts as dead
PATIENCE = 1.0  # seconds that a process may take to end after it was killed
PF_EXITING = 4  # flag of a process in /proc/PID/stat


@dataclass(frozen=True)
class Owner:
    """A process that trains in a run directory.

    Attributes:
        started: clock ticks from boot to its start: tells it from a later process of its number.
        boot: identity of the machine's boot.
        namespace: in which its number counts; each container has its own.
        since: when it began, UTC.
        token: unlike any other owner's.
        job: that it is a process of; a later one of the same job takes its place.
    """

    host: str = "an unknown host"
    pid: int = 0
    started: int | None = None
    boot: str = ""
    namespace: str = ""
    since: str = "an unknown time"
    token: str = ""
    job: str = ""

    def can_look_up(self, other: Owner) -> bool:
        """Whether this process sees the other one's entry in /proc."""
        return bool(self.boot and self.namespace) and (
            (self.host, self.boot, self.namespace) == (other.host, other.boot, other.namespace)
        )

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} (since {self.since})"


@contextlib.contextmanager
def sole_owner(run_dir: Place, *others: Place) -> Iterator[None]:
    """Own the run directory, and others that the run writes into; what is not there is made. All
    ranks together, rank 0 for them all.

    Raises:
        TrainingError: another process that lives owns one of them.
        ConfigError: one cannot be written.
        StoreError: one lies in a store that cannot be written.
    """
    heartbeats: list[Heartbeat] = []
    made: list[Path] = []

    def take() -> None:
        owner = this_process()
        for folder in (run_dir, *others):
            own = folder == run_dir
            another = "directory with --run-dir" if own else "checkpoint.directory"
            try:
                if isinstance(folder, Path):
                    made.extend(each for each in (folder, *folder.parents) if not each.exists())
                folder.mkdir(parents=True, exist_ok=True)
                _take(folder / OWNER, owner, f"give another {another}")
                heartbeats.append(Heartbeat(folder / OWNER, owner))
            except OSError as error:
                cause, remedy = explain_os_error(error, f"give another {another}")
                raise ConfigError(
                    f"cannot write the {'run' if own else 'checkpoint'} directory: {cause}",
                    str(folder),
                    remedy,
                ) from error

    def release() -> None:
        for heartbeat in heartbeats:
            heartbeat.stop()
        if heartbeats:
            with contextlib.suppress(OSError):  # empty only where the run was refused
                for folder in made:
                    folder.rmdir()

    releases = stopping.current().releases
    releases.append(release)
    try:
        distributed.on_rank_zero(take)
        yield
    finally:
        release()
        releases.remove(release)


def owned_with(run_dir: Path, checkpoints: Place) -> list[Place]:
    """What a run that trains in `run_dir` has to own besides, by where its checkpoints lie."""
    if checkpoints == run_dir / CHECKPOINTS:
        return []
    another = checkpoints.parent  # perhaps a run that has its own checkpoints there
    return [checkpoints, *([another] if (another / CONFIG).is_file() else [])]


class Heartbeat:
    """Shows every `BEAT` seconds that the owner lives, in a thread of its own; ends the process
    where the directory has another owner by now."""

    def __init__(self, path: Place, owner: Owner):
        self._path, self._owner, self._stopped = path, owner, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="heartbeat")
        self._thread.start()

    def _run(self) -> None:
        while not self._stopped.wait(BEAT):
            # A file system that fails for a while is training's affair, not this thread's.
            with contextlib.suppress(OSError, StoreError):
                self._beat()

    def _beat(self) -> None:
        held = _read(self._path)
        if held is None:
            _create(self._path, self._owner)
        elif held[0].token == self._owner.token:
            if isinstance(self._path, StorePath):
                self._path.write_bytes(_content(self._owner).encode())
            else:
                os.utime(self._path)
        elif held[0].token and not self._stopped.is_set():
            # It stood still for so long that it was taken for dead.
            print(
                f"archscale: {held[0]} has taken over while this process stood still"
                f" ({self._path.parent}): this one ends, the other one trains on",
                file=sys.stderr,
                flush=True,
            )
            os._exit(2)

    def stop(self) -> None:
        """Give the directory up."""
        self._stopped.set()
        self._thread.join(PATIENCE)
        with contextlib.suppress(OSError, StoreError):
            held = _read(self._path)
            if held is not None and held[0].token == self._owner.token:
                self._path.unlink()


def this_process() -> Owner:
    """As an owner from now on; what a system without /proc does not tell stays empty."""
    boot = namespace = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    pid, now = os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    return Owner(
        platform.node(),
        pid,
        process_start(pid),
        boot,
        namespace,
        now,
        uuid.uuid4().hex[:12],
        distributed.job(),
    )


def process_start(pid: int) -> int | None:
    """When a process started, in clock ticks from boot; None when there is none, or it is ending
    (proc_pid_stat(5): fields 3, 9 and 22)."""
    try:
        # The name of the program, field 2, may hold blanks and brackets.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    ending = fields[0] in "ZX" or int(fields[6]) & PF_EXITING
    return None if ending else int(fields[19])


def _take(path: Place, owner: Owner, otherwise: str) -> None:
    while True:
        held = _read(path)
        if held is None:
            if _create(path, owner):
                return
        elif held[0].token == owner.token:  # created, though the reply of the server was lost
            return
        elif _is_dead(path, *held, owner, otherwise):
            _remove(path, held[0])


def _is_dead(path: Place, holder: Owner, beat: float, here: Owner, otherwise: str) -> bool:
    """Whether the owner died; False when it has left or changed meanwhile.

    Raises:
        TrainingError: it lives.
    """
    lives = TrainingError(
        f"{holder} trains in this directory",
        str(path.parent),
        f"wait for it to end, end it, or {otherwise}",
    )
    if here.job and here.job == holder.job:
        # A job has one group of ranks at a time: what may be left of the group before this one
        # waits in vain for those that are here now, and ends at its next sign of life.
        return True
    if here.can_look_up(holder):
        patience = time.monotonic() + PATIENCE
        while holder.started is not None and process_start(holder.pid) == holder.started:
            if time.monotonic() > patience:
                raise lives
            time.sleep(0.05)
        return True
    # The server's clock, which is that of `beat`, may differ from this machine's.
    age = min(max(0.0, _clock(path.parent) - beat), STALE)
    if age < STALE:
        print(
            f"archscale: {holder} trained in {path.parent} {age:.0f} s ago: waiting up to"
            f" {STALE - age:.0f} s for a sign that it lives",
            file=sys.stderr,
            flush=True,
        )
    end = time.monotonic() + STALE - age
    while time.monotonic() < end:
        time.sleep(min(1.0, STALE / 10))
        held = _read(path)
        if held is None or held[0].token != holder.token:
            return False
        if held[1] != beat:
            raise lives
    return True


def _clock(folder: Place) -> float:
    """What the server of a directory takes for now, Unix seconds."""
    if isinstance(folder, StorePath):
        probe = folder / f".{uuid.uuid4().hex[:12]}.tmp"
        probe.write_bytes(b"now")
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_mtime


def _content(owner: Owner) -> str:
    return json.dumps(asdict(owner))


def _read(path: Place) -> tuple[Owner, float] | None:
    """The owner and its last sign of life, Unix seconds by the file system's clock; None where
    there is no owner."""
    try:
        if isinstance(path, StorePath):
            content, beat = path.read_bytes(), path.stat().st_mtime
        else:
            with open(path, "rb") as file:  # anew, so that a network file system asks its server
                content, beat = file.read(), os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None
    try:
        return Owner(**json.loads(content)), beat
    except (ValueError, TypeError):  # not written to its end
        return Owner(), beat


def _create(path: Place, owner: Owner) -> bool:
    """Whether the file could be created with the owner in it; there was none before."""
    content = _content(owner)
    if isinstance(path, StorePath):
        # Of two that write at once the last one counts: the heartbeat of the other ends it.
        path.write_bytes(content.encode())
        held = _read(path)
        return held is not None and held[0].token == owner.token
    temporary = path.with_name(f".{path.name}.{owner.token}.tmp")
    try:
        temporary.write_text(content)
        os.link(temporary, path)  # with all of its content at once
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        try:
            with open(path, "x") as file:
                file.write(content)
        except FileExistsError:
            return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _remove(path: Place, dead: Owner) -> None:
    """Remove the file of a dead owner, and of no other one that has just replaced it."""
    if isinstance(path, StorePath):
        held = _read(path)
        if held is not None and held[0].token == dead.token:
            path.unlink(missing_ok=True)
        return
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return
    held = _read(aside)
    if held is not None and held[0].token != dead.token:
        # Put back: should a third process have come between, the heartbeat of one of them ends it.
        os.rename(aside, path)
    aside.unlink(missing_ok=True)
