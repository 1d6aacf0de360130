"""Weighted words -> the query languages of search engines.

The words are letters, digits and underscores in lower case, as `qe_edge.text` cuts a text into them: no
operator, quote or wildcard that a user typed is left, so every query is valid. Engines stem and weigh them
by their own analyzers and statistics. Where there is no word at all, the query matches nothing.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qe_edge.arguments import check_kind, check_number, check_text, check_texts
from qe_edge.errors import BadArgument

WORDS = 256  # the heaviest ones
CLAUSES = 1024  # of a query in Lucene, at most: one for each word in each field
REPEATS = 32  # of one word, where an engine has no weights


def heaviest(words: Mapping[str, float], *, fields: int = 1) -> dict[str, float]:
    """At most WORDS of them, and CLAUSES in all fields together; in their order. One without weight is none.

    Raises:
        BadArgument: there are more fields than CLAUSES, or a weight is not finite.
        TypeError: these are no weighted words.
    """
    if fields > CLAUSES:
        raise BadArgument(f"{fields} fields are too many: search engines take {CLAUSES} clauses at most")
    check_kind("words", words, Mapping, "a dict of words and weights, such as ExpandedQuery.words()")
    for word, weight in words.items():
        check_text("a word", word)
        check_number(f"the weight of {word!r}", weight, -sys.float_info.max, sys.float_info.max)
    most = min(WORDS, CLAUSES // fields)
    words = {word: weight for word, weight in words.items() if weight > 0}
    if len(words) <= most:
        return words
    kept = set(sorted(words, key=words.__getitem__, reverse=True)[:most])
    return {word: weight for word, weight in words.items() if word in kept}


def repeated(words: Mapping[str, float]) -> list[str]:
    """Each word as often as its weight says, for engines that count.

    The lightest one stands once, unless the heaviest would stand more than REPEATS times.
    """
    words = heaviest(words)
    if not words:
        return []
    unit = max(min(words.values()), max(words.values()) / REPEATS)
    return [word for word, weight in words.items() for _ in range(max(1, round(weight / unit)))]


def fts5(words: Mapping[str, float], *, columns: str | Sequence[str] = ()) -> str:
    """A MATCH expression of SQLite's FTS5 (https://www.sqlite.org/fts5.html#full_text_query_syntax).

    FTS5 knows no weights, but `bm25()` adds up all phrases of a query, so heavier words are repeated.
    `columns` restricts the match to one or several, which a table with `detail=none` can't do.
    """
    match = " OR ".join(map(_quoted, repeated(words))) or '""'
    names = _names("columns", columns)
    if not names:
        return match
    return f"{{{' '.join(map(_quoted, names))}}} : ({match})"


def single_tokens(words: Mapping[str, float], *, trigram: bool = False) -> dict[str, float]:
    """Words that FTS5 takes for one token each, which is what a table without positions can look up.

    Its `unicode61` tokenizer splits at whatever is neither letter nor digit, `trigram` into every three
    characters in a row; a part takes its word's weight.
    """
    parts: dict[str, float] = {}
    for word, weight in words.items():
        cut = [word[i : i + 3] for i in range(len(word) - 2)] if trigram else re.findall(r"[^\W_]+", word)
        for part in cut:
            parts[part] = max(weight, parts.get(part, 0.0))
    return parts


def tantivy(words: Mapping[str, float]) -> str:
    """A query for Tantivy's `Index.parse_query`: quoted words, each with its boost.

    Words of 40 bytes and more, which Tantivy's own tokenizers leave out of an index, are left out here too:
    a query of nothing else would be refused.
    """
    short = {word: weight for word, weight in words.items() if len(word.encode()) < 40}
    return " OR ".join(f"{_quoted(word)}^{_number(weight)}" for word, weight in heaviest(short).items())


def lucene(words: Mapping[str, float], *, field: str | Sequence[str] = "") -> str:
    """A query in the classic syntax of Lucene and Solr, and of `query_string`: words, each with its boost.

    In one `field` or several; without one, in the parser's default field, of which it must have one only.
    """
    fields = _names("field", field)
    kept = heaviest(words, fields=max(1, len(fields)))
    match = " OR ".join(f"{_quoted(word)}^{_number(weight)}" for word, weight in kept.items()) or "-*:*"
    return " OR ".join(f"{name}:({match})" for name in fields) or match


def elasticsearch(words: Mapping[str, float], *, fields: Sequence[str]) -> dict[str, Any]:
    """The `query` of a search request to OpenSearch or Elasticsearch: a `bool` of boosted `match` clauses.

    `fields` may carry boosts of their own, such as `title^2`.

    Raises:
        BadArgument: there is no field, which would mean all of an index, or too many.
    """
    for field in fields:
        check_text("a field", field)
    if not fields:
        raise BadArgument("name the fields to search, such as title^2 and body")
    kept = heaviest(words, fields=len(fields))
    clauses = [_match(word, weight, fields) for word, weight in kept.items()]
    if not clauses:
        return {"match_none": {}}
    return {"bool": {"should": clauses, "minimum_should_match": 1}}


def _names(what: str, given: str | Sequence[str]) -> list[str]:
    """One name or several; an empty one is none."""
    if not isinstance(given, str):
        check_texts(what, given)
    names = [given] if isinstance(given, str) else list(given)
    for name in names:
        check_text(what, name)
    return [name for name in names if name]


def _match(word: str, weight: float, fields: Sequence[str]) -> dict[str, Any]:
    if len(fields) == 1 and "^" not in fields[0]:
        return {"match": {fields[0]: {"query": word, "boost": weight}}}
    return {"multi_match": {"query": word, "fields": list(fields), "boost": weight}}


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '""').replace("\0", "") + '"'  # for SQLite a NUL is the end of the text


def _number(weight: float) -> str:
    """Four significant digits without an exponent, which the parsers don't know."""
    return np.format_float_positional(weight, precision=4, fractional=False, trim="-")
