"""Data sets of the Hugging Face hub."""

import gzip
import hashlib
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from archscale.data.preparing.sources.base import SourceBase
from archscale.data.preparing.sources.fields import BadRecord, record_text
from archscale.data.preparing.sources.globbing import match
from archscale.data.preparing.sources.remote import is_missing, is_remote
from archscale.data.preparing.sources.units import UNIT_BYTES, Part, Unit
from archscale.data.preparing.trouble import DamagedFile, Trouble, UnreadableFile
from archscale.errors import DataError

# What `datasets` raises for content that cannot be decoded. Those of Arrow are a `ValueError`.
_DAMAGE = (ValueError, EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)


class HuggingFaceSource(SourceBase):
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
    # It changes no byte of the result, so that adding it later does not make the data set another.
    tokens: float | None = Field(
        default=None,
        gt=0,
        exclude=True,
        description="published number of tokens, for --dry-run where the hub is out of reach",
    )

    def files(self) -> list[tuple[str, Path]]:
        patterns = [self.data_files] if isinstance(self.data_files, str) else self.data_files or []
        local = dict(file for pattern in patterns for file in match(pattern))
        return sorted(local.items())

    def units(self, limit: int = UNIT_BYTES) -> list[Unit]:
        data, mark = self._load()
        total = _shards(data)
        return [
            Unit((Part(self.name, n, n + 1, measure="shards", mark=mark, shards=total),))
            for n in range(total)
        ]

    def remote_files(self) -> list[Part]:
        mark = _mark(self._builder())
        return [Part(self.name, mark=mark)]

    def read_part(self, part: Part, trouble: Trouble) -> Iterator[str]:
        data, mark = self._load()
        if (mark, _shards(data)) != (part.mark, part.shards):
            problem, remedy = (
                "the data set changed since it was listed",
                "give the same command again",
            )
            raise DataError(problem, self.name, remedy)
        rows = data.shard(num_shards=part.shards, index=part.start, contiguous=True)
        records = enumerate(rows)
        while True:
            try:
                number, record = next(records)
            except StopIteration:
                return
            except _DAMAGE as error:
                raise _error(DamagedFile, self.name, error) from error
            except Exception as error:
                refusal = UnreadableFile if is_missing(error) else DataError
                raise _error(refusal, self.name, error) from error
            try:
                document = record_text(record, self.field)
            except BadRecord as error:
                error.record(trouble, f"{part.name}, row {number}")
                continue
            del record
            yield document
            del document

    def _builder(self) -> Any:
        try:
            import datasets
        except ImportError as error:
            problem, remedy = (
                "the package 'datasets' is not installed",
                "pip install transformers datasets",
            )
            raise DataError(problem, self.name, remedy) from error
        try:
            return datasets.load_dataset_builder(
                self.name, self.config, data_files=self.data_files, revision=self.revision
            )
        except Exception as error:
            raise _error(DataError, self.name, error) from error

    def _load(self) -> tuple[Any, str]:
        """The data set, and the mark of what is remote of it."""
        builder = self._builder()
        try:
            if self.streaming:
                data = builder.as_streaming_dataset(split=self.split)
            else:
                builder.download_and_prepare()
                data = builder.as_dataset(split=self.split)
        except Exception as error:
            raise _error(DataError, self.name, error) from error
        return data, _mark(builder)


def _mark(builder: Any) -> str:
    """From the commits and ETags of the remote files of all splits; "" where there are none."""
    files = [
        (path, origin)
        for split in (builder.config.data_files or {}).values()
        for path, origin in zip(split, split.origin_metadata)
        if is_remote(path)
    ]
    return hashlib.sha256(repr(files).encode()).hexdigest() if files else ""


def _shards(data: Any) -> int:
    # What is not streamed is in one piece.
    return getattr(data, "num_shards", 1)


def _error(kind: type[DataError], name: str, error: Exception) -> DataError:
    """Network, names, formats: `datasets` raises dozens of classes."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return kind(f"cannot read the data set: {reason}", name, "check the name, files and network")
