"""The most memory that a process has held."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path

import torch

RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes; getrusage(2)


def peak_memory(device: torch.device) -> int:
    """Bytes since the process began: on a GPU what tensors took of it, on a CPU all that the
    process has had in memory. Waits for nothing."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux hands the peak of getrusage on from the process that has started this one.
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT
