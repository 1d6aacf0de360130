"""Lines of data files, which end at a line feed alone.

Texts hold other characters that Unicode, and `str.splitlines`, take for line ends: form feed, U+0085, U+2028.
"""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from qe_edge.errors import BadInput, NotFound


def raw_lines(path: Path | str) -> Iterator[tuple[int, bytes]]:
    """Number and content of each line of a plain or gzipped file, without its end and a byte order mark.

    Raises:
        NotFound: there is no such file.
        BadInput: it is a folder, or a gzip file that is damaged.
    """
    path, number = Path(path), 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in cut(file):
                yield number, line
    except FileNotFoundError:
        raise NotFound(f"{path}: no such file") from None
    except IsADirectoryError:
        raise BadInput("is a folder, expected a file", path=path) from None
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise BadInput(f"can't be read on: {error}", path=path, line=number + 1) from None


def read_lines(path: Path | str) -> Iterator[tuple[int, str]]:
    """Number and text of each line; see `raw_lines`.

    Raises:
        BadInput: a line is not in UTF-8.
    """
    yield from decoded(raw_lines(path), path)


def cut(file: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Number and content of each line of an open file, which yields them with their ends."""
    for number, line in enumerate(file, 1):
        content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        yield number, content.removesuffix(b"\n").removesuffix(b"\r")


def decoded(lines: Iterable[tuple[int, bytes]], path: Path | str) -> Iterator[tuple[int, str]]:
    """The lines as text; `path` is named where one is no UTF-8."""
    for number, line in lines:
        try:
            yield number, line.decode()
        except UnicodeDecodeError as error:
            raise BadInput(f"not UTF-8 text: {error}", path=path, line=number) from None
