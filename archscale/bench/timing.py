"""What benchmarks share: paired ratios, the machine's matmul rate and its name."""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

GPU_ROWS, GPU_PRODUCTS = 8192, 20  # of the products that a GPU's rate is taken from: 20 ms or so


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def spread(times: Sequence[float]) -> float:
    """(90th − 10th percentile) / median."""
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    return (deciles[-1] - deciles[0]) / statistics.median(times)


def paired_ratio(times: Sequence[float], base: Sequence[float]) -> tuple[float, float, float]:
    """Median over rounds of times / base, and the ends of its 95 % bootstrap interval."""
    ratios = [a / b for a, b in zip(times, base, strict=True)]
    generator = random.Random(0)
    medians = [statistics.median(generator.choices(ratios, k=len(ratios))) for _ in range(2000)]
    ends = statistics.quantiles(medians, n=40, method="inclusive")
    return statistics.median(ratios), ends[0], ends[-1]


def matmul_rate(size: int, dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of products of square matrices, once: of `size` rows on a CPU, of `gpu_matmul_rows` on
    a GPU."""
    repeat = min(max(1, round(2e9 / size**3)), 1000)
    if device.type == "cuda":
        size, repeat = gpu_matmul_rows(torch.cuda.mem_get_info(device)[0], dtype), GPU_PRODUCTS
    a = torch.randn(size, size, device=device).to(dtype)
    a @ a
    synchronize(device)
    began = time.perf_counter()
    for _ in range(repeat):
        a @ a
    synchronize(device)
    return repeat * 2 * size**3 / (time.perf_counter() - began)


def gpu_matmul_rows(free: int, dtype: torch.dtype) -> int:
    """Rows of square matrices whose product takes a GPU about a millisecond, so that its rate is
    not that of launches: `GPU_ROWS`, halved until four of them fit into `free` bytes."""
    rows = GPU_ROWS
    while rows > 1024 and 4 * rows**2 * max(dtype.itemsize, torch.float32.itemsize) > free:
        rows //= 2
    return rows


class Stopwatch:
    """Runs from its making on. On a GPU it marks the device's time line, and waits for the device
    only when it is read."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._first = self._mark()
        self._last = self._first

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def stop(self) -> Stopwatch:
        self._last = self._mark()
        return self

    def milliseconds(self) -> float:
        """Between start and stop."""
        if not self._cuda:
            return (self._last - self._first) * 1e3
        self._last.synchronize()
        return self._first.elapsed_time(self._last)


def milliseconds(
    run: Callable[[], Any], device: torch.device, repeats: int, warmups: int = 2
) -> float:
    """Median time of `run`."""
    for _ in range(warmups):
        run()
    times = []
    for _ in range(repeats):
        watch = Stopwatch(device)
        run()
        times.append(watch.stop().milliseconds())
    return statistics.median(times)


def machine(device: torch.device) -> str:
    """What the figures were taken on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        name = "CPU"
    return (
        f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch"
        f" {torch.__version__}"
    )
