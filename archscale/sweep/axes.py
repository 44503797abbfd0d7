"""What a grid varied: which of its keys is tuned, which tell arms apart, along which a run grows.
From the values, not from names of studies.

tuned   the learning rate, or another setting that is searched for its best value
arms    keys that are no numbers, such as rules: a color each
scale   numbers that change a run's FLOPs, such as width or tokens
others  all other numbers, such as top_k
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from archscale.fit.table import Cell, Table
from archscale.report.records import LR, Axes, SweepRecord
from archscale.sweep.expressions import as_number

SIZES = ("model.width", "model.depth", "training.tokens")
LOSSES = ("val_loss", "val_bits_per_byte", "loss")
# Where no learning rate varies, a setting of these sections with so many values counts as one that
# is searched.
SEARCHED, LEAST_VALUES = ("optimizer.", "parameterization.", "schedule."), 4
GROWS = 1.1  # FLOPs' factor above which a key changes them


def find_axes(sweep: SweepRecord) -> Axes:
    """From the values of all planned runs, and the FLOPs of the finished ones."""
    table = sweep.table
    runs = list(sweep.values.values())
    asked = [
        name for fit in sweep.fits for name in (*fit.group, *([fit.against] if fit.against else []))
    ]
    keys = list(dict.fromkeys(key for values in runs for key in values))
    keys = [
        key for key in keys if key != "seed" and len({_plain(run.get(key)) for run in runs}) > 1
    ]
    # Of keys that move together the one that the grid's own fits speak of is kept, so that both say
    # the same.
    keys.sort(key=lambda key: not any(key == name or key.endswith(f".{name}") for name in asked))
    numeric = {key for key in keys if all(_is_number(run.get(key)) for run in runs)}
    tuned = _tuned(sweep, keys, numeric, runs)
    kept: list[str] = []
    labels: list[str] = []
    for key in sorted((key for key in keys if key != tuned), key=lambda key: key in numeric):
        if not _follows(key, kept, runs):
            kept.append(key)
            labels += [key] if key not in numeric else []
        elif (
            key not in numeric
            and all(isinstance(run.get(key), str) for run in runs)
            and _follows(key, labels, runs)
        ):
            labels.append(key)
    arms = [key for key in kept if key not in numeric]
    numbers = sorted(
        (key for key in kept if key in numeric),
        key=lambda key: SIZES.index(key) if key in SIZES else 9,
    )
    scale = [key for key in numbers if _grows(table, key, [*kept])]
    losses = [
        y for y in (*(fit.y for fit in sweep.fits), *LOSSES) if y in LOSSES and _measured(table, y)
    ]
    return Axes(
        tuned,
        arms,
        sorted(labels, key=keys.index),
        scale,
        [key for key in numbers if key not in scale],
        losses[0] if losses else None,
    )


def _tuned(
    sweep: SweepRecord, keys: Sequence[str], numeric: set[str], runs: Sequence[Mapping[str, Any]]
) -> str | None:
    positive = [
        key for key in keys if key in numeric and all(as_number(run[key]) > 0 for run in runs)
    ]
    if LR in positive:
        return LR
    for fit in sweep.fits:
        for key in positive:
            if fit.form == "quadratic_log" and (key == fit.x[0] or key.endswith(f".{fit.x[0]}")):
                return key
    searched = [key for key in positive if key.startswith(SEARCHED)]
    return next((key for key in searched if len({run[key] for run in runs}) >= LEAST_VALUES), None)


def _plain(value: Any) -> str:
    number = as_number(value)
    return (
        repr(float(number)) if _is_number(value) else json.dumps(value, sort_keys=True, default=str)
    )


def _is_number(value: Any) -> bool:
    number = as_number(value)
    return (
        isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)
    )


def _follows(key: str, others: Sequence[str], runs: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the values of `others` tell that of `key`."""
    if not others:
        return False
    seen: dict[tuple[str, ...], str] = {}
    for run in runs:
        value = _plain(run.get(key))
        if seen.setdefault(tuple(_plain(run.get(other)) for other in others), value) != value:
            return False
    return True


def _grows(table: Table, key: str, cell: Sequence[str]) -> bool:
    """Whether `key` changes the FLOPs of a run while the other keys stay."""
    flops = table.columns.get("flops")
    if flops is None:
        return key in SIZES
    groups: dict[tuple[Cell, ...], list[tuple[Cell, float]]] = {}
    for row, value in enumerate(flops):
        if isinstance(value, float) and value > 0:
            rest = tuple(table.columns[other][row] for other in cell if other != key)
            groups.setdefault(rest, []).append((table.columns[key][row], value))
    several = [group for group in groups.values() if len({value for value, _ in group}) > 1]
    if not several:
        return key in SIZES
    return any(max(f for _, f in group) > GROWS * min(f for _, f in group) for group in several)


def _measured(table: Table, column: str) -> bool:
    return any(
        isinstance(value, float) and math.isfinite(value) for value in table.columns.get(column, [])
    )
