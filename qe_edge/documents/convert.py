"""A file of notes -> its text: plain text, Markdown, HTML, JSON Lines, PDF (PDFium), Office (markitdown)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from qe_edge.errors import BadInput, QeEdgeError, require
from qe_edge.lines import read_lines
from qe_edge.text import CJK

PLAIN = (".txt", ".text", ".rst", ".org", ".tex", ".log")
MARKDOWN = (".md", ".markdown", ".mdown", ".qmd")
HTML = (".html", ".htm", ".xhtml")
JSONL = (".jsonl", ".ndjson")
PDF = (".pdf",)
OFFICE = (".docx", ".pptx", ".xlsx", ".epub")
KINDS = (*PLAIN, *MARKDOWN, *HTML, *JSONL, *PDF, *OFFICE)
_INSIDE_CHINESE = re.compile(rf"(?<=[{CJK}])\r\n(?=[{CJK}])")
_TEXT_KEYS = ("text", "contents", "content", "body", "passage")


class Text(NamedTuple):
    """A document's lines with their numbers in the file; 0 where the file has none, as in a PDF.

    `record` is the line of a file of JSON Lines, each of which is a document.
    """

    title: str
    lines: list[tuple[int, str]]
    markdown: bool
    record: int = 0


def read_texts(file: Path) -> Iterator[Text]:
    """The texts of a file: one, or of JSON Lines one a line.

    Raises:
        BadInput: it can't be read as what its name says it is.
        NotInstalled: what reads such a file isn't there.
    """
    kind = file.suffix.lower()
    if kind in JSONL:
        yield from _records(file)
    elif kind in PDF:
        yield Text("", _unnumbered(_pdf(file)), False)
    elif kind in OFFICE:
        yield Text("", _unnumbered(_office(file)), True)
    elif kind in HTML:
        yield _html(file)
    else:
        yield Text("", list(read_lines(file)), kind in MARKDOWN)


def _records(file: Path) -> Iterator[Text]:
    """A JSON object a line; its text is the first of `_TEXT_KEYS` that it has."""
    for number, line in read_lines(file):
        if not line.strip():
            continue
        try:
            row = msgspec.json.decode(line, type=dict[str, Any])
        except (msgspec.MsgspecError, RecursionError) as error:
            raise BadInput(f"not a JSON object: {error}", path=file, line=number) from None
        text = next((row[key] for key in _TEXT_KEYS if isinstance(row.get(key), str)), None)
        if text is None:
            raise BadInput(f"has none of the keys {', '.join(_TEXT_KEYS)}", path=file, line=number)
        title = row.get("title")
        yield Text(title if isinstance(title, str) else "", _unnumbered(text), True, number)


def _html(file: Path) -> Text:
    from bs4 import BeautifulSoup
    from markdownify import MarkdownConverter

    page = BeautifulSoup(file.read_bytes(), "html.parser")  # which finds out the encoding
    for part in page(["script", "style", "noscript", "template", "nav"]):
        part.decompose()
    title = page.title.get_text(" ", strip=True) if page.title else ""
    # Pictures and where links lead are no words of the text.
    converter = MarkdownConverter(heading_style="ATX", strip=["a", "img"], escape_underscores=False)
    return Text(title, _unnumbered(converter.convert_soup(page.body or page)), True)


def _pdf(file: Path) -> str:
    """The words of all pages; markitdown, which looks for tables, glues them together in some files."""
    pdfium = require("pypdfium2", "documents")
    try:
        with pdfium.PdfDocument(file) as document:
            pages = [page.get_textpage().get_text_range() for page in document]
    except pdfium.PdfiumError as error:
        raise BadInput(f"can't be read: {error}", path=file) from None
    return without_line_ends("\f".join(pages))


def without_line_ends(text: str) -> str:
    """PDFium's text with the words whole that a line's end divides: hyphenated ones and Chinese ones.

    For a hyphen at a line's end it has U+FFFE, without the line's end.
    """
    return _INSIDE_CHINESE.sub("", text.replace("\ufffe", "")).replace("\r\n", "\n")


def _office(file: Path) -> str:
    markitdown = require("markitdown", "documents")
    try:
        return markitdown.MarkItDown().convert(file).markdown
    except QeEdgeError:
        raise
    except Exception as error:  # each of the libraries behind it fails in its own way
        what = str(error).strip().splitlines()
        raise BadInput(f"can't be read: {what[-1] if what else type(error).__name__}", path=file) from None


def _unnumbered(text: str) -> list[tuple[int, str]]:
    return [(0, line) for line in text.replace("\f", "\n\n").split("\n")]
