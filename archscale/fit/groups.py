"""Fits by group over the rows of a table: what `archscale fit` and sweeps call. Writing for people
is in `fit_text`.

    fits = fit_table(read_table(["runs/lr_transfer"]), "quadratic_log",
    x=["parameterization.base.lr"], y="val_loss",
                     group=["model.width"], against="tokens")

A group that cannot be fitted is kept with the reason: the others are worth seeing all the same.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from archscale.errors import ConfigError, DataError
from archscale.fit.blocks import fit_blocks
from archscale.fit.fit import Fit, Settings, around_best, estimate_dict, fit
from archscale.fit.laws import LAWS
from archscale.fit.least_squares import Array
from archscale.fit.leverage import Leverage, leverage
from archscale.fit.optima import joint_law, optimum_law
from archscale.fit.table import Cell, Table, number

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
            (`archscale.fit.blocks`).
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
        form, x, against, joint = self.form, self.x, self.against, self.joint
        over, at, block, settings = self.over, self.at, self.block, self.settings
        columns = LAWS[form].columns
        problems = [
            (
                len(x) != columns,
                f"{form} takes {columns} of --x, got {len(x)}",
                "--x",
                "give one --x" if columns == 1 else "give two: parameters, then tokens",
            ),
            (
                against is not None and form != "quadratic_log",
                f"{form} has no optimum to follow",
                "--against",
                "use --form quadratic_log, or make it an --x",
            ),
            (
                joint and against is None,
                "a joint fit needs the column that optima follow",
                "--joint",
                "add --against COLUMN",
            ),
            (
                over is not None and against is not None,
                "optima are no curves of loss over compute",
                "--leverage",
                "fit power or power_irreducible",
            ),
            (
                bool(at) and over is None,
                "points for a leverage that is not asked for",
                "--at",
                "add --leverage A B",
            ),
            (
                block is not None and form != "quadratic_log",
                f"{form} has no shifts of blocks",
                "--block",
                "use --form quadratic_log",
            ),
            (
                block is not None and joint,
                "a joint fit has no shifts of blocks",
                "--block",
                "leave out --joint",
            ),
            (
                settings.nearest is not None and form != "quadratic_log",
                f"{form} has no best x to be near",
                "--nearest",
                "use --form quadratic_log",
            ),
            (
                settings.nearest is not None and settings.nearest < 3,
                "a parabola needs 3 different x",
                "--nearest",
                "give 3 or more",
            ),
            (
                settings.delta is not None and settings.loss != "huber",
                "squares have no delta",
                "--delta",
                "add --loss huber",
            ),
        ]
        for wrong, what, where, remedy in problems:
            if wrong:
                raise ConfigError(what, where, remedy)


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


@dataclass(frozen=True)
class TableFits:
    """All fits of a table.

    Attributes:
        form, x, y, group, against: as asked for, with the columns' whole names.
        settings: of the fits.
        joint: whether `laws` come from one fit of all points.
        block: column whose values shift whole bowls, or None.
        groups: with `against`, its column is the last of each key.
        laws: of optima against `against`, by group without it.
        leverage: (A, B) and the ratios, or None.
        excluded: (row, reason).
    """

    form: str
    x: list[str]
    y: str
    group: list[str]
    against: str | None
    settings: Settings
    joint: bool
    groups: list[Group]
    laws: list[Group] = field(default_factory=list)
    leverage: tuple[tuple[str, str], list[Leverage]] | None = None
    excluded: list[tuple[str, str]] = field(default_factory=list)
    block: str | None = None

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
        return DataError(
            first.what, first.where, first.remedy + (f" (also refused: {others})" if others else "")
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON: an end of an interval that the data do not bound is null."""

        def plain(group: Group, columns: list[str]) -> dict[str, Any]:
            found: dict[str, Any] = {"group": dict(zip(columns, group.key)), "label": group.label}
            found |= group.fit.as_dict() if group.fit else {}
            return found | {"refused": group.refused.as_dict() if group.refused else None}

        found = {
            "form": self.form,
            "formula": LAWS[self.form].formula,
            "x": self.x,
            "y": self.y,
            "block": self.block,
            "settings": (
                asdict(self.settings) | {"space": self.settings.space or LAWS[self.form].space}
            ),
            "groups": [
                plain(group, [*self.group, *([self.against] if self.against else [])])
                for group in self.groups
            ],
            "excluded": [{"row": row, "reason": reason} for row, reason in self.excluded],
        }
        if self.against:
            found["optimum"] = {
                "against": self.against,
                "joint": self.joint,
                "groups": [plain(law, self.group) for law in self.laws],
            }
        if self.leverage:
            (a, b), points = self.leverage
            found["leverage"] = {
                "of": a,
                "over": b,
                "points": [
                    {
                        "x": point.x,
                        "loss": point.loss,
                        **estimate_dict(point.ratio),
                        "extrapolated": list(point.extrapolated),
                    }
                    for point in points
                ],
            }
        return found


