"""Imports run one way, without a circle, and `torch.distributed` is spoken in few places."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "archscale"

# From the ground up. CONTRIBUTING.md draws the same floors.
FLOORS = [
    ["errors", "files", "rules", "terminal", "yaml_reader", "distributed"],
    ["config"],
    ["data", "model", "optim", "parallel", "telemetry"],
    ["plan", "fit", "checkpoint", "huggingface", "inference"],
    ["train", "report", "export"],
    ["sweep", "evaluation"],
    ["study", "bench"],
    ["cli", "__main__"],
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
CONNECTED = {0, len(FLOORS) - 1}  # floors whose rooms may import each other
ONLY = {  # all of archscale that these import
    "optim": {"optim", "distributed", "errors", "rules"},
    "fit": {"fit", "errors"},
    "report": {
        *("report", "errors", "files", "fit", "plan.text", "yaml_reader", "__version__"),
        "checkpoint.place",
    },
    "model": {"model", "config", "distributed"},
    "telemetry": {"telemetry", "errors", "files"},
}
# Components get their section of the config, never the whole.
SECTIONS_ONLY = {"data", "model", "optim", "parallel", "telemetry", "fit", "report"}
WHOLE_CONFIG = {"archscale.config.Config", "archscale.config.schema.Config"}
WITHOUT_TORCH = [
    "rules",
    "errors",
    "files",
    "yaml_reader",
    "config",
    "fit",
    "plan",
    "report",
    "cli",
]
SPEAKERS = {  # who may use torch.distributed
    "archscale.distributed",
    "archscale.parallel",
    "archscale.optim.examples",
    "archscale.model.moe",
    "archscale.checkpoint",
    "archscale.bench.checkpoint",
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
    if own is not None and own not in FLOOR:
        return [*problems, f"{module}: archscale.{own} has no floor in tests/test_imports.py"]
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
    if other not in FLOOR:
        return "no such room in the floors"
    if own is None:
        return "archscale/__init__.py imports nothing of archscale"
    if own in ONLY and not any(within(name, f"archscale.{allowed}") for allowed in ONLY[own]):
        return f"{own} imports only {', '.join(sorted(ONLY[own]))}"
    if FLOOR[other] > FLOOR[own]:
        return "upwards"
    if own in SECTIONS_ONLY and name in WHOLE_CONFIG:
        return f"{own} takes sections of the config"
    if own != other and FLOOR[own] == FLOOR[other] and FLOOR[own] not in CONNECTED:
        return "rooms of this floor do not import each other"
    return None


FILES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_imports_run_one_way():
    problems = []
    for path in FILES:
        problems += check_source(module_name(path), path.read_text(), path.name == "__init__.py")
    assert not problems, "\n".join(problems)


def test_no_file_reaches_itself():
    """Circles, imports for types alone included: each file could be read after those below it."""
    names = {module_name(path): path for path in FILES}
    below: dict[str, set[str]] = {}
    for module, path in names.items():
        tree = ast.parse(path.read_text())
        targets = (name for _, name in imports(module, path.name == "__init__.py", tree))
        # `from package import name` reaches the package's face, or the module of that name.
        below[module] = {
            target
            for name in targets
            if (target := name if name in names else name.rpartition(".")[0]) in names
        } - {module}
    assert circles(below) == []


def circles(below: dict[str, set[str]]) -> list[list[str]]:
    """A closed way for each file from which one is found; depth first."""
    done: set[str] = set()
    closed: list[list[str]] = []

    def visit(module: str, way: list[str]) -> None:
        if module in way:
            closed.append([*way[way.index(module) :], module])
        elif module not in done:
            for other in sorted(below[module]):
                visit(other, [*way, module])
            done.add(module)

    for module in sorted(below):
        visit(module, [])
    return closed


def test_a_circle_is_seen():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c", "a"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_the_drawing_in_contributing_is_the_floors():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^    floor +(\d+) +(.+)$", text, flags=re.MULTILINE)
    drawn = {int(number): names.split() for number, names in rows}
    assert drawn == {
        number: [name for name in names if name != "__main__"]
        for number, names in enumerate(FLOORS)
    }


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("archscale.errors", "import archscale.model"),
        ("archscale.config.schema", "def f():\n    from archscale import train"),
        ("archscale.model.moe", "from archscale.optim import MatrixOptimizer"),
        ("archscale.model.moe", "from ..parallel.mesh import build_mesh"),
        ("archscale.model.moe", "if TYPE_CHECKING:\n    from archscale.data import shards"),
        ("archscale.model.moe", "from archscale.plan.counting import parameters"),
        ("archscale.model.moe", "from archscale.config import Config"),
        ("archscale.data.loader", "from .. import telemetry"),
        (
            "archscale.data.loader",
            "import importlib\nimportlib.import_module('archscale.train.step')",
        ),
        ("archscale.optim.roles", "from archscale.config import Config"),
        ("archscale.fit.groups", "from archscale.config import Config"),
        ("archscale.fit.groups", "from archscale.files import write_atomically"),
        ("archscale.plan.plan", "from archscale.fit import laws"),
        ("archscale.plan.plan", "import archscale.train.build"),
        ("archscale.report.run", "from archscale.sweep.record import read_sweep"),
        ("archscale.report.run", "from archscale.train import trainer"),
        ("archscale.report.run", "from archscale.plan.plan import make_plan"),
        ("archscale.train.trainer", "from archscale.report.run import write_run_page"),
        ("archscale.study.run", "from archscale.bench import timing"),
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
        ("archscale.optim.engine", "import torch.distributed as dist"),
        ("archscale.train.step", "import torch.distributed as dist"),
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
            "archscale.checkpoint.saving",
            "import torch.distributed as dist\nfrom archscale.optim import MatrixOptimizer",
            False,
        ),
        (
            "archscale.parallel.native",
            "from torch import distributed\nfrom archscale.distributed import rank",
            False,
        ),
        (
            "archscale.optim",
            "from .engine import MatrixOptimizer\nfrom archscale import rules",
            True,
        ),
        (
            "archscale.model.moe",
            "from .loss import z_loss\nfrom ..config import ModelConfig",
            False,
        ),
        ("archscale.plan.plan", "from archscale.data.shards import read_manifest", False),
        ("archscale.report.run", "from archscale.plan.text import size", False),
        ("archscale.sweep.run", "from archscale.report.records import SweepRecord", False),
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


@pytest.mark.parametrize("room", WITHOUT_TORCH)
def test_rooms_that_need_no_torch(room):
    """Their files import it inside functions at most: a plan, a fit and a page start at once."""
    modules = [name for name in map(module_name, FILES) if within(name, f"archscale.{room}")]
    code = f"import sys, {', '.join(modules)}; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.stdout.strip(), done.returncode) == ("False", 0), done.stderr


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
