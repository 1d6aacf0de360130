"""Official files, in each publisher's format, become a data set that can be searched and measured."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from qe_edge.errors import BadArgument, BadInput, NotFound
from qe_edge.retrieval import official
from qe_edge.retrieval.datasets import describe, load_dataset
from qe_edge.retrieval.official import Official, import_dataset

PASSAGES = {"d1": "The moon's gravity pulls the sea.", "d2": "Yeast makes gas in dough.", "d3": "Iron rusts."}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Topics and judgments in TREC's form; one topic isn't judged, as in DL20."""
    monkeypatch.setenv("QE_EDGE_DATA", str(tmp_path / "home"))
    topics, qrels = tmp_path / "topics.txt", tmp_path / "qrels.txt"
    topics.write_text("q1\twhat causes tides\nq2\thow does bread rise\nq3\tnobody judged this\n")
    qrels.write_text("q1 0 d1 3\nq1 Q0 d2 0\nq2 0 d2 2\n")
    return {"topics": topics, "qrels": qrels}


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def ms_marco(folder: Path) -> Path:
    file = folder / "collection.tsv"
    file.write_text("".join(f"{i}\t{text}\n" for i, text in PASSAGES.items()))
    return file


def ms_marco_v2(folder: Path) -> Path:
    parts = folder / "msmarco_v2_passage"
    parts.mkdir()
    for number, (i, text) in enumerate(PASSAGES.items()):
        with gzip.open(parts / f"msmarco_passage_{number:02d}.gz", "wt") as file:
            file.write(lines([{"pid": i, "passage": text, "spans": "(0,3)", "docid": "D1"}]))
    return parts


def miracl(folder: Path) -> Path:
    parts = folder / "miracl-corpus-v1.0-zh"
    parts.mkdir()
    with gzip.open(parts / "docs-0.jsonl.gz", "wt") as file:
        file.write(lines([{"docid": i, "title": "", "text": text} for i, text in PASSAGES.items()]))
    return parts


def beir(folder: Path) -> Path:
    (folder / "beir").mkdir()
    (folder / "beir" / "corpus.jsonl").write_text(lines([{"_id": i, "text": t} for i, t in PASSAGES.items()]))
    (folder / "beir" / "queries.jsonl").write_text(lines([{"_id": "x", "text": "not a passage"}]))
    return folder / "beir"


@pytest.mark.parametrize("form", [ms_marco, ms_marco_v2, miracl, beir])
def test_each_publishers_format_becomes_a_data_set(files: dict[str, Path], tmp_path: Path, form: Any) -> None:
    origin = import_dataset("mine", **files, passages=form(tmp_path), out=tmp_path / "home" / "mine")
    assert (origin.pool, origin.passages, origin.missing_judged) == (False, 3, 0)
    data = load_dataset("mine")
    assert str(data) == "mine@test"
    assert dict(data.documents()) == PASSAGES
    assert data.qrels == {"q1": {"d1": 3, "d2": 0}, "q2": {"d2": 2}}
    assert data.queries == {"q1": "what causes tides", "q2": "how does bread rise"}
    assert describe(data).documents == 3


