"""Which exemplars a query may be shown, what makes an answer unusable, and imports."""

import json
from collections import Counter

import msgspec
import pytest

from qe_edge.errors import BadArgument, BadInput, NotFound
from qe_edge.records import Expansion, encode_jsonl, read_jsonl
from qe_edge.retrieval.datasets import load_dataset
from qe_edge.student.prompt import load_teacher_prompt
from qe_edge.train.teach.exemplars import load_exemplars, shortened
from qe_edge.train.teach.importing import ImportConfig, import_expansions
from qe_edge.train.teach.problems import problem_of


@pytest.fixture
def collection(tmp_path):
    """Five training queries; one of them is asked in the test split too, in other words."""
    root = tmp_path / "tiny"
    (root / "qrels").mkdir(parents=True)
    documents = {f"d{i}": f"Passage number {i} about {w}." for i, w in enumerate("abcdef")}
    queries = {
        "q0": "what causes ocean tides",
        "q1": "how does bread rise",
        "q2": "why is the sky blue",
        "q3": "bread baking without yeast",
        "q4": "tides of the ocean",
        "t0": "How does the bread rise?",
    }
    write = lambda rows: "".join(json.dumps(row) + "\n" for row in rows)  # noqa: E731
    (root / "corpus.jsonl").write_text(write({"_id": i, "text": t} for i, t in documents.items()))
    (root / "queries.jsonl").write_text(write({"_id": i, "text": t} for i, t in queries.items()))
    header = "query-id\tcorpus-id\tscore\n"
    train = "".join(f"q{i}\td{i}\t2\n" for i in range(5)) + "q0\td5\t3\nq2\td0\t1\n"
    (root / "qrels" / "train.tsv").write_text(header + train)
    (root / "qrels" / "test.tsv").write_text(header + "t0\td1\t1\n")
    return root


def exemplars(expanded, name="", **settings):
    return load_exemplars(name, expanded, **({"rule": "random", "shots": 2, "seed": 0} | settings))


def test_neither_the_query_itself_nor_a_test_query_is_shown(collection):
    data = load_dataset(f"{collection}@train")
    for rule in ("random", "bm25"):
        chosen = exemplars(data, rule=rule, shots=3)
        for query_id, query in data.queries.items():
            shown = [e.query for e in chosen.of(query_id, query)]
            assert query not in shown
            assert "how does bread rise" not in shown  # as the test query “How does the bread rise?”
    test = load_dataset(f"{collection}@test")
    assert len(exemplars(test, shots=4).of("x", "How does the bread rise?")) == 4
    with pytest.raises(
        BadInput, match="only 4 of 5 exemplars may be shown with the query 'How does the bread rise"
    ):
        exemplars(test, shots=5).of("x", "How does the bread rise?")


def test_an_exemplar_shows_its_best_judged_passage(collection):
    data = load_dataset(f"{collection}@train")
    shown = exemplars(data, shots=3).of("x", "why is the sky blue")
    assert dict(shown)["what causes ocean tides"] == "Passage number 5 about f."


def test_bm25_shows_the_nearest_first_and_random_follows_the_seed(collection):
    data = load_dataset(f"{collection}@train")
    near = exemplars(data, rule="bm25", shots=1)
    assert near.of("x", "what causes ocean tides")[0].query == "tides of the ocean"
    orders = {tuple(exemplars(data, seed=seed, shots=3).of("x", "popcorn")) for seed in range(8)}
    assert len(orders) > 1
    assert exemplars(data, seed=3, shots=3).of("x", "popcorn") == exemplars(data, seed=3, shots=3).of(
        "x", "popcorn"
    )


def test_queries_of_another_data_set_that_are_expanded_are_not_shown(collection, tmp_path):
    from qe_edge.retrieval.datasets import load_queries

    file = tmp_path / "q.jsonl"
    file.write_text('{"_id": "x", "text": "Why is the sky BLUE?"}\n{"_id": "y", "text": "popcorn"}\n')
    shown = exemplars(load_queries(file), f"{collection}@train", shots=3).of("x", "popcorn")
    assert "why is the sky blue" not in [e.query for e in shown]


