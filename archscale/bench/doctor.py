"""What this machine has, and what will be used of it."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

import archscale
from archscale.plan.devices import this_device
from archscale.train.build import cpp_compiler


def examine() -> dict[str, str]:
    """Printable facts, in the order in which one asks for them."""
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        if torch.cuda.is_available()
        else []
    )
    facts = {
        "archscale": archscale.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": (
            f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()},"
            f" {torch.get_num_threads()} threads a process"
        ),
        "gpu": ", ".join(gpus) or "none: the CPU will be used",
        "backend": f"{'NCCL' if gpus else 'gloo'} between processes",
        "bf16 products": (
            "yes" if this_device().bf16 else "emulated: training.precision fp32 is faster here"
        ),
        "compiler": cpp_compiler() or "none: training.compile needs g++ (or set it to false)",
    }
    for package, purpose in (
        ("sentencepiece", "tokenizers"),
        ("transformers", "Hugging Face tokenizers"),
        ("datasets", "data: huggingface, parquet"),
        ("deepspeed", "parallel.engine: deepspeed"),
    ):
        try:
            facts[package] = f"{importlib.metadata.version(package)} ({purpose})"
        except importlib.metadata.PackageNotFoundError:
            facts[package] = f"not installed ({purpose}): pip install {package}"
    return facts
