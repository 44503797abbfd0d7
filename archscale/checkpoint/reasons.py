"""Why torch.distributed.checkpoint has failed, in words for the user."""

from __future__ import annotations

from torch.distributed.checkpoint.api import CheckpointException

from archscale.errors import ArchscaleError, explain_os_error


def first_failure(error: BaseException) -> BaseException:
    """What the first of the ranks that failed has raised."""
    if isinstance(error, CheckpointException) and error.failures:
        return next(iter(error.failures.values()))[0]
    return error


def os_error_of(error: BaseException) -> OSError | None:
    """The error of the operating system behind another one, if there is any: torch raises errors
    of its own over it."""
    cause: BaseException | None = first_failure(error)
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause


def reason(error: BaseException) -> str:
    """Type and text of the first failure, in one line of at most about 300 characters."""
    error = first_failure(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def why_not_written(error: BaseException) -> tuple[str, str]:
    """(cause, remedy) of a checkpoint that could not be written."""
    elsewhere = "train in another directory with --run-dir"
    if isinstance(first := first_failure(error), ArchscaleError):
        return first.what, first.remedy
    if (refused := os_error_of(error)) is not None:
        return explain_os_error(refused, elsewhere, vanished=True)
    return reason(error), f"check that the directory can be written, or {elsewhere}"


def why_not_read(error: BaseException, otherwise: str) -> tuple[str, str]:
    """(cause, remedy) of a checkpoint that could not be read.

    Args:
        otherwise: the remedy unless the operating system has refused for a reason of its own.
    """
    if isinstance(first := first_failure(error), ArchscaleError):
        return first.what, first.remedy
    if (refused := os_error_of(error)) is not None:
        return explain_os_error(refused, otherwise)
    return reason(error), otherwise
