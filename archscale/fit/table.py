"""Rows to fit: named columns, from CSV files (also exports of W&B) or from runs
(`archscale.sweep.table`)."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path
from typing import Any

from archscale.errors import DataError, explain_os_error, nearest, show

Cell = float | str | None  # None: missing
# Before a name that has a prefix, as in W&B's exports.
SEPARATORS = ("/", ".", " - ", " ", ":", "_")
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
        """A table of mappings, which need not have the same keys."""
        keys = dict.fromkeys(key for row in rows for key in row)
        columns = {key: [plain(row.get(key)) for row in rows] for key in keys}
        return cls(source, columns, list(names), list(left_out))

    def only(self, chosen: Sequence[bool]) -> Table:
        """The rows for which `chosen` is true."""
        columns = {name: list(compress(cells, chosen)) for name, cells in self.columns.items()}
        return Table(self.source, columns, list(compress(self.rows, chosen)), self.left_out)

    def numbers(self, name: str) -> list[float]:
        """A column, NaN where a cell is missing.

        Raises:
            DataError: a cell is text.
        """
        return [number(cell, name, row) for cell, row in zip(self.columns[name], self.rows)]

    def find(self, name: str) -> str:
        """The column that `name` means: that name, else the only one that is it in other case or
        behind a prefix.

        Raises:
            DataError: none or several.
        """
        if name in self.columns:
            return name
        low = name.lower()
        endings = tuple(separator + low for separator in SEPARATORS)
        matches = [column for column in self.columns if column.lower() == low] or [
            column for column in self.columns if column.lower().endswith(endings)
        ]
        if len(matches) == 1:
            return matches[0]
        if matches:
            choices = " or ".join(map(show, matches[:SHOWN]))
            raise DataError(f"{show(name)} could be {choices}", self.source, "give the whole name")
        columns = list(self.columns)
        close = nearest(name, columns)
        rest = f" and {len(columns) - SHOWN} more" if len(columns) > SHOWN else ""
        raise DataError(
            f"there is no column {show(name)}",
            self.source,
            (f"did you mean {close}? " if close else "")
            + f"The columns are {', '.join(columns[:SHOWN])}{rest}",
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
    """The place of each row in the file, for errors, and its cells; `file` is a column unless the
    file has one.

    Raises:
        DataError: the file is missing, or is no table in UTF-8.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as stream:
            yield from _rows(csv.reader(stream, strict=True), path)
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


def _rows(reader: Any, path: Path) -> Iterator[tuple[str, dict[str, Cell]]]:
    header = [name.strip() for name in next(reader, [])]
    if not any(header):
        raise DataError(
            "the first line has no column names", str(path), "begin with a line of names"
        )
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise DataError(
            f"the column {show(twice[0])} is there twice", str(path), "rename one of them"
        )
    for values in reader:
        where = f"line {reader.line_num} of {path}"
        cells = [parse(value) for value in values]
        if all(cell is None for cell in cells):
            continue
        if len(cells) != len(header):
            raise DataError(
                f"{len(cells)} values for {len(header)} columns",
                where,
                "quote values that hold a comma",
            )
        yield where, {"file": str(path), **dict(zip(header, cells))}


def parse(text: str) -> Cell:
    """A cell as a file has it: a number, else text; empty: missing."""
    text = text.strip()
    try:
        return float(text) if text else None
    except ValueError:
        return text
