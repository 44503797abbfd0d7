"""Fits as text for people."""

from __future__ import annotations

import math
from collections.abc import Sequence

from archscale.fit.fit import Estimate, Fit
from archscale.fit.groups import Group, TableFits
from archscale.fit.laws import LAWS


def render(fits: TableFits) -> str:
    """Tables of parameters with intervals, one row a group; refused groups with the reason."""
    s, law = fits.settings, LAWS[fits.form]
    names = dict(zip(("x",) if law.columns == 1 else ("N", "D"), fits.x))
    meaning = ", ".join(f"{symbol} = {name}" for symbol, name in names.items())
    loss = "least squares" if s.loss == "squares" else "Huber's loss"
    kind = "ln " if (s.space or law.space) == "log" else ""
    lines = [
        f"{fits.y} = {law.formula}, {meaning}",
        (
            f"{loss} on {kind}{fits.y}{f', a shift of each {fits.block}' if fits.block else ''};"
            f" {s.confidence:.0%} intervals by studentized bootstrap, {s.replicates} replicates"
        ),
        "",
        *_table(fits.groups, kind != ""),
    ]
    if fits.against:
        how = "one fit of all points" if fits.joint else "through the optima"
        lines += [
            "",
            f"optimal {fits.x[0]} = coefficient · x^exponent, x = {fits.against}, {how}",
            "",
        ]
        lines += _table(fits.laws, not fits.joint)
    if fits.leverage:
        (a, b), points = fits.leverage
        lines += [
            "",
            f"leverage: {fits.x[0]} that {b} needs for the {fits.y} of {a}, over that of {a}",
            "",
        ]
        rows = [[fits.x[0], f"{fits.y} of {a}", "leverage", ""]]
        for point in points:
            note = f"extrapolates {' and '.join(point.extrapolated)}" if point.extrapolated else ""
            ratio = f"never: below the irreducible term of {b}"
            rows.append(
                [
                    f"{point.x:.4g}",
                    f"{point.loss:.4f}",
                    with_interval(point.ratio) if math.isfinite(point.ratio.value) else ratio,
                    note,
                ]
            )
        lines += aligned(rows)
    if fits.excluded:
        lines += [
            "",
            f"not used: {len(fits.excluded)}",
            *(f"  {row}: {reason}" for row, reason in fits.excluded),
        ]
    return "\n".join(lines)


def with_interval(estimate: Estimate) -> str:
    """Such as `0.01515 [0.0144, 0.016]`; ∞ where the data set no bound."""
    ends = (
        f"{end:.4g}" if math.isfinite(end) else ("∞" if end > 0 else "-∞")
        for end in (estimate.low, estimate.high)
    )
    return f"{estimate.value:.5g} [{', '.join(ends)}]"


def _table(groups: Sequence[Group], relative: bool) -> list[str]:
    fitted: list[tuple[Group, Fit]] = [(group, group.fit) for group in groups if group.fit]
    lines = []
    if fitted:
        names = list(fitted[0][1].estimates)
        extrapolates = fitted[0][1].law.extrapolates
        header = [
            "group",
            "points",
            *names,
            "leave-one-out error",
            *(["extrapolation error"] if extrapolates else []),
        ]
        rows = [header]
        for group, fit in fitted:
            errors = [fit.leave_one_out, *([fit.extrapolation] if extrapolates else [])]
            rows.append(
                [
                    group.label or "all",
                    str(fit.points),
                    *(with_interval(fit.estimates[name]) for name in names),
                    *(_error(error, relative) for error in errors),
                ]
            )
        lines = aligned(rows)
    return lines + [
        f"  refused: {group.refused.what} ({group.refused.where})"
        for group in groups
        if group.refused
    ]


def _error(error: float | None, relative: bool) -> str:
    if error is None:
        return "n/a"
    return f"{error:.3%}" if relative else f"{error:.3g}"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, columns aligned and indented."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip()
        for row in rows
    ]
