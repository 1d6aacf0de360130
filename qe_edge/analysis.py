"""Text -> index terms, and which language a text is in.

English: words of two characters and more, stop words out, stems by Snowball's English stemmer
(Porter2). Chinese: overlapping bigrams of Han characters as in Lucene's CJKAnalyzer, or jieba's words.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache

from qe_edge.errors import BadArgument, require
from qe_edge.records import Lang

Analyzer = Callable[[str], list[str]]

# Ideographs (with extensions and the iteration mark), kana and Hangul: the scripts CJKAnalyzer bigrams.
_CJK = "\u3005\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff\u3040-\u30ff\uac00-\ud7af"
_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_WORD = re.compile(r"\b\w\w+\b")
_CJK_OR_WORD = re.compile(rf"([{_CJK}]+)|([^\W{_CJK}]+)")


def detect_language(text: str) -> Lang:
    """`zh` when at least a fifth of the letters are Han characters, else `en`.

    A Han character carries about as much as a short word, so a low share already means Chinese.
    """
    letters = sum(c.isalpha() for c in text)
    return "zh" if letters and len(_HAN.findall(text)) / letters >= 0.2 else "en"


def count_words(text: str) -> int:
    """Words, every Han, kana or Hangul character counting as one: a length that needs no tokenizer."""
    return sum(1 if word else len(cjk) for cjk, word in _CJK_OR_WORD.findall(text))


def words_of(text: str, *, cjk: int = 2) -> list[str]:
    """Words in lower case as they stand, and overlapping pieces of `cjk` characters of Chinese."""
    terms: list[str] = []
    for run, word in _CJK_OR_WORD.findall(text.lower()):
        terms += [word] if word else [run[i : i + cjk] for i in range(max(1, len(run) - cjk + 1))]
    return terms


@cache
def stop_words(*, more: bool = False) -> frozenset[str]:
    """English function words: Lucene's 33, or `more`."""
    from bm25s.stopwords import STOPWORDS_EN, STOPWORDS_EN_PLUS

    return frozenset(STOPWORDS_EN_PLUS if more else STOPWORDS_EN)


def _english() -> Analyzer:
    import Stemmer

    stop, stem = stop_words(), Stemmer.Stemmer("english").stemWords

    def analyze(text: str) -> list[str]:
        return stem([word for word in _WORD.findall(text.lower()) if word not in stop])

    return analyze


def _cjk() -> Analyzer:
    return words_of


def _jieba() -> Analyzer:
    jieba = require("jieba", "zh")
    jieba.setLogLevel("WARNING")  # its start-up notes go to stderr

    def analyze(text: str) -> list[str]:
        return [word for word in jieba.cut_for_search(text.lower()) if any(c.isalnum() for c in word)]

    return analyze


_ANALYZERS: dict[str, Callable[[], Analyzer]] = {"english": _english, "cjk": _cjk, "jieba": _jieba}
_DEFAULT: dict[Lang, str] = {"en": "english", "zh": "cjk"}


@cache
def get_analyzer(name: str) -> Analyzer:
    """The analyzer of that name: `english`, `cjk` or `jieba`."""
    if name not in _ANALYZERS:
        raise BadArgument(f"no analyzer named {name!r}; there are: {', '.join(_ANALYZERS)}")
    return _ANALYZERS[name]()


def analyzer_for(lang: Lang) -> str:
    """The name of the language's default analyzer."""
    return _DEFAULT[lang]
