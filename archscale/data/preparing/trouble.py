"""What to do with documents and files that cannot be read: stop at the first, or leave them out and
count them.
"""

from collections import Counter
from typing import Any, ClassVar, Literal

from archscale.errors import DataError

MAX_EXAMPLES = 20


class DamagedFile(DataError):
    """A compressed or Parquet file that cannot be decoded any further."""

    cause: ClassVar[str] = "damaged file"


class UnreadableFile(DataError):
    """A file that is not there, or that the file system does not give. The errors of a network or
    server, which pass, are plain `DataError`s."""

    cause: ClassVar[str] = "unreadable file"


class Trouble:
    """What went wrong while documents were read.

    Args:
        on_error: "stop" raises the first error; "skip" counts it and goes on.

    Attributes:
        counts: errors by cause, a short key such as "null text" or "damaged file".
        examples: the first messages, at most `MAX_EXAMPLES`.
    """

    def __init__(self, on_error: Literal["stop", "skip"] = "stop"):
        self.on_error = on_error
        self.counts: Counter[str] = Counter()
        self.examples: list[str] = []

    def record(self, cause: str, error: DataError) -> None:
        if self.on_error == "stop":
            raise error
        self.counts[cause] += 1
        if len(self.examples) < MAX_EXAMPLES:
            # Without the remedy, which may be to skip.
            self.examples.append(f"{error.what} ({error.where})")

    def merge(self, other: "Trouble") -> None:
        """Adds what happened in a later part of the same work."""
        self.counts.update(other.counts)
        self.examples = (self.examples + other.examples)[:MAX_EXAMPLES]

    def to_json(self) -> dict[str, Any]:
        return {
            "on_error": self.on_error,
            "counts": dict(self.counts),
            "examples": self.examples,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Trouble":
        trouble = cls(values["on_error"])
        trouble.counts.update(values["counts"])
        trouble.examples = list(values["examples"])
        return trouble
