"""How many runs of a sweep train at the same time on this machine, and what each of them gets."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from archscale.errors import ConfigError
from archscale.plan.devices import Device
from archscale.plan.plan import Plan
from archscale.plan.text import size
from archscale.sweep.launchers.local import threads

# of main memory that Python and torch take in each process beside the plan (340 MB measured)
PROCESS_BYTES = 400 * 10**6


@dataclass(frozen=True)
class Slots:
    """Room for runs at the same time.

    Attributes:
        variables: environment variables of each.
        text: what bounds them.
        here: whether it is on this machine.
        device: what each process of a run gets elsewhere; None: not known.
    """

    variables: list[dict[str, str]]
    text: str
    here: bool = True
    device: Device | None = None


def slots(
    plans: Sequence[Plan],
    processes: int,
    jobs: int | None,
    device: Device,
    gpus: Sequence[str] | None = None,
    cores: int | None = None,
) -> Slots:
    """Room for `jobs` runs at once, or for as many as there is room for.

    Args:
        gpus: names of this machine's, as CUDA_VISIBLE_DEVICES has them; None: ask torch.
        cores: that this process may use; None: ask the system.

    Raises:
        ConfigError: there is no room for so many.
    """
    peak = max(plan.figures["memory"]["peak"] for plan in plans)
    if gpus is None:
        count = torch.cuda.device_count()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",")[:count] if visible else [str(number) for number in range(count)]
    ask = f"{processes} {'process' if processes == 1 else 'processes'} each"
    if gpus:
        if processes > len(gpus):
            raise ConfigError(
                f"{processes} processes of a run need as many GPUs, there are {len(gpus)}",
                "processes",
                f"set it to {len(gpus)} or less",
            )
        wanted = min(jobs or len(gpus) // processes, len(plans))
        shared = -(-wanted * processes // len(gpus))  # processes on the fullest GPU
        if device.room is not None and shared * peak > device.room:
            raise ConfigError(
                f"{shared} runs of {size(peak)} on a GPU do not fit into {size(device.room)}",
                "--jobs",
                f"set it to {len(gpus) // processes * max(1, int(device.room // peak))} or less",
            )
        variables = [
            {
                "CUDA_VISIBLE_DEVICES": ",".join(
                    gpus[(job * processes + k) % len(gpus)] for k in range(processes)
                )
            }
            for job in range(wanted)
        ]
        return Slots(variables, f"{wanted} at once on {len(gpus)} GPUs, {ask}")
    cores = cores or len(os.sched_getaffinity(0))
    each_has = int(threads())
    each = (peak + PROCESS_BYTES) * processes
    fit = len(plans) if device.room is None else int(device.room // each)
    if jobs and jobs > max(1, fit):
        raise ConfigError(
            f"{jobs} runs of {size(each)} at once do not fit into {size(device.room or 0)}",
            "--jobs",
            f"set it to {max(1, fit)} or less",
        )
    wanted = min(jobs or max(1, min(cores // (processes * each_has), fit)), len(plans))
    text = (
        f"{wanted} at once on {cores} cores, {ask} of {each_has}"
        f" {'thread' if each_has == 1 else 'threads'} and {size(peak + PROCESS_BYTES)} at most"
    )
    return Slots([{"OMP_NUM_THREADS": str(each_has)}] * wanted, text)
