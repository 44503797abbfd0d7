"""The tables of a sweep's report: rows of plain values, the same in the page and as CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from typing import Any

from archscale.fit.fit import Estimate
from archscale.fit.groups import Group, TableFits
from archscale.report.records import Analysis, Combination, SweepRecord, curve_names, name_of

TableRow = dict[str, Any]  # cells by column
LEAST_GROWTH = 1.02  # factor over the range of FLOPs
PROVENANCE = ("tokens", "flops", "parameters")


def make_tables(sweep: SweepRecord, analysis: Analysis) -> dict[str, list[TableRow]]:
    """By file name; one without rows is left out."""
    tables = {
        "optima": _optima(analysis),
        "drift": _drift(analysis),
        "curves": _curves(analysis, analysis.curves),
        "leverage": _leverage(analysis),
        "stability": _stability(analysis),
        "indicators": _indicators(analysis),
        "runs": _runs(sweep, analysis),
    }
    return {name: rows for name, rows in tables.items() if rows}


def csv_text(rows: Sequence[TableRow]) -> str:
    """Numbers in full; nothing for what is missing or has no bound."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _plain(value) for key, value in row.items()} for row in rows)
    return stream.getvalue()


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        if not math.isfinite(value):
            return ""
        return int(value) if value.is_integer() and abs(value) < 1e15 else repr(value)
    return value


def _estimate(name: str, estimate: Estimate | None) -> TableRow:
    if estimate is None:
        return {name: None, f"{name} low": None, f"{name} high": None}
    return {name: estimate.value, f"{name} low": estimate.low, f"{name} high": estimate.high}


def _cell_of(analysis: Analysis, member: Combination) -> TableRow:
    """What tells a combination apart."""
    numbers = {name_of(key): member.row[key] for key in analysis.axes.numbers}
    return {"group": member.arm, **numbers}


def _optima(analysis: Analysis) -> list[TableRow]:
    rows = []
    for member in analysis.combinations:
        row = _cell_of(analysis, member) | {key: member.row.get(key) for key in PROVENANCE}
        row["runs"] = sum(map(len, member.points))
        mean, error = float(member.means[member.best]), float(member.errors[member.best])
        if analysis.axes.tuned:
            row |= {"best tried": float(member.x[member.best]), "mean loss there": mean}
            row |= _estimate("optimum", member.optimum) | _estimate("minimum", member.minimum)
            row["note"] = "; ".join(member.notes)
        else:
            row |= {"mean loss": mean, "standard error": error}
        rows.append(row)
    return rows


def _drift(analysis: Analysis) -> list[TableRow]:
    rows = []
    for drift in analysis.drifts:
        x, refused = drift.law.x, drift.law.refused
        span = float(x.max() / x.min()) if x.size and x.min() > 0 else None
        row: TableRow = {"along": name_of(drift.along), "group": drift.label}
        row |= _estimate("exponent", drift.exponent)
        row |= {"expected": drift.reference, "optima": int(x.shape[1]), "range": span}
        factor = span**drift.exponent.value if drift.exponent and span else None
        row["factor over the range"] = factor
        row["verdict"] = refused.what if refused else verdict(drift.exponent, drift.reference)
        rows.append(row)
    return rows


def verdict(exponent: Estimate | None, reference: float | None) -> str:
    """Whether an exponent's interval holds 0, or what is expected."""
    if exponent is None:
        return ""
    if not any(map(math.isfinite, (exponent.low, exponent.high))):
        return "not known: the interval has no bound"
    expected = reference or 0.0
    name = "0" if not expected else f"the expected {expected:g}"
    if exponent.low <= expected <= exponent.high:
        return f"{name} is within the interval"
    return f"{'below' if exponent.high < expected else 'above'} {name}"


def growth(group: Group) -> str:
    """What a power law over FLOPs shows: "grows", "does not grow", "undecided" (growth is neither
    shown nor excluded), or "not known: " and the reason, where there is no fit with an interval."""
    if group.fit is None:
        return f"not known: {group.refused.what if group.refused else 'no fit'}"
    exponent, span = group.fit.estimates["exponent"], float(group.fit.highs[0] / group.fit.lows[0])
    if not all(map(math.isfinite, (exponent.low, exponent.high))):
        return "not known: the interval of the exponent has no bound"
    if exponent.low > 0 and span**exponent.value > LEAST_GROWTH:
        return "grows"
    # Less than rounding: even the upper end of the interval.
    level = exponent.high <= 0 or span**exponent.high <= LEAST_GROWTH
    return "does not grow" if level else "undecided"


def _curves(analysis: Analysis, fits: TableFits | None) -> list[TableRow]:
    rows = []
    for _, label, group in curve_names(analysis, fits) if fits else []:
        row: TableRow = {"group": label, "points": int(group.x.shape[1])}
        estimates = group.fit.estimates if group.fit else {}
        for name in ("coefficient", "exponent"):
            row |= _estimate(name, estimates.get(name))
        row |= {"smallest": float(group.y.min()), "largest": float(group.y.max())}
        row["leave-one-out error"] = group.fit.leave_one_out if group.fit else None
        row["note"] = _joined(group.refused.what if group.refused else "", analysis.at_edge(label))
        rows.append(row)
    return rows


def _joined(*notes: str) -> str:
    return "; ".join(filter(None, notes))


def _stability(analysis: Analysis) -> list[TableRow]:
    rows = []
    for name, fits in analysis.growth.items():
        groups = curve_names(analysis, fits)
        for (_, _, group), row in zip(groups, _curves(analysis, fits)):
            rows.append({"indicator": name, **row, "growth": growth(group).partition(":")[0]})
    return rows


def _leverage(analysis: Analysis) -> list[TableRow]:
    rows: list[TableRow] = []
    for name, base, points in analysis.leverage:
        if isinstance(points, str):
            rows.append({"group": name, "over": base, "note": points})
            continue
        for point in points:
            row = {"group": name, "over": base, "FLOPs": point.x, "loss": point.loss}
            row |= _estimate("leverage", point.ratio)
            beyond = " and ".join(point.extrapolated)
            note = f"extrapolates {beyond}" if beyond else ""
            rows.append(row | {"note": _joined(note, analysis.at_edge(name, base))})
    return rows


def _indicators(analysis: Analysis) -> list[TableRow]:
    names = [*analysis.indicators, *analysis.constant]
    return [
        {**_cell_of(analysis, member), **{key: member.row.get(key) for key in ("flops", *names)}}
        for member in analysis.combinations
        if names
    ]


def _runs(sweep: SweepRecord, analysis: Analysis) -> list[TableRow]:
    table, at = sweep.table, {name: number for number, name in enumerate(sweep.table.rows)}
    left, diverged = dict(table.left_out), dict(analysis.diverged)
    planned = list(sweep.values.values())
    keys = dict.fromkeys(key for values in planned for key in values)
    varied = [key for key in keys if len({repr(values.get(key)) for values in planned}) > 1]
    shown = [key for key in (analysis.axes.y, *PROVENANCE) if key in table.columns]
    rows = []
    for name, values in sweep.values.items():
        status = "finished" if name in at else "failed" if name in sweep.failed else "not finished"
        status = "diverged" if name in diverged else status
        reason = left.get(name) or diverged.get(name, "")
        row: TableRow = {"run": name, "status": status, "reason": reason}
        row |= {key: values.get(key) for key in varied}
        row |= {key: table.columns[str(key)][at[name]] if name in at else None for key in shown}
        rows.append(row)
    return rows
