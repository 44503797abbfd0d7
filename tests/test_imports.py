"""Imports run one way, and `torch.distributed` is spoken in few places."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "archscale"

LAYERS = [
    {
        "errors",
        "batch",
        "config",
        "config_io",
        "config_model",
        "config_sections",
        "config_synonyms",
        "distributed",
    },
    {"model", "optim", "data", "parallel", "telemetry"},
    {"scaling", "export"},
    {"train", "report", "bench", "study"},
    {"cli", "__main__"},
]
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
STRANGERS = {1, 2}  # layers whose packages do not import each other
ONLY = {  # all that these import of the layers below or beside them
    "optim": {"archscale.optim", "archscale.distributed", "archscale.errors"},
    "scaling": {
        "archscale.scaling",
        "archscale.model.counting",
        "archscale.model.memory",
        *(f"archscale.{name}" for name in LAYERS[0]),
    },
    "export": {"archscale.export", "archscale.model", *(f"archscale.{name}" for name in LAYERS[0])},
}
SPEAKERS = {  # who may use torch.distributed
    "archscale.distributed",
    "archscale.parallel",
    "archscale.optim.engine",
    "archscale.optim.examples",
    "archscale.model.expert_parallel",
    "archscale.train",
}


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def imports(module: str, is_package: bool, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything imported anywhere in the module, also lazily, by type or by
    string.

    `from a import b` counts as `a.b`, since b may be a module.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + is_package]
                source = ".".join([*parents, *filter(None, [source])])
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = (
                node.func.attr
                if isinstance(node.func, ast.Attribute)
                else getattr(node.func, "id", "")
            )
            if function in {"import_module", "__import__"}:
                yield node.lineno, str(node.args[0].value)


def distributed_attributes(tree: ast.Module) -> Iterator[int]:
    """Lines with `torch.distributed` as an attribute, under whatever name torch was imported."""
    names = {"torch"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {
                alias.asname for alias in node.names if alias.name == "torch" and alias.asname
            }
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id=name), attr="distributed") if name in names:
                yield node.lineno


def check_source(module: str, source: str, is_package: bool = False) -> list[str]:
    """What in this module breaks the rules, one line each."""
    tree = ast.parse(source)
    found = list(imports(module, is_package, tree))
    problems = []
    if not any(within(module, speaker) for speaker in SPEAKERS):
        lines = {line for line, name in found if within(name, "torch.distributed")}
        lines |= set(distributed_attributes(tree))
        problems += [f"{module}:{line} uses torch.distributed" for line in sorted(lines)]
    own = module.split(".")[1] if "." in module else None
    if own is not None and own not in LAYER:
        return [*problems, f"{module}: archscale.{own} has no layer in tests/test_imports.py"]
    for line, name in found:
        if not within(name, "archscale"):
            continue
        other = name.split(".")[1] if "." in name else "__version__"
        if other.startswith("__") and other != "__main__":
            continue
        if problem := _import_problem(own, other, name):
            problems.append(f"{module}:{line} imports {name}: {problem}")
    return problems


def _import_problem(own: str | None, other: str, name: str) -> str | None:
    if other not in LAYER:
        return "no such package in the layers"
    if own is None:
        return "archscale/__init__.py imports nothing of archscale"
    if own in ONLY and not any(within(name, allowed) for allowed in ONLY[own]):
        return f"{own} imports only {', '.join(sorted(ONLY[own]))}"
    if LAYER[other] > LAYER[own]:
        return "upwards"
    if own != other and LAYER[own] == LAYER[other] and LAYER[own] in STRANGERS:
        return "packages of this layer do not import each other"
    return None


FILES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_imports_run_one_way():
    problems = []
    for path in FILES:
        problems += check_source(module_name(path), path.read_text(), path.name == "__init__.py")
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("archscale.errors", "import archscale.model"),
        ("archscale.config", "def f():\n    from archscale import train"),
        ("archscale.model.moe", "from archscale.optim import MatrixOptimizer"),
        ("archscale.model.moe", "from ..parallel.mesh import build_mesh"),
        ("archscale.model.moe", "if TYPE_CHECKING:\n    from archscale.data import shards"),
        ("archscale.data.loader", "from .. import telemetry"),
        (
            "archscale.data.loader",
            "import importlib\nimportlib.import_module('archscale.train.step')",
        ),
        ("archscale.optim.roles", "from archscale.config import Config"),
        ("archscale.scaling.plan", "from archscale.model import Transformer"),
        ("archscale.scaling.plan", "import archscale.model.transformer"),
        ("archscale.scaling.plan", "from archscale.export import huggingface"),
        ("archscale.export.huggingface", "from archscale.optim.rules import Rule"),
        ("archscale.export.huggingface", "from archscale.scaling import plan"),
        ("archscale.train.step", "from archscale.cli import main"),
        ("archscale.train.step", "from archscale.unheard import of"),
        ("archscale.unheard", "import math"),
        ("archscale", "from archscale.errors import ConfigError"),
        ("archscale.model.loss", "import torch.distributed"),
        ("archscale.model.loss", "import torch.distributed.tensor as dt"),
        ("archscale.model.loss", "from torch.distributed.tensor import DTensor"),
        ("archscale.model.loss", "from torch import distributed as dist"),
        ("archscale.model.loss", "import torch\ndef f(): return torch.distributed.get_rank()"),
        ("archscale.model.loss", "import torch as t\ntorch = 1\nt.distributed.barrier()"),
        ("archscale.optim.exchange", "import torch.distributed as dist"),
    ],
)
def test_a_violation_is_caught(module, source):
    assert len(check_source(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source", "is_package"),
    [
        (
            "archscale.train.step",
            "import archscale\nfrom archscale.model import Transformer",
            False,
        ),
        (
            "archscale.train.step",
            "import torch.distributed as dist\nfrom archscale.report import run",
            False,
        ),
        (
            "archscale.optim.engine",
            "from torch import distributed\nfrom archscale.distributed import rank",
            False,
        ),
        ("archscale.optim", "from .engine import MatrixOptimizer\nfrom . import rules", True),
        (
            "archscale.model.moe",
            "from .loss import z_loss\nfrom ..config import ModelConfig",
            False,
        ),
        ("archscale.scaling.plan", "from archscale.model.counting import flops", False),
        ("archscale.scaling.plan", "from archscale.model import counting", False),
        ("archscale.export.huggingface", "from archscale.model import Transformer", False),
        ("archscale.cli", "from archscale.train.trainer import train", False),
        (
            "archscale.model.loss",
            "import torch\nfrom archscale import distributed\ndistributed.rank()",
            False,
        ),
    ],
)
def test_what_is_allowed(module, source, is_package):
    assert check_source(module, source, is_package) == []


@pytest.mark.skipif(not (PACKAGE / "cli.py").exists(), reason="no archscale/cli.py yet")
def test_the_command_line_starts_without_torch():
    code = (
        "import sys, archscale.cli; print(sorted({'torch', 'numpy', 'transformers'} &"
        " set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr
