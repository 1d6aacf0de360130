"""Our queries in a real Lucene. `QE_EDGE_LUCENE_JAR` names a jar with Lucene 9, such as Anserini's, and
jpype1 must be installed beside a Java runtime."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from test_queries import DOCUMENTS, HOSTILE, expanded, texts

from qe_edge.runtime.expansion import ExpandedQuery
from qe_edge.student.join import Join

JAR = os.environ.get("QE_EDGE_LUCENE_JAR")
jpype = pytest.importorskip("jpype", reason="needs jpype1") if JAR else None
pytestmark = pytest.mark.skipif(not JAR, reason="QE_EDGE_LUCENE_JAR names no jar of Lucene")
Search = Callable[[str], dict[str, float]]


@pytest.fixture(scope="module")
def lucene() -> Any:
    assert jpype
    if not jpype.isJVMStarted():
        jpype.startJVM(classpath=[JAR])
    return jpype.JPackage("org").apache.lucene


def searcher(lucene: Any, analyzer: Any) -> Search:
    """Query -> document -> score, over DOCUMENTS in memory."""
    directory = lucene.store.ByteBuffersDirectory()
    writer = lucene.index.IndexWriter(directory, lucene.index.IndexWriterConfig(analyzer))
    stored = lucene.document.Field.Store.YES
    for name, text in DOCUMENTS.items():
        document = lucene.document.Document()
        document.add(lucene.document.StringField("id", name, stored))
        document.add(lucene.document.TextField("body", text, stored))
        writer.addDocument(document)
    writer.close()
    reader = lucene.index.DirectoryReader.open(directory)
    found = lucene.search.IndexSearcher(reader)
    parser = lucene.queryparser.classic.QueryParser("body", analyzer)

    def search(query: str) -> dict[str, float]:
        hits = found.search(parser.parse(query), 10).scoreDocs
        return {str(reader.storedFields().document(hit.doc).get("id")): float(hit.score) for hit in hits}

    return search


@pytest.fixture(scope="module")
def english(lucene: Any) -> Search:
    return searcher(lucene, lucene.analysis.en.EnglishAnalyzer())


@pytest.fixture(scope="module")
def cjk(lucene: Any) -> Search:
    return searcher(lucene, lucene.analysis.cjk.CJKAnalyzer())


def test_a_weight_is_a_boost(english: Search) -> None:
    one, other = english("moon"), english("oceans")
    query = ExpandedQuery("moon", "oceans", Join("repeat", 2.5))
    found = english(query.to_lucene())
    assert found["tides"] == pytest.approx(2.5 * one["tides"] + other["tides"], rel=1e-5)
    assert found["moon"] == pytest.approx(2.5 * one["moon"], rel=1e-5)
    assert english(query.to_lucene(field="body")) == found


def test_chinese_is_found_by_its_pairs(cjk: Search) -> None:
    assert list(cjk(expanded("潮汐", "月球的引力").to_lucene())) == ["潮汐"]
    assert list(cjk(expanded("怎么烤", "面包").to_lucene())) == ["面包"]


@pytest.mark.parametrize("query", HOSTILE, ids=lambda query: ascii(query[:12]))
def test_hostile_queries_are_valid(english: Search, cjk: Search, query: str) -> None:
    for search in (english, cjk):
        search(expanded(query).to_lucene())
        assert "moon" in search(expanded(query, "the moon").to_lucene())


@given(texts, texts)
def test_every_query_is_valid(english: Search, cjk: Search, query: str, text: str) -> None:
    for search in (english, cjk):
        search(expanded(query, text).to_lucene())
        search(expanded(query, text).to_lucene(field="body"))


def test_what_has_no_word_finds_nothing(english: Search) -> None:
    assert english(expanded("*").to_lucene()) == {} == english(expanded("*").to_lucene(field="body"))
