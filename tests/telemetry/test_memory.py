"""Peak memory, where it is measured and where it is shown."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from archscale.telemetry.memory import peak_memory
from archscale.train.progress import Progress

MB = 1 << 20


def resident() -> int:
    """Bytes that this process has in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_of_a_process_is_kept_when_memory_is_freed():
    """To 1 %: the kernel counts by processor, and adds up now and then."""
    held = torch.ones(64 * MB, dtype=torch.uint8)
    while_held = resident()
    del held
    assert peak_memory(torch.device("cpu")) >= 0.99 * while_held


def test_on_a_gpu_it_is_what_tensors_took(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: device.index + 7)
    assert peak_memory(torch.device("cuda", 3)) == 10


def test_the_terminal_shows_it_beside_mfu(capsys):
    line = {"step": 10, "loss": 2.5, "tokens_per_second": 1234.0, "val_loss_ema": 2.25}
    Progress(10, 0, "run").update(line | {"mfu": 0.4125, "peak_memory_bytes": 61_200_000_000})
    shown = capsys.readouterr().out
    assert "loss 2.5000  of the average 2.2500  1,234 tokens/s  41.2% MFU  61.2 GB at most" in shown
    Progress(10, 0, "run").update(line)  # of a device whose peak is not known, at no reading
    assert "MFU" not in capsys.readouterr().out
