"""Rows to fit: CSV files (also exports of W&B), and directories of runs.

A run directory has config.yaml and metrics.jsonl. Its row has the columns

    run                      its path
    model.width, seed, …     the keys of the config, dotted
    val_loss, tokens, …      the last value of each metric
    parameters, active_parameters, published_parameters, flops_per_token, flops, published_flops
                             from the model's structure (`archscale.model.counting`); flops of all
                             tokens trained
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from archscale.config_io import nearest, show
from archscale.errors import ConfigError, DataError, explain_os_error

if TYPE_CHECKING:
    from archscale.config import Config

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
            {key: [_plain(row.get(key)) for row in rows] for key in keys},
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


def _plain(value: Any) -> Cell:
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


def read_table(paths: Sequence[str | os.PathLike[str]]) -> Table:
    """All rows of these files and directories. Rows of CSV files get a column `file` unless they
    have one.

    Raises:
        DataError: one of them is missing or cannot be read.
    """
    rows: list[dict[str, Cell]] = []
    names: list[str] = []
    left_out: list[tuple[str, str]] = []
    for path in map(Path, paths):
        if path.is_dir():
            found = list(_runs(path, left_out))
            if not found and not left_out:
                raise DataError(
                    "there is no run directory in it",
                    str(path),
                    "give a directory whose folders hold config.yaml and metrics.jsonl, or a CSV"
                    " file",
                )
        else:
            found = list(_csv(path))
        for name, row in found:
            names.append(name)
            rows.append(row)
    return Table.from_rows(rows, names, " and ".join(map(str, paths)), left_out)


def _csv(path: Path) -> Iterator[tuple[str, dict[str, Cell]]]:
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


def _runs(folder: Path, left_out: list[tuple[str, str]]) -> Iterator[tuple[str, dict[str, Cell]]]:
    """Every finished run below `folder`, or `folder` itself, in the order of their names."""
    from archscale.config import load_config  # with torch behind it, which a CSV file does not need
    from archscale.scaling.transfer import resolve

    for path, inner, files in os.walk(folder):
        inner.sort()
        if "config.yaml" not in files:
            continue
        run = Path(path)
        if "metrics.jsonl" not in files:
            if not inner:  # a config beside folders belongs to the sweep
                left_out.append((path, "has no metrics.jsonl"))
            continue
        inner.clear()  # nothing below a run is a run
        config = load_config(run / "config.yaml")
        metrics = _last_values(run / "metrics.jsonl")
        row: dict[str, Cell] = {"run": path, **dict(flat(config.resolved())), **metrics}
        row |= _structure(config, metrics.get("tokens"))
        step = metrics.get("step")
        try:
            steps = resolve(config).steps
        except ConfigError:  # a budget that follows a vocabulary which only the data knows
            steps = None
        if not isinstance(step, float):
            left_out.append((path, "has no metrics yet"))
        elif steps is not None and step < steps:
            left_out.append((path, f"unfinished: step {step:.0f} of {steps}"))
        else:
            yield path, row


def _last_values(path: Path) -> dict[str, Cell]:
    """The last value of each metric; NaN where it was not finite. A last line cut short by a crash
    is lost."""
    found: dict[str, Cell] = {}
    for count, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), 1):
        try:
            values = json.loads(line)
            found |= {k: math.nan if v is None else _plain(v) for k, v in values.items()}
        except (ValueError, TypeError, AttributeError):
            if line.endswith("\n"):
                raise DataError(
                    "not a flat JSON object",
                    f"line {count} of {path}",
                    "correct the line, or name the other runs only",
                ) from None
    return found


def flat(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Cell]]:
    """Dotted keys and values of a config, lists as JSON."""
    for key, value in section.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, json.dumps(value) if isinstance(value, list) else _plain(value)


def _structure(config: Config, tokens: Cell) -> dict[str, Cell]:
    """What follows from the model; nothing while its vocabulary is not known."""
    from archscale.model import counting

    model = config.model
    if model.vocab_size is None:
        return {}
    count = counting.parameters(model)
    useful, published = counting.training_flops(model), counting.published_flops_per_token(model)
    found: dict[str, Cell] = {
        "parameters": float(count.total),
        "active_parameters": float(count.active),
        "published_parameters": float(counting.published_parameters(model)),
        "flops_per_token": useful,
    }
    if isinstance(tokens, float):
        found |= {"flops": useful * tokens, "published_flops": float(published) * tokens}
    return found
