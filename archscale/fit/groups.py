"""Fits by group over the rows of a table: what `archscale fit` and sweeps call. Writing for people
is in `text`.

    rows = read_table(["runs/lr_transfer"])  # of archscale.sweep.table
    rate = "parameterization.base.lr"
    fit_table(rows, FitRequest("quadratic_log", [rate], "val_loss", ["model.width"], "tokens"))

A group that cannot be fitted is kept with the reason: the others are worth seeing all the same.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from archscale.errors import ConfigError, DataError
from archscale.fit.fit import Fit, Settings, around_best, fit
from archscale.fit.laws import LAWS
from archscale.fit.least_squares import Array
from archscale.fit.leverage import Leverage, leverage
from archscale.fit.optima import joint_law, optimum_law
from archscale.fit.table import Cell, Table, parse

Key = tuple[Cell, ...]


@dataclass(frozen=True)
class FitRequest:
    """A law to fit to the rows of each group of a table.

    Attributes:
        x: as many columns as the form has.
        group: columns whose values, together, tell groups apart.
        against: with quadratic_log, each value of this column has its own optimum, and each group
            its power law of them.
        joint: find that law by one fit of all points.
        over: names of two groups, for the leverage of the first over the second.
        at: x of the leverage.
        block: with quadratic_log, a column whose values, such as seeds, shift whole bowls
            (`archscale.fit.fit.fit`).
        where: expression over columns; whoever makes the table leaves out the rows for which it is
            false.
    """

    form: str
    x: Sequence[str]
    y: str
    group: Sequence[str] = ()
    against: str | None = None
    joint: bool = False
    over: tuple[str, str] | None = None
    at: Sequence[float] = ()
    block: str | None = None
    settings: Settings = field(default_factory=Settings)
    where: str | None = None

    def check(self) -> None:
        """Refuses parts that do not go together.

        Raises:
            ConfigError: which ones, by the options of `archscale fit`.
        """
        form, columns, settings = self.form, LAWS[self.form].columns, self.settings
        bowl = form == "quadratic_log"
        if len(self.x) != columns:
            remedy = "give one --x" if columns == 1 else "give two: parameters, then tokens"
            raise ConfigError(f"{form} takes {columns} of --x, got {len(self.x)}", "--x", remedy)
        if self.against is not None and not bowl:
            remedy = "use --form quadratic_log, or make it an --x"
            raise ConfigError(f"{form} has no optimum to follow", "--against", remedy)
        if self.joint and self.against is None:
            lacking = "a joint fit needs the column that optima follow"
            raise ConfigError(lacking, "--joint", "add --against COLUMN")
        if self.over is not None and self.against is not None:
            remedy = "fit power or power_irreducible"
            raise ConfigError("optima are no curves of loss over compute", "--leverage", remedy)
        if self.at and self.over is None:
            lacking = "points for a leverage that is not asked for"
            raise ConfigError(lacking, "--at", "add --leverage A B")
        if self.block is not None and not bowl:
            lacking = f"{form} has no shifts of blocks"
            raise ConfigError(lacking, "--block", "use --form quadratic_log")
        if self.block is not None and self.joint:
            lacking = "a joint fit has no shifts of blocks"
            raise ConfigError(lacking, "--block", "leave out --joint")
        if settings.nearest is not None and not bowl:
            lacking = f"{form} has no best x to be near"
            raise ConfigError(lacking, "--nearest", "use --form quadratic_log")
        if settings.nearest is not None and settings.nearest < 3:
            raise ConfigError("a parabola needs 3 different x", "--nearest", "give 3 or more")
        if settings.delta is not None and settings.loss != "huber":
            raise ConfigError("squares have no delta", "--delta", "add --loss huber")


@dataclass(frozen=True)
class Group:
    """Rows that share the values of the group columns, and what came of them.

    Attributes:
        key: those values.
        label: for people.
        x, y: (c, n) and (n,).
        fit: None where refused.
        refused: why.
    """

    key: Key
    label: str
    x: Array
    y: Array
    fit: Fit | None
    refused: DataError | None

    def as_dict(self, columns: Sequence[str]) -> dict[str, Any]:
        """For JSON; `columns` are those of the key."""
        identity = {"group": dict(zip(columns, self.key)), "label": self.label}
        figures = self.fit.as_dict() if self.fit else {}
        return identity | figures | {"refused": self.refused.as_dict() if self.refused else None}


@dataclass(frozen=True)
class TableFits(FitRequest):
    """A request with the columns' whole names, and its fits.

    Attributes:
        groups: with `against`, its column is the last of each key.
        laws: of optima against `against`, by group without it.
        leverage: `over` and the ratios, or None.
        excluded: (row, reason).
    """

    groups: list[Group] = field(default_factory=list)
    laws: list[Group] = field(default_factory=list)
    leverage: tuple[tuple[str, str], list[Leverage]] | None = None
    excluded: list[tuple[str, str]] = field(default_factory=list)

    @property
    def key_columns(self) -> list[str]:
        return [*self.group, *([self.against] if self.against else [])]

    @property
    def refusal(self) -> DataError | None:
        """Why groups were refused, in one line: the first of them, and the names of the others."""
        refused = [
            (group.label, group.refused) for group in [*self.groups, *self.laws] if group.refused
        ]
        if not refused:
            return None
        others = "; ".join(label or "the law of the optima" for label, _ in refused[1:])
        first = refused[0][1]
        remedy = first.remedy + (f" (also refused: {others})" if others else "")
        return DataError(first.what, first.where, remedy)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: an end of an interval that the data do not bound is null."""
        law = LAWS[self.form]
        content: dict[str, Any] = {
            "form": self.form,
            "formula": law.formula,
            "x": self.x,
            "y": self.y,
            "block": self.block,
            "settings": asdict(self.settings) | {"space": self.settings.space or law.space},
            "groups": [group.as_dict(self.key_columns) for group in self.groups],
            "excluded": [{"row": row, "reason": reason} for row, reason in self.excluded],
        }
        if self.against:
            groups = [group.as_dict(self.group) for group in self.laws]
            content["optimum"] = {"against": self.against, "joint": self.joint, "groups": groups}
        if self.leverage:
            (a, b), points = self.leverage
            content["leverage"] = {"of": a, "over": b, "points": [p.as_dict() for p in points]}
        return content