def test_test_splits_are_refused(collection):
    data = load_dataset(f"{collection}@train")
    with pytest.raises(BadArgument, match="must not come from test queries"):
        exemplars(data, f"{collection}@test")


def test_ir_datasets_ids_must_name_a_training_split_too(collection, monkeypatch):
    from qe_edge.retrieval.datasets import Dataset
    from qe_edge.train.teach import exemplars as module

    real = load_dataset(f"{collection}@train")

    def stand_in(name):
        return Dataset(name, "", real.queries, real.qrels, real.documents)

    monkeypatch.setattr(module, "load_dataset", stand_in)
    for name in ("scifact", "beir/scifact/test", "miracl-zh", "dl19"):
        with pytest.raises(BadArgument, match="must not come from test queries"):
            exemplars(real, name)
    for name in ("beir/scifact/train", "miracl-zh-train", "msmarco-passage/train/judged"):
        expanded = Dataset("other", "", {"x": "popcorn"}, {"x": {}}, real.documents)
        assert exemplars(expanded, name, shots=4).of("x", "popcorn")


def test_a_passage_that_is_relevant_for_the_query_is_not_shown(collection):
    data = load_dataset(f"{collection}@train")
    for query_id, query in data.queries.items():
        passages = {text for doc_id, text in data.documents() if data.qrels[query_id].get(doc_id, 0) > 0}
        assert not passages & {e.passage for e in exemplars(data, shots=2).of(query_id, query)}


def test_the_same_folder_by_another_path_is_the_same_data_set(collection, monkeypatch):
    monkeypatch.chdir(collection.parent)
    data = load_dataset("tiny@train")
    assert len(exemplars(data, f"{collection}@train", shots=3).of("x", "popcorn")) == 3


def test_chinese_queries_get_chinese_exemplars_and_a_chinese_prompt():
    data = load_dataset("demo-zh@train")
    query = next(iter(data.queries.values()))
    shown = exemplars(data).of(next(iter(data.queries)), query)
    _, user = load_teacher_prompt().messages(query, shown)
    assert user.startswith("请用中文")
    assert user.endswith(f"查询：{query}\n段落：")
    assert all(f"查询：{e.query}\n段落：{e.passage}" in user for e in shown)
    english = load_dataset("demo-en@train")
    with pytest.raises(BadInput, match="only 0 of 2"):
        exemplars(english, "demo-zh@train").of("x", "what causes tides")


def test_long_passages_end_with_a_sentence():
    text = "One sentence here. " * 60
    assert shortened(text) == ("One sentence here. " * 31).strip()
    assert shortened("潮汐由月球引起。" * 40) == "潮汐由月球引起。" * 25
    assert shortened("short") == "short"


# Checks


@pytest.mark.parametrize(
    ("query", "text", "finish", "problem"),
    [
        ("what causes tides", "The moon's gravity pulls the sea.", "stop", None),
        ("what causes tides", "The moon's gravity", "length", "cut"),
        ("what causes tides", " \n", "stop", "empty"),
        ("what causes tides", "", "content_filter", "refused"),
        ("what causes tides", "I'm sorry, but I can't help with that.", "stop", "refused"),
        ("what causes tides", "“As an AI language model, I have no opinion.”", "stop", "refused"),
        ("what causes tides", "I cannot answer this.", "length", "refused"),
        ("sorry seems to be the hardest word", "Sorry Seems to Be is a song by Elton John.", "stop", None),
        ("what causes tides", "What causes the tides?", "stop", "copy of the query"),
        ("what causes tides", "潮汐是由月球的引力引起的。", "stop", "wrong language"),
        ("潮汐是怎么形成的", "Tides are caused by the moon.", "stop", "wrong language"),
        ("潮汐是怎么形成的", "潮汐由月球（Moon）的引力引起。", "stop", None),
        ("潮汐是怎么形成的", "抱歉，我无法回答这个问题。", "stop", "refused"),
        ("潮汐是怎么形成的", "作为一个AI助手，我不能", "stop", "refused"),
        ("潮汐是怎么形成的", "潮汐是怎么形成的？", "stop", "copy of the query"),
        ("what causes tides", "<think>\n\n</think>\n\nGravity.", "stop", "think block"),
        ("what causes tides", "so gravity it is.</think>Gravity.", "stop", "think block"),
    ],
)
def test_what_is_wrong_with_an_answer(query, text, finish, problem):
    assert problem_of(query, text, finish) == problem


