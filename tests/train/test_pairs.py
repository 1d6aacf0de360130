import json
import os
import random
import subprocess
import sys
from statistics import fmean

import msgspec
import pytest

from qe_edge.errors import BadArgument, BadInput, QeEdgeError
from qe_edge.records import Candidate, Expansion, Pair, encode_jsonl, read_jsonl
from qe_edge.retrieval.bulk import BulkSearch
from qe_edge.retrieval.datasets import load_dataset
from qe_edge.retrieval.index import Index
from qe_edge.retrieval.measures import per_query
from qe_edge.student.join import Join
from qe_edge.text import get_analyzer
from qe_edge.train import scoring
from qe_edge.train.config import PairsConfig
from qe_edge.train.pair_report import describe
from qe_edge.train.pairs import make_pairs, pairs
from qe_edge.train.scoring import Reward
from qe_edge.work.files import read_json
from qe_edge.work.folder import Workdir

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
    # No candidate of q2 beats the plain query.
    assert list(read_jsonl(folder / "best.jsonl", Expansion)) == [candidate("q1", good, "few-shot")]
    report = read_json(folder / "report.json")
    assert report["dropped"] == {
        "seen before": 1,
        "empty": 1,
        "of another query with that id": 1,
        "of queries not judged in this split": 1,
        "of equal reward": 1,
    }
    assert report["candidates"] == 4
    assert report["candidates_better_than_plain"] == 1
    assert report["queries_with_pairs"] == 1
    assert report["plain query"] == {"ndcg@10": 0.5, "best_of": 1}
    assert {name: row["ndcg@10"] for name, row in report["candidates_of_each_query"].items()} == {
        "best": 1.0,
        "worst": 0.5,
    }
    scores = {c.text: (c.ndcg, c.plain_ndcg) for c in read_jsonl(folder / "candidates.jsonl", Candidate)}
    assert len(scores) == 5
    assert scores[good] == (1.0, 0.0)
    assert scores["yeast"] == (1.0, 1.0)
    assert read_json(folder / "run.json")["settings"]["dataset"] == str(collection)


def scored(*values, texts=()):
    rows = [candidate("q1", t) for t in texts or ["moon", "dough", "popcorn", "kettle"][: len(values)]]
    return [
        (row, Candidate("tiny", "q1", "teacher", "zero-shot", value, 0.0, value, row.text))
        for row, value in zip(rows, values, strict=True)
    ]


def paired(candidates, **settings):
    """(chosen, rejected) as places in the list of candidates, and the counts."""
    made, dropped = make_pairs(candidates, PairsConfig(**settings), get_analyzer("english"))
    texts = [row.text for row, _ in candidates]
    return [(texts.index(p.chosen), texts.index(p.rejected)) for p in made], dropped


def test_gap_and_limit_decide_and_the_widest_gaps_stay():
    made, dropped = paired(scored(0.9, 0.5, 0.46, 0.1), min_gap=0.05, max_per_query=2)
    assert made == [(0, 3), (0, 2)]
    assert dropped == {"below --min-gap": 1, "over --max-per-query": 3}


def test_a_gap_of_exactly_the_minimum_counts():
    assert paired(scored(0.5, 0.25), min_gap=0.25)[0] == [(0, 1)]


def test_strategies():
    four = scored(0.5, 0.9, 0.05, 0.3)
    assert paired(four, strategy="all-above-gap", max_per_query=9)[0] == [
        *((1, 2), (1, 3), (0, 2), (1, 0)),
        *((3, 2), (0, 3)),
    ]
    assert paired(four, strategy="best-worst", max_per_query=9)[0] == [(1, 2)]
    drawn = {tuple(paired(four, strategy="best-vs-sampled", max_per_query=2, seed=s)[0]) for s in range(20)}
    assert {pair for pairs in drawn for pair in pairs} == {(1, 0), (1, 2), (1, 3)}
    again = [paired(four, strategy="best-vs-sampled", max_per_query=2, seed=3)[0] for _ in range(2)]
    assert again[0] == again[1]
    for strategy in ("all-above-gap", "best-worst", "best-vs-sampled"):
        assert paired(scored(0.5), strategy=strategy)[0] == []
        assert paired(scored(0.5, 0.5), strategy=strategy) == ([], {"of equal reward": 1})


def test_near_duplicates_make_no_pair():
    words = "moon gravity ocean water level rise fall shore coast"
    made, dropped = paired(scored(0.9, 0.1, texts=[f"{words} day", f"The {words}, a day!"]))
    assert (made, dropped) == ([], {"of nearly the same words": 1})
    assert paired(scored(0.9, 0.1, texts=[words, "dough"]))[0] == [(0, 1)]


