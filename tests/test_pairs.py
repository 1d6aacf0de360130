import json

import pytest

from qe_edge.errors import BadInput
from qe_edge.manifest import read_json
from qe_edge.records import Candidate, Expansion, Pair, encode_jsonl, read_jsonl
from qe_edge.train.pairs import PairsConfig, make_pairs, pairs
from qe_edge.workdir import Workdir

DOCUMENTS = {
    "tides": "Gravity of the moon raises ocean tides.",
    "bread": "Yeast makes dough rise in the oven.",
    "moon": "The moon has craters and no air.",
}


@pytest.fixture
def collection(tmp_path):
    root = tmp_path / "tiny"
    (root / "qrels").mkdir(parents=True)
    (root / "corpus.jsonl").write_text(
        "".join(json.dumps({"_id": key, "text": text}) + "\n" for key, text in DOCUMENTS.items())
    )
    (root / "queries.jsonl").write_text(
        '{"_id": "q1", "text": "why does the sea go up and down"}\n'
        '{"_id": "q2", "text": "how does bread rise"}\n'
    )
    (root / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq1\ttides\t3\nq2\tbread\t3\n")
    return root


def candidate(query_id, text, mode="zero-shot", model="teacher"):
    query = {"q1": "why does the sea go up and down", "q2": "how does bread rise"}.get(query_id, "other")
    return Expansion("tiny", query_id, query, "en", model, mode, text)


def build(tmp_path, collection, rows, **settings):
    file = tmp_path / "expansions.jsonl"
    file.write_bytes(encode_jsonl(rows))
    return pairs(str(collection), [file], PairsConfig(**settings), workdir=Workdir(tmp_path / "work"))


def test_the_better_retriever_is_chosen_and_everything_is_counted(tmp_path, collection):
    good, bad = "the gravity of the moon raises tides", "dough needs an oven"
    folder = build(
        tmp_path,
        collection,
        [
            candidate("q1", bad),
            candidate("q1", good, "few-shot"),
            candidate("q1", good),  # the same text again
            candidate("q1", "  "),
            candidate("q2", "yeast"),
            candidate("q2", "yeast in dough", "few-shot"),
            candidate("q9", "not judged"),
            Expansion("other", "q2", "another set's query", "en", "teacher", "zero-shot", "text"),
        ],
    )
    (pair,) = read_jsonl(folder / "pairs.jsonl", Pair)
    assert (pair.chosen, pair.rejected) == (good, bad)
    assert (pair.chosen_ndcg, pair.rejected_ndcg) == (1.0, 0.0)
    assert (pair.chosen_mode, pair.rejected_mode) == ("few-shot", "zero-shot")
    report = read_json(folder / "report.json")
    assert report["dropped"] == {
        "duplicate expansion": 1,
        "empty expansion": 1,
        "other query of that id": 1,
        "query not judged in this split": 1,
        "tie": 1,
    }
    assert report["candidates"] == 4
    assert report["candidates_better_than_plain"] == 1
    assert report["queries_with_pairs"] == 1
    assert report["ndcg@10"] == {
        "plain query": 0.5,
        "best candidate (oracle)": 1.0,
        "worst candidate (oracle)": 0.5,
    }
    scores = {c.text: (c.ndcg, c.plain_ndcg) for c in read_jsonl(folder / "candidates.jsonl", Candidate)}
    assert scores[good] == (1.0, 0.0)
    assert scores["yeast"] == (1.0, 1.0)
    assert read_json(folder / "run.json")["settings"]["dataset"] == str(collection)


def scored(*values):
    rows = [candidate("q1", f"text {i}") for i in range(len(values))]
    return [
        (row, Candidate("tiny", "q1", "teacher", "zero-shot", value, 0.0, row.text))
        for row, value in zip(rows, values, strict=True)
    ]


def test_gap_and_limit_decide_and_the_widest_gaps_stay():
    made, dropped = make_pairs(scored(0.9, 0.5, 0.46, 0.1), PairsConfig(min_gap=0.05, max_per_query=2))
    assert [(p.chosen, p.rejected) for p in made] == [("text 0", "text 3"), ("text 0", "text 2")]
    assert dropped == {"gap below the minimum": 1, "over the limit per query": 3}


def test_a_gap_of_exactly_the_minimum_counts():
    made, _ = make_pairs(scored(0.5, 0.25), PairsConfig(min_gap=0.25))
    assert len(made) == 1


def test_no_usable_pair_is_an_error_with_the_counts(tmp_path, collection):
    with pytest.raises(BadInput, match=r"differ by 0\.05.*tie"):
        build(tmp_path, collection, [candidate("q2", "yeast"), candidate("q2", "yeast dough")])
    assert not (tmp_path / "work" / "pairs").exists()


def test_expansions_of_other_queries_are_an_error(tmp_path, collection):
    with pytest.raises(BadInput, match="none of the 1 expansions is of a judged query"):
        build(tmp_path, collection, [candidate("q9", "x")])


def test_judgments_of_unknown_documents_are_refused(tmp_path, collection):
    with (collection / "qrels" / "train.tsv").open("a") as file:
        file.write("q1\tnowhere\t1\n")
    with pytest.raises(BadInput, match="such as nowhere"):
        build(tmp_path, collection, [candidate("q1", "moon"), candidate("q1", "dough")])
