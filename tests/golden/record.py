"""Rewrites the recorded curves: `python -m tests.golden.record [NAME ...]`.

The commit that changes a curve explains why.
"""

import json
import sys
import tempfile
from pathlib import Path

from tests.golden.curves import CASES, FOLDER, curve, data


def rounded(value: float | list[float]) -> float | list[float]:
    """Nine digits, which is what float32 has."""
    return [float(f"{x:.9g}") for x in value] if isinstance(value, list) else float(f"{value:.9g}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        made = data(Path(folder))
        for name in sys.argv[1:] or CASES:
            found = curve(made, name, f"{folder}/{name}")
            rows = [f'  "{key}": {json.dumps(rounded(value))}' for key, value in found.items()]
            (FOLDER / f"{name}.json").write_text("{\n" + ",\n".join(rows) + "\n}\n")
