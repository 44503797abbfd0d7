"""What every kind of source does: it lists units, and reads one as documents."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from archscale.data.preparing.sources.units import UNIT_BYTES, Part, Unit
from archscale.data.preparing.trouble import DamagedFile, Trouble, UnreadableFile


class SourceBase(BaseModel):
    """A kind of source. The documents of its units, one unit after the other, do not depend on how
    the units are cut."""

    model_config = ConfigDict(extra="forbid")
    weight: float = Field(
        default=1.0, gt=0, le=1, description="share of the documents taken, by content hash"
    )

    @field_validator("*")
    @classmethod
    def _can_be_stored(cls, value: Any) -> Any:
        """The recipe is kept with the data set, as JSON."""
        if isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):
            raise ValueError("not Unicode text; in a path, write ? for a byte that is not UTF-8")
        return value

    def units(self, limit: int = UNIT_BYTES) -> list[Unit]:
        """What can be read separately, about `limit` bytes each, in order. A function of the names
        and sizes of files, whether large ones are compressed, and Parquet footers."""
        raise NotImplementedError

    def read_part(self, part: Part, trouble: Trouble) -> Iterator[str]:
        """The documents of a part. Those that cannot be read go to `trouble`.

        Raises:
            DamagedFile, UnreadableFile: nothing more can be read of it.
            DataError: what may pass, such as an error of the network.
        """
        raise NotImplementedError

    def files(self) -> list[tuple[str, Path]]:
        """(name, path) of the local files read; the name does not depend on the machine."""
        return []

    def remote_files(self) -> list[Part]:
        """What is read from elsewhere, with the marks by which a change of it is seen.

        Raises:
            DataError: it cannot be reached.
        """
        return []

    def notes(self) -> list[str]:
        """What a user may not expect of how the source is read, one line each."""
        return []

    def read(self, unit: Unit, trouble: Trouble) -> Iterator[str]:
        """The documents of a unit, in order. What cannot be read goes to `trouble`: of a damaged
        file, the documents before the damage are there, and the rest counts once.

        Raises:
            DataError: under "stop" the first trouble; always what may pass, or it would be left out
                for good.
        """
        for part in unit.parts:
            try:
                yield from self.read_part(part, trouble)
            except (DamagedFile, UnreadableFile) as error:
                trouble.record(error.cause, error)

    def documents(self) -> Iterator[str]:
        """All documents, in order.

        Raises:
            DataError: for the first that cannot be read.
        """
        trouble = Trouble("stop")
        for unit in self.units():
            yield from self.read(unit, trouble)
