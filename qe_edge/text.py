"""Text -> index terms, and which language a text is in.

Every text is folded first (`fold`), documents and queries alike. English: words of two characters and more,
stop words out, stems by Snowball's English stemmer (Porter2), and of Chinese in between what the Chinese
analyzer makes of it. Chinese: overlapping bigrams of Han characters as in Lucene's CJKAnalyzer, or jieba's
words.
"""

from __future__ import annotations

import re
import runpy
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from qe_edge.arguments import check_text
from qe_edge.errors import BadArgument, require
from qe_edge.records import Lang


@dataclass(frozen=True)
class Analyzer:
    """Text -> index terms: its words, and of these the terms, or the words themselves."""

    name: str
    words: Callable[[str], list[str]]
    terms: Callable[[list[str]], list[str]] | None = None

    def __call__(self, text: str) -> list[str]:
        words = self.words(text)
        return self.terms(words) if self.terms else words


# Ideographs (with extensions and the iteration mark), kana and Hangul: the scripts CJKAnalyzer bigrams.
CJK = "\u3005\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff\u3040-\u30ff\uac00-\ud7af"
_CJK = re.compile(f"[{CJK}]")
_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
# Latin letters as folding leaves them.
_LATIN = re.compile(
    "[a-z\u00df-\u00f6\u00f8-\u02af\u1d00-\u1d25\u1e00-\u1eff\u2c60-\u2c7f\ua722-\ua7ff\uab30-\uab6f]"
)
_WORD = re.compile(r"\b\w\w+\b")
# Unicode's format characters (category Cf: soft hyphen, zero-width and direction marks, tags), and the
# variation selectors and fillers that nothing is seen of either.
_UNSEEN = re.compile(
    "[\u00ad\u034f\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u115f\u1160\u180b-\u180f\u200b-\u200f"
    "\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff9-\ufffb\U000110bd\U000110cd"
    "\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0001-\U000e0fff]"
)
_LAST_WORD = re.compile(rf"[^\W{CJK}]+([-'’][^\W{CJK}]*)*\Z")
_CJK_OR_WORD = re.compile(rf"([{CJK}]+)|([^\W{CJK}]+)")


def fold(text: str) -> str:
    """What a text is compared as: what looks alike, or is written alike, becomes the same characters.

    Characters that nothing is seen of are dropped; Unicode form NFKC composes accents and takes full and half
    width, ligatures and the like apart; then lower case. Folding a folded text changes nothing.
    """
    if text.isascii():
        return text.lower()
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", _UNSEEN.sub("", text)).lower())


def detect_language(text: str) -> Lang:
    """`other` when most letters are neither Latin nor Han, `zh` when at least a fifth are Han, else `en`.

    A Han character carries about as much as a short word, so a low share already means Chinese. A text
    without letters is taken for English.
    """
    text = fold(text)
    letters = sum(c.isalpha() for c in text)
    han = len(_HAN.findall(text))
    if 2 * (han + len(_LATIN.findall(text))) < letters:
        return "other"
    return "zh" if letters and han / letters >= 0.2 else "en"


def whole_words(text: str) -> str:
    """A text that was cut anywhere, without its last word, which may be half of one; Chinese stays whole."""
    return _LAST_WORD.sub("", text)


def begun(text: str, most: int) -> str:
    """A text's first characters, on one line, with an ellipsis where there are more."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[:most].rstrip()}…"


def count_words(text: str) -> int:
    """Words, every Han, kana or Hangul character counting as one: a length that needs no tokenizer."""
    return sum(1 if word else len(cjk) for cjk, word in _CJK_OR_WORD.findall(fold(text)))


def words_of(text: str, *, cjk: int = 2) -> list[str]:
    """Folded words as they stand, and overlapping pieces of `cjk` characters of Chinese."""
    check_text("a text", text)
    terms: list[str] = []
    for run, word in _CJK_OR_WORD.findall(fold(text)):
        terms += [word] if word else [run[i : i + cjk] for i in range(max(1, len(run) - cjk + 1))]
    return terms


@cache
def stop_words(*, more: bool = False) -> frozenset[str]:
    """English function words: Lucene's 33, or `more`."""
    # bm25s's file of them alone: to import all of bm25s takes an app's first query half a second.
    found = find_spec("bm25s")
    assert found and found.origin
    lists = runpy.run_path(str(Path(found.origin).with_name("stopwords.py")))
    return frozenset(lists["STOPWORDS_EN_PLUS" if more else "STOPWORDS_EN"])


def _english() -> Analyzer:
    import Stemmer

    stop, stem = stop_words(), Stemmer.Stemmer("english").stemWords

    def words(text: str) -> list[str]:
        folded = fold(text)
        if folded.isascii() or not _CJK.search(folded):
            return _WORD.findall(folded)
        return [word for word in words_of(folded) if len(word) > 1 or _CJK.match(word)]

    def terms(words: list[str]) -> list[str]:
        return stem([word for word in words if word not in stop])

    return Analyzer("english", words, terms)


def _cjk() -> Analyzer:
    return Analyzer("cjk", words_of)


def _jieba() -> Analyzer:
    jieba = require("jieba", "zh")
    jieba.setLogLevel("WARNING")  # its start-up notes go to stderr

    def words(text: str) -> list[str]:
        return [word for word in jieba.cut_for_search(fold(text)) if any(c.isalnum() for c in word)]

    return Analyzer("jieba", words)


_ANALYZERS: dict[str, Callable[[], Analyzer]] = {"english": _english, "cjk": _cjk, "jieba": _jieba}
# Of other languages: words as they stand, which no stemmer for English spoils, and pieces of kana and Hangul.
_DEFAULT: dict[Lang, str] = {"en": "english", "zh": "cjk", "other": "cjk"}


@cache
def get_analyzer(name: str) -> Analyzer:
    """The analyzer of that name: `english`, `cjk` or `jieba`."""
    if name not in _ANALYZERS:
        raise BadArgument(f"no analyzer named {name!r}; there are: {', '.join(_ANALYZERS)}")
    return _ANALYZERS[name]()


def analyzer_for(lang: Lang) -> str:
    """The name of the language's default analyzer."""
    return _DEFAULT[lang]
