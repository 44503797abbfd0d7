"""Machines that are network namespaces of this one: a job on several nodes, and a cable to pull.

with Network(2) as network:
    first, second = network.nodes
    running = first.start(["train", "config.yaml"], nodes="1:2", env={...})   # torchrun there
    network.cut(second)                                # no packet passes, and nobody is told
    network.restore(second)

Every node has its address, its host name and the one disk. Needs root, `ip` and `unshare`: see
`available`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.commands import Launched, environment

ETC = Path("/etc/netns")  # what `ip netns exec` puts over /etc in a namespace
# Otherwise agents that stay keep the address of an earlier start's store: see launch/torchrun.sh.
STORE_OF_EACH_START: dict[str, str | None] = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
PORT = 29400  # of the rendezvous, on the first node


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=20)


@functools.cache
def available() -> bool:
    """Whether namespaces can be made here."""
    if (
        sys.platform != "linux"
        or os.geteuid()
        or not (shutil.which("ip") and shutil.which("unshare"))
    ):
        return False
    try:
        with Network(2):
            return True
    except (subprocess.SubprocessError, OSError):
        return False


def give_up_early(node: Node) -> None:
    """Let the node's connections fail after about 10 s without an answer, not after 15 minutes."""
    command = ["ip", "netns", "exec", node.name, "sysctl", "-w", "net.ipv4.tcp_retries2=5"]
    subprocess.run(command, check=True, capture_output=True, timeout=20)


@dataclass(frozen=True)
class Node:
    """One machine.

    Attributes:
        name: of the namespace, and the host name there.
        hosts: whether the rendezvous is there.
        endpoint: address of the node that hosts it.
    """

    name: str
    address: str
    hosts: bool
    endpoint: str

    def start(
        self,
        argv: Sequence[str],
        nodes: str = "2",
        restarts: int = 3,
        processes: int = 1,
        rendezvous: dict[str, int] | None = None,
        job: str = "test",
        env: dict[str, str | None] | None = None,
    ) -> Launched:
        """`torchrun -m archscale *argv` on this node.

        Args:
            nodes: of the job, a number or `least:most`.
            rendezvous: further settings of `--rdzv-conf`, seconds.
        """
        settings = {"is_host": int(self.hosts), **(rendezvous or {})}
        torchrun = [
            *(sys.executable, "-m", "torch.distributed.run"),
            *(f"--nnodes={nodes}", f"--nproc_per_node={processes}", f"--max-restarts={restarts}"),
            *("--rdzv-backend=c10d", f"--rdzv-endpoint={self.endpoint}:{PORT}"),
            "--rdzv-conf=" + ",".join(f"{key}={value}" for key, value in settings.items()),
            *(f"--rdzv-id={job}", f"--local-addr={self.address}"),
        ]
        there = ["ip", "netns", "exec", self.name, "unshare", "--uts", "sh", "-c"]
        there += [f'hostname {self.name} && exec "$@"', "sh"]
        changes = {"GLOO_SOCKET_IFNAME": "net0", **STORE_OF_EACH_START, **(env or {})}
        return Launched(
            [*there, *torchrun, "-m", "archscale", *map(str, argv)], environment(changes), None
        )


class Network:
    """Nodes on one switch; the first hosts the rendezvous, and torchrun gives the lowest ranks to
    the last of them."""

    def __init__(self, count: int) -> None:
        tag = uuid.uuid4().hex[:6]
        self._switch = f"ar{tag}"
        # Ranks follow the order of the addresses.
        addresses = [f"10.77.0.{count - i}" for i in range(count)]
        self.nodes = [
            Node(f"node{i}-{tag}", address, i == 0, addresses[0])
            for i, address in enumerate(addresses)
        ]

    def __enter__(self) -> Network:
        try:
            _ip("netns", "add", self._switch)
            _ip("-n", self._switch, "link", "add", "switch", "type", "bridge")
            _ip("-n", self._switch, "link", "set", "switch", "up")
            for i, node in enumerate(self.nodes):
                _ip("netns", "add", node.name)
                # Without names each connection waits for a server that cannot be reached.
                (ETC / node.name).mkdir(parents=True)
                names = [f"{n.address} {n.name}" for n in self.nodes]
                (ETC / node.name / "hosts").write_text(
                    "\n".join(["127.0.0.1 localhost", *names, ""])
                )
                (ETC / node.name / "resolv.conf").write_text("nameserver 127.0.0.1\n")
                pair = ("type", "veth", "peer", "name", "net0", "netns", node.name)
                _ip("-n", self._switch, "link", "add", f"port{i}", *pair)
                _ip("-n", self._switch, "link", "set", f"port{i}", "master", "switch", "up")
                _ip("-n", node.name, "address", "add", f"{node.address}/24", "dev", "net0")
                for device in ("lo", "net0"):
                    _ip("-n", node.name, "link", "set", device, "up")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def close(self) -> None:
        """Remove the namespaces; what still runs there keeps one, without a network."""
        for name in [self._switch, *(node.name for node in self.nodes)]:
            with contextlib.suppress(subprocess.SubprocessError):
                _ip("netns", "del", name)
            shutil.rmtree(ETC / name, ignore_errors=True)

    def cut(self, node: Node) -> None:
        """Let no packet from or to the node pass."""
        _ip("-n", self._switch, "link", "set", f"port{self.nodes.index(node)}", "nomaster")

    def restore(self, node: Node) -> None:
        """Undo `cut`."""
        _ip("-n", self._switch, "link", "set", f"port{self.nodes.index(node)}", "master", "switch")