def test_what_stands_in_for_a_collection_is_called_a_pool(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = hashlib.sha256(files["qrels"].read_bytes()).hexdigest()
    monkeypatch.setitem(official.OFFICIAL, "dl19", Official(digest, 1000))
    passages, out = ms_marco(tmp_path), tmp_path / "home" / "dl19"
    with pytest.raises(BadArgument, match=r"3 passages of 1,000, and lacks 0 of the 2 .*; with --pool"):
        import_dataset("dl19", **files, passages=passages, out=out)
    assert not out.exists()
    import_dataset("dl19", **files, passages=passages, out=out, pool=True)
    assert str(load_dataset("dl19")) == "dl19 pool@test"

    passages.write_text("d1\tThe moon.\n")
    origin = import_dataset("dl19", **files, passages=passages, out=out, pool=True)
    assert (origin.pool, origin.missing_judged, origin.lost_queries) == (True, 1, 1)
    assert str(load_dataset(str(out))) == "dl19 pool@test"  # by its path too
    assert load_dataset("dl19").qrels == {"q1": {"d1": 3}}
    with pytest.raises(BadArgument, match="lacks 1 of the 2 judged ones"):
        import_dataset("mine", **files, passages=passages, out=tmp_path / "mine")
    # Of a collection whose size nobody knows, the user's word is taken.
    passages.write_text("d1\tThe moon.\nd2\tYeast.\n")
    assert import_dataset("mine", **files, passages=passages, out=tmp_path / "mine", pool=True).pool
    passages.write_text("d9\tNobody judged this.\n")
    with pytest.raises(BadInput, match="none of its passages is judged"):
        import_dataset("dl19", **files, passages=passages, out=out, pool=True)
    assert load_dataset("dl19").qrels == {"q1": {"d1": 3}}  # the good import stays


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/abs", "a@b", ".hidden"])
def test_a_name_that_could_not_be_loaded_is_refused(
    files: dict[str, Path], tmp_path: Path, name: str
) -> None:
    with pytest.raises(BadArgument, match="can't be a data set's name"):
        import_dataset(name, **files, passages=ms_marco(tmp_path), out=tmp_path / "home" / "x")


def test_only_an_earlier_import_is_replaced(files: dict[str, Path], tmp_path: Path) -> None:
    passages, out = ms_marco(tmp_path), tmp_path / "precious"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(BadArgument, match="holds something other than"):
        import_dataset("mine", **files, passages=passages, out=out)
    assert (out / "thesis.txt").exists()
    (out / "origin.json").write_text('{"camera": "x"}')  # a name that others use, too
    with pytest.raises(BadArgument, match="holds something other than"):
        import_dataset("mine", **files, passages=passages, out=out)
    assert (out / "thesis.txt").exists()
    for _ in range(2):
        import_dataset("mine", **files, passages=passages, out=tmp_path / "new")
    with pytest.raises(BadArgument, match=r"holds something other than `qe-edge data import other` made;"):
        import_dataset("other", **files, passages=passages, out=tmp_path / "new")
    (tmp_path / "new" / "qrels" / "mine.tsv").touch()
    with pytest.raises(BadArgument, match=r"made, such as qrels/mine\.tsv; choose a new folder"):
        import_dataset("mine", **files, passages=passages, out=tmp_path / "new")


def test_other_judgments_than_the_official_ones_are_refused(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="isn't the official file of dl19"):
        import_dataset("dl19", **files, passages=ms_marco(tmp_path), out=tmp_path / "out", pool=True)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("topics.txt", "q1 no tab\n", r"topics.txt:1: expected a topic's id, a tab"),
        ("qrels.txt", "q1 0 d1 3\nq1 0 d1\n", r"qrels.txt:2: expected query id"),
        ("qrels.txt", "q9 0 d1 3\n", r"qrels.txt:1: query 'q9' is not among the topics"),
        ("collection.tsv", "d1\tThe moon.\nd2 no tab\n", r"collection.tsv:2: expected a passage's id"),
    ],
)
def test_malformed_lines_are_named(
    files: dict[str, Path], tmp_path: Path, name: str, content: str, message: str
) -> None:
    passages = ms_marco(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(BadInput, match=message):
        import_dataset("mine", **files, passages=passages, out=tmp_path / "out", pool=True)
    assert not (tmp_path / "out").exists()


def test_broken_archives_and_absent_files_are_named(files: dict[str, Path], tmp_path: Path) -> None:
    whole = ms_marco_v2(tmp_path)
    part = whole / "msmarco_passage_02.gz"
    part.write_bytes(part.read_bytes()[:-10])
    with pytest.raises(BadInput, match=r"msmarco_passage_02.gz:\d: can't be read on"):
        import_dataset("mine", **files, passages=whole, out=tmp_path / "out")
    part.write_bytes(gzip.compress(b'{"text": "no id"}\n'))
    with pytest.raises(BadInput, match="has no id and text under any known names"):
        import_dataset("mine", **files, passages=whole, out=tmp_path / "out")
    part.write_bytes(gzip.compress(b'{"pid": "d3", "passage": null}\n'))
    with pytest.raises(BadInput, match="has no id and text under any known names"):
        import_dataset("mine", **files, passages=whole, out=tmp_path / "out")
    zipped = bytearray(gzip.compress(b'{"pid": "d3", "passage": "Iron rusts in water and air."}\n'))
    zipped[-5] ^= 0xFF  # of its checksum
    part.write_bytes(zipped)
    with pytest.raises(BadInput, match=r"msmarco_passage_02.gz:\d: can't be read on"):
        import_dataset("mine", **files, passages=whole, out=tmp_path / "out")
    part.write_bytes(gzip.compress(b'{"pid": "d1", "passage": "The moon again."}\n'))
    with pytest.raises(BadInput, match=r"msmarco_passage_02.gz:1: passage 'd1' is there twice"):
        import_dataset("mine", **files, passages=whole, out=tmp_path / "out")
    (tmp_path / "mixed").mkdir()
    for name in ("collection.tsv", "queries.tsv"):
        (tmp_path / "mixed" / name).write_text("q1\twhat\n")
    with pytest.raises(BadArgument, match="name the one with the passages"):
        import_dataset("mine", **files, passages=tmp_path / "mixed", out=tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFound, match=r"holds no \.tsv"):
        import_dataset("mine", **files, passages=tmp_path / "empty", out=tmp_path / "out")
    with pytest.raises(NotFound, match=r"gone: no such file"):
        import_dataset("mine", **files, passages=tmp_path / "gone", out=tmp_path / "out")
