import json
import random
from collections import Counter

import bm25s
import numpy as np
import pytest

from qe_edge.errors import BadInput, NotFound, QeEdgeError
from qe_edge.retrieval.analysis import analysed
from qe_edge.retrieval.datasets import load_dataset
from qe_edge.retrieval.index import Index
from qe_edge.student.join import Join
from qe_edge.text import Analyzer, get_analyzer

DOCUMENTS = [
    ("d1", "the moon pulls on the oceans and raises tides"),
    ("d2", "bread rises because of yeast"),
    ("d3", "tides follow the moon and the sun, tides turn twice a day"),
    ("d4", "the moon the moon the moon"),
]


@pytest.fixture
def index():
    return Index.build(DOCUMENTS, analyzer="english")


def test_finds_the_best_documents_and_leaves_out_the_rest(index):
    assert [doc_id for doc_id, _ in index.search_text("moon tides", join=Join())] == ["d3", "d1", "d4"]


def test_weighted_unique_terms_score_as_repeated_terms_do_in_bm25s():
    draw = random.Random(1)
    words = [f"w{i}" for i in range(50)]
    documents = [(str(i), " ".join(draw.choices(words, k=draw.randint(1, 40)))) for i in range(200)]
    index = Index.build(documents, analyzer="english")
    reference = bm25s.BM25(k1=0.9, b=0.4, method="lucene")
    reference.index([index.analyze(text) for _, text in documents], show_progress=False)
    for _ in range(20):
        query, expansion = draw.choices(words, k=3), draw.choices(words, k=30)
        repeated = [term for text in (query * 5, expansion) for term in index.analyze(" ".join(text))]
        expected = reference.get_scores(repeated)
        weights = Join("repeat", 5)(index.analyze(" ".join(query)), index.analyze(" ".join(expansion)))
        found = dict(index.search(weights, k=200))
        assert [found.get(str(i), 0) for i in range(200)] == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_ties_keep_the_collections_order():
    index = Index.build([(f"d{i}", "same text here") for i in range(9)], analyzer="english")
    ranking = index.search({"text": 1.0}, k=5)
    assert [doc_id for doc_id, _ in ranking] == ["d0", "d1", "d2", "d3", "d4"]


def test_saved_and_opened_it_finds_the_same(index, tmp_path):
    Index.write(DOCUMENTS, tmp_path, analyzer="english")
    opened = Index.open(tmp_path)
    assert isinstance(opened.data.base, np.memmap)
    assert list(opened.ids) == list(index.ids) == ["d1", "d2", "d3", "d4"]
    assert opened.ids[-1] == "d4" and opened.ids[1:3] == ["d2", "d3"]
    with pytest.raises(IndexError):
        opened.ids[4]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "data.npy", "ids.bin", "ids.npy", "qe_edge_index.json", "rows.npy", "starts.npy", "vocab.json",
    ]  # fmt: skip
    assert opened.meta == index.meta
    assert opened.search_text("moon tides", "sun", join=Join()) == index.search_text(
        "moon tides", "sun", join=Join()
    )


def test_unknown_and_empty_queries_find_nothing(index):
    assert index.search_text("zebra", join=Join()) == []
    assert index.search({}, k=3) == []


