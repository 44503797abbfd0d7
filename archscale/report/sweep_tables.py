"""The tables of a sweep's report: rows of plain values, the same in the page and as CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from typing import Any

from archscale.fit.fit import Estimate
from archscale.fit.groups import Group, TableFits
from archscale.report.records import Analysis, SweepRecord, curve_names, name_of

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


def _optima(analysis: Analysis) -> list[TableRow]:
    rows = []
    for one in analysis.combinations:
        row: TableRow = {
            "group": one.arm,
            **{name_of(key): one.row[key] for key in analysis.axes.numbers},
        }
        row |= {key: one.row.get(key) for key in PROVENANCE}
        row["runs"] = sum(map(len, one.points))
        if analysis.axes.tuned:
            row |= {
                "best tried": float(one.x[one.best]),
                "mean loss there": float(one.means[one.best]),
            }
            row |= _estimate("optimum", one.optimum) | _estimate("minimum", one.minimum)
            row["note"] = "; ".join(one.notes)
        else:
            row |= {"mean loss": float(one.means[0]), "standard error": float(one.errors[0])}
        rows.append(row)
    return rows


def _drift(analysis: Analysis) -> list[TableRow]:
    rows = []
    for drift in analysis.drifts:
        row: TableRow = {
            "along": name_of(drift.along),
            "group": drift.label,
            **_estimate("exponent", drift.exponent),
        }
        row |= {"expected": drift.reference, "optima": int(drift.law.x.shape[1])}
        span = (
            float(drift.law.x.max() / drift.law.x.min())
            if drift.law.x.size and drift.law.x.min() > 0
            else None
        )
        factor = span**drift.exponent.value if drift.exponent and span else None
        row |= {"range": span, "factor over the range": factor}
        row["verdict"] = (
            drift.law.refused.what
            if drift.law.refused
            else verdict(drift.exponent, drift.reference)
        )
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
    return (
        "does not grow"
        if exponent.high <= 0 or span**exponent.high <= LEAST_GROWTH
        else "undecided"
    )


def _curves(analysis: Analysis, fits: TableFits | None) -> list[TableRow]:
    rows = []
    for _, label, group in curve_names(analysis, fits) if fits else []:
        row: TableRow = {"group": label, "points": int(group.x.shape[1])}
        estimates = group.fit.estimates if group.fit else {}
        row |= _estimate("coefficient", estimates.get("coefficient")) | _estimate(
            "exponent", estimates.get("exponent")
        )
        row |= {"smallest": float(group.y.min()), "largest": float(group.y.max())}
        row |= {"leave-one-out error": group.fit.leave_one_out if group.fit else None}
        row["note"] = "; ".join(
            filter(None, [group.refused.what if group.refused else "", analysis.at_edge(label)])
        )
        rows.append(row)
    return rows


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
        rows += [
            {
                "group": name,
                "over": base,
                "FLOPs": point.x,
                "loss": point.loss,
                **_estimate("leverage", point.ratio),
                "note": "; ".join(
                    filter(
                        None,
                        [
                            (
                                f"extrapolates {' and '.join(point.extrapolated)}"
                                if point.extrapolated
                                else ""
                            ),
                            analysis.at_edge(name, base),
                        ],
                    )
                ),
            }
            for point in points
        ]
    return rows


def _indicators(analysis: Analysis) -> list[TableRow]:
    return [
        {
            "group": one.arm,
            **{name_of(key): one.row[key] for key in analysis.axes.numbers},
            "flops": one.row.get("flops"),
            **{name: one.row.get(name) for name in [*analysis.indicators, *analysis.constant]},
        }
        for one in analysis.combinations
        if analysis.indicators or analysis.constant
    ]


def _runs(sweep: SweepRecord, analysis: Analysis) -> list[TableRow]:
    table, at = sweep.table, {name: number for number, name in enumerate(sweep.table.rows)}
    left, diverged = dict(table.left_out), dict(analysis.diverged)
    keys = list(dict.fromkeys(key for values in sweep.values.values() for key in values))
    keys = [
        key for key in keys if len({repr(values.get(key)) for values in sweep.values.values()}) > 1
    ]
    shown = [key for key in (analysis.axes.y, *PROVENANCE) if key in table.columns]
    rows = []
    for name, values in sweep.values.items():
        status = "finished" if name in at else "failed" if name in sweep.failed else "not finished"
        row: TableRow = {
            "run": name,
            "status": status,
            "reason": left.get(name) or diverged.get(name, ""),
        }
        row |= {key: values.get(key) for key in keys}
        row |= {key: table.columns[str(key)][at[name]] if name in at else None for key in shown}
        rows.append(row)
    return rows
