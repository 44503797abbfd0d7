"""What the runs of a sweep say together: each combination's bowl, how optima move, curves over
FLOPs, leverage, growth of indicators.

All statistics are those of `archscale.fit`; this chooses what to fit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from archscale.config.model import TOKEN_EXPONENTS
from archscale.errors import ArchscaleError
from archscale.fit.fit import Settings, lowest
from archscale.fit.groups import FitRequest, Group, TableFits, fit_table
from archscale.fit.leverage import leverage
from archscale.fit.table import Cell, Table
from archscale.report.records import (
    LR,
    Analysis,
    Axes,
    Combination,
    Drift,
    Key,
    SweepRecord,
    curve_names,
    label_in,
    value_of,
)
from archscale.sweep.axes import find_axes
from archscale.sweep.results import make_fits

INDICATORS = re.compile(
    r"(stability|moe)/(?!layer_)[^/]+|optimizer/(clip_fraction|trust_ratio_mean|relative_update_mean|weight_norm_drift|orthogonality_residual)"
)


def analyse(sweep: SweepRecord) -> Analysis:
    """Everything that the finished runs allow; what they do not is left out, or there with the
    reason."""
    axes = find_axes(sweep)
    analysis = Analysis(axes, [], [], make_fits(sweep.table, sweep.fits))
    if axes.y is None:
        return analysis
    _combine(analysis, sweep.table)
    if axes.tuned and analysis.combinations:
        _bowls(analysis, sweep.table)
    best = Table.from_rows(
        [
            combination.row | {"loss at the best": combination.loss}
            for combination in analysis.combinations
        ],
        [
            ", ".join(
                [
                    combination.arm,
                    *(value_of(key, combination.row.get(key)) for key in axes.numbers),
                ]
            )
            for combination in analysis.combinations
        ],
        sweep.table.source,
    )
    if axes.scale and "flops" in best.columns:
        analysis.curves = _try(
            analysis,
            lambda: fit_table(
                best, FitRequest("power", ["flops"], "loss at the best", _curve_keys(axes))
            ),
        )
        _leverage(analysis)
    _indicators(analysis, best)
    return analysis


def _curve_keys(axes: Axes) -> list[str]:
    return [*axes.arms, *axes.others]


def _try(analysis: Analysis, make):  # type: ignore[no-untyped-def]
    """None with a note where it is refused."""
    try:
        return make()
    except ArchscaleError as error:
        analysis.notes.append(str(error))
        return None


def _finite(value: Cell) -> float | None:
    return value if isinstance(value, float) and math.isfinite(value) else None


def _combine(analysis: Analysis, table: Table) -> None:
    axes = analysis.axes
    y = table.columns[str(axes.y)]
    groups: dict[Key, list[int]] = {}
    for row, name in enumerate(table.rows):
        if _finite(y[row]) is None:
            analysis.diverged.append(
                (name, f"{axes.y} is {'missing' if y[row] is None else 'not finite'}")
            )
        else:
            groups.setdefault(tuple(table.columns[key][row] for key in axes.cell), []).append(row)

    def order(key: Key) -> list[tuple[int, float, str]]:
        return [
            (0, value, "") if isinstance(value, float) else (1, 0.0, str(value)) for value in key
        ]

    arms = len(axes.arms)
    # Arms as the grid lists them.
    first = {key[:arms]: number for number, key in reversed(list(enumerate(groups)))}
    for key in sorted(groups, key=lambda key: (first[key[:arms]], order(key[arms:]))):
        by_x: dict[float, list[int]] = {}
        for row in groups[key]:
            x = _finite(table.columns[axes.tuned][row]) if axes.tuned else math.nan
            by_x.setdefault(math.nan if x is None else x, []).append(row)
        xs = sorted(by_x)
        points = [np.array([_finite(y[row]) for row in by_x[x]], dtype=float) for x in xs]
        best = lowest(points)
        mean = _mean_row(table, by_x[xs[best]])
        analysis.combinations.append(
            Combination(key, axes.arm(mean), mean, np.array(xs), points, best)
        )


def _mean_row(table: Table, rows: Sequence[int]) -> dict[str, Cell]:
    """Means of numbers over seeds, the first of all else."""
    out: dict[str, Cell] = {}
    for name, column in table.columns.items():
        values = [value for row in rows if (value := _finite(column[row])) is not None]
        out[name] = (
            (values[0] if len(set(values)) == 1 else sum(values) / len(values))
            if values
            else column[rows[0]]
        )
    return out


def _bowls(analysis: Analysis, table: Table) -> None:
    """A bowl for each combination and, for each numeric key, the law of their optima.

    The grid's own fits where they are of these points, so that page and command say the same; fits
    with their settings for all others.
    """
    axes = analysis.axes
    asked = [
        fit
        for fit in analysis.fits
        if fit.asked.form == "quadratic_log" and _is_bowl(fit.fits, axes)
    ]
    settings = asked[0].asked.settings if asked else Settings()
    block = next((fit.fits.block for fit in asked[:1] if fit.fits), None)
    known: set[tuple[str, Key]] = set()
    alongs: list[str | None] = [*axes.numbers] or [None]
    own = [
        _try(
            analysis,
            lambda along=along: fit_table(  # type: ignore[misc]
                table,
                FitRequest(
                    "quadratic_log",
                    [str(axes.tuned)],
                    str(axes.y),
                    [key for key in axes.cell if key != along],
                    against=along,
                    block=block,
                    settings=settings,
                ),
            ),
        )
        for along in alongs
    ]
    for fits in [*(fit.fits for fit in asked), *own]:
        if fits is None:
            continue
        members: dict[Key, list[Combination]] = {}
        for group in fits.groups:
            values = dict(zip([*fits.group, *([fits.against] if fits.against else [])], group.key))
            matches = [
                combination
                for combination in analysis.combinations
                if combination.has(group)
                and all(combination.row.get(k) == v for k, v in values.items())
            ]
            if len(matches) != 1:
                continue  # it mixes combinations
            [combination] = matches
            combination.bowl = combination.bowl or group
            members.setdefault(group.key[:-1], []).append(combination)
        for law in fits.laws:
            _add_drift(analysis, fits, law, members.get(law.key, []), known)
    analysis.drifts.sort(
        key=lambda drift: (axes.numbers.index(drift.along), analysis.arms.index(drift.arm))
    )


def _is_bowl(fits: TableFits | None, axes: Axes) -> bool:
    return fits is not None and (fits.form, fits.x, fits.y) == (
        "quadratic_log",
        [axes.tuned],
        axes.y,
    )


def _add_drift(
    analysis: Analysis,
    fits: TableFits,
    law: Group,
    members: Sequence[Combination],
    known: set[tuple[str, Key]],
) -> None:
    """`law` as a drift, if its combinations differ in nothing else and no earlier one is of
    them."""
    axes, along = analysis.axes, fits.against
    if along not in axes.numbers or not members:
        return
    columns = [key for key in axes.cell if key != along]
    keys = {tuple(combination.row[key] for key in columns) for combination in members}
    if len(keys) != 1 or (along, *keys) in known:
        return
    [key] = keys
    known.add((along, key))
    row = members[0].row
    label = label_in(axes, row, [key for key in axes.numbers if key != along])
    reference = _reference(along, row) if axes.tuned == LR else None
    analysis.drifts.append(Drift(along, columns, key, members[0].arm, label, law, reference))


def _reference(along: str, row: Mapping[str, Cell]) -> float | None:
    """The exponent of base.lr that `archscale.plan.transfer` expects along a key: 0 for what it
    transfers itself."""
    kind = str(row.get("parameterization.kind"))
    if kind not in TOKEN_EXPONENTS:
        return None
    if along == "training.tokens":
        applied = _finite(row.get("parameterization.token_exponent"))
        if _finite(row.get("parameterization.planned_tokens")) is not None:
            applied = 0.0  # the rates are those of that length, whatever the run's own
        known = TOKEN_EXPONENTS[kind]
        return (0.0 if applied is None else applied - known) if known else None
    transferred = along in ("model.width", "training.batch_tokens")
    transferred |= along == "model.depth" and row.get("model.depth_mup") == "true"
    transferred |= (
        along == "model.moe.top_k" and kind == "hyperp" and row.get("model.moe.sqrt_gate") == "true"
    )
    return 0.0 if transferred else None


def _leverage(analysis: Analysis) -> None:
    """Leverage of every curve over the one that needs most FLOPs in the middle of their range."""
    fits = analysis.curves
    groups = [group for group in (fits.groups if fits else []) if group.fit]
    if len(groups) < 2:
        return
    assert fits is not None
    low = max(float(group.fit.lows[0]) for group in groups if group.fit)
    high = min(float(group.fit.highs[0]) for group in groups if group.fit)
    middle = math.sqrt(low * high)
    base = max(groups, key=lambda group: float(group.fit.predict(middle)[0]) if group.fit else 0.0)
    names = {group.key: label for _, label, group in curve_names(analysis, fits)}
    for group in sorted(groups, key=lambda group: list(names).index(group.key)):
        if group is base:
            continue
        assert group.fit is not None
        assert base.fit is not None
        pair = (names[group.key], names[base.key])
        try:
            analysis.leverage.append(
                (*pair, leverage(group.fit, base.fit, [], pair, "the curves over FLOPs"))
            )
        except ArchscaleError as error:
            analysis.leverage.append((*pair, str(error)))


def _indicators(analysis: Analysis, best: Table) -> None:
    axes = analysis.axes
    for name, column in best.columns.items():
        if not INDICATORS.fullmatch(name):
            continue
        values = [value for cell in column if (value := _finite(cell)) is not None]
        if not values:
            continue
        if max(values) - min(values) <= 1e-12 * max(map(abs, values)):
            analysis.constant[name] = values[0]
            continue
        analysis.indicators.append(name)
        if axes.scale:
            try:
                analysis.growth[name] = fit_table(
                    best, FitRequest("power", ["flops"], name, _curve_keys(axes))
                )
            except ArchscaleError as error:
                analysis.notes.append(str(error))
                analysis.unfitted[name] = error.what