# Imports


def imported(out):
    return [(row.query_id, row.text, row.problem) for row in read_jsonl(out / "expansions.jsonl", Expansion)]


def test_querygym_files_with_and_without_the_repeated_query(tmp_path):
    data = load_dataset("demo-en@train")
    query = data.queries["q01"]
    file, out = tmp_path / "run.tsv", tmp_path / "out"
    config = ImportConfig(format="querygym", model="gpt", mode="few-shot")
    file.write_text(
        "qid\tpassage\n"
        f'q01\tThe cabin "pressure" falls.\n'
        f"q01\t{' '.join([query] * 5)} The eardrum bulges.\n"
        "q01\tI'm sorry, I can't.\n"
        "elsewhere\tNot judged.\n"
    )
    assert import_expansions(file, config, data, out=out) == {
        "good": 2, "refused": 1, "of other queries, left out": 1,
    }  # fmt: skip
    assert imported(out) == [
        ("q01", 'The cabin "pressure" falls.', None),
        ("q01", "The eardrum bulges.", None),
        ("q01", "", "refused"),
    ]
    assert import_expansions(file, config, data, out=out) == {
        "already there": 3, "of other queries, left out": 1,
    }  # fmt: skip
    file.write_text("q01\n")
    with pytest.raises(BadInput, match=r"run\.tsv:1: expected a query id, a tab and the text"):
        import_expansions(file, config, data, out=out)
    file.write_text("elsewhere\tNot judged.\n")
    with pytest.raises(BadInput, match="holds no expansion of a query of demo-en@train"):
        import_expansions(file, config, data, out=out)
    with pytest.raises(NotFound, match="no such file"):
        import_expansions(tmp_path / "nothing", config, data, out=out)


def test_query2doc_and_own_files(tmp_path):
    data = load_dataset("demo-en@train")
    file, out = tmp_path / "train.jsonl", tmp_path / "out"
    file.write_text('{"query_id": "q01", "query": "x", "pseudo_doc": "The eardrum bulges."}\n')
    config = ImportConfig(format="query2doc", model="davinci", mode="few-shot")
    assert import_expansions(file, config, data, out=out) == {"good": 1}
    row = Expansion("d", "1", "what causes tides", "en", "m", "zero-shot", "Gravity.", finish_reason="length")
    file.write_bytes(encode_jsonl([row]))
    assert import_expansions(file, ImportConfig(), None, out=out) == {"cut": 1}
    assert imported(out) == [("q01", "The eardrum bulges.", None), ("1", "Gravity.", "cut")]
    assert Counter(r.model for r in read_jsonl(out / "expansions.jsonl", Expansion)) == {"davinci": 1, "m": 1}
    # Of a data set that is named, only what belongs to it: neither its ids nor its queries alone do.
    with pytest.raises(BadInput, match="holds no expansion of a query of demo-en@train"):
        import_expansions(file, ImportConfig(), data, out=out)
    ours = msgspec.structs.replace(row, query_id="q01", query=data.queries["q01"])
    file.write_bytes(encode_jsonl([row, ours, msgspec.structs.replace(ours, query="another")]))
    found = import_expansions(file, ImportConfig(), data, out=out)
    assert found == {"cut": 1, "of other queries, left out": 2}