def test_a_missing_a_damaged_and_an_empty_index_are_named(index, tmp_path):
    with pytest.raises(NotFound, match="no index there"):
        Index.open(tmp_path / "nowhere")
    for name in ("data.npy", "ids.bin", "vocab.json", "qe_edge_index.json"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        Index.write(DOCUMENTS, folder, analyzer="english")
        (folder / name).write_bytes(b"short")
        with pytest.raises(BadInput, match="the index is damaged"):
            Index.open(folder)
    with pytest.raises(BadInput, match="no text to index"):
        Index.build([("d1", "the of")], analyzer="english")


@pytest.mark.parametrize(("chunk", "flush"), [(1, 1), (7, 3), (1000, 10_000)])
def test_chunks_change_nothing_and_every_score_is_bm25ss(tmp_path, monkeypatch, chunk, flush):
    draw = random.Random(2)
    words = [f"w{i}" for i in range(30)]
    texts = [" ".join(draw.choices(words, k=draw.randint(0, 20))) for _ in range(100)]
    monkeypatch.setattr("qe_edge.retrieval.postings.CHUNK", chunk)
    monkeypatch.setattr("qe_edge.retrieval.analysis.BLOCK", flush)
    index = Index.build([(f"ü{i}", text) for i, text in enumerate(texts)], analyzer="english")
    assert index.ids[99] == "ü99"
    retriever = bm25s.BM25(k1=0.9, b=0.4, method="lucene")
    vocabulary = index.vocab
    retriever.index(
        ([[vocabulary[t] for t in text.split()] for text in texts], vocabulary), show_progress=False
    )
    theirs = retriever.scores
    assert np.array_equal(index.starts, theirs["indptr"])
    assert np.array_equal(index.rows, theirs["indices"])
    assert np.array_equal(index.data, theirs["data"])
    assert [index.frequency(f"w{i}") for i in range(30)] == [
        sum(f"w{i}" in text.split() for text in texts) for i in range(30)
    ]


def test_an_id_that_is_there_twice_is_refused(tmp_path):
    with pytest.raises(BadInput, match="document 'd1' is there twice, as number 1 and as number 2"):
        Index.build([("d1", "moon"), ("d1", "sun")], analyzer="english")


@pytest.mark.parametrize("documents", [1, 2, 5, 1000, 5003])
def test_the_best_are_found_among_many_blocks(documents: int) -> None:
    from qe_edge.retrieval.index import _top

    draw = np.random.default_rng(documents)
    many_equal = np.round(draw.random(documents) * (draw.random(documents) < 0.4), 1)
    for scores in (many_equal, np.sort(draw.random(documents)), np.zeros(documents)):
        ranked = sorted((-score, place) for place, score in enumerate(scores.tolist()) if score > 0)
        for k in (1, 3, 10, 1000):
            assert _top(scores, k) == [(place, -score) for score, place in ranked[:k]]


def test_an_index_of_another_format_is_refused_by_name(tmp_path):
    Index.write([("d1", "The moon.")], tmp_path, analyzer="english")
    meta = tmp_path / "qe_edge_index.json"
    content = json.loads(meta.read_text())
    for made, told in ((None, 2), (9, 9)):
        content.pop("format", None)
        meta.write_text(json.dumps(content if made is None else content | {"format": made}))
        with pytest.raises(BadInput, match=f"an index of format {told}, and this qe-edge reads 4"):
            Index.open(tmp_path)


@pytest.mark.parametrize("analyzer", ["english", "cjk", "jieba"])
def test_no_number_of_workers_changes_a_byte(tmp_path, monkeypatch, analyzer):
    if analyzer == "jieba":
        pytest.importorskip("jieba")
    data = load_dataset("demo-zh" if analyzer != "english" else "demo-en")
    documents = [(f"{doc_id}-{i}", text) for i in range(3) for doc_id, text in data.documents()]
    documents.insert(7, ("empty", ""))
    monkeypatch.setattr("qe_edge.retrieval.analysis.BLOCK", 50)
    for workers in (1, 2, 3):
        folder = tmp_path / str(workers)
        folder.mkdir()
        Index.write(iter(documents), folder, analyzer=analyzer, workers=workers)
    names = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert len(names) == 7
    for other in ("2", "3"):
        for name in names:
            assert (tmp_path / other / name).read_bytes() == (tmp_path / "1" / name).read_bytes(), name


def test_terms_and_their_counts_are_the_analyzers(monkeypatch):
    monkeypatch.setattr("qe_edge.retrieval.analysis.MOST_WORDS", 5)  # what is kept is dropped now and then
    analyzer = get_analyzer("english")
    documents = list(load_dataset("demo-en").documents())
    (block,) = analysed(documents, analyzer, workers=1)
    ends = np.cumsum(block.sizes)
    for i, (_, text) in enumerate(documents):
        part = block.postings[ends[i] - block.sizes[i] : ends[i]]
        assert {block.terms[place]: count for place, count in part.tolist()} == Counter(analyzer(text))
        assert block.lengths[i] == len(analyzer(text))


def test_a_worker_that_dies_is_told(monkeypatch):
    monkeypatch.setattr("qe_edge.retrieval.analysis.BLOCK", 1)
    documents = [(f"d{i}", "moon") for i in range(9)]
    with pytest.raises(QeEdgeError, match="a process that read documents died"):
        list(analysed(documents, Analyzer("no such analyzer", str.split), workers=2))
