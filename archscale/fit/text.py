"""Fits as text for people."""

from __future__ import annotations

import math
from collections.abc import Sequence

from archscale.fit.groups import Group, TableFits
from archscale.fit.intervals import Estimate
from archscale.fit.laws import LAWS


def render(fits: TableFits) -> str:
    """Tables of figures with intervals, one row a group; refused groups with the reason."""
    settings, law = fits.settings, LAWS[fits.form]
    symbols = ("x",) if law.columns == 1 else ("N", "D")
    meaning = ", ".join(f"{symbol} = {name}" for symbol, name in zip(symbols, fits.x))
    loss = "least squares" if settings.loss == "squares" else "Huber's loss"
    logarithmic = (settings.space or law.space) == "log"
    shifts = f", a shift of each {fits.block}" if fits.block else ""
    lines = [
        f"{fits.y} = {law.formula}, {meaning}",
        f"{loss} on {'ln ' if logarithmic else ''}{fits.y}{shifts}; {settings.confidence:.0%}"
        f" intervals by studentized bootstrap, {settings.replicates} replicates",
        "",
        *_table(fits.groups, relative=logarithmic),
    ]
    if fits.against:
        how = "one fit of all points" if fits.joint else "through the optima"
        lines += [
            "",
            f"optimal {fits.x[0]} = coefficient · x^exponent, x = {fits.against}, {how}",
            "",
            *_table(fits.laws, relative=not fits.joint),
        ]
    lines += _leverage(fits)
    if fits.excluded:
        lines += ["", f"not used: {len(fits.excluded)}"]
        lines += [f"  {row}: {reason}" for row, reason in fits.excluded]
    return "\n".join(lines)


def _leverage(fits: TableFits) -> list[str]:
    if not fits.leverage:
        return []
    (a, b), points = fits.leverage
    rows = [[fits.x[0], f"{fits.y} of {a}", "leverage", ""]]
    for point in points:
        ratio = f"never: below the irreducible term of {b}"
        if math.isfinite(point.ratio.value):
            ratio = with_interval(point.ratio)
        note = f"extrapolates {' and '.join(point.extrapolated)}" if point.extrapolated else ""
        rows.append([f"{point.x:.4g}", f"{point.loss:.4f}", ratio, note])
    title = f"leverage: {fits.x[0]} that {b} needs for the {fits.y} of {a}, over that of {a}"
    return ["", title, "", *aligned(rows)]


def with_interval(estimate: Estimate) -> str:
    """Such as `0.01515 [0.0144, 0.016]`; ∞ where the data set no bound."""
    low, high = (f"{end:.4g}".replace("inf", "∞") for end in (estimate.low, estimate.high))
    return f"{estimate.value:.5g} [{low}, {high}]"


def _table(groups: Sequence[Group], relative: bool) -> list[str]:
    rows: list[list[str]] = []
    for group in groups:
        if fit := group.fit:
            errors = {"leave-one-out error": fit.leave_one_out}
            if fit.law.extrapolates:
                errors["extrapolation error"] = fit.extrapolation
            if not rows:
                rows.append(["group", "points", *fit.estimates, *errors])
            figures = map(with_interval, fit.estimates.values())
            texts = (_error(error, relative) for error in errors.values())
            rows.append([group.label or "all", str(fit.points), *figures, *texts])
    return aligned(rows) + [
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
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip()
        for row in rows
    ]
