"""`ExpandedQuery`: a query with its expansion, in the terms of our index and of other search engines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from qe_edge.arguments import check_kind, check_text, check_whole
from qe_edge.runtime import queries
from qe_edge.student.feedback import RelevanceModel
from qe_edge.student.join import Join, Part, joined
from qe_edge.text import analyzer_for, detect_language, get_analyzer, stop_words, words_of

FinishReason = Literal["stop", "length", "dry", "deadline", "broken off", "skipped"]
"""The student ended by itself; the token budget cut it; new tokens brought no new words; time was up; nobody
read on (of a stream); it was not asked."""


@dataclass(frozen=True)
class ExpandedQuery:
    """A query with what the student wrote for it.

    `text` is empty where the plain query is to be searched; `fallback` then says why, and `rejected` is what
    was written. Times are in seconds: prefill runs until the first token, decode from there to the end. They
    include the steps of the answers that were written at the same time, and are those of the first time if
    the answer was `cached`.

    After `Expander.feedback` the expansion is a `relevance` model instead of a text, after `Expander.refine`
    both; prefill is then also the time of reading.
    """

    query: str
    text: str
    join: Join
    prompt_tokens: int = 0
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason = "skipped"
    prefill_s: float = 0.0
    decode_s: float = 0.0
    fallback: str = ""
    rejected: str = ""
    cached: bool = False
    relevance: RelevanceModel | None = None

    def __post_init__(self) -> None:
        check_text("a query", self.query)
        check_text("a text", self.text)
        check_kind("join", self.join, Join, 'a Join, such as Join.parse("mass:0.7")')

    def __str__(self) -> str:
        return self.summary()

    @property
    def tokens(self) -> int:
        """How many tokens the student wrote, its end token not counted."""
        return len(self.token_ids)

    def terms(self, analyzer: str | None = None) -> dict[str, float]:
        """Weighted index terms of query and expansion, joined by the student's own rule.

        `analyzer` is that of your index; by default the language's own.
        """
        analyze = get_analyzer(analyzer or analyzer_for(detect_language(self.query)))
        return self._joined(analyze(self.query), analyze)

    def _joined(self, query: list[str], analyze: Callable[[str], list[str]]) -> dict[str, float]:
        """The query's terms with those of text and passages."""
        parts: list[Part] = [(self.join, analyze(self.text))]
        if self.relevance:
            parts.append((self.relevance.join, self.relevance.terms(analyze)))
        return joined(query, parts)

    def words(self, *, cjk: int = 2) -> dict[str, float]:
        """Weighted words as they are written, for an engine that has its own analyzer.

        Function words are left out, more of the expansion's than of the query's, and none of a query that has
        no others. Chinese comes in overlapping pieces of `cjk` characters.
        """

        check_whole("cjk", cjk, 1, 8)
        query = _cut(self.query, stop_words(), cjk) or _cut(self.query, frozenset(), cjk)
        return self._joined(query, partial(_cut, without=stop_words(more=True), cjk=cjk))

    def summary(self, most: int = 12) -> str:
        """The expansion for people: the text, or without one the heaviest words that the query lacks."""
        if self.text or not self.relevance:
            return self.text
        known = set(words_of(self.query))
        words = self.relevance.terms(partial(_cut, without=stop_words(more=True), cjk=2))
        return " ".join([word for word in words if word not in known][:most])

    def to_fts5(
        self, *, columns: str | Sequence[str] = (), trigram: bool = False, phrases: bool = True
    ) -> str:
        """A MATCH expression for SQLite FTS5; bind it as a parameter, and order by `rank`.

        Words such as `snake_case` are phrases to FTS5, and so are all with `trigram`. A table with
        `detail=none` or `detail=column` knows none: with `phrases=False`, their parts are searched for.

        FTS5 splits no Chinese, Japanese or Korean. Either index `" ".join(words_of(text))`, or make the
        table with `tokenize='trigram'` and say so here, where pieces below three characters can't be found.
        """
        words = self.words(cjk=3 if trigram else 2)
        if trigram:
            words = {word: weight for word, weight in words.items() if len(word) >= 3}
        if not phrases:
            words = queries.single_tokens(words, trigram=trigram)
        return queries.fts5(words, columns=columns)

    def to_tantivy(self) -> str:
        """A query for Tantivy's `Index.parse_query`."""
        return queries.tantivy(self.words())

    def to_lucene(self, *, field: str | Sequence[str] = "") -> str:
        """A query in Lucene's classic syntax, which Solr and `query_string` read too.

        Over several fields, name them here: with several default fields, there would be too many clauses.
        """
        return queries.lucene(self.words(), field=field)

    def to_elasticsearch(self, *fields: str) -> dict[str, Any]:
        """The `query` of an Elasticsearch request over these fields, such as `"title^2", "body"`."""
        return queries.elasticsearch(self.words(), fields=fields)

    def to_opensearch(self, *fields: str) -> dict[str, Any]:
        """The `query` of an OpenSearch request, which is Elasticsearch's."""
        return self.to_elasticsearch(*fields)

    def to_bm25s(self, analyzer: str | None = None) -> list[list[str]]:
        """Index terms for `bm25s.BM25.retrieve`, heavier ones repeated.

        The index must have been made of the same terms: `[get_analyzer(name)(text) for text in corpus]`.
        """
        return [queries.repeated(self.terms(analyzer))]

    def to_text(self) -> str:
        """Words in a row, heavier ones repeated, for any engine that takes a plain text."""
        return " ".join(queries.repeated(self.words()))


def _cut(text: str, without: frozenset[str], cjk: int) -> list[str]:
    # Tantivy refuses a word that its tokenizer leaves nothing of, such as an underscore.
    words = (word for word in words_of(text, cjk=cjk) if any(map(str.isalnum, word)))
    return [word for word in words if word not in without]
