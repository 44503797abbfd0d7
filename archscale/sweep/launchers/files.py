"""Files with which the runs of a grid train on Kubernetes and through SkyPilot: written here,
submitted by the user.

All runs have one command, `archscale sweep GRID --index N`, which trains run N of the grid and no
other.
"""

from __future__ import annotations

import re
import shlex
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from archscale.config.layers import write_yaml
from archscale.errors import RETRY, ConfigError
from archscale.files import write_atomically
from archscale.sweep.launchers.config import KubernetesConfig, SkyPilotConfig

LONGEST_NAME = (
    50  # characters of a Kubernetes Job, whose pods add their index and more to at most 63
)
REFUSED = 2  # exit status of a run that would be refused again
SHELL_INDEX = "ARCHSCALE_RUN"  # environment variable of a managed job


def write_kubernetes(
    directory: Path,
    settings: KubernetesConfig,
    name: str,
    command: Sequence[str],
    runs: int,
    at_once: int | None,
    retries: int,
    processes: int,
) -> str:
    """Writes `kubernetes.yaml`, an indexed Job with a pod for each run, into the sweep directory;
    returns what to do with it.

    Args:
        command: `archscale sweep GRID …`, relative to the pods' working directory.
        at_once: pods at the same time; None: as many as the cluster has room for.
        retries: of a pod that crashed.

    Raises:
        ConfigError: the sweep directory would not be on the claim.
    """
    workdir = PurePosixPath(settings.workdir or settings.mount)
    there = workdir / directory.as_posix()
    if not there.is_relative_to(settings.mount) or ".." in there.parts:
        raise ConfigError(
            f"the sweep directory is {there} in the pods, which is not on the claim in"
            f" {settings.mount}",
            "kubernetes.mount",
            "give a --sweep-dir or a workdir below the mount",
        )
    path = directory / "kubernetes.yaml"
    write_yaml(kubernetes_job(settings, name, command, runs, at_once, retries, processes), path)
    return f"kubectl apply -f {path}"


def kubernetes_job(
    settings: KubernetesConfig,
    name: str,
    command: Sequence[str],
    runs: int,
    at_once: int | None,
    retries: int,
    processes: int,
) -> dict[str, Any]:
    """The Job, as `write_kubernetes` describes it."""
    need: dict[str, Any] = {}
    if settings.cpus is not None:
        need["cpu"] = f"{settings.cpus:g}"
    if settings.memory_gb is not None:
        need["memory"] = f"{round(settings.memory_gb * 1024)}Mi"
    if settings.gpus:
        need[settings.gpu_resource] = str(settings.gpus)
    mounts: list[dict[str, Any]] = [{"name": "shared", "mountPath": settings.mount}]
    volumes: list[dict[str, Any]] = [
        {"name": "shared", "persistentVolumeClaim": {"claimName": settings.claim}}
    ]
    if processes > 1:  # a container's own 64 MB of shared memory are too few for NCCL
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})
        volumes.append({"name": "shm", "emptyDir": {"medium": "Memory"}})
    container = {
        "name": "train",
        "image": settings.image,
        "workingDir": settings.workdir or settings.mount,
        "command": [
            *command,
            "--index",
            "$(JOB_COMPLETION_INDEX)",
        ],  # which Kubernetes sets in each
        "env": [{"name": key, "value": value} for key, value in settings.env.items()],
        "resources": {"requests": dict(need), "limits": dict(need)} if need else {},
        "volumeMounts": mounts,
    }
    # the first rule that fits decides: a refusal would be refused again, a signal and a preemption
    # are nobody's fault
    failures = [
        {
            "action": action,
            "onExitCodes": {"containerName": "train", "operator": "In", "values": [status]},
        }
        for action, status in (("FailIndex", REFUSED), ("Ignore", RETRY))
    ] + [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]
    metadata = {"name": kubernetes_name(name), "labels": {"app.kubernetes.io/name": "archscale"}}
    if settings.namespace:
        metadata["namespace"] = settings.namespace
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata,
        "spec": {
            "completionMode": "Indexed",
            "completions": runs,
            "parallelism": min(at_once or runs, runs),
            "backoffLimitPerIndex": retries,
            "podFailurePolicy": {"rules": failures},
            "template": {
                "metadata": {"labels": {"app.kubernetes.io/name": "archscale"}},
                "spec": {
                    **settings.pod,
                    "restartPolicy": "Never",
                    "containers": [container],
                    "volumes": volumes,
                },
            },
        },
    }


def kubernetes_name(name: str) -> str:
    """A name that Kubernetes takes, different for different `name`."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if plain != name or len(plain) > LONGEST_NAME or not plain[:1].isalpha():
        plain = (
            f"sweep-{plain[: LONGEST_NAME - 15]}".rstrip("-") + f"-{zlib.crc32(name.encode()):08x}"
        )
    return plain


def write_skypilot(
    directory: Path,
    settings: SkyPilotConfig,
    name: str,
    command: Sequence[str],
    runs: Mapping[int, str],
    retries: int,
) -> str:
    """Writes `skypilot.yaml`, a task, and `skypilot.sh`, which launches it as a managed job for
    each run; returns what to do with them.

    Args:
        command: `sweep GRID …`, relative to the working directory.
        runs: names of those that are left, by index.
        retries: of a job that crashed; machines that are taken away are not counted.
    """
    task, script = directory / "skypilot.yaml", directory / "skypilot.sh"
    write_yaml(skypilot_task(settings, name, command, retries), task)
    lines = [
        "#!/usr/bin/env bash",
        (
            f"# A managed job for each run of {name} that is left. SkyPilot queues what it has no"
            " room for."
        ),
        "set -euo pipefail",
        *(
            "sky jobs launch --yes --detach-run --name"
            f" {shlex.quote(f'{kubernetes_name(name)}-{index}')} --env {SHELL_INDEX}={index}"
            f" {shlex.quote(str(task))}  # {run}"
            for index, run in runs.items()
        ),
    ]
    write_atomically(script, "\n".join(lines) + "\n")
    script.chmod(0o755)
    return f"bash {script}"


def skypilot_task(
    settings: SkyPilotConfig, name: str, command: Sequence[str], retries: int
) -> dict[str, Any]:
    """The task, as `write_skypilot` describes it."""
    resources: dict[str, Any] = {
        "infra": settings.infra,
        "accelerators": settings.accelerators,
        "cpus": settings.cpus,
        "memory": settings.memory,
        "disk_size": settings.disk_gb,
        "image_id": settings.image,
    }
    call = f"{settings.command} {shlex.join(command)} --index ${SHELL_INDEX}"
    task: dict[str, Any] = {
        "name": kubernetes_name(name),
        "workdir": settings.workdir,
        "num_nodes": 1,
        "resources": {
            **{key: value for key, value in resources.items() if value is not None},
            "use_spot": settings.use_spot,
            "job_recovery": {"strategy": "EAGER_NEXT_REGION", "max_restarts_on_errors": retries},
        },
        "envs": {SHELL_INDEX: "0", **settings.envs},
        "file_mounts": settings.mounts,
    }
    if settings.setup:
        task["setup"] = "\n".join(["set -e", *settings.setup]) + "\n"
    return task | {"run": f"set -e\n{call}\n"}
