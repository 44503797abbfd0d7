"""What this machine has, and what will be used of it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil

import torch
import torch.distributed as dist

import archscale


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
        "backend": (
            f"{'NCCL' if gpus else 'gloo'} between processes"
            if dist.is_available()
            else "none: torch without distributed"
        ),
        "bf16 products": (
            "yes" if _fast_bf16(bool(gpus)) else "emulated: training.precision fp32 is faster here"
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


def cpp_compiler() -> str | None:
    """Path of the C++ compiler that torch.compile would use on a CPU."""
    return shutil.which(os.environ.get("CXX", "")) or shutil.which("g++") or shutil.which("clang++")


def _fast_bf16(cuda: bool) -> bool:
    if cuda:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpu = torch.cpu
    return bool(
        getattr(cpu, "_is_amx_tile_supported", bool)()
        or getattr(cpu, "_is_avx512_bf16_supported", bool)()
    )
