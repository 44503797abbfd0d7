"""Where documents come from: one class a kind of source, listed in `SOURCES`. A new kind is a class
and a row there.

A source yields documents as strings, in a fixed order, and can say which local files it reads, so
that a second `prepare` can tell whether they changed.
"""

import glob
import gzip
import hashlib
import json
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from archscale.errors import DataError, explain_os_error

# of a file's beginning and end go into its fingerprint: all of a small one, O(1) of a huge one
_END_BYTES = 1 << 20


class _Source(BaseModel):
    model_config = ConfigDict(extra="forbid")
    weight: float = Field(
        default=1.0, gt=0, le=1, description="share of the documents taken, by content hash"
    )

    def documents(self) -> Iterator[str]:
        raise NotImplementedError

    def files(self) -> list[tuple[str, Path]]:
        """(name, path) of the local files read; the name does not depend on the machine."""
        return []


def _glob(pattern: str) -> list[tuple[str, Path]]:
    paths = [
        (name, Path(name))
        for name in sorted(glob.glob(pattern, recursive=True))
        if Path(name).is_file()
    ]
    if not paths:
        raise DataError(
            "no file matches",
            pattern,
            "correct the source's path; relative ones start at the current directory",
        )
    return paths


def _whole_lines(lines: Iterable[bytes], path: Path) -> Iterator[bytes]:
    """The lines of a file; DataError where it is compressed and damaged."""
    try:
        yield from lines
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        problem = f"not a whole gzip file: {error}"
        raise DataError(
            problem, str(path), "copy the file again, or leave it out of the source's path"
        ) from error


def _field(record: Any, field: str, where: str) -> str:
    value = record.get(field) if isinstance(record, dict) else None
    if not isinstance(value, str):
        there = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
        raise DataError(
            f"no text in field {field!r}; there is: {there}", where, "set the source's field"
        )
    return value


class TextSource(_Source):
    """Text files, each one document; `path` is a glob."""

    kind: Literal["text"]
    path: str
    encoding: str = "utf-8"

    def files(self) -> list[tuple[str, Path]]:
        return _glob(self.path)

    def documents(self) -> Iterator[str]:
        for _, path in self.files():
            try:
                yield path.read_bytes().decode(self.encoding)
            except (UnicodeDecodeError, LookupError) as error:
                raise DataError(
                    f"not {self.encoding} text: {error}", str(path), "set the source's encoding"
                ) from error


class JsonlSource(_Source):
    """JSON lines, each one document, plain or `.gz`; `path` is a glob."""

    kind: Literal["jsonl"]
    path: str
    field: str = "text"

    def files(self) -> list[tuple[str, Path]]:
        return _glob(self.path)

    def documents(self) -> Iterator[str]:
        for _, path in self.files():
            with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as lines:
                for number, line in enumerate(_whole_lines(lines, path), 1):
                    where = f"{path}:{number}"
                    try:
                        record = json.loads(line) if line.strip() else {self.field: ""}
                    except ValueError as error:
                        raise DataError(
                            f"not a JSON line: {error}", where, "correct or remove the line"
                        ) from error
                    yield _field(record, self.field, where)


class PythonStdlibSource(_Source):
    """The standard library of the running Python, each `.py` file one document: a corpus that is
    always there."""

    kind: Literal["python_stdlib"]
    include_tests: bool = False

    def files(self) -> list[tuple[str, Path]]:
        root = Path(sysconfig.get_path("stdlib"))
        skipped = {"site-packages", "dist-packages", "__pycache__"}
        if not self.include_tests:
            skipped |= {"test", "tests", "idle_test"}
        names = sorted(path.relative_to(root) for path in root.rglob("*.py"))
        # _sysconfigdata is generated when Python is built, and differs from machine to machine.
        names = [
            n
            for n in names
            if not skipped.intersection(n.parts) and not n.name.startswith("_sysconfigdata")
        ]
        if not names:
            raise DataError(
                "this Python has no source files", str(root), "use another kind of source"
            )
        return [(name.as_posix(), root / name) for name in names]

    def documents(self) -> Iterator[str]:
        for _, path in self.files():
            try:
                yield path.read_bytes().decode()
            except UnicodeDecodeError:
                continue  # a handful of its test files are wrong on purpose


def _datasets(where: str):
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            "the package 'datasets' is not installed", where, "pip install transformers datasets"
        ) from error
    return datasets


def _load(where: str, field: str, *args: Any, **kwargs: Any) -> Iterator[str]:
    datasets = _datasets(where)
    try:
        for number, record in enumerate(datasets.load_dataset(*args, **kwargs)):
            yield _field(record, field, f"{where}, row {number}")
    except DataError:
        raise
    except Exception as error:  # network, names, formats: `datasets` raises dozens of classes
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"cannot read the data set: {reason}", where, "check the name, files and network"
        ) from error


class ParquetSource(_Source):
    """Parquet files, each row one document; `path` is a glob. Needs `archscale[hf]`."""

    kind: Literal["parquet"]
    path: str
    field: str = "text"

    def files(self) -> list[tuple[str, Path]]:
        return _glob(self.path)

    def documents(self) -> Iterator[str]:
        files = [str(path) for _, path in self.files()]
        return _load(
            self.path, self.field, "parquet", data_files=files, split="train", streaming=True
        )


class HuggingFaceSource(_Source):
    """A data set of the Hugging Face hub, or local files by the name of their format. Needs
    `archscale[hf]`."""

    kind: Literal["huggingface"]
    name: str
    config: str | None = None
    split: str = "train"
    field: str = "text"
    data_files: str | list[str] | None = None
    revision: str | None = None
    streaming: bool = True

    def files(self) -> list[tuple[str, Path]]:
        patterns = [self.data_files] if isinstance(self.data_files, str) else self.data_files or []
        local = {name for pattern in patterns for name in glob.glob(pattern, recursive=True)}
        return [(name, Path(name)) for name in sorted(local) if Path(name).is_file()]

    def documents(self) -> Iterator[str]:
        return _load(
            self.name,
            self.field,
            self.name,
            self.config,
            split=self.split,
            data_files=self.data_files,
            revision=self.revision,
            streaming=self.streaming,
        )


SOURCES = {
    "text": TextSource,
    "jsonl": JsonlSource,
    "parquet": ParquetSource,
    "huggingface": HuggingFaceSource,
    "python_stdlib": PythonStdlibSource,
}
Source = Annotated[
    TextSource | JsonlSource | ParquetSource | HuggingFaceSource | PythonStdlibSource,
    Field(discriminator="kind"),
]


def fingerprint_files(files: Iterable[tuple[str, Path]]) -> str:
    """sha256 over names, sizes, and the first and last MiB of each file: a change elsewhere in a
    larger file that keeps its size is not seen. Not times: a copy of the same files is the same
    source."""
    total = hashlib.sha256()
    for name, path in files:
        try:
            with open(path, "rb") as file:
                size = file.seek(0, 2)
                file.seek(0)
                digest = hashlib.sha256(file.read(_END_BYTES))
                file.seek(max(_END_BYTES, size - _END_BYTES))
                digest.update(file.read(_END_BYTES))
        except OSError as error:
            cause, remedy = explain_os_error(error, "check the path")
            raise DataError(f"cannot read the file: {cause}", str(path), remedy) from error
        total.update(f"{name}\0{size}\0{digest.hexdigest()}\n".encode())
    return total.hexdigest()
