"""Rows of topics and judgments: ids without blanks, which separate a TREC run file's columns, each once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Generic, TypeVar

from qe_edge.errors import BadInput

K = TypeVar("K")
V = TypeVar("V")


def is_blank(name: str) -> bool:
    """Whether an id is empty or holds a blank of any kind, also at its ends."""
    return name.split() != [name]


def check_id(name: str, what: str, path: Path | None, line: int | None = None) -> None:
    """Refuse an empty id, and one that holds blanks."""
    if is_blank(name):
        raise BadInput(f"{what} id {name!r} is empty or holds blanks", path=path, line=line)


def check_ids(ids: Sequence[str], source: Path | None) -> None:
    """Document ids must be unique, and without blanks.

    Raises:
        BadInput: one is not.
    """
    twice = next((doc_id for doc_id, count in Counter(ids).items() if count > 1), None)
    if twice is not None:
        first = ids.index(twice)
        second = ids.index(twice, first + 1)
        raise BadInput(
            f"document {twice!r} is there twice, as number {first + 1} and as number {second + 1}",
            path=source,
        )
    for broken in filter(is_blank, ids):
        check_id(broken, "document", source)


def parse_grade(text: str) -> int:
    """A grade, whose range is that of trec_eval's integers.

    Raises:
        ValueError: it is none.
    """
    grade = int(text)
    if abs(grade) >= 2**31:
        raise ValueError(text)
    return grade


class Once(Generic[K, V]):
    """Rows of a file by their key; a row may stand there again, if it says the same."""

    def __init__(self, what: str, path: Path):
        self.rows: dict[K, V] = {}
        self._what, self._path = what, path
        self._lines: dict[K, int] = {}

    def add(self, line: int, key: K, value: V) -> None:
        """Take a row in.

        Raises:
            BadInput: an earlier line has another value; the message names both.
        """
        if key not in self.rows:
            self.rows[key], self._lines[key] = value, line
        elif self.rows[key] != value:
            raise BadInput(
                f"{self._what} {key!r} is {value!r} here and {self.rows[key]!r} in line {self._lines[key]}; "
                "take one out",
                path=self._path,
                line=line,
            )
