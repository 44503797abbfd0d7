"""What accelerators can do: dense bf16 peak (without sparsity), memory and its bandwidth, as their
makers' data sheets say.

A device that is not here has no peak: its time is n/a, never a guess. `cpu` is measured when it is
asked for.
"""

from __future__ import annotations

import dataclasses
import os
import time
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Device:
    """One accelerator. `peak`: dense bf16 FLOP/s; `memory`: bytes; `bandwidth`: of the memory,
    bytes/s; each None where it is not known. `bf16`: it has units for products of bf16."""

    name: str
    peak: float | None
    memory: int | None
    source: str
    bandwidth: float | None = None
    bf16: bool = True

    @property
    def precision(self) -> Literal["bf16", "fp32"]:
        """What `training.precision: auto` means there."""
        return "bf16" if self.bf16 else "fp32"

    @property
    def room(self) -> int | None:
        """Bytes that a run may plan for: an accelerator's context, libraries and fragmentation take
        `RESERVED`."""
        return self.memory if self.memory is None or self.name == "cpu" else self.memory - RESERVED


# bytes of an accelerator's memory left to its context, libraries and fragmentation
RESERVED = 2 * 10**9

DEVICES = {
    device.name: device
    for device in (
        Device("a100", 312e12, 80 * 10**9, "NVIDIA A100 80GB SXM data sheet", 2.039e12),
        Device("h100", 989.4e12, 80 * 10**9, "NVIDIA H100 SXM data sheet", 3.35e12),
        Device("h200", 989.4e12, 141 * 10**9, "NVIDIA H200 SXM data sheet", 4.8e12),
        Device("b200", 2250e12, 180 * 10**9, "NVIDIA HGX B200 data sheet", 8e12),
        Device("mi300x", 1307.4e12, 192 * 10**9, "AMD Instinct MI300X data sheet", 5.3e12),
    )
}
# What drivers call exactly these; their PCIe, NVL, 40 GB, Grace and sliced relatives have other
# figures.
DRIVER_NAMES = {
    "nvidia a100-sxm4-80gb": "a100",
    "nvidia h100 80gb hbm3": "h100",
    "nvidia h200": "h200",
    "nvidia b200": "b200",
    "amd instinct mi300x": "mi300x",
}


def find_device(name: str, *, peak: float | None = None, memory: int | None = None) -> Device:
    """A device by its name in the table or by what its driver calls it; `cpu` is measured.

    Of any other device only what is given is known, and what is given goes before the table.

    Args:
        peak: dense bf16 FLOP/s. memory: bytes.
    """
    lowered = name.lower()
    listed = f"not in the table: {', '.join(DEVICES)}, cpu"
    if lowered == "cpu":
        device = this_cpu()
    else:
        device = DEVICES.get(DRIVER_NAMES.get(lowered, lowered)) or Device(name, None, None, listed)
    if peak is None and memory is None:
        return device
    given = " and ".join(
        word for word, value in (("peak", peak), ("memory", memory)) if value is not None
    )
    return dataclasses.replace(
        device,
        peak=device.peak if peak is None else peak,
        memory=device.memory if memory is None else memory,
        source=(
            f"{given} as given" if device.source == listed else f"{given} as given; {device.source}"
        ),
    )


def this_cpu() -> Device:
    """This machine's processor: its float32 matmul rate over all threads, measured for a moment,
    and its memory."""
    return Device(
        "cpu",
        measured_matmul_rate(),
        physical_memory(),
        "float32 matmul measured here",
        bf16=processor_has_bf16(),
    )


def processor_has_bf16() -> bool:
    """Whether this machine's processor has units for products of bf16 (AMX, AVX512-BF16).

    What it says of itself, and no measurement, which another load could turn: without them bf16 is
    emulated and slower than float32, with them large products take less than half the time.
    """
    import torch

    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, name, bool)() for name in names)


def physical_memory() -> int:
    """Bytes of main memory that this process may use: of the machine, or of its cgroup where that
    is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        with open("/sys/fs/cgroup/memory.max") as limit:
            return min(total, int(limit.read()))
    except (OSError, ValueError):  # no cgroup, or no limit
        return total


def measured_matmul_rate(size: int = 1024, seconds: float = 0.2) -> float:
    """FLOP/s of float32 matrix products on the CPU: the best of as many as fit into `seconds`."""
    import torch

    a = torch.randn(size, size)
    a @ a
    best, end = float("inf"), time.perf_counter() + seconds
    while (began := time.perf_counter()) < end:
        a @ a
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def this_device() -> Device:
    """What a process of this job trains on, and the memory that it has there. Nothing is
    measured."""
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(int(os.environ.get("LOCAL_RANK", "0")))
        return dataclasses.replace(
            find_device(properties.name),
            memory=properties.total_memory,
            bf16=torch.cuda.is_bf16_supported(including_emulation=False),
        )
    share = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    return Device(
        "cpu",
        None,
        physical_memory() // share,
        "this machine, shared by its processes",
        bf16=processor_has_bf16(),
    )
