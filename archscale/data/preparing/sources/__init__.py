"""Where documents come from: one class for each kind of source, listed in `SOURCES`."""

from typing import Annotated

from pydantic import Field

from archscale.data.preparing.sources.base import SourceBase
from archscale.data.preparing.sources.fingerprints import hash_file
from archscale.data.preparing.sources.hub import HuggingFaceSource
from archscale.data.preparing.sources.jsonl import JsonlSource
from archscale.data.preparing.sources.parquet import ParquetSource
from archscale.data.preparing.sources.stdlib import PythonStdlibSource
from archscale.data.preparing.sources.text import TextSource
from archscale.data.preparing.sources.units import Part, Unit

__all__ = [
    "SOURCES",
    "HuggingFaceSource",
    "JsonlSource",
    "ParquetSource",
    "Part",
    "PythonStdlibSource",
    "Source",
    "SourceBase",
    "TextSource",
    "Unit",
    "hash_file",
]

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
