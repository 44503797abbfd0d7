"""Rows to fit: CSV files (also exports of W&B), and directories of runs.

A run directory has config.yaml and metrics.jsonl. Its row has the columns

    run                      its path
    model.width, seed, …     the keys of the config, dotted
    val_loss, tokens, …      the last value of each metric
    parameters, active_parameters, published_parameters, flops_per_token, flops, published_flops
                             from the model's structure (`archscale.plan.counting`); flops of all
                             tokens trained
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from archscale.errors import DataError, explain_os_error, nearest, show

if TYPE_CHECKING:
    pass

Cell = float | str | None  # None: missing
SEPARATORS = (
    "/",
    ".",
    " - ",
    " ",
    ":",
    "_",
)  # before a name that has a prefix, as in W&B's exports
SHOWN = 40  # columns that an error lists


@dataclass(frozen=True)
class Table:
    """Rows with named columns.

    Attributes:
        source: where they come from, for errors.
        columns: by name, all of one length.
        rows: a name for each row.
        left_out: (name, reason) of what was there and is no row.
    """

    source: str
    columns: dict[str, list[Cell]]
    rows: list[str]
    left_out: list[tuple[str, str]] = field(default_factory=list)

    @classmethod
    def from_rows(
        cls,
        rows: Sequence[Mapping[str, Any]],
        names: Sequence[str],
        source: str,
        left_out: Sequence[tuple[str, str]] = (),
    ) -> Table:
        """Of mappings, which need not have the same keys."""
        keys = dict.fromkeys(key for row in rows for key in row)
        return cls(
            source,
            {key: [plain(row.get(key)) for row in rows] for key in keys},
            list(names),
            list(left_out),
        )

    def only(self, chosen: Sequence[bool]) -> Table:
        """The rows for which `chosen` is true."""
        columns = {
            name: [cell for cell, keep in zip(cells, chosen) if keep]
            for name, cells in self.columns.items()
        }
        return Table(
            self.source,
            columns,
            [row for row, keep in zip(self.rows, chosen) if keep],
            self.left_out,
        )

    def find(self, name: str) -> str:
        """The column that `name` means: that name, else the only one that is it in other case or
        behind a prefix.

        Raises:
            DataError: none or several.
        """
        if name in self.columns:
            return name
        low = name.lower()
        found = [column for column in self.columns if column.lower() == low]
        found = found or [
            c for c in self.columns if any(c.lower().endswith(s + low) for s in SEPARATORS)
        ]
        if len(found) == 1:
            return found[0]
        if found:
            raise DataError(
                f"{show(name)} could be {' or '.join(map(show, found[:SHOWN]))}",
                self.source,
                "give the whole name",
            )
        close = nearest(name, list(self.columns))
        shown = ", ".join(list(self.columns)[:SHOWN])
        more = f" and {len(self.columns) - SHOWN} more" if len(self.columns) > SHOWN else ""
        raise DataError(
            f"there is no column {show(name)}",
            self.source,
            (f"did you mean {close}? " if close else "") + f"The columns are {shown}{more}",
        )


def plain(value: Any) -> Cell:
    """Any scalar as a cell; TypeError for a list or mapping."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return json.dumps(value)
    return float(value)


def number(value: Cell, column: str, row: str) -> float:
    """A cell as a number, NaN where it is missing.

    Raises:
        DataError: it is text.
    """
    if value is None or value == "null":
        return math.nan
    if isinstance(value, str):
        raise DataError(
            f"{show(value)} is not a number",
            f"{column} in {row}",
            "correct it, empty it, or choose another column",
        )
    return float(value)


def read_csv(path: Path) -> Iterator[tuple[str, dict[str, Cell]]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, strict=True)
            header = [name.strip() for name in next(reader, [])]
            if not any(header):
                raise DataError(
                    "the first line has no column names", str(path), "begin with a line of names"
                )
            twice = sorted({name for name in header if header.count(name) > 1})
            if twice:
                raise DataError(
                    f"the column {show(twice[0])} is there twice", str(path), "rename one of them"
                )
            for values in reader:
                if not any(value.strip() for value in values):
                    continue
                where = f"line {reader.line_num} of {path}"
                if len(values) != len(header):
                    raise DataError(
                        f"{len(values)} values for {len(header)} columns",
                        where,
                        "quote values that hold a comma",
                    )
                row: dict[str, Cell] = {"file": str(path)}
                yield where, row | {name: _cell(value) for name, value in zip(header, values)}
    except FileNotFoundError:
        raise DataError("there is no such file or directory", str(path), "check the path") from None
    except OSError as error:
        cause, remedy = explain_os_error(error, "give a CSV file")
        raise DataError(f"cannot be read: {cause}", str(path), remedy) from None
    except (UnicodeDecodeError, csv.Error) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"cannot be read as CSV: {reason}", str(path), "give a CSV file in UTF-8"
        ) from None


def _cell(text: str) -> Cell:
    text = text.strip()
    if not text:
        return None
    try:
        return float(text)
    except ValueError:
        return text
