"""Every failure a user can cause or meet, each with its exit code. The message names the remedy.

The CLI catches `QeEdgeError` in one place, prints `error: <message>` and exits with `exit_code`;
library users catch the same classes.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

DEBUG = "QE_EDGE_DEBUG"  # the environment variable that has traces shown


class QeEdgeError(Exception):
    """Base of all expected errors; on its own, a run-time failure."""

    exit_code = 6


class BadArgument(QeEdgeError):
    """An option or a recipe value that cannot be used."""

    exit_code = 2


class NotInstalled(QeEdgeError):
    """An optional part is missing; the message holds the pip command."""

    exit_code = 3


class NotFound(QeEdgeError):
    """A model, data set or earlier output does not exist."""

    exit_code = 4


class BadInput(QeEdgeError):
    """Input data that cannot be used. Pass the file and the 1-based line where they are known."""

    exit_code = 5

    def __init__(self, message: str, *, path: Path | str | None = None, line: int | None = None):
        where = "" if path is None else f"{path}: " if line is None else f"{path}:{line}: "
        super().__init__(where + message)


class PartlyDone(QeEdgeError):
    """Some of the work succeeded and was kept; the rest failed."""

    exit_code = 7


class Interrupted(QeEdgeError):
    """Ctrl-C ended it, and what was done is kept."""

    exit_code = 130


def explained(error: Exception) -> str:
    """What happened and what helps; our own errors, and most of the system's, say so themselves."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}; is it there, and may you read and write it?"
    if isinstance(error, QeEdgeError | OSError):
        return str(error)
    said = " ".join(str(error).split()) or "no reason is given"
    if isinstance(error, ImportError):
        return (
            f"an installed package can't be imported ({said}); install it again, "
            f"see `qe-edge doctor`, or set {DEBUG}=1 for the whole trace"
        )
    if isinstance(error, MemoryError):
        return f"memory is short ({said}); try a smaller model or fewer at a time"
    return (
        f"{type(error).__name__}: {said} (set {DEBUG}=1 for the whole trace; if neither your settings nor "
        "your system is the cause, please report it with that and what `qe-edge doctor` prints)"
    )


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency, or say which extra brings it."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:  # the latter where a compiled library is broken
        raise NotInstalled(
            f"this needs {module}, which cannot be imported ({error}); "
            f"install it with: pip install 'qe-edge[{extra}]'"
        ) from None
