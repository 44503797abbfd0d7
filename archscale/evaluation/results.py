"""What an evaluation has found: for people, as JSON, and in the run directory."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from archscale.errors import explain_os_error
from archscale.files import EVALUATIONS


@dataclass(frozen=True)
class Result:
    """One thing that was measured.

    Attributes:
        kind: validation, data, text or task.
        name: of the text or task.
        settings: with what it was measured, and how much of it.
        figures: by their own names, such as bits_per_byte.
        metrics: the same by the names that they have among a run's metrics, such as
            eval/wiki-1f3a9c/bits_per_byte.
        recorded: what the run itself has written for the same, by name of the figure.
    """

    kind: str
    name: str
    settings: Mapping[str, Any]
    figures: Mapping[str, float]
    metrics: Mapping[str, float]
    recorded: Mapping[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no number that is not finite: null."""
        content: dict[str, Any] = {"kind": self.kind, "name": self.name}
        content |= {"settings": dict(self.settings), "figures": _finite(self.figures)}
        return content | ({"recorded": dict(self.recorded)} if self.recorded else {})


@dataclass(frozen=True)
class Evaluated:
    """All results of one model.

    Attributes:
        step: of its checkpoint; None for an export.
        tokens: that it was trained on by then, where that is known.
        run_dir: whose list of results has these; None for an export, and for a checkpoint that its
            run has abandoned.
    """

    target: str
    results: Sequence[Result]
    run_dir: Path | None = None
    step: int | None = None
    tokens: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        results = [result.as_dict() for result in self.results]
        return {"target": self.target, "step": self.step, "results": results}

    def table(self) -> str:
        """For people."""
        step = "" if self.step is None else f", step {self.step}"
        lines = [f"{self.target}{step}"]
        for result in self.results:
            settings = ", ".join(f"{key} {_text(value)}" for key, value in result.settings.items())
            name = result.kind if not result.name else f"{result.kind} {result.name}"
            lines.append(f"{name}{f' ({settings})' if settings else ''}")
            width = max(map(len, result.figures), default=0)
            for key, value in result.figures.items():
                recorded = result.recorded.get(key)
                beside = "" if recorded is None else f"  (in training {recorded:.6f})"
                lines.append(f"  {key:<{width}}  {_text(value)}{beside}")
        return "\n".join(lines)

    def keep(self) -> None:
        """Append the results to the run's own list of them. Where that cannot be written there is a
        warning: the results were printed."""
        if self.run_dir is None:
            return
        head = {"step": self.step, "tokens": self.tokens, "time": round(time.time(), 3)}
        lines = [
            json.dumps(head | result.as_dict() | {"metrics": _finite(result.metrics)}) + "\n"
            for result in self.results
        ]
        path = self.run_dir / EVALUATIONS
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write("".join(lines))
        except OSError as error:
            cause, _ = explain_os_error(error, "")
            print(f"archscale: warning: {path} does not have these: {cause}", file=sys.stderr)


def _finite(figures: Mapping[str, float]) -> dict[str, float | None]:
    return {key: value if math.isfinite(value) else None for key, value in figures.items()}


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}" if abs(value) >= 1000 else f"{value:.6f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