def fit_table(table: Table, request: FitRequest) -> TableFits:
    """Fits the law to the rows of each group.

    Raises:
        ConfigError: parts of the request that do not go together.
        DataError: a column that is not there, text for a number, no rows at all, or a leverage that
            cannot be made.
    """
    request.check()
    form, settings, over = request.form, request.settings, request.over
    xs, target = [table.find(name) for name in request.x], table.find(request.y)
    by = [table.find(name) for name in request.group]
    moving = table.find(request.against) if request.against else None
    shifting = table.find(request.block) if request.block else None
    names = [*xs, target]
    rows, excluded = _rows(table, [*xs, target, *([moving] if moving else [])])
    cells = [table.columns[name] for name in [*by, *([moving] if moving else [])]]
    keys = [
        tuple(None if cell[row] != cell[row] else cell[row] for cell in cells) for row in rows
    ]  # NaN is missing
    found = []
    for key in sorted(set(keys), key=_order):
        chosen = [row for row, of in zip(rows, keys) if of == key]
        X = np.array(
            [
                [number(table.columns[name][row], name, table.rows[row]) for row in chosen]
                for name in xs
            ]
        )
        Y = np.array(
            [number(table.columns[target][row], target, table.rows[row]) for row in chosen]
        )
        blocks = np.array(
            [table.columns[shifting][row] if shifting else None for row in chosen], dtype=object
        )
        if settings.nearest is not None:
            near = around_best(X, Y, settings.nearest)
            X, Y, blocks = X[:, near], Y[near], blocks[near]
        label = label_of([*by, *([moving] if moving else [])], key)
        where = f"{label} in {table.source}" if label else table.source
        own = replace(
            settings, seed=(*np.atleast_1d(settings.seed).tolist(), zlib.crc32(label.encode()))
        )
        fitted, refused = None, None
        try:
            if shifting:
                fitted = fit_blocks(X, Y, blocks, own, where, names, shifting)
            else:
                fitted = fit(form, X, Y, own, where=where, names=names)
        except DataError as error:
            refused = error
        found.append(Group(key, label, X, Y, fitted, refused))
    if not found:
        raise DataError("there are no rows to fit", table.source, _why_none(excluded, table))
    fits = TableFits(
        form,
        xs,
        target,
        by,
        moving,
        settings,
        request.joint,
        found,
        excluded=[*table.left_out, *excluded],
        block=shifting,
    )
    if moving:
        laws = [
            _law(fits, key, table.source)
            for key in dict.fromkeys(group.key[:-1] for group in found)
        ]
        fits = replace(fits, laws=laws)
    if over:
        a, b = (_find(found, name, table.source) for name in over)
        fits = replace(fits, leverage=(over, leverage(a, b, request.at, over, table.source)))
    return fits


def label_of(columns: Sequence[str], key: Key) -> str:
    """Such as `model.width 64, tokens 1.04e+10`."""
    return ", ".join(f"{column} {text_of(value)}" for column, value in zip(columns, key))


def text_of(value: Cell) -> str:
    """A cell for people."""
    if isinstance(value, float):
        return f"{value:.10g}"
    return "null" if value is None else value


def _rows(table: Table, columns: Sequence[str]) -> tuple[list[int], list[tuple[str, str]]]:
    """Rows whose numbers are all there and finite; and the others, with the reason."""
    rows, excluded = [], []
    for row, name in enumerate(table.rows):
        values = {column: number(table.columns[column][row], column, name) for column in columns}
        bad = [column for column, value in values.items() if not math.isfinite(value)]
        if not bad:
            rows.append(row)
            continue
        raw = table.columns[bad[0]][row]
        excluded.append(
            (name, f"{bad[0]} is {'missing' if raw in (None, 'null') else 'not finite'}")
        )
    return rows, excluded


def _law(fits: TableFits, key: Key, source: str) -> Group:
    """The law of the optima of the groups whose keys begin with `key`."""
    members = [group for group in fits.groups if group.key[:-1] == key]
    label = label_of(fits.group, key)
    where = f"{label} in {source}" if label else source
    usable = [(group, group.fit) for group in members if group.fit]
    t = np.array([float(group.key[-1] or 0.0) for group, _ in usable])
    found, optima = (
        [fit for _, fit in usable],
        np.array([fit.estimates["optimum"].value for _, fit in usable]),
    )
    own = replace(
        fits.settings,
        seed=(*np.atleast_1d(fits.settings.seed).tolist(), zlib.crc32(label.encode())),
    )
    law, refused = None, None
    try:
        if fits.joint:
            law = joint_law(
                [(group.x[0], group.y) for group, _ in usable],
                found,
                t,
                own,
                where,
                str(fits.against),
            )
        else:
            # The space that is asked for is that of the loss; optima are multiplicative.
            law = optimum_law(
                found, t, replace(own, space=None), where, (str(fits.against), fits.x[0])
            )
    except DataError as error:
        refused = error
    return Group(key, label, t[None], optima, law, refused)


def _find(groups: Sequence[Group], name: str, source: str) -> Fit:
    """The fit of the group that `name` means: its label, or its values with commas between."""
    for group in groups:
        spellings = {group.label, *(glue.join(map(text_of, group.key)) for glue in (",", ", "))}
        same = name in spellings
        if not same and len(group.key) == 1 and isinstance(group.key[0], float):
            try:
                same = float(name) == group.key[0]
            except ValueError:
                same = False
        if same:
            if group.refused:
                raise group.refused
            assert group.fit is not None
            return group.fit
    known = (
        ", ".join(",".join(map(text_of, group.key)) for group in groups)
        if groups[0].key
        else "none: give --group"
    )
    raise DataError(f"there is no group {name}", source, f"the groups are {known}")


def _order(key: Key) -> tuple[tuple[int, float, str], ...]:
    return tuple(
        (0, value, "") if isinstance(value, float) else (1, 0.0, text_of(value)) for value in key
    )


def _why_none(excluded: Sequence[tuple[str, str]], table: Table) -> str:
    reasons = [f"{row}: {reason}" for row, reason in [*table.left_out, *excluded]]
    return (
        reasons[0] + (f" (and {len(reasons) - 1} more)" if reasons[1:] else "")
        if reasons
        else "add rows"
    )