def fit_table(table: Table, request: FitRequest) -> TableFits:
    """Fits the law to the rows of each group.

    Raises:
        ConfigError: parts of the request that do not go together.
        DataError: a column that is not there, text for a number, no rows at all, or a leverage that
            cannot be made.
    """
    request.check()
    whole = replace(
        request,
        x=[table.find(name) for name in request.x],
        y=table.find(request.y),
        group=[table.find(name) for name in request.group],
        against=table.find(request.against) if request.against else None,
        block=table.find(request.block) if request.block else None,
    )
    fits = TableFits(**vars(whole))
    against = [fits.against] if fits.against else []
    rows, excluded = _complete(table, [*fits.x, fits.y, *against])
    if not rows.rows:
        raise DataError("there are no rows to fit", table.source, _why_none(excluded))
    cells = [rows.columns[name] for name in fits.key_columns]
    keys = [  # NaN is missing
        tuple(None if column[row] != column[row] else column[row] for column in cells)
        for row in range(len(rows.rows))
    ]
    groups = [
        _fit_group(rows.only([other == key for other in keys]), fits, key)
        for key in sorted(set(keys), key=_order)
    ]
    fits = replace(fits, groups=groups, excluded=excluded)
    if against:
        shorter = dict.fromkeys(group.key[:-1] for group in groups)
        fits = replace(fits, laws=[_fit_optima(fits, key, table.source) for key in shorter])
    if fits.over:
        a, b = (_fit_named(name, groups, table.source) for name in fits.over)
        points = leverage(a, b, fits.at, fits.over, table.source)
        fits = replace(fits, leverage=(fits.over, points))
    return fits


def label_of(columns: Sequence[str], key: Key) -> str:
    """Such as `model.width 64, tokens 1.04e+10`."""
    return ", ".join(f"{column} {text_of(value)}" for column, value in zip(columns, key))


