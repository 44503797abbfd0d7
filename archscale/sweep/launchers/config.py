"""The keys of a grid file that say where its runs train, beside this machine: `slurm`,
`kubernetes`, `skypilot`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Annotated, Any

from pydantic import Field, StrictBool, field_validator

from archscale.config.sections import Section
from archscale.config.values import Count, CountOrZero, Positive, Text
from archscale.errors import ConfigError
from archscale.plan.devices import DEVICES

SbatchValue = StrictBool | int | float | Text
OURS = {
    "array",
    "dependency",
    "error",
    "job-name",
    "nodes",
    "ntasks",
    "ntasks-per-node",
    "open-mode",
    "output",
    "signal",
}


def _unknown_device(section: str, device: str | None) -> Iterator[ConfigError]:
    if device is not None and device not in DEVICES:
        yield ConfigError(
            f"unknown device {device}",
            f"{section}.device",
            f"give one of {', '.join(DEVICES)}, or leave it out",
        )


class SlurmConfig(Section):
    """A task of a Slurm job array trains one run."""

    hours: Positive
    """Time limit of a task; a run that needs longer is requeued and goes on from its newest
    checkpoint."""
    partition: Text | None = None
    """Partition of the tasks; null: the cluster's default."""
    account: Text | None = None
    """Account that is charged; null: the cluster's default."""
    qos: Text | None = None
    """Quality of service; null: the cluster's default."""
    nodes: Count = 1
    """Nodes of a run, a divisor of processes; each has a torchrun."""
    gpus_per_node: CountOrZero = 0
    """GPUs of a run on each node; 0 trains on CPUs."""
    cpus_per_task: Count = 1
    """Cores of a run on each node."""
    mem_gb: Positive | None = None
    """Main memory on each node, in GiB; null: the cluster's default."""
    setup: list[Text] = Field(default_factory=list)
    """Lines of bash before the run starts, such as `module load cuda`."""
    requeues: CountOrZero = 100
    """How often a run that reached its time limit is requeued; preemptions are not counted."""
    device: Text | None = None
    """What the nodes have, as `archscale plan --device` calls it: memory and time are planned for
    it; null: for none."""
    extra: dict[str, SbatchValue] = Field(default_factory=dict)
    """Further options of sbatch by their long names, such as constraint; true is an option without
    a value."""

    @property
    def minutes(self) -> int:
        """The time limit as Slurm takes it."""
        return max(1, round(self.hours * 60))

    @field_validator("extra")
    @classmethod
    def _names(cls, value: dict[str, Any]) -> dict[str, Any]:
        return {key.replace("_", "-"): option for key, option in value.items()}

    def problems(self) -> Iterator[ConfigError]:
        yield from _unknown_device("slurm", self.device)
        for key in self.extra:
            if key in OURS or not re.fullmatch(r"[a-z][a-z-]*", key):
                yield ConfigError(
                    f"sbatch's {key} is not for a grid to set", f"slurm.extra.{key}", "leave it out"
                )


class KubernetesConfig(Section):
    """A pod of an indexed Job trains one run."""

    image: Text
    """Image with archscale in it."""
    claim: Text
    """Persistent volume claim that all pods can write; sweep directory and data lie on it."""
    mount: Text = "/shared"
    """Where the pods see the claim."""
    workdir: Text | None = None
    """Where the pods start, and what the paths of grid and data are relative to; null: `mount`."""
    namespace: Text | None = None
    """Namespace of the Job; null: kubectl's own."""
    gpus: CountOrZero = 0
    """GPUs of a run; 0 trains on CPUs."""
    gpu_resource: Text = "nvidia.com/gpu"
    """What the cluster calls its GPUs."""
    device: Text | None = None
    """What the GPUs are, as `archscale plan --device` calls them: memory and time are planned for
    it; null: for none."""
    cpus: Positive | None = None
    """Cores of a run; null: the cluster's default."""
    memory_gb: Positive | None = None
    """Main memory of a run, in GiB; null: the cluster's default."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment variables."""
    pod: dict[str, Any] = Field(default_factory=dict)
    """Further keys of the pod's spec, such as nodeSelector, tolerations and serviceAccountName."""

    def problems(self) -> Iterator[ConfigError]:
        yield from _unknown_device("kubernetes", self.device)
        for key, value in (("mount", self.mount), ("workdir", self.workdir)):
            if value is not None and not PurePosixPath(value).is_absolute():
                yield ConfigError(
                    f"{value} is not an absolute path", f"kubernetes.{key}", "start it with a slash"
                )
        for key in self.pod:
            if key in ("containers", "restartPolicy", "volumes"):
                yield ConfigError(
                    f"the Job sets {key} itself", f"kubernetes.pod.{key}", "leave it out"
                )


