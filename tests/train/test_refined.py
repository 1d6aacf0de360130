"""Candidates that are scored as an encoder refines them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from tiny_encoder import save_tiny_encoder

from qe_edge import Encoder, Expander
from qe_edge.errors import NotFound
from qe_edge.records import Candidate, Expansion, encode_jsonl, read_jsonl
from qe_edge.retrieval.datasets import load_dataset
from qe_edge.retrieval.measures import per_query
from qe_edge.serve.collection import Collection
from qe_edge.student.gate import OPEN
from qe_edge.student.join import Join
from qe_edge.train.config import PairsConfig
from qe_edge.train.pairs import pairs
from qe_edge.train.refined import Refiner
from qe_edge.work.folder import Workdir

pytest.importorskip("llama_cpp")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_encoder(tmp_path_factory.mktemp("encoder") / "tiny.gguf")


def test_a_text_is_refined_as_an_expander_does(gguf: Path, encoder: Path, tmp_path: Path) -> None:
    collection = Collection.open("demo-en", tmp_path)
    refiner = Refiner(collection, encoder, 4)
    with Expander.load(gguf, reader=encoder, passages=4, gate=OPEN, budget_tokens=8) as expander:
        for query in ("what makes bread rise", "why do my ears pop on a plane"):
            refined = expander.refine(query, partial(collection.found, most=4))
            assert refined.relevance
            terms = refiner.terms(query, refined.text, expander.spec.join)
            assert terms == pytest.approx(collection.terms(refined), rel=1e-2)
    refiner.close()


def test_the_reward_is_that_of_the_refined_query(encoder: Path, tmp_path: Path) -> None:
    data = load_dataset("demo-en@train")
    queries = dict(list(data.queries.items())[:3])
    rows = [
        Expansion(data.name, query_id, query, "en", "teacher", "zero-shot", text)
        for query_id, query in queries.items()
        for text in ("yeast, dough and bread", "pressure in the ears")
    ]
    file = tmp_path / "expansions.jsonl"
    file.write_bytes(encode_jsonl(rows))
    config = PairsConfig(reader=str(encoder), passages=4, min_gap=1e-6)
    out = pairs("demo-en@train", [file], config, workdir=Workdir(tmp_path / "work"))
    collection = Collection.open("demo-en", tmp_path / "index")
    refiner = Refiner(collection, encoder, 4)
    found = {(c.query_id, c.text): c.ndcg for c in read_jsonl(out / "candidates.jsonl", Candidate)}
    assert len(found) == 9
    for (query_id, text), ndcg in found.items():
        terms = refiner.terms(queries[query_id], text, Join())
        run = {query_id: collection.index.search(terms, 10)}
        qrels = {query_id: data.qrels[query_id]}
        assert per_query(qrels, run, "nDCG@10")[query_id] == pytest.approx(ndcg)
    # Kept apart from the scores of the texts alone.
    plain = pairs("demo-en@train", [file], PairsConfig(min_gap=1e-6), workdir=Workdir(tmp_path / "work"))
    alone = {(c.query_id, c.text): c.ndcg for c in read_jsonl(plain / "candidates.jsonl", Candidate)}
    assert alone != found


def test_a_reader_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no such file"):
        Encoder(tmp_path / "missing.gguf")
    with pytest.raises(ValueError, match="works on this machine"):
        PairsConfig(reader="x.gguf", retriever="http://localhost:9200/x")
    with pytest.raises(ValueError, match="name one"):
        PairsConfig(passages=3)