def test_of_two_equally_good_candidates_the_shorter_wins(tmp_path, collection):
    long = "the gravity of the moon raises the tides of all oceans every single day"
    rows = [candidate("q1", long), candidate("q1", "gravity raises tides", "few-shot")]
    with pytest.raises(BadInput, match="of equal reward"):
        build(tmp_path, collection, rows)
    folder = build(tmp_path, collection, rows, length_penalty=1.0)
    told = describe(read_json(folder / "report.json")).splitlines()
    assert told[:2] == [
        "nDCG@10 of 1 query; gain over plain [95 %]; best, or as good, for how many by",
        "  nDCG@10 less 1 per hundred words",
    ]
    (pair,) = read_jsonl(folder / "pairs.jsonl", Pair)
    assert pair.chosen == "gravity raises tides"
    assert (pair.chosen_ndcg, pair.rejected_ndcg) == (1.0, 1.0)
    assert (pair.chosen_reward, pair.rejected_reward) == pytest.approx((1 - 0.03, 1 - 0.14))


def test_queries_that_leave_nothing_to_win_are_told(tmp_path, collection):
    texts = [candidate("q2", "yeast"), candidate("q2", "dough in the oven")]
    with pytest.raises(BadInput, match="Ask for more of each query"):  # q1 may have something to win
        build(tmp_path, collection, texts)
    (collection / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq2\tbread\t3\n")
    with pytest.raises(BadInput, match=r"BM25 alone reaches 1\.000 for each of these queries: take harder"):
        build(tmp_path, collection, texts)


def test_any_measure_or_a_mix_is_the_reward(tmp_path, collection):
    values = {"nDCG@10": 0.5, "R@100": 1.0, "AP": 0.25}
    assert Reward.parse("AP").of(values, 0) == 0.25
    assert Reward.parse("0.7*nDCG@10 + 0.3*R@100").of(values, 0) == pytest.approx(0.65)
    assert Reward.parse("0.5 * AP+R@100", 0.1).of(values, 50) == pytest.approx(1.125 - 0.05)
    assert Reward.parse("0.7*nDCG@10 + 0.3*R@100").measures == ["nDCG@10", "R@100"]
    assert Reward.parse("NDCG@10") == Reward()  # one measure under two names would be measured as one
    assert Reward.parse("Recall@100+R@100").of({"nDCG@10": 0.0, "R@100": 0.25}, 0) == 0.5
    for wrong, message in (
        ("nDCQ@10", "no measure"),
        ("", "can't read"),
        ("1.2.3*AP", "not a number"),
        ("alpha_nDCG@10", "can't be computed here"),
    ):
        with pytest.raises(BadArgument, match=message):
            Reward.parse(wrong)
    rows = [candidate("q1", "gravity raises tides"), candidate("q1", "dough")]
    folder = build(tmp_path, collection, rows, reward="0.5*AP+0.5*RR")
    (pair,) = read_jsonl(folder / "pairs.jsonl", Pair)
    assert (pair.chosen_reward, pair.rejected_reward) == (1.0, 0.0)


def test_marked_rows_are_left_out_unless_asked_for(tmp_path, collection):
    cut = msgspec.structs.replace(candidate("q1", "gravity raises tides"), problem="cut")
    rows = [cut, candidate("q1", "dough"), candidate("q2", "yeast")]
    with pytest.raises(BadInput, match="1 marked as cut") as error:
        build(tmp_path, collection, rows)
    assert "Take what was cut (--accept cut), or ask for more" in str(error.value)
    with pytest.raises(BadInput, match="1 marked as cut") as error:  # no query would have two
        build(tmp_path, collection, [cut, candidate("q2", "yeast")])
    assert "Take what was cut" not in str(error.value)
    copied = msgspec.structs.replace(cut, problem="copy of the query")
    with pytest.raises(BadInput, match="1 marked as copy of the query") as error:
        build(tmp_path, collection, [copied, *rows[1:]], accept=("cut",))
    assert "--accept cut" not in str(error.value) and "--min-gap" not in str(error.value)
    assert str(error.value).endswith("`qe-edge teach --n 4`); `train sft` needs no pairs")
    assert (
        len(list(read_jsonl(build(tmp_path, collection, rows, accept=("cut",)) / "pairs.jsonl", Pair))) == 1
    )


def test_the_report_says_who_wins_and_where_expansion_hurts(tmp_path, collection):
    rows = [
        candidate("q1", "gravity raises tides", model="good"),
        candidate("q1", "the moon has craters", model="bad"),
        candidate("q2", "moon craters moon craters moon craters moon craters", model="bad"),
        candidate("q2", "craters and air on the moon", "few-shot", "bad"),
    ]
    report = read_json(build(tmp_path, collection, rows, join="mass:3") / "report.json")
    best_of = {origin: row["best_of"] for origin, row in report["origins"].items()}
    assert best_of == {"bad few-shot": 0, "bad zero-shot": 0, "good zero-shot": 1}
    assert report["plain query"]["best_of"] == 1
    assert report["queries_where_every_candidate_hurts"] == 1
    assert report["queries_without_usable_pair"] == 1
    # Paired: over the one query that it wrote for, whose plain query finds nothing.
    good = report["origins"]["good zero-shot"]
    assert (good["queries"], good["ndcg@10"], good["vs_plain"]["mean"]) == (1, 1.0, 1.0)
    told = describe(report)
    assert "  1.000  +1.000 [+1.000, +1.000]  good zero-shot, best for 1\n" in told
    assert "         (of the 1 with a text that can be used; plain has 0.000 there)\n" in told
    assert (
        "gaps between best and worst reward, of queries with several candidates:\n  0 to 0.05: 1 query\n"
        in told
    )
    assert "queries without a pair: 1" in told and "without a candidate" not in told
    told = describe(report | {"reward": "AP"})
    assert told.startswith(
        "nDCG@10 of 2 queries; gain over plain [95 %]; best, or as good, for how many by\n  AP\n"
        "(a model's several texts of one mode are averaged for each query first)\n"
    )
    assert (
        " worse by nDCG@10\n" in told
        and "gaps between best and worst reward by AP, of queries with several candidates:\n" in told
    )
    single = read_json(build(tmp_path, collection, rows[:3]) / "report.json")
    assert describe(single).endswith("queries without a pair: 1, 1 of them with a single candidate")
    told = describe(report | {"queries": 5, "dropped": {"of equal reward": 1, "marked as cut": 2}})
    assert "queries without a candidate that can be used: 3\n" in told
    assert told.endswith(
        "texts left out: 2 marked as cut (--accept cut takes it)\npairs not made: 1 of equal reward"
    )
    assert report["gaps"] == {
        "0 to 0.05": 1,
        "0.05 to 0.1": 0,
        "0.1 to 0.2": 0,
        "0.2 to 0.3": 0,
        "0.3 to 0.5": 1,
        "0.5 and more": 0,
    }


def test_several_candidates_of_one_origin_count_as_one(tmp_path, collection):
    """A query with many candidates weighs as much as one with a single candidate."""
    rows = [
        candidate("q1", "gravity raises tides"),
        candidate("q1", "tides and the moon's gravity"),
        candidate("q1", "popcorn"),
        candidate("q2", "craters"),
    ]
    folder = build(tmp_path, collection, rows, join="mass:3")
    report = read_json(folder / "report.json")
    scores = {c.text: c.ndcg for c in read_jsonl(folder / "candidates.jsonl", Candidate)}
    first = fmean(scores[row.text] for row in rows[:3])
    assert report["origins"]["teacher zero-shot"]["ndcg@10"] == pytest.approx((first + scores["craters"]) / 2)


# Scoring at scale


@pytest.fixture
def many():
    """Distinct expansions of demo-en's queries, more than one process takes."""
    data = load_dataset("demo-en@train")
    words = " ".join(text for _, text in data.documents()).split()
    draw = random.Random(0)
    items = [(q, " ".join(draw.choices(words, k=20))) for q in data.queries for _ in range(50)]
    return data, [*((q, "") for q in data.queries), *items]


def test_all_cores_score_as_one_search_after_the_other(tmp_path, many):
    data, items = many
    assert len(items) > scoring.SERIAL
    index = Index.for_dataset(data, tmp_path / "index")
    join = Join.parse("repeat:5")
    found = scoring.score(
        items, data, index, join, ["nDCG@10", "R@100"], cache=tmp_path / "scores", workers=2
    )
    run = {}
    for (query_id, text), values in zip(items[::100], found[::100], strict=True):
        run[query_id] = index.search_text(data.queries[query_id], text, join=join, k=100)
        assert values["nDCG@10"] == pytest.approx(per_query(data.qrels, run)[query_id])
        assert values["R@100"] == pytest.approx(per_query(data.qrels, run, "R@100")[query_id])


def test_a_rerun_scores_only_what_is_new(tmp_path, many, monkeypatch):
    data, items = many
    index = Index.for_dataset(data, tmp_path / "index")
    searched = []
    real = scoring._score_chunk
    monkeypatch.setattr(scoring, "_score_chunk", lambda chunk: searched.extend(chunk) or real(chunk))

    def scores(items, join="mass:1", data=data):
        searched.clear()
        cache = tmp_path / "scores"
        return scoring.score(items, data, index, Join.parse(join), ["nDCG@10"], cache=cache, workers=1)

    first = scores(items[:300])
    assert len(searched) == 300
    assert scores(items[:310])[:300] == first
    assert searched == items[300:310]
    scores(items[:10], join="mass:2")
    assert searched == items[:10]
    judged = load_dataset("demo-en@train")
    query_id = items[3][0]
    judged.qrels[query_id] = dict(list(judged.qrels[query_id].items())[:1])
    scores(items[:10], data=judged)
    assert searched == [items[3]]


def test_scoring_that_is_interrupted_keeps_what_it_has(tmp_path, many, monkeypatch):
    data, items = many
    index = Index.for_dataset(data, tmp_path / "index")
    real, done = scoring._score_chunk, []

    def interrupted(chunk):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(chunk)
        return real(chunk)

    monkeypatch.setattr(scoring, "_score_chunk", interrupted)
    setting = {"cache": tmp_path / "scores", "workers": 1}
    with pytest.raises(KeyboardInterrupt):
        scoring.score(items, data, index, Join(), ["nDCG@10"], **setting)
    monkeypatch.setattr(scoring, "_score_chunk", lambda chunk: done.append(chunk) or real(chunk))
    scoring.score(items, data, index, Join(), ["nDCG@10"], **setting)
    assert sum(map(len, done)) == len(items)


def killed(chunk):
    os._exit(9)  # as a process ends that the system kills for its memory


def test_a_worker_that_dies_is_an_error_not_a_hang(tmp_path, many, monkeypatch):
    data, items = many
    index = Index.for_dataset(data, tmp_path / "index")
    monkeypatch.setattr(scoring, "_score_chunk", killed)
    with pytest.raises(QeEdgeError, match="a worker process died; what was scored is kept"):
        scoring.score(items, data, index, Join(), ["nDCG@10"], cache=tmp_path / "scores", workers=2)


def test_a_script_without_a_main_guard_is_told(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path\n"
        "from qe_edge.retrieval.datasets import load_dataset\n"
        "from qe_edge.retrieval.index import Index\n"
        "from qe_edge.student.join import Join\n"
        "from qe_edge.train.scoring import score\n"
        "data = load_dataset('demo-en@train')\n"
        "index = Index.for_dataset(data, Path('index'))\n"
        "items = [(q, f'{q} moon {i}') for q in data.queries for i in range(50)]\n"
        "score(items, data, index, Join(), ['nDCG@10'], cache=Path('scores'), workers=2)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert "outside of `if __name__" in done.stderr


@pytest.mark.slow
def test_a_ray_cluster_scores_the_same(tmp_path, many):
    pytest.importorskip("ray", reason="needs qe-edge[ray]")
    data, items = many
    index = Index.for_dataset(data, tmp_path / "index")
    found = [
        scoring.score(
            items, data, index, Join(), ["nDCG@10"], cache=tmp_path / name, executor=name, workers=2
        )
        for name in ("local", "ray")
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize("k", [1, 10, 1000])
def test_bulk_search_ranks_as_the_index_does(k):
    data = load_dataset("demo-en@train")
    index = Index.build(data.documents(), analyzer="english")
    bulk = BulkSearch(index)
    texts = [text for _, text in data.documents()]
    draw = random.Random(1)
    terms = [
        (index.analyze(query), index.analyze(draw.choice([*texts, ""])))
        for query in [*data.queries.values(), "", "nowhere", "the"]
    ]
    for join in map(Join.parse, ("repeat:5", "mass:0.3", "mass:5", "adaptive:3")):
        for (query, expansion), found in zip(terms, bulk.search(terms, join, k=k), strict=True):
            expected = index.search(join(query, expansion), k=k)
            assert [score for _, score in found] == pytest.approx([score for _, score in expected])
            assert [doc_id for doc_id, _ in found] == [doc_id for doc_id, _ in expected]
    assert bulk.search([], Join()) == []


def test_bulk_search_over_many_blocks(monkeypatch):
    """A collection larger than a block of documents, with equal scores on both sides of its end."""
    from qe_edge.retrieval.kernel import BLOCK

    words = ("moon", "tides", "bread", "sky", "sky tides moon")
    documents = [(f"d{i}", words[i * 7 % len(words)]) for i in range(2 * BLOCK + 100)]
    index = Index.build(documents, analyzer="english")
    terms = [(["moon"], ["tide", "sky"]), (["sky"], []), (["bread", "bread"], ["bread"])]
    for (query, expansion), found in zip(terms, BulkSearch(index).search(terms, Join(), k=50), strict=True):
        assert found == index.search(Join()(query, expansion), k=50)
