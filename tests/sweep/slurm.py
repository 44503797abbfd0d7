"""A real Slurm of two nodes on this machine, for tests: Debian's slurm-wlm and munge, as root,
without accounting."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archscale.sweep.launchers.config import SlurmConfig
from archscale.sweep.launchers.local import Event, Job
from archscale.sweep.launchers.slurm import SlurmLauncher
from tests.commands import die_with_parent

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel", "srun")
CONF = """
ClusterName=archscale
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,batch_sched_delay=0,sched_min_interval=0,bf_interval=1
ReturnToService=2
KillWait=2
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName={host} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 State=UNKNOWN
NodeName={host}-2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 State=UNKNOWN
PartitionName=all Nodes={host},{host}-2 Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True)
class Code(Job):
    """A job that runs Python instead of archscale; here, because a task imports the module it is
    from."""

    def command(self, *_: object) -> list[str]:  # type: ignore[override]
        return [sys.executable, "-c", *self.arguments]


class Sweep:
    """A sweep directory and its log, as `archscale.sweep.run` keeps them."""

    def __init__(self, folder: Path, codes: dict[str, str], **options: Any):
        self.folder, self.options = folder, {"at_once": None, "retries": 2} | options
        self.jobs = [
            Code(name, [code], folder / "logs" / f"{name}.log") for name, code in codes.items()
        ]
        folder.mkdir(exist_ok=True)

    def write(self, **line: Any) -> None:
        with open(self.folder / "sweep.jsonl", "a") as log:
            log.write(json.dumps(line) + "\n")

    def tell(self, event: Event) -> None:
        self.write(
            event=event.what,
            run=event.job.name,
            attempt=event.attempt,
            reason=event.reason,
            again=event.again,
            task=event.task,
        )

    def go(self, tick: Callable[[], None] = lambda: None, **sweep: Any) -> dict[str, str]:
        self.write(event="sweep", **sweep)
        launch = SlurmLauncher(SlurmConfig(hours=0.5), self.folder, "s", **self.options)
        return launch(self.jobs, self.tell, tick)

    def told(self, what: str) -> list[tuple[str, int]]:
        lines = map(json.loads, (self.folder / "sweep.jsonl").read_text().splitlines())
        return [(line["run"], line["attempt"]) for line in lines if line["event"] == what]


def missing() -> str:
    """Why there can be no Slurm here; empty where there can."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    absent = [program for program in PROGRAMS if not shutil.which(program, path=path)]
    if absent:
        return f"Slurm is not installed: no {', '.join(absent)} (Debian: slurm-wlm and munge)"
    return "" if os.geteuid() == 0 else "Slurm's daemons need root"


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Slurm with its files in `folder`; gives the environment variables under which its commands
    find it.

    Raises:
        RuntimeError: it does not start; the message has its logs.
    """
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    folder.chmod(0o755)
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    conf = folder / "slurm.conf"
    host = socket.gethostname().partition(".")[
        0
    ]  # also a node's name, so that a rendezvous on that node is found
    conf.write_text(CONF.format(host=host, folder=folder, ports=_free_ports(3)))
    env = {**os.environ, "SLURM_CONF": str(conf), "PATH": path}
    munged = [
        "munged",
        "--foreground",
        "--force",
        f"--key-file={key}",
        f"--socket={folder}/munge.socket",
        f"--pid-file={folder}/munged.pid",
        f"--log-file={folder}/munged.log",
        f"--seed-file={folder}/munged.seed",
    ]
    daemons = [
        munged,
        ["slurmctld", "-D", "-c"],
        ["slurmd", "-D", "-N", host],
        ["slurmd", "-D", "-N", f"{host}-2"],
    ]
    running: list[subprocess.Popen[bytes]] = []
    try:
        for command in daemons:
            with open(folder / f"{command[0]}.out", "ab") as out:
                running.append(
                    subprocess.Popen(
                        command,
                        env=env,
                        stdin=subprocess.DEVNULL,
                        stdout=out,
                        stderr=out,
                        start_new_session=True,
                        preexec_fn=lambda: die_with_parent(signal.SIGTERM),
                    )
                )
            if command is munged:
                _wait(lambda: (folder / "munge.socket").exists(), 10, folder, running)
        idle = ["sinfo", "--noheader", "--states=idle", "--format=%D"]
        _wait(lambda: _output(idle, env).strip() == "2", 30, folder, running)
        yield {"SLURM_CONF": str(conf), "PATH": path}
    finally:
        if len(running) > 1 and running[1].poll() is None:
            _output(["scancel", "--full", "--signal=KILL", "--user=root"], env)
            _output(["scancel", "--user=root"], env)
            limit = time.monotonic() + 15
            while _output(["squeue", "--noheader"], env).strip() and time.monotonic() < limit:
                time.sleep(0.2)
        for sig, patience in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
            left = [process for process in reversed(running) if process.poll() is None]
            for process in left:
                process.send_signal(sig)
            limit = time.monotonic() + patience
            for process in left:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.1, limit - time.monotonic()))


def _output(command: list[str], env: dict[str, str]) -> str:
    try:
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=20).stdout
    except subprocess.TimeoutExpired:
        return ""


def _wait(ready, seconds: float, folder: Path, running: list[subprocess.Popen[bytes]]) -> None:  # type: ignore[no-untyped-def]
    limit = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > limit or any(process.poll() is not None for process in running):
            logs = [
                f"--- {p.name}\n{p.read_text(errors='replace')[-1500:]}"
                for p in sorted(folder.glob("*.[lo][ou][gt]"))
            ]
            raise RuntimeError("Slurm does not start\n" + "\n".join(logs))
        time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