def text_of(value: Cell) -> str:
    """A cell for people."""
    if isinstance(value, float):
        return f"{value:.10g}"
    return "null" if value is None else value


def _complete(table: Table, columns: Sequence[str]) -> tuple[Table, list[tuple[str, str]]]:
    """The rows whose numbers are all there and finite; the names of all others, with the reason."""
    excluded: dict[int, str] = {}
    for column in columns:
        for row in np.flatnonzero(~np.isfinite(table.numbers(column))):
            missing = table.columns[column][row] in (None, "null")
            excluded.setdefault(int(row), f"{column} is {'missing' if missing else 'not finite'}")
    complete = table.only([row not in excluded for row in range(len(table.rows))])
    reasons = [(table.rows[row], reason) for row, reason in sorted(excluded.items())]
    return complete, [*table.left_out, *reasons]


def _fit_group(rows: Table, fits: TableFits, key: Key) -> Group:
    X, y = np.array([rows.numbers(name) for name in fits.x]), np.array(rows.numbers(fits.y))
    blocks = np.array(rows.columns[fits.block] if fits.block else [None] * len(y), dtype=object)
    if fits.settings.nearest is not None:
        near = around_best(X, y, fits.settings.nearest)
        X, y, blocks = X[:, near], y[near], blocks[near]
    label = label_of(fits.key_columns, key)
    settings, where = _own(fits.settings, label, rows.source)
    names, block = [*fits.x, fits.y], fits.block or ""
    try:
        law = fit(fits.form, X, y, settings, blocks=blocks, block=block, where=where, names=names)
    except DataError as error:
        return Group(key, label, X, y, None, error)
    return Group(key, label, X, y, law, None)


def _fit_optima(fits: TableFits, key: Key, source: str) -> Group:
    """The law of the optima of the groups whose keys begin with `key`."""
    members = [(group, group.fit) for group in fits.groups if group.key[:-1] == key and group.fit]
    bowls = [bowl for _, bowl in members]
    t = np.array([float(group.key[-1] or 0.0) for group, _ in members])
    optima = np.array([bowl.estimates["optimum"].value for bowl in bowls])
    label, against = label_of(fits.group, key), str(fits.against)
    settings, where = _own(fits.settings, label, source)
    try:
        if fits.joint:
            points = [(group.x[0], group.y) for group, _ in members]
            law = joint_law(points, bowls, t, settings, where, against)
        else:
            # The space that is asked for is that of the loss; optima are multiplicative.
            law = optimum_law(bowls, t, replace(settings, space=None), where, (against, fits.x[0]))
    except DataError as error:
        return Group(key, label, t[None], optima, None, error)
    return Group(key, label, t[None], optima, law, None)


def _own(settings: Settings, label: str, source: str) -> tuple[Settings, str]:
    """The settings of a group, whose replicates are independent of other groups', and its place."""
    seed = (*np.atleast_1d(settings.seed).tolist(), zlib.crc32(label.encode()))
    return replace(settings, seed=seed), f"{label} in {source}" if label else source


def _fit_named(name: str, groups: Sequence[Group], source: str) -> Fit:
    """The fit of the group that `name` means: its label, or its values with commas between."""
    for group in groups:
        spellings = {group.label, *(comma.join(map(text_of, group.key)) for comma in (",", ", "))}
        if name in spellings or (parse(name),) == group.key:
            if group.refused:
                raise group.refused
            assert group.fit is not None
            return group.fit
    known = ", ".join(",".join(map(text_of, group.key)) for group in groups)
    if not groups[0].key:
        known = "none: give --group"
    raise DataError(f"there is no group {name}", source, f"the groups are {known}")


def _order(key: Key) -> tuple[tuple[int, float, str], ...]:
    """Numbers by size, before text."""
    return tuple(
        (0, value, "") if isinstance(value, float) else (1, 0.0, text_of(value)) for value in key
    )


def _why_none(excluded: Sequence[tuple[str, str]]) -> str:
    if not excluded:
        return "add rows"
    row, reason = excluded[0]
    return f"{row}: {reason}" + (f" (and {len(excluded) - 1} more)" if excluded[1:] else "")
