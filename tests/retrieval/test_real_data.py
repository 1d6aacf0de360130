"""Figures on real collections. The data are not ours to ship: QE_EDGE_TEST_DATA names their folder."""

import os
from collections import defaultdict
from pathlib import Path

import bm25s
import numpy as np
import pytest

from qe_edge.records import Candidate, Expansion, read_jsonl
from qe_edge.retrieval.datasets import load_dataset
from qe_edge.retrieval.index import Index
from qe_edge.retrieval.measures import mean, per_query
from qe_edge.student.join import TEACHER_JOIN
from qe_edge.text import get_analyzer
from qe_edge.train.config import PairsConfig
from qe_edge.train.pairs import pairs
from qe_edge.work.files import read_json
from qe_edge.work.folder import Workdir

ROOT = Path(__file__).parents[2]
DATA = (ROOT / os.environ.get("QE_EDGE_TEST_DATA", "../shared/data")).resolve()
pytestmark = [
    pytest.mark.data,
    pytest.mark.skipif(
        not (DATA / "beir").is_dir(), reason=f"no real data: set QE_EDGE_TEST_DATA (tried {DATA})"
    ),
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("index")


@pytest.mark.parametrize(
    ("collection", "expansions", "bm25", "zero_shot"),
    [
        ("trec-dl19-20-pool@dl19", "dl19", 0.454, 0.675),
        ("trec-dl19-20-pool@dl20", "dl20", 0.467, 0.679),
        ("scifact@test", "scifact", 0.676, 0.717),
    ],
)
def test_bm25_and_the_teacher_reach_their_known_figures(cache, collection, expansions, bm25, zero_shot):
    data = load_dataset(str(DATA / "beir" / collection))
    index = Index.for_dataset(data, cache)
    texts = {
        row.query_id: row.text
        for row in read_jsonl(DATA / "expansions" / f"{expansions}.jsonl", Expansion)
        if (row.model, row.mode) == ("openai/gpt-4.1", "zero-shot")
    }

    def score(expanded):
        run = {
            query_id: index.search_text(query, expanded.get(query_id, ""), join=TEACHER_JOIN)
            for query_id, query in data.queries.items()
        }
        return mean(per_query(data.qrels, run))

    assert score({}) == pytest.approx(bm25, abs=0.003)
    assert score(texts) == pytest.approx(zero_shot, abs=0.005)


@pytest.mark.parametrize(
    ("collection", "expansions", "best", "worst"),
    [("scifact", "scifact", 0.772, 0.648), ("trec-dl19-20-pool@dl20", "dl20", 0.759, 0.487)],
)
def test_scores_of_eight_real_candidates_match_an_independent_calculation(
    tmp_path, collection, expansions, best, worst
):
    name, file = str(DATA / "beir" / collection), DATA / "expansions" / f"{expansions}.jsonl"
    config = PairsConfig(join="repeat:5", strategy="best-worst")
    folder = pairs(name, [file], config, workdir=Workdir(tmp_path))
    report = read_json(folder / "report.json")
    rows = [row for row in read_jsonl(folder / "candidates.jsonl", Candidate) if row.mode != "plain"]
    data = load_dataset(name)
    mine = by_bm25s_alone(data, rows)

    assert len(rows) == report["candidates"]
    assert len(rows) + report["dropped"].get("seen before", 0) == 8 * len(data.queries)
    # The pool holds passages twice, with equal scores and other grades, which may be ranked either way.
    assert np.mean([abs(row.ndcg - value) < 1e-6 for row, value in zip(rows, mine, strict=True)]) > 0.97
    values = defaultdict(list)
    for row, value in zip(rows, mine, strict=True):
        values[row.query_id].append(value)
    for kind, choose, known in (("best", max, best), ("worst", min, worst)):
        independent = np.mean([choose(v) for v in values.values()])
        assert report["candidates_of_each_query"][kind]["ndcg@10"] == pytest.approx(independent, abs=1e-3)
        assert independent == pytest.approx(known, abs=0.003)
    wide = sum(max(v) - min(v) >= 0.05 for v in values.values())
    assert report["queries_with_pairs"] == report["pairs"] == pytest.approx(wide, abs=1)


def by_bm25s_alone(data, rows):
    """nDCG@10 of the query five times and the expansion, without our search, join and measures."""
    analyze = get_analyzer("english")
    ids, texts = zip(*data.documents(), strict=True)
    retriever = bm25s.BM25(k1=0.9, b=0.4, method="lucene")
    retriever.index([analyze(text) for text in texts], show_progress=False)
    repeated = [analyze(" ".join([data.queries[row.query_id]] * 5 + [row.text])) for row in rows]
    found = retriever.retrieve(repeated, k=10, show_progress=False).documents
    discounts = 1 / np.log2(np.arange(2, 12))
    values = []
    for row, ranking in zip(rows, found, strict=True):
        grades = data.qrels[row.query_id]
        gains = np.array([max(grades.get(ids[place], 0), 0) for place in ranking])
        ideal = np.array(sorted((max(g, 0) for g in grades.values()), reverse=True)[:10])
        values.append(float(gains @ discounts / (ideal @ discounts[: len(ideal)])))
    return values
