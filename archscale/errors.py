"""Errors a user can cause. Each ends in one line on stderr and exit status 2 (see
`archscale.cli.main`)."""

import difflib
import errno
import json
from collections.abc import Sequence
from typing import Any

# Exit statuses of a command that a signal has ended.
RETRY = 75  # the same command goes on: EX_TEMPFAIL of sysexits.h
INTERRUPTED = 130  # by Ctrl-C, as shells say of SIGINT


DAMAGED = "it is damaged: "


class ArchscaleError(Exception):
    """One line: what went wrong, where, and the remedy.

    Args:
        what: the fact, with the offending values.
        where: file, dotted config key or parameter name.
        remedy: what the user can do about it.
    """

    on_every_rank = False  # whether all ranks raise it together, so that one of them reports it
    status = 2  # exit status of a command that ends with it

    def __init__(self, what: str, where: str, remedy: str):
        self.what, self.where, self.remedy = what, where, remedy
        super().__init__(f"{what} ({where}): {remedy}")

    def as_dict(self) -> dict[str, str]:
        """For JSON."""
        return {"what": self.what, "where": self.where, "remedy": self.remedy}

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        return type(self), (self.what, self.where, self.remedy)  # errors travel between ranks


class ConfigError(ArchscaleError):
    """The YAML, an override, or a combination of keys is wrong.

    Attributes:
        all: every problem found at once, this one first; empty where there is only this one.
    """

    all: "list[ConfigError]" = []  # noqa: RUF012  replaced, never changed

    @classmethod
    def several(cls, problems: "list[ConfigError]", hint: str = "") -> "ConfigError":
        """The first of `problems` in one line, which says how many more there are, and then
        `hint`."""
        first, others = problems[0], len(problems) - 1
        tail = (
            f" (and {others} more {'problem' if others == 1 else 'problems'}{hint})"
            if others
            else ""
        )
        summary = cls(first.what, first.where, first.remedy + tail)
        summary.all = problems
        return summary


class DataError(ArchscaleError):
    """A data directory, shard, tokenizer or recipe is missing, foreign or corrupt."""


class CheckpointError(ArchscaleError):
    """A checkpoint is missing, incomplete, corrupt or of another model."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint is not as it was written; `what` is `DAMAGED` and how."""

    @property
    def problem(self) -> str:
        """What is wrong with which file."""
        return self.what.removeprefix(DAMAGED)


class TrainingError(ArchscaleError):
    """Training cannot go on."""


def explain_os_error(error: OSError, otherwise: str, *, vanished: bool = False) -> tuple[str, str]:
    """(cause, remedy) of a failed read or write, in words that are true of this error.

    Args:
        otherwise: what helps where the path itself is unsuitable, such as "give another with
            --run-dir".
        vanished: a path that is missing was there before, so that another process has deleted it.
    """
    number = error.errno
    cause = error.strerror or " ".join(str(error).split()) or type(error).__name__
    if number == errno.ENOSPC:
        return cause, f"free space or inodes on that file system, or {otherwise}"
    if number == errno.EDQUOT:
        return cause, f"free space, ask for a larger quota, or {otherwise}"
    if number in (errno.EACCES, errno.EPERM):
        return cause, f"get permission for it, or {otherwise}"
    if vanished and number in (errno.ENOENT, errno.ESTALE):
        return (
            f"{cause}: another process deleted it",
            f"let only one process work there, or {otherwise}",
        )
    if number in (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY):
        return f"{cause}: something else stands there", otherwise
    if number == errno.EFBIG:
        return cause, f"raise the limit of `ulimit -f`, or {otherwise}"
    if number in (errno.EMFILE, errno.ENFILE):
        return cause, "raise the limit of `ulimit -n`"
    if number == errno.EIO:
        return cause, f"check the device of that file system, or {otherwise}"
    return cause, otherwise


def show(value: Any) -> str:
    """A value as it could stand in the YAML, at most 60 characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def nearest(word: Any, choices: Sequence[str]) -> str | None:
    matches = difflib.get_close_matches(str(word), choices, n=1)
    return matches[0] if matches else None


def one_line(text: str) -> str:
    return " ".join(text.split())
