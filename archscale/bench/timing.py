"""What benchmarks share: paired ratios, the machine's matmul rate and its name."""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch


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
    """FLOP/s of products of square matrices of `size` rows, once."""
    a = torch.randn(size, size, device=device).to(dtype)
    repeat = min(max(1, round(2e9 / size**3)), 1000)
    a @ a
    synchronize(device)
    began = time.perf_counter()
    for _ in range(repeat):
        a @ a
    synchronize(device)
    return repeat * 2 * size**3 / (time.perf_counter() - began)


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
