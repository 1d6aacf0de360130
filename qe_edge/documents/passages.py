"""A document's lines -> passages: cut at headings and paragraphs where they are, else between sentences."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import dropwhile, pairwise
from typing import NamedTuple

from qe_edge.text import count_words

WORDS = 100  # of a passage, about: as many as MS MARCO's and DPR's have; of Chinese, characters
_LONG = 20  # characters of a word, from which what has no blank is cut too
_SEPARATOR = " › "
_HEADING = re.compile(r"(#{1,6})\s+(.*?)\s*#*")
_FENCE = re.compile(r"\s*(```|~~~)")
# The end of a sentence, with what closes it; what stands behind "e.g." goes on in lower case.
_SENTENCE = re.compile(r"""(?<=[.!?…])["'”’)\]]*\s+(?=[^a-z\s])|(?<=[。！？；])["'”’」』）]*""")


class Passage(NamedTuple):
    """`line` is where it begins in the file, and `title` the document's and the headings it stands under."""

    line: int
    title: str
    text: str


class _Sentence(NamedTuple):
    line: int
    text: str
    words: int
    headings: tuple[str, ...]
    first: str = ""  # "heading", "paragraph" or "line", which it begins


def split(
    lines: Iterable[tuple[int, str]], *, title: str, markdown: bool, words: int = WORDS
) -> Iterator[Passage]:
    """Passages of about `words` words.

    Where one ends inside a paragraph, its last sentence stands in the next one too, if it is short. A section
    of fewer words than half goes on into the next section, and what is left at the end goes to the last.
    """
    sentences = list(_sentences(lines, markdown, words))
    passages = list(_packed(sentences, words))
    if len(passages) > 1 and _words(passages[-1]) < words / 4:
        rest = [sentence for sentence in passages.pop() if sentence not in passages[-1]]
        passages[-1] += rest
    for passage in passages:
        first = next((sentence for sentence in passage if sentence.first != "heading"), passage[0])
        above = first.headings if first.first != "heading" else ()
        said = [above[: level + 1] for level in range(len(above))]  # headings that the title names
        text = [s for s in passage if not (s.first == "heading" and s.headings in said)]
        path = dict.fromkeys(filter(None, [title, *first.headings]))
        yield Passage(passage[0].line, _SEPARATOR.join(path), _joined(text))


def _packed(sentences: Sequence[_Sentence], words: int) -> Iterator[list[_Sentence]]:
    current: list[_Sentence] = []
    for i, sentence in enumerate(sentences):
        size = _words(current)
        full = size + sentence.words > words
        if sentence.first == "paragraph" and size >= words / 2:
            full = size + _paragraph_words(sentences, i) > words
        if full or (sentence.first == "heading" and size >= words / 2):
            over = []
            if current and sentence.first in ("line", "") and current[-1].words <= words / 4:
                over = current[-1:]
            while current and current[-1].first == "heading":  # which belongs to what follows
                over = [current.pop(), *over]
            if current:
                yield current
            current = over
        current.append(sentence)
    if current:
        yield current


def _paragraph_words(sentences: Sequence[_Sentence], start: int) -> int:
    size, i = sentences[start].words, start + 1
    while i < len(sentences) and sentences[i].first not in ("heading", "paragraph"):
        size, i = size + sentences[i].words, i + 1
    return size


def _words(passage: Iterable[_Sentence]) -> int:
    """Of the passage; the headings that it begins with stand in its title."""
    text = dropwhile(lambda sentence: sentence.first == "heading", passage)
    return sum(sentence.words for sentence in text)


def _size(text: str) -> int:
    """Its words; of what has no blanks, pieces of _LONG characters."""
    return max(count_words(text), -(-len(text) // _LONG))


def _joined(passage: Sequence[_Sentence]) -> str:
    text = passage[0].text
    for before, sentence in pairwise(passage):
        chinese = before.text[-1] > "\u2e7f" or sentence.text[0] > "\u2e7f"
        text += ("\n" if sentence.first else "" if chinese else " ") + sentence.text
    return text


def _sentences(lines: Iterable[tuple[int, str]], markdown: bool, words: int) -> Iterator[_Sentence]:
    headings: dict[int, str] = {}
    paragraph: list[tuple[int, str]] = []
    fenced = False
    for number, line in lines:
        fenced ^= bool(markdown and _FENCE.match(line))
        found = _HEADING.fullmatch(line.strip()) if markdown and not fenced else None
        if found or not line.strip():
            yield from _cut(paragraph, tuple(headings.values()), words)
            paragraph = []
        if found:
            level, name = len(found[1]), found[2]
            headings = {other: text for other, text in headings.items() if other < level} | {level: name}
            if name:
                yield _Sentence(number, name, _size(name), tuple(headings.values()), "heading")
        elif line.strip():
            paragraph.append((number, line.strip()))
    yield from _cut(paragraph, tuple(headings.values()), words)


def _cut(paragraph: Sequence[tuple[int, str]], headings: tuple[str, ...], words: int) -> Iterator[_Sentence]:
    first = "paragraph"
    for number, text in paragraph:
        start = 0
        for end in [*(match.end() for match in _SENTENCE.finditer(text)), len(text)]:
            for part in _pieces(text[start:end].strip(), words):
                yield _Sentence(number, part, _size(part), headings, first)
                first = ""
            start = end
        first = "line"


def _pieces(sentence: str, words: int) -> Iterator[str]:
    """A sentence; one that is longer than a passage in pieces."""
    longest = _LONG * words
    while len(sentence) > longest or _size(sentence) > words:
        low, high = 1, min(len(sentence), longest)
        while low < high:  # the longest beginning that is not too long
            middle = (low + high + 1) // 2
            low, high = (middle, high) if _size(sentence[:middle]) <= words else (low, middle - 1)
        blank = sentence.rfind(" ", 1, low + 1)
        end = blank if blank > 0 else low
        yield sentence[:end].strip()
        sentence = sentence[end:].strip()
    if sentence:
        yield sentence
