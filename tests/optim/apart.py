"""Functions of tests in a process of their own, for what Triton reads when it is imported."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_apart(module: str, call: str, tmp_path: Path, **env: str) -> str:
    """What `call`, of a module of these tests, prints."""
    command = [sys.executable, "-c", f"from tests.optim import {module}; {module}.{call}"]
    paths = [str(ROOT), os.environ.get("PYTHONPATH")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **env}
    env |= {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
