"""What the tests of sources share."""

from pathlib import Path

from archscale.data.preparing.sources import JsonlSource, SourceBase, TextSource
from archscale.data.preparing.sources.units import UNIT_BYTES
from archscale.data.preparing.trouble import Trouble


def text(path: Path | str, **keys: object) -> TextSource:
    return TextSource.model_validate({"kind": "text", "path": str(path)} | keys)


def jsonl(path: Path | str, **keys: object) -> JsonlSource:
    return JsonlSource.model_validate({"kind": "jsonl", "path": str(path)} | keys)


def read(source: SourceBase, trouble: Trouble | None = None, limit: int = UNIT_BYTES) -> list[str]:
    """The documents of all units; by default the first error is raised."""
    trouble = trouble or Trouble("stop")
    return [text for unit in source.units(limit) for text in source.read(unit, trouble)]
