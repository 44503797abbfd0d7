"""What accelerators can do: dense bf16 peak (without sparsity) and memory, as their makers publish them.

A device that is not here has no peak: its time is n/a, never a guess. `cpu` is measured when it is asked for.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """One accelerator. `peak`: dense bf16 FLOP/s; `memory`: bytes; either None where it is not known."""

    name: str
    peak: float | None
    memory: int | None
    source: str


DEVICES = {
    device.name: device
    for device in (
        Device("a100", 312e12, 80 * 10**9, "NVIDIA A100 80GB SXM data sheet"),
        Device("h100", 989.4e12, 80 * 10**9, "NVIDIA H100 SXM data sheet"),
        Device("h200", 989.4e12, 141 * 10**9, "NVIDIA H200 SXM data sheet"),
        Device("b200", 2250e12, 180 * 10**9, "NVIDIA DGX B200 data sheet, an eighth of the system"),
        Device("mi300x", 1307.4e12, 192 * 10**9, "AMD Instinct MI300X data sheet"),
    )
}


def find_device(name: str) -> Device:
    """A device by the name that a user or CUDA gives it ("NVIDIA H100 80GB HBM3"); an unknown one has no figures."""
    lowered = name.lower()
    if lowered == "cpu":
        return this_cpu()
    for device in DEVICES.values():
        if device.name in lowered.replace(" ", "").replace("-", ""):
            return device
    return Device(name, None, None, "not in the table")


def this_cpu() -> Device:
    """This machine's processor: its float32 matmul rate over all threads, measured for a moment, and its memory."""
    return Device("cpu", measured_matmul_rate(), physical_memory(), "float32 matmul measured here")


def physical_memory() -> int:
    """Bytes of main memory that this process may use: of the machine, or of its cgroup where that is less."""
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
