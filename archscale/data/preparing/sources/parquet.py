"""Parquet files, read by row groups."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from archscale.data.preparing.sources.base import SourceBase
from archscale.data.preparing.sources.fields import BadRecord, field_names, text_of
from archscale.data.preparing.sources.globbing import match_files
from archscale.data.preparing.sources.opening import list_files, open_file
from archscale.data.preparing.sources.remote import is_remote
from archscale.data.preparing.sources.units import UNIT_BYTES, Part, Unit, group, shown
from archscale.data.preparing.trouble import DamagedFile, Trouble, UnreadableFile
from archscale.errors import DataError, one_line

_EXAMPLE = "*.parquet"
# Decoded at a time, and read of a column at a time.
_BATCH_BYTES = 1 << 20
_BUFFER_BYTES = 1 << 20


def _pyarrow(where: str) -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            "the package 'pyarrow' is not installed", where, "pip install archscale[hf]"
        ) from error
    return pyarrow


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    """A `ParquetFile`.

    Raises:
        UnreadableFile, DamagedFile: also while it is read.
    """
    arrow = _pyarrow(shown(path))
    with open_file(path) as file:
        try:
            # Ahead, Arrow would read all of a row group.
            yield arrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=_BUFFER_BYTES)
        except (arrow.ArrowException, OSError) as error:
            # Arrow raises an OSError without a number for data that it cannot decode.
            if isinstance(error, OSError) and error.errno is not None:
                raise
            reason = one_line(str(error)) or type(error).__name__
            raise DamagedFile(
                f"not a whole Parquet file: {reason}",
                shown(path),
                "copy the file again, or leave it out of the source's path",
            ) from error


def _find_column(arrow: Any, columns: Any, field: str) -> tuple[list[str], Any] | None:
    """Names of columns within columns that a dotted field stands for, and the type of the last; a
    name that itself has dots wins. None: it is not there.

    Args:
        columns: of a schema, or the fields of a struct.
    """
    types = {column.name: column.type for column in columns}
    if field in types:
        return [field], types[field]
    for name, kind in types.items():
        if field.startswith(f"{name}.") and arrow.types.is_struct(kind):
            fields = [kind.field(i) for i in range(kind.num_fields)]
            inner = _find_column(arrow, fields, field[len(name) + 1 :])
            if inner is not None:
                return [name, *inner[0]], inner[1]
    return None


def _is_text(arrow: Any, kind: Any) -> bool:
    """Whether the values of a column may be text, bytes, or lists of texts; or all are null."""
    types = arrow.types
    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        kind = kind.value_type
    return any(
        test(kind)
        for test in (
            types.is_string,
            types.is_large_string,
            types.is_string_view,
            types.is_binary,
            types.is_large_binary,
            types.is_binary_view,
            types.is_fixed_size_binary,
            types.is_null,
        )
    )


class ParquetSource(SourceBase):
    """Parquet files, each row one document; `path` is a glob or URL. Needs `archscale[hf]`."""

    kind: Literal["parquet"]
    path: str
    field: str = "text"

    def files(self) -> list[tuple[str, Path]]:
        return [] if is_remote(self.path) else match_files(self.path, _EXAMPLE)

    def remote_files(self) -> list[Part]:
        return list_files(self.path, _EXAMPLE) if is_remote(self.path) else []

    def units(self, limit: int = UNIT_BYTES) -> list[Unit]:
        _pyarrow(shown(self.path))
        parts = list_files(self.path, _EXAMPLE)
        return group([piece for part in parts for piece in _cut_large(part, limit)], limit)

    def read_part(self, part: Part, trouble: Trouble) -> Iterator[str]:
        with _opened(part.path) as file:
            column = self._column(file.schema_arrow, part, trouble)
            if column is None:
                return
            groups = range(part.start, file.num_row_groups if part.stop is None else part.stop)
            row = sum(file.metadata.row_group(i).num_rows for i in range(part.start))
            fields = field_names(file.schema_arrow.names)
            for values in _values(file, groups, column):
                for number, value in enumerate(values, row):
                    try:
                        document = text_of(_python(value), self.field, fields)
                    except BadRecord as error:
                        error.record(trouble, f"{shown(part.path)}, row {number}")
                        continue
                    yield document
                    del document
                row += len(values)

    def _column(self, schema: Any, part: Part, trouble: Trouble) -> list[str] | None:
        """The names that lead to the column; None where `trouble` lets a file without it pass."""
        arrow = _pyarrow(part.path)
        column = _find_column(arrow, schema, self.field)
        fields = field_names(schema.names)
        if column is None:
            cause, problem = "no text field", f"no field {self.field!r}; there is: {fields}"
        elif not _is_text(arrow, column[1]):
            held = f"{column[1]}, not text"
            cause, problem = "not text", f"field {self.field!r} holds {held}; there is: {fields}"
        else:
            return column[0]
        trouble.record(cause, DataError(problem, shown(part.path), "set the source's field"))
        return None


def _python(value: Any) -> Any:
    """A value of Arrow; bytes where it claims to be text and is not UTF-8."""
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        return error.object


def _values(file: Any, groups: range, column: list[str]) -> Iterator[Any]:
    """Arrays of a column, a few rows each: as many as have `_BATCH_BYTES` on the average of the row
    group with the longest."""
    import pyarrow.compute

    row_groups = [file.metadata.row_group(number) for number in groups]
    longest = max((g.total_byte_size / max(1, g.num_rows) for g in row_groups), default=1)
    rows = max(1, min(int(_BATCH_BYTES / max(1, longest)), 1000))
    names = [".".join(column)]
    for batch in file.iter_batches(rows, list(groups), columns=names, use_threads=False):
        array = batch.column(column[0])
        yield pyarrow.compute.struct_field(array, column[1:]) if column[1:] else array


def _cut_large(part: Part, limit: int) -> list[Part]:
    """A large file in parts of row groups, about `limit` bytes each."""
    if part.size is None or part.size <= limit:
        return [part]
    try:
        with _opened(part.path) as file:
            sizes = [_size_on_disk(file.metadata.row_group(i)) for i in range(file.num_row_groups)]
    except (DamagedFile, UnreadableFile):
        # Reading it says so, or counts it.
        return [part]
    parts = []
    start = size = 0
    for number, group_size in enumerate(sizes):
        if size and size + group_size > limit:
            parts.append(replace(part, start=start, stop=number, size=size, measure="row groups"))
            start, size = number, 0
        size += group_size
    return [*parts, replace(part, start=start, size=size, measure="row groups")]


def _size_on_disk(row_group: Any) -> int:
    columns = range(row_group.num_columns)
    return sum(row_group.column(i).total_compressed_size for i in columns)