class SkyPilotConfig(Section):
    """A managed job of SkyPilot trains one run."""

    sweep_dir: Text
    """The sweep directory on the machines; below one of `mounts`, else it would vanish with
    them."""
    mounts: Annotated[dict[str, Any], Field(min_length=1)]
    """SkyPilot's `file_mounts`: path on the machines → bucket or local folder, or a mapping with
    source and mode. That of `sweep_dir` is a volume or a bucket in mode MOUNT_CACHED."""
    accelerators: Text | None = None
    """GPUs of a machine, such as H100:8; null trains on CPUs."""
    cpus: Text | int | None = None
    """Cores of a machine, such as 8+; null: SkyPilot's default."""
    memory: Text | int | None = None
    """Main memory of a machine in GB, such as 64+; null: SkyPilot's default."""
    disk_gb: Count | None = None
    """Size of a machine's own disk in GB; null: SkyPilot's default."""
    infra: Text | None = None
    """Cloud or cluster, such as aws/us-east-1 or k8s; null: the cheapest."""
    use_spot: StrictBool = False
    """Machines that may be taken away; the run then goes on elsewhere."""
    image: Text | None = None
    """Image, such as docker:registry/archscale:tag; null: SkyPilot's default."""
    workdir: Text = "."
    """Folder that is copied to each machine, and what the path of the grid is relative to."""
    setup: list[Text] = Field(default_factory=list)
    """Lines of bash on a new machine, such as `bash launch/install.sh`."""
    command: Text = "archscale"
    """How archscale is called there, such as .venv/bin/archscale."""
    envs: dict[str, str] = Field(default_factory=dict)
    """Environment variables."""

    @property
    def gpus(self) -> int:
        """GPUs of a machine."""
        if self.accelerators is None:
            return 0
        count = self.accelerators.partition(":")[2]
        return int(count) if count else 1

    def problems(self) -> Iterator[ConfigError]:
        directory = PurePosixPath(self.sweep_dir)
        below = [
            mount
            for mount in self.mounts
            if directory.is_relative_to(mount) and directory.is_absolute()
        ]
        lasting = any(
            isinstance(content := self.mounts[mount], dict)
            and (content.get("mode") == "MOUNT_CACHED" or content.get("store") == "volume")
            for mount in below
        )
        if not below:
            yield ConfigError(
                f"{directory} is not below any of {', '.join(self.mounts)}, so nothing of a run"
                " would outlive its machine",
                "skypilot.sweep_dir",
                "give a path below one of the mounts",
            )
        # SkyPilot copies what has no mode, and appends to no file of a bucket under MOUNT.
        elif not lasting:
            yield ConfigError(
                f"files in {below[0]} could not be appended to, or would not outlive the machine",
                f"skypilot.mounts.{below[0]}",
                "give `{source: s3://bucket, mode: MOUNT_CACHED}`, or a volume",
            )
        if self.accelerators is not None and not re.fullmatch(
            r"[\w.-]+(:[1-9]\d*)?", self.accelerators
        ):
            yield ConfigError(
                f"{self.accelerators} is no accelerator",
                "skypilot.accelerators",
                "give it as H100:8",
            )


class ClusterSections(Section):
    """The sections of a grid file about clusters."""

    processes: Count = 1
    """Processes of each run, under torchrun."""
    slurm: SlurmConfig | None = None
    """What a run gets with `--launcher slurm`."""
    kubernetes: KubernetesConfig | None = None
    """What a run gets with `--launcher kubernetes`."""
    skypilot: SkyPilotConfig | None = None
    """What a run gets with `--launcher skypilot`."""

    def problems(self) -> Iterator[ConfigError]:
        processes = self.processes
        if self.slurm and processes % self.slurm.nodes:
            yield ConfigError(
                f"{processes} {'process' if processes == 1 else 'processes'} of a run do not divide"
                f" among {self.slurm.nodes} nodes",
                "slurm.nodes",
                "give a divisor of `processes`, or other `processes`",
            )
        elif self.slurm and 0 < self.slurm.gpus_per_node < processes // self.slurm.nodes:
            yield self._too_few(
                self.slurm.gpus_per_node, processes // self.slurm.nodes, "slurm.gpus_per_node"
            )
        if self.kubernetes and 0 < self.kubernetes.gpus < processes:
            yield self._too_few(self.kubernetes.gpus, processes, "kubernetes.gpus")
        if self.skypilot and 0 < self.skypilot.gpus < processes:
            yield self._too_few(self.skypilot.gpus, processes, "skypilot.accelerators")

    @staticmethod
    def _too_few(gpus: int, processes: int, key: str) -> ConfigError:
        return ConfigError(
            f"{processes} processes on a machine need as many GPUs, it has {gpus}",
            key,
            f"give {processes}",
        )


def needs_section(sections: ClusterSections, launcher: str, where: str) -> None:
    """Refuses a launcher without its section.

    Raises:
        ConfigError: there is none.
    """
    examples = {
        "slurm": "slurm: {hours: 24, partition: gpu, gpus_per_node: 1}",
        "kubernetes": "kubernetes: {image: registry/archscale, claim: shared, gpus: 1}",
        "skypilot": (
            "skypilot: {accelerators: 'H100:1', mounts: {/shared: {source: 's3://bucket', mode:"
            " MOUNT_CACHED}}, sweep_dir: /shared/sweep}"
        ),
    }
    if launcher in examples and getattr(sections, launcher) is None:
        raise ConfigError(
            f"--launcher {launcher} needs a section `{launcher}`",
            where,
            f"add `{examples[launcher]}`",
        )
