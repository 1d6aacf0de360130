"""Expanded queries in real engines: valid whatever a user typed, and weighted as they say."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qe_edge import queries
from qe_edge.errors import BadArgument
from qe_edge.retrieval.index import Index
from qe_edge.runtime.expansion import ExpandedQuery
from qe_edge.runtime.queries import REPEATS, WORDS, repeated
from qe_edge.student.join import Join
from qe_edge.text import get_analyzer, words_of

HOSTILE = (
    *('"', "*", "NEAR(a b)", "title:tides", "a OR", "OR", "AND NOT", "it's \"quoted", "(", "a^2", "-tides"),
    *(
        "{x}",
        "tides\0moon",
        "\0",
        "🌊🌙",
        "مد وجزر",
        "שלום עולם",
        "\u202eabc\u202c",
        "ﬁ ½ ²",
        "e\u0301",
        "__ _",
    ),
    *("e\u0301", "/a/ [a TO b]", "糖", "\ud7ff", "a\\", "~", "+ + +"),
    *("x" * 10_000, "word " * 2_000, " ".join(map(str, range(5_000))), "潮汐" * 3_000),
)
DOCUMENTS = {
    "tides": "The moon and the sun pull the oceans and make tides.",
    "bread": "Bread is baked from flour, water and yeast.",
    "moon": "The moon is a rocky body without an atmosphere.",
    "潮汐": "潮汐是月球和太阳的引力造成的。",
    "面包": "面包用面粉和酵母烤成。",
}


def expanded(query: str, text: str = "", value: float = 1.0) -> ExpandedQuery:
    return ExpandedQuery(query, text, Join("mass", value))


@pytest.fixture(scope="module")
def fts5() -> Iterator[sqlite3.Connection]:
    """One table as English search has it, one whose Chinese is cut by us, and one of trigrams."""
    db = sqlite3.connect(":memory:")
    db.execute("CREATE VIRTUAL TABLE english USING fts5(id UNINDEXED, body, tokenize='porter unicode61')")
    db.execute("CREATE VIRTUAL TABLE words USING fts5(id UNINDEXED, body)")
    db.execute("CREATE VIRTUAL TABLE trigrams USING fts5(id UNINDEXED, body, tokenize='trigram')")
    for name, text in DOCUMENTS.items():
        db.execute("INSERT INTO english VALUES (?, ?)", (name, text))
        db.execute("INSERT INTO words VALUES (?, ?)", (name, " ".join(words_of(text))))
        db.execute("INSERT INTO trigrams VALUES (?, ?)", (name, text))
    yield db
    db.close()


def found(db: sqlite3.Connection, table: str, match: str) -> list[str]:
    rows = db.execute(f"SELECT id FROM {table} WHERE {table} MATCH ? ORDER BY rank", (match,))
    return [name for (name,) in rows]


@pytest.fixture(scope="module")
def tantivy() -> Any:
    module = pytest.importorskip("tantivy", reason="needs tantivy")
    schema = module.SchemaBuilder()
    schema.add_text_field("id", stored=True)
    schema.add_text_field("body", tokenizer_name="en_stem")
    schema.add_text_field("cut")
    index = module.Index(schema.build())
    writer = index.writer(15_000_000, 1)
    for name, text in DOCUMENTS.items():
        writer.add_document(module.Document(id=name, body=text, cut=" ".join(words_of(text))))
    writer.commit()
    index.reload()
    return index


def found_by_tantivy(index: Any, query: str, field: str = "body") -> list[str]:
    searcher = index.searcher()
    hits = searcher.search(index.parse_query(query, [field]), 10).hits
    return [searcher.doc(address)["id"][0] for _, address in hits]


def test_fts5_finds_what_only_the_expansion_names(fts5: sqlite3.Connection) -> None:
    query = expanded("what causes high water", "tides are caused by the moon")
    assert set(found(fts5, "english", expanded("what causes high water").to_fts5())) == {"bread"}
    assert found(fts5, "english", query.to_fts5())[0] == "tides"
    assert found(fts5, "english", query.to_fts5(columns=["body"]))[0] == "tides"
    with pytest.raises(sqlite3.OperationalError, match="no such column"):
        found(fts5, "english", query.to_fts5(columns=['bo"dy']))


def test_chinese_is_found_by_bigrams_and_by_trigrams(fts5: sqlite3.Connection) -> None:
    assert found(fts5, "words", expanded("潮汐", "月球的引力").to_fts5()) == ["潮汐"]
    assert found(fts5, "words", expanded("怎么烤", "面包").to_fts5()) == ["面包"]
    # Two characters are no trigram; the expansion's are.
    assert found(fts5, "trigrams", expanded("潮汐").to_fts5(trigram=True)) == []
    assert found(fts5, "trigrams", expanded("潮汐", "太阳的引力").to_fts5(trigram=True)) == ["潮汐"]
    assert "moon" in found(fts5, "trigrams", expanded("moon").to_fts5(trigram=True))


def test_a_weight_is_a_weight_in_fts5s_scores(fts5: sqlite3.Connection) -> None:
    """bm25() of a word that stands three times is three times that of one."""

    def score(match: str, name: str) -> float:
        return fts5.execute(
            "SELECT rank FROM english WHERE english MATCH ? AND id = ?", (match, name)
        ).fetchone()[0]

    one, other = score('"moon"', "tides"), score('"ocean"', "tides")
    query = ExpandedQuery("moon", "ocean", Join("repeat", 3))
    assert query.words() == {"moon": 3, "ocean": 1}
    assert score(query.to_fts5(), "tides") == pytest.approx(3 * one + other)


def test_a_weight_is_a_boost_in_tantivy(tantivy: Any) -> None:
    def scores(query: str) -> dict[str, float]:
        searcher = tantivy.searcher()
        hits = searcher.search(tantivy.parse_query(query, ["body"]), 10).hits
        return {searcher.doc(address)["id"][0]: score for score, address in hits}

    one, other = scores('"moon"'), scores('"ocean"')
    query = ExpandedQuery("moon", "ocean", Join("repeat", 2.5))
    assert query.to_tantivy() == '"moon"^2.5 OR "ocean"^1'
    assert scores(query.to_tantivy())["tides"] == pytest.approx(2.5 * one["tides"] + other["tides"], rel=1e-5)
    assert found_by_tantivy(tantivy, expanded("潮汐", "月球").to_tantivy(), "cut") == ["潮汐"]


def test_words_stay_as_they_are_written_and_function_words_go() -> None:
    words = expanded("What causes the tides?", "The tides are caused by it, on THE coast.").words()
    assert list(words) == ["what", "causes", "tides", "caused", "coast"]
    assert expanded("to be or not").words() == {"to": 1, "be": 1, "or": 1, "not": 1}
    assert list(expanded("vitamin d", "you can get d because").words()) == ["vitamin", "d", "get"]
    assert list(expanded("潮汐的成因 tides").words()) == ["潮汐", "汐的", "的成", "成因", "tides"]


def test_repetition_rounds_the_weights_and_has_an_end() -> None:
    assert repeated({"a": 1.0, "b": 0.5}) == ["a", "a", "b"]
    assert repeated({"a": 0.9, "b": 0.5}) == ["a", "a", "b"]
    assert repeated({"a": 1.0, "b": 1e-9}) == ["a"] * REPEATS + ["b"]
    assert repeated({}) == []
    assert len({*repeated({str(i): 1 + i for i in range(1000)})}) == WORDS
    assert min(map(int, repeated({str(i): 1 + i for i in range(1000)}))) == 1000 - WORDS


def test_elasticsearch_gets_boosted_clauses() -> None:
    query = ExpandedQuery("tides", "moon", Join("mass", 0.5))
    assert query.to_elasticsearch("body") == query.to_opensearch("body")
    assert query.to_opensearch("body") == {
        "bool": {
            "should": [
                {"match": {"body": {"query": "tides", "boost": 1.0}}},
                {"match": {"body": {"query": "moon", "boost": 0.5}}},
            ],
            "minimum_should_match": 1,
        }
    }
    assert query.to_opensearch("title^2", "body")["bool"]["should"][1] == {
        "multi_match": {"query": "moon", "fields": ["title^2", "body"], "boost": 0.5}
    }
    assert expanded("🌊").to_opensearch("body") == {"match_none": {}}


def test_lucene_gets_words_that_mean_nothing_else() -> None:
    assert expanded("tides OR moon", value=1).to_lucene() == '"tides"^1 OR "moon"^1'
    assert ExpandedQuery("tides", "moon", Join("mass", 1e-7)).to_lucene() == '"tides"^1 OR "moon"^0.0000001'
    assert queries.fts5({"tides": 0, "moon": 1.0, "sea": -1}) == '"moon"'  # without weight, none at all
    assert queries.fts5({"tides": 0}) == '""'
    assert expanded("moon").to_fts5(columns="body") == '{"body"} : ("moon")'
    assert expanded("moon").to_lucene(field="body") == 'body:("moon"^1)'
    assert expanded("*").to_lucene() == "-*:*"


def test_bm25s_ranks_as_our_index() -> None:
    import bm25s

    analyze = get_analyzer("english")
    english = {name: text for name, text in DOCUMENTS.items() if name.isascii()}
    bm25 = bm25s.BM25(method="lucene", k1=0.9, b=0.4)
    bm25.index([analyze(text) for text in english.values()], show_progress=False)
    query = ExpandedQuery("causes of tides", "moon sun moon", Join("repeat", 2))
    hits, scores = bm25.retrieve(query.to_bm25s(), k=2, show_progress=False)
    ours = Index.build(english.items(), analyzer="english").search(query.terms(), 2)
    assert [list(english)[i] for i in hits[0]] == [name for name, _ in ours]
    np.testing.assert_allclose(scores[0], [score for _, score in ours], rtol=1e-5)


def test_the_querys_own_words_stay_beside_many_others() -> None:
    query = ExpandedQuery("tides of the moon", " ".join(f"w{i}" for i in range(1000)), Join("mass", 0.5))
    match = query.to_fts5()
    assert match.startswith('"tides" OR') and '"moon"' in match
    assert match.count('"w') == WORDS - 2


def test_a_text_for_anything_else() -> None:
    assert ExpandedQuery("tides", "moon", Join("repeat", 2)).to_text() == "tides tides moon"


texts = st.one_of(
    st.text(max_size=60),
    st.text(alphabet='"*():^-+~{}[]\\/&|!? \0aORNEAtd潮汐🌊', max_size=40),
    st.sampled_from(HOSTILE),
)


@given(texts, texts, st.floats(1e-9, 1e9))
@example('"', "*", 1.0)
def test_every_query_is_valid_everywhere(
    fts5: sqlite3.Connection, tantivy: Any, query: str, text: str, value: float
) -> None:
    one = expanded(query, text, value)
    for table, trigram in (("english", False), ("words", False), ("trigrams", True)):
        found(fts5, table, one.to_fts5(trigram=trigram))
        found(fts5, table, one.to_fts5(columns=["body"], trigram=trigram))
    for field in ("body", "cut"):
        found_by_tantivy(tantivy, one.to_tantivy(), field)
    # Nothing but quoted words, boosts and ORs.
    assert re.fullmatch(r'-\*:\*|("[^"\\\s]+"\^\d+(\.\d+)?( OR |$))+', one.to_lucene())
    clauses = one.to_opensearch("body").get("bool", {"should": []})["should"]
    assert len(clauses) <= WORDS
    assert all(0 < clause["match"]["body"]["boost"] < float("inf") for clause in clauses)


@pytest.mark.parametrize("query", HOSTILE, ids=lambda query: ascii(query[:12]))
def test_hostile_queries_are_valid_and_find_their_own_words(
    fts5: sqlite3.Connection, tantivy: Any, query: str
) -> None:
    assert "moon" in found(fts5, "english", expanded(query, "the moon").to_fts5())
    assert "moon" in found_by_tantivy(tantivy, expanded(query, "the moon").to_tantivy())


def clauses(query: Any) -> int:
    """Term queries of an Elasticsearch query, as Lucene counts them."""
    found = 0
    for clause in query["bool"]["should"]:
        found += len(clause["multi_match"]["fields"]) if "multi_match" in clause else 1
    return found


@pytest.mark.parametrize("fields", [1, 2, 4, 5, 7, 300, 1024])
def test_words_in_all_fields_are_no_more_clauses_than_lucene_takes(fields: int) -> None:
    many = expanded("tides", " ".join(f"word{i}" for i in range(400)))
    names = [f"f{i}" for i in range(fields)]
    most = min(WORDS, 1024 // fields)
    assert clauses(many.to_elasticsearch(*names)) == fields * most <= 1024
    assert many.to_lucene(field=names).count("^") == fields * most
    assert many.to_lucene(field=names).count(":(") == fields
    assert "tides" in many.to_lucene(field=names)  # the heaviest words stay


def test_fields_that_cant_be_searched_are_refused() -> None:
    with pytest.raises(BadArgument, match="name the fields to search"):
        expanded("tides").to_elasticsearch()
    with pytest.raises(BadArgument, match="1025 fields are too many"):
        expanded("tides").to_elasticsearch(*map(str, range(1025)))
    assert expanded("tides").to_lucene(field=["a", "b"]) == 'a:("tides"^1) OR b:("tides"^1)'


@pytest.mark.parametrize("detail", ["none", "column", "full"])
@pytest.mark.parametrize("tokenize", ["unicode61", "porter unicode61", "trigram"])
def test_a_table_without_positions_is_searched_without_phrases(detail: str, tokenize: str) -> None:
    db = sqlite3.connect(":memory:")
    db.execute(
        f"CREATE VIRTUAL TABLE t USING fts5(id UNINDEXED, body, tokenize='{tokenize}', detail={detail})"
    )
    texts = {"a": "the moon raises tides in snake_case and 潮汐的成因", "b": "bread and yeast"}
    db.executemany("INSERT INTO t VALUES (?, ?)", texts.items())
    trigram = tokenize == "trigram"

    def search(query: ExpandedQuery, phrases: bool) -> list[str]:
        match = query.to_fts5(trigram=trigram, phrases=phrases)
        return [row[0] for row in db.execute("SELECT id FROM t WHERE t MATCH ? ORDER BY rank", [match])]

    for text in ("snake_case", "tides", "what_causes_tides", "潮汐的成因" if trigram else "tides 潮汐"):
        assert search(expanded(text), phrases=False) == ["a"]
    if detail != "full":
        with pytest.raises(sqlite3.OperationalError, match="phrase"):
            search(expanded("snake_case"), phrases=True)
    for text in HOSTILE:  # valid whatever was typed
        search(expanded(text), phrases=False)
