"""Figures on real collections. The data are not ours to ship: QE_EDGE_TEST_DATA names their folder."""

import os
from pathlib import Path

import pytest

from qe_edge.datasets import load_dataset
from qe_edge.index import Index
from qe_edge.join import TEACHER_JOIN
from qe_edge.measures import mean, per_query
from qe_edge.records import Expansion, read_jsonl
from qe_edge.train.pairs import PairsConfig, pairs
from qe_edge.workdir import Workdir

ROOT = Path(__file__).parent.parent
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


def test_the_best_and_worst_candidates_of_scifact_reach_their_known_figures(tmp_path):
    from qe_edge.manifest import read_json

    folder = pairs(
        str(DATA / "beir" / "scifact"),
        [DATA / "expansions" / "scifact.jsonl"],
        PairsConfig(join="repeat:5"),
        workdir=Workdir(tmp_path),
    )
    found = read_json(folder / "report.json")["ndcg@10"]
    assert found["best candidate (oracle)"] == pytest.approx(0.772, abs=0.003)
    assert found["worst candidate (oracle)"] == pytest.approx(0.648, abs=0.003)
