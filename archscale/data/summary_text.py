"""The summary of a data set as text for people."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from archscale.data.shards import SPLITS

COLUMNS = {
    "tokens": "tokens",
    "documents": "documents",
    "bytes": "bytes",
    "bytes_per_token": "bytes per token",
    "shards": "shards",
}
# entries that have lines of their own
_DETAILS = (*SPLITS, "dropped", "skipped", "recipe", "excerpt")


def render(summary: Mapping[str, Any]) -> str:
    """What `prepare` and `inspect` return: facts, then a table of splits.

    Of `inspect` also the recipe, a line for each dotted key, and how the text begins.
    """
    facts = {
        key.replace("_", " "): _text(value) for key, value in summary.items() if key not in _DETAILS
    }
    if "dropped" in summary:
        counts = dict(summary["dropped"])
        repaired = counts.pop("repaired", 0)  # these are kept
        facts["documents left out"] = _counts(counts)
        if repaired:
            facts["documents repaired"] = _text(repaired)
    if "skipped" in summary:
        facts["skipped for errors"] = _counts(summary["skipped"]["counts"])
    lines = _aligned([[key, value] for key, value in facts.items()])
    splits = [name for name in summary if name in SPLITS]
    columns = {key: name for key, name in COLUMNS.items() if key in summary[splits[0]]}
    cells = [[name, *(_text(summary[name][key]) for key in columns)] for name in splits]
    lines += ["", *_aligned([["split", *columns.values()], *cells], numbers=True)]
    if "skipped" in summary:
        lines += ["", "skipped, the first of them", *summary["skipped"]["examples"]]
    if "recipe" in summary:
        rows = [[f"  {key}", value] for key, value in _dotted(summary["recipe"])]
        lines += ["", "recipe", *_aligned(rows)]
    if "excerpt" in summary:
        lines += [
            "",
            f"the {'training' if splits[0] == SPLITS[0] else splits[0]} split begins",
            *(f"  {line}" for line in summary["excerpt"].splitlines()),
        ]
    return "\n".join(lines)


def render_estimate(estimate: Mapping[str, Any]) -> str:
    """What `archscale data prepare --dry-run` expects: a line for each source, and totals."""
    cells = [
        [row["source"], _size(row["disk"]), _size(row["text"]), _count(row["tokens"])]
        for row in estimate["sources"]
    ]
    lines = _aligned([["source", "on disk", "text", "tokens"], *cells], numbers=True)
    totals = {
        "text": _size(estimate["text"]),
        "documents": _count(estimate["documents"]),
        "tokens": _count(estimate["tokens"]),
        "shards": _size(estimate["shards"]),
        "disk beside them while they are made": _size(estimate["work"]),
        "free disk": _size(estimate["free"]),
        f"time on {estimate['workers']} cores": _time(estimate["seconds"]),
    }
    lines += ["", *_aligned([[key, value] for key, value in totals.items()])]
    notes = [f"note: {note}" for note in estimate["notes"]]
    return "\n".join([*lines, "", *notes, "estimated; nothing was written"])


def _count(value: float | None) -> str:
    return "unknown" if value is None else f"{_two_digits(value):,.0f}"


def _size(value: float | None) -> str:
    """Bytes in the unit that leaves a number below 1,000."""
    if value is None:
        return "unknown"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.5 or unit == "TB":
            return f"{_two_digits(value):,.3g} {unit}"
        value /= 1000
    raise AssertionError("the last unit always fits")


def _two_digits(value: float) -> float:
    """An estimate is not known better."""
    return float(f"{value:.2g}")


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    minutes = seconds / 60
    if minutes < 1:
        return "less than a minute"
    if minutes < 120:
        return f"about {minutes:.0f} minutes"
    return f"about {_two_digits(minutes / 60):g} hours"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.items())


def _aligned(rows: list[list[str]], numbers: bool = False) -> list[str]:
    """Columns of equal width; all but the first to the right where they hold numbers."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for first, *rest in rows:
        cells = [
            cell.rjust(width) if numbers else cell.ljust(width)
            for cell, width in zip(rest, widths[1:])
        ]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return lines


def _dotted(tree: Any, key: str = "") -> list[tuple[str, str]]:
    """(dotted key, value) of every leaf that is set."""
    if isinstance(tree, Mapping) or (isinstance(tree, list) and tree):
        items = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
        return [
            leaf
            for name, value in items
            for leaf in _dotted(value, f"{key}.{name}" if key else str(name))
        ]
    return [] if tree is None else [(key, _text(tree))]


def _text(value: Any) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value)
