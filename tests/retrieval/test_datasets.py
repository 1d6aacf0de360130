import json
from types import SimpleNamespace

import pytest

from qe_edge.errors import BadInput, NotFound
from qe_edge.records import Expansion, read_jsonl
from qe_edge.retrieval.datasets import (
    BUILTIN,
    builtin_folder,
    describe,
    load_collection,
    load_dataset,
    load_queries,
    split_name,
    splits,
)
from qe_edge.retrieval.official import import_dataset


@pytest.fixture
def folder(tmp_path):
    """A BEIR folder of two documents and two queries."""
    root = tmp_path / "tiny"
    (root / "qrels").mkdir(parents=True)
    documents = [
        {"_id": "d1", "title": "Tides", "text": "The moon.", "metadata": {}},
        {"_id": "d2", "text": "Bread."},
    ]
    queries = [{"_id": "q1", "text": "what causes tides"}, {"_id": "q2", "text": "unjudged"}]
    (root / "corpus.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
    (root / "queries.jsonl").write_text("".join(json.dumps(q) + "\n" for q in queries))
    (root / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td2\t0\n")
    return root


def test_a_beir_folder(folder):
    data = load_dataset(str(folder))
    assert list(data.documents()) == [("d1", "Tides The moon."), ("d2", "Bread.")]
    assert data.queries == {"q1": "what causes tides"}  # judged queries only
    assert data.qrels == {"q1": {"d1": 2, "d2": 0}}
    info = describe(data)
    assert (info.name, info.lang, info.documents, info.queries, info.judgments) == (
        "tiny@test",
        "en",
        2,
        1,
        2,
    )


def test_the_fingerprint_follows_the_content(folder):
    before = load_dataset(str(folder)).fingerprint()
    assert load_dataset(str(folder)).fingerprint() == before
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\n")
    assert load_dataset(str(folder)).fingerprint() != before


def test_queries_are_drawn_from_a_data_set():
    whole = load_dataset("demo-zh")
    drawn = whole.draw(5)
    assert len(drawn.queries) == 5 and list(drawn.queries) == [q for q in whole.queries if q in drawn.queries]
    assert drawn.qrels == {query_id: whole.qrels[query_id] for query_id in drawn.queries}
    assert (str(drawn), drawn.lang, drawn.queries) == (str(whole), "zh", whole.draw(5).queries)
    assert drawn.queries != whole.draw(5, seed=1).queries
    assert whole.draw(1000).fingerprint() == whole.fingerprint() != drawn.fingerprint()


def test_a_folder_without_queries_is_a_collection_to_search(folder):
    judged = load_collection(str(folder))
    assert (str(judged), judged.queries) == ("tiny@test", {"q1": "what causes tides"})
    (folder / "queries.jsonl").unlink()
    found = load_collection(str(folder))
    assert (str(found), found.queries, found.lang) == ("tiny", {}, "en")
    assert list(found.documents()) == list(judged.documents())
    assert found.collection_hash() == judged.collection_hash()  # and so one index
    (folder / "corpus.jsonl").write_text('{"_id": "d1", "text": "潮汐是由月球引力引起的"}\n')
    assert load_collection(str(folder)).lang == "zh"
    (folder / "corpus.jsonl").unlink()
    with pytest.raises(NotFound, match=r"has no corpus\.jsonl"):
        load_collection(str(folder))


@pytest.mark.parametrize("missing", ["corpus.jsonl", "queries.jsonl", "qrels"])
def test_a_missing_part_is_named(folder, missing):
    (folder / missing).rename(folder / "away")
    with pytest.raises(NotFound, match=f"has no {missing}"):
        load_dataset(str(folder))


def test_an_unknown_split_lists_the_known_ones(folder):
    with pytest.raises(NotFound, match="no split 'dev'; there are: test"):
        load_dataset(f"{folder}@dev")


@pytest.mark.parametrize(
    ("qrels", "line", "message"),
    [
        ("q1\td1\t1\n", 1, "the first line must be query-id"),
        ("query-id\tcorpus-id\tscore\nq1\td1\n", 2, "expected query-id, corpus-id and a whole-number score"),
        ("query-id\tcorpus-id\tscore\nq1\td1\thigh\n", 2, "whole-number score"),
        ("query-id\tcorpus-id\tscore\nq1\td1\t1\nq9\td1\t1\n", 3, "query 'q9' is not in queries.jsonl"),
    ],
)
def test_a_bad_judgment_is_named_with_its_line(folder, qrels, line, message):
    path = folder / "qrels" / "test.tsv"
    path.write_text(qrels)
    with pytest.raises(BadInput, match=message) as error:
        load_dataset(str(folder))
    assert str(error.value).startswith(f"{path}:{line}: ")


def test_judgments_of_unknown_documents_are_refused(folder):
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\tdX\t1\n")
    with pytest.raises(BadInput, match=r"the collection lacks \(1 in all\), such as dX"):
        describe(load_dataset(str(folder)))


def test_a_malformed_document_is_named_with_its_line(folder):
    with (folder / "corpus.jsonl").open("a") as file:
        file.write('{"_id": 3}\n')
    with pytest.raises(BadInput, match=r"corpus\.jsonl:3: not a valid document"):
        describe(load_dataset(str(folder)))


def test_ids_must_be_unique_and_without_blanks(folder):
    corpus = (folder / "corpus.jsonl").read_text()
    (folder / "corpus.jsonl").write_text(corpus + '{"_id": "d1", "text": "again"}\n')
    with pytest.raises(BadInput, match="document 'd1' is there twice, as number 1 and as number 3"):
        describe(load_dataset(str(folder)))
    (folder / "corpus.jsonl").write_text(corpus + '{"_id": "d 3", "text": "x"}\n')
    with pytest.raises(BadInput, match="'d 3' is empty or holds blanks"):
        describe(load_dataset(str(folder)))
    with (folder / "queries.jsonl").open("a") as file:
        file.write('{"_id": "q1", "text": "again"}\n')
    with pytest.raises(BadInput, match=r"jsonl:3: query 'q1' is 'again' here and 'what .* in line 1"):
        load_dataset(str(folder))


def test_windows_line_ends_and_a_byte_order_mark_are_read(folder):
    for path in (folder / "corpus.jsonl", folder / "queries.jsonl", folder / "qrels" / "test.tsv"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert describe(load_dataset(str(folder))).judgments == 2


def test_other_encodings_are_named(folder):
    (folder / "qrels" / "test.tsv").write_bytes(
        "query-id\tcorpus-id\tscore\nq1\td\xe9\t1\n".encode("latin-1")
    )
    with pytest.raises(BadInput, match="not UTF-8 text"):
        load_dataset(str(folder))


def test_an_unknown_name_says_what_there_is():
    with pytest.raises(NotFound, match="demo-en, demo-zh, dl19"):
        load_dataset("demo-fr")


def test_ir_datasets_ids_are_read_through_it(monkeypatch):
    ir_datasets = pytest.importorskip("ir_datasets")
    from types import SimpleNamespace as Row

    class Source:
        def queries_iter(self):
            return iter([Row(query_id="1", default_text=lambda: "tides")])

        def qrels_iter(self):
            return iter([Row(query_id="1", doc_id="a", relevance=2)])

        def docs_iter(self):
            return iter([Row(doc_id="a", default_text=lambda: "The moon.")])

    asked = []
    monkeypatch.setattr(ir_datasets, "load", lambda name: asked.append(name) or Source())
    data = load_dataset("miracl-zh")
    assert asked == ["miracl/zh/dev"]
    assert (data.queries, data.qrels, list(data.documents())) == (
        {"1": "tides"},
        {"1": {"a": 2}},
        [("a", "The moon.")],
    )


def test_a_download_that_fails_says_what_to_do(monkeypatch):
    ir_datasets = pytest.importorskip("ir_datasets")

    class Source:
        def queries_iter(self):
            raise OSError("no route to host")

    monkeypatch.setattr(ir_datasets, "load", lambda name: Source())
    with pytest.raises(NotFound, match=r"no route to host.*BEIR layout"):
        load_dataset("dl19")


def test_short_names_exist_in_ir_datasets():
    ir_datasets = pytest.importorskip("ir_datasets")
    from qe_edge.retrieval.datasets import SHORT_NAMES

    for target in SHORT_NAMES.values():
        assert ir_datasets.load(target).has_qrels()


@pytest.mark.parametrize("name", BUILTIN)
def test_built_in_collections(name):
    train, test = load_dataset(f"{name}@train"), load_dataset(name)
    assert test.split == "test"
    assert train.lang == name[-2:]
    assert describe(train).documents >= 150
    assert len(train.queries) + len(test.queries) >= 60
    assert not train.queries.keys() & test.queries.keys()
    for data in (train, test):
        grades = {grade for judged in data.qrels.values() for grade in judged.values()}
        assert grades == {0, 1, 2, 3}
        assert all(max(judged.values()) >= 2 for judged in data.qrels.values())
        expansions = list(read_jsonl(builtin_folder(name) / "expansions" / f"{data.split}.jsonl", Expansion))
        assert {e.query_id: e.query for e in expansions} == data.queries
        assert {e.mode for e in expansions} == {"zero-shot", "few-shot"}


def test_the_hash_of_a_large_collection_is_kept_until_it_changes(tmp_path, monkeypatch):
    monkeypatch.setattr("qe_edge.retrieval.datasets._LARGE", 10)
    folder = tmp_path / "mine"
    (folder / "qrels").mkdir(parents=True)
    corpus = folder / "corpus.jsonl"
    corpus.write_text('{"_id": "d1", "text": "The moon."}\n')
    (folder / "queries.jsonl").write_text('{"_id": "q1", "text": "tides"}\n')
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\n")
    first = load_dataset(str(folder)).collection_hash()
    again = load_dataset(str(folder))
    monkeypatch.setattr(again, "documents", lambda: pytest.fail("read again"))
    assert again.collection_hash() == first
    corpus.write_text('{"_id": "d1", "text": "The sun itself."}\n')
    assert load_dataset(str(folder)).collection_hash() != first


BLANK_IDS = ["", "q 1", "q1 ", "\u00a0q1", "q\u30001", "q\x851", "q\t1"]


@pytest.mark.parametrize("query_id", BLANK_IDS)
def test_a_query_id_with_blanks_is_refused_in_every_way_in(folder, tmp_path, monkeypatch, query_id):
    """It would give TREC runs of seven columns."""
    message = "id .* is empty or holds blanks"
    file = tmp_path / "queries.jsonl"
    file.write_text(json.dumps({"_id": query_id, "text": "tides"}) + "\n")
    with pytest.raises(BadInput, match=rf"queries\.jsonl:1: query {message}"):
        load_queries(file)
    file.replace(folder / "queries.jsonl")
    with pytest.raises(BadInput, match=rf"queries\.jsonl:1: query {message}"):
        load_dataset(str(folder))
    if "\t" not in query_id:
        topics = tmp_path / "topics.tsv"
        topics.write_text(f"{query_id}\ttides\n")
        with pytest.raises(BadInput, match=rf"topics\.tsv:1: topic {message}"):
            import_dataset("x", topics=topics, qrels=topics, passages=topics, out=tmp_path / "out")
    ir_datasets = pytest.importorskip("ir_datasets")
    source = SimpleNamespace(
        queries_iter=lambda: iter([SimpleNamespace(query_id=query_id, default_text=lambda: "tides")]),
        qrels_iter=lambda: iter([SimpleNamespace(query_id=query_id, doc_id="d", relevance=1)]),
    )
    monkeypatch.setattr(ir_datasets, "load", lambda name: source)
    with pytest.raises(BadInput, match=message):
        load_dataset("beir/scifact/test")


@pytest.mark.parametrize("doc_id", BLANK_IDS)
def test_a_document_id_with_blanks_is_refused_too(folder, doc_id):
    with (folder / "corpus.jsonl").open("a") as file:
        file.write(json.dumps({"_id": doc_id, "text": "x"}) + "\n")
    with pytest.raises(BadInput, match="is empty or holds blanks"):
        describe(load_dataset(str(folder)))


def test_two_different_judgments_are_named_with_both_lines(folder, tmp_path):
    path = folder / "qrels" / "test.tsv"
    header = "query-id\tcorpus-id\tscore\n"
    path.write_text(f"{header}q1\td1\t2\nq1\td2\t0\nq1\td1\t2\n")
    assert load_dataset(str(folder)).qrels == {"q1": {"d1": 2, "d2": 0}}  # said twice, but the same
    path.write_text(f"{header}q1\td1\t2\nq1\td2\t0\nq1\td1\t1\n")
    with pytest.raises(BadInput, match=r"test\.tsv:4: the judgment of .* is 1 here and 2 in line 2"):
        load_dataset(str(folder))
    topics, qrels = tmp_path / "topics.tsv", tmp_path / "qrels.txt"
    files = {"topics": topics, "qrels": qrels, "passages": topics}
    topics.write_text("q1\ttides\nq2\tbread\nq1\tmoon\n")
    qrels.write_text("q1 0 d1 3\nq1 0 d1 2\n")
    with pytest.raises(BadInput, match=r"topics\.tsv:3: topic 'q1' is 'moon' here and 'tides' in line 1"):
        import_dataset("x", **files, out=tmp_path / "out")
    topics.write_text("q1\ttides\n")
    with pytest.raises(BadInput, match=r"qrels\.txt:2: the judgment of .* is 2 here and 3 in line 1"):
        import_dataset("x", **files, out=tmp_path / "out")


def test_a_title_of_null_is_an_empty_one(folder, tmp_path):
    row = '{"_id": "d3", "title": null, "text": "Iron."}\n'
    with (folder / "corpus.jsonl").open("a") as file:
        file.write(row)
    assert dict(load_dataset(str(folder)).documents())["d3"] == "Iron."
    topics, qrels, passages = (tmp_path / name for name in ("topics.tsv", "qrels.txt", "passages.jsonl"))
    topics.write_text("q1\tiron\n")
    qrels.write_text("q1 0 d3 3\n")
    passages.write_text(row)
    files = {"topics": topics, "qrels": qrels, "passages": passages}
    import_dataset("x", **files, out=tmp_path / "out")
    assert dict(load_dataset(str(tmp_path / "out")).documents()) == {"d3": "Iron."}
    passages.write_text(row.replace("null", "[1]"))
    with pytest.raises(BadInput, match=r"passages\.jsonl:1: its title is \[1\], not a text"):
        import_dataset("x", **files, out=tmp_path / "out")


def test_hidden_files_are_no_data(folder, tmp_path):
    (folder / "qrels" / "._test.tsv").write_bytes(b"\0\5\x16\7")
    (folder / "qrels" / ".test.tsv.swp.tsv").write_bytes(b"")
    assert splits(folder) == ["test"]
    passages = tmp_path / "passages"
    passages.mkdir()
    (passages / "collection.tsv").write_text("d1\tThe moon.\n")
    (passages / "._collection.tsv").write_bytes(b"\0\5\x16\7")
    topics, qrels = tmp_path / "topics.tsv", tmp_path / "qrels.txt"
    topics.write_text("q1\ttides\n")
    qrels.write_text("q1 0 d1 3\n")
    assert (
        import_dataset("x", topics=topics, qrels=qrels, passages=passages, out=tmp_path / "o").passages == 1
    )


def test_what_exists_as_typed_wins_over_a_split(folder, tmp_path):
    graded = "qe-edge-work/judged/demo-en@test/test-synthetic.tsv"  # as `data judge` names it
    assert split_name(f"demo-en@{graded}") == ("demo-en", graded)
    drive = tmp_path / "GoogleDrive-me@example.org"
    drive.mkdir()
    moved = folder.rename(drive / "tiny")
    assert str(load_dataset(str(moved))) == "tiny@test"
    assert str(load_dataset(f"{moved}@test")) == "tiny@test"
    with_at = moved.rename(drive / "tiny@dev")
    assert str(load_dataset(str(with_at))) == "tiny@dev@test"
    assert load_dataset(f"{with_at}@test").split == "test"
    with pytest.raises(NotFound, match="has no split 'x'"):
        load_dataset(f"{with_at}@x")


def test_judgments_may_lie_elsewhere(folder, tmp_path):
    elsewhere = tmp_path / "others.tsv"
    query_id, document = next(
        (q, next(iter(grades))) for q, grades in load_dataset(str(folder)).qrels.items()
    )
    elsewhere.write_text(f"query-id\tcorpus-id\tscore\n{query_id}\t{document}\t3\n")
    data = load_dataset(f"{folder}@{elsewhere}")
    assert (str(data), data.qrels) == (f"{folder.name}@others", {query_id: {document: 3}})
    assert data.fingerprint() != load_dataset(str(folder)).fingerprint()
    elsewhere.write_text("query-id\tcorpus-id\tscore\nnobody\td\t3\n")
    with pytest.raises(BadInput, match=r"others\.tsv:2: query 'nobody' is not in queries\.jsonl"):
        load_dataset(f"{folder}@{elsewhere}")


def test_synthetic_judgments_say_so_in_every_name(folder):
    (folder / "synthetic.json").write_text("{}")
    assert str(load_dataset(str(folder))).startswith(f"{folder.name}-synthetic@")
