"""Data sets of the Hugging Face hub."""

import gzip
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from archscale.data.preparing.sources.base import SourceBase
from archscale.data.preparing.sources.fields import BadRecord, record_text
from archscale.data.preparing.sources.globbing import match
from archscale.data.preparing.sources.remote import is_missing
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
        shards = range(_shards(self._load()))
        return [Unit((Part(self.name, n, n + 1, measure="shards"),)) for n in shards]

    def read_part(self, part: Part, trouble: Trouble) -> Iterator[str]:
        data = self._load()
        rows = data.shard(num_shards=_shards(data), index=part.start, contiguous=True)
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

    def _load(self) -> Any:
        try:
            import datasets
        except ImportError as error:
            problem, remedy = (
                "the package 'datasets' is not installed",
                "pip install transformers datasets",
            )
            raise DataError(problem, self.name, remedy) from error
        try:
            return datasets.load_dataset(
                self.name,
                self.config,
                split=self.split,
                data_files=self.data_files,
                revision=self.revision,
                streaming=self.streaming,
            )
        except Exception as error:
            raise _error(DataError, self.name, error) from error


def _shards(data: Any) -> int:
    # What is not streamed is in one piece.
    return getattr(data, "num_shards", 1)


def _error(kind: type[DataError], name: str, error: Exception) -> DataError:
    """Network, names, formats: `datasets` raises dozens of classes."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return kind(f"cannot read the data set: {reason}", name, "check the name, files and network")
