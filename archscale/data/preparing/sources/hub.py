"""Data sets of the Hugging Face hub."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from archscale.data.preparing.sources.base import SourceBase
from archscale.data.preparing.sources.fields import BadRecord, record_text
from archscale.data.preparing.sources.globbing import match
from archscale.data.preparing.sources.units import UNIT_BYTES, Part, Unit
from archscale.data.preparing.trouble import Trouble, UnreadableFile
from archscale.errors import DataError


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
            except Exception as error:
                raise _unreadable(self.name, error) from error
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
            raise _unreadable(self.name, error) from error


def _shards(data: Any) -> int:
    # What is not streamed is in one piece.
    return getattr(data, "num_shards", 1)


def _unreadable(name: str, error: Exception) -> UnreadableFile:
    """Network, names, formats: `datasets` raises dozens of classes."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    remedy = "check the name, files and network"
    return UnreadableFile(f"cannot read the data set: {reason}", name, remedy)
