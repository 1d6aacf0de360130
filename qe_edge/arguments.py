"""What callers give, looked at where it comes in: a number out of bounds ends in native code otherwise."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from qe_edge.errors import BadArgument

MOST_THREADS = 512  # of llama.cpp, whose GGML_MAX_N_THREADS it is
MOST_PARALLEL = 10_000  # queries that are read ahead; an engine decodes as many of them as it can
LONGEST_MS = 1e9  # eleven days


def check_number(name: str, value: Any, least: float, most: float) -> None:
    """Refuse what is no number from `least` to `most`; nan is none.

    Raises:
        TypeError: it is of another type.
        BadArgument: it is out of bounds.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, not {type(value).__name__}")
    if not least <= float(value) <= most:
        raise BadArgument(f"{name} must be from {least:.10g} to {most:.10g}, not {float(value):.10g}")


def check_whole(name: str, value: Any, least: int, most: int) -> None:
    """Refuse what is no whole number from `least` to `most`; errors as in `check_number`."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be a whole number, not {type(value).__name__}")
    if not least <= int(value) <= most:
        raise BadArgument(f"{name} must be from {least} to {most}, not {value}")


def check_kind(name: str, value: object, kinds: type | tuple[type, ...], wanted: str) -> None:
    """Refuse what is of none of these kinds, in words that say what is `wanted`.

    Raises:
        TypeError: it is of another type.
    """
    if not isinstance(value, kinds):
        raise TypeError(f"{name} must be {wanted}, not {type(value).__name__}")


def check_path(name: str, value: object) -> None:
    """Refuse an empty path, which would be the current folder: a variable that isn't set becomes one.

    Raises:
        TypeError: it is no path.
        BadArgument: it is empty.
    """
    check_kind(name, value, (str, Path), "a str or a Path")
    if not str(value).strip():
        raise BadArgument(f"{name} is empty; name a file")


def check_text(name: str, value: object) -> None:
    """Refuse what is no text, bytes included.

    Raises:
        TypeError: it is of another type.
    """
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, not {type(value).__name__}")


def check_texts(name: str, values: object) -> None:
    """Refuse a single text where several belong: each of its characters would be taken for one."""
    if isinstance(values, str | bytes):
        raise TypeError(f"{name} must be several texts, such as a list, not one {type(values).__name__}")
    check_kind(name, values, Iterable, "several texts, such as a list")


def check_deadline(deadline_ms: float | None) -> None:
    """A deadline in milliseconds from now; 0 leaves no time, None is none."""
    if deadline_ms is not None:
        check_number("deadline_ms", deadline_ms, 0, LONGEST_MS)


def check_scores(scores: Iterable[Any]) -> None:
    """What a search engine scored, best first."""
    check_kind("scores", scores, Iterable, "numbers, such as a list")
    for score in scores:
        if not isinstance(score, Real) or not math.isfinite(score):
            raise BadArgument(f"scores must be finite numbers, not {score!r}")
