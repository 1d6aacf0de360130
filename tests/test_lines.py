"""A line ends at a line feed alone, in every file that is read; a byte order mark is no part of the first."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qe_edge.errors import BadInput, NotFound
from qe_edge.lines import cut, decoded, read_lines
from qe_edge.records import Expansion, encode_jsonl, read_jsonl
from qe_edge.retrieval.datasets import load_dataset, load_queries
from qe_edge.retrieval.official import import_dataset

# What `str.splitlines` cuts at, and a line feed does not.
ENDS = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize("name", ["x.txt", "x.txt.gz"])
def test_lines_of_plain_and_gzipped_files(tmp_path, name):
    content = BOM + f"one{ENDS}\r\n\r\ntwo\rthree\nfour".encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert list(read_lines(tmp_path / name)) == [(1, f"one{ENDS}"), (2, ""), (3, "two\rthree"), (4, "four")]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n"))))
def test_what_is_written_in_lines_is_read_back(texts):
    file = io.BytesIO("".join(f"{text}\r\n" for text in texts).encode())
    read = [text for _, text in decoded(cut(file), "x")]
    assert read == [text.removeprefix("\ufeff") if n == 0 else text for n, text in enumerate(texts)]


def test_what_cant_be_read_is_named_with_its_line(tmp_path):
    file = tmp_path / "x.txt"
    with pytest.raises(NotFound, match=r"x\.txt: no such file"):
        next(read_lines(file))
    with pytest.raises(BadInput, match=r"is a folder, expected a file$"):
        next(read_lines(tmp_path))
    with pytest.raises(BadInput, match=r"is a folder, expected a file; none in it holds expansions \(as"):
        next(read_jsonl(tmp_path, Expansion))
    row = Expansion("d", "1", "what causes tides", "en", "m", "zero-shot", "Gravity.")
    (tmp_path / "best.jsonl").write_bytes(encode_jsonl([row]))
    for name, text in (("corpus", '{"_id": "1", "text": "x"}\n'), ("empty", ""), ("broken", "{")):
        (tmp_path / f"{name}.jsonl").write_text(text)
    with pytest.raises(BadInput, match=r"expected a file; name one in it: best\.jsonl$"):
        next(read_jsonl(tmp_path, Expansion))
    file.write_bytes(b"good\nb\xe9d\n")
    with pytest.raises(BadInput, match=r"x\.txt:2: not UTF-8 text"):
        list(read_lines(file))
    (tmp_path / "x.gz").write_bytes(gzip.compress(b"good\n" * 9999)[:-20])
    with pytest.raises(BadInput, match=r"x\.gz:\d+: can't be read on"):
        list(read_lines(tmp_path / "x.gz"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ids that are as they are in MS MARCO, and texts with every kind of end within."""
    root = tmp_path / "tiny"
    (root / "qrels").mkdir(parents=True)
    rows = {"corpus": {"_id": "d1", "text": f"a{ENDS}b"}, "queries": {"_id": "q1", "text": f"x{ENDS}y"}}
    for name, row in rows.items():
        text = json.dumps(row, ensure_ascii=False) + "\n"
        (root / f"{name}.jsonl").write_bytes(BOM + text.encode())
    (root / "qrels" / "test.tsv").write_bytes(BOM + b"query-id\tcorpus-id\tscore\nq1\td1\t1\n")
    return root


def test_a_data_set_with_other_line_ends_in_its_texts(folder):
    data = load_dataset(str(folder))
    assert data.queries == load_queries(folder / "queries.jsonl").queries == {"q1": f"x{ENDS}y"}
    assert list(data.documents()) == [("d1", f"a{ENDS}b")]
    # A half line is not a judgment of its own.
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td\x85\t1\n")
    assert load_dataset(str(folder)).qrels == {"q1": {"d\x85": 1}}


def test_an_import_keeps_no_byte_order_mark_and_no_half_line(tmp_path):
    files = {
        "topics": BOM + f"q1\twhat causes{ENDS} tides\nq2\tbread\n".encode(),
        "qrels": BOM + b"q1 0 d1 3\nq2 0 d2 1\n",
        "passages": BOM + f"d1\tThe{ENDS} moon.\nd2\tYeast.\n".encode(),
    }
    paths = {name: tmp_path / f"{name}.tsv" for name in files}
    for name, content in files.items():
        paths[name].write_bytes(content)
    origin = import_dataset("mine", **paths, out=tmp_path / "mine")
    assert (origin.passages, origin.lost_queries) == (2, 0)
    data = load_dataset(str(tmp_path / "mine"))
    assert data.queries == {"q1": f"what causes{ENDS} tides", "q2": "bread"}
    assert dict(data.documents()) == {"d1": f"The{ENDS} moon.", "d2": "Yeast."}


def test_an_imported_expansion_is_one_line(tmp_path):
    pytest.importorskip("openai")
    from qe_edge.train.teach.importing import ImportConfig, import_expansions

    file = tmp_path / "x.tsv"
    file.write_bytes(BOM + f"q01\tThe moon{ENDS}pulls\rthe sea.\r\n".encode())
    data = load_dataset("demo-en@train")
    config = ImportConfig(format="querygym", model="m", mode="zero-shot")
    import_expansions(file, config, data, out=tmp_path / "out")
    (row,) = read_jsonl(tmp_path / "out" / "expansions.jsonl", Expansion)
    assert (row.query_id, row.text) == ("q01", "The moon pulls the sea.")
    file.write_text("q01\t" + "x" * 200_000 + "\n")
    with pytest.raises(BadInput, match=r"x\.tsv:1: can't be read: field larger"):
        import_expansions(file, config, data, out=tmp_path / "out")


def test_a_query_on_stdin_is_one_line():
    pytest.importorskip("llama_cpp")
    command = [sys.executable, "-m", "qe_edge", "expand", "-", "-m", "builtin:smollm2-135m"]
    asked = BOM + "what causes\u2028 tides\r\n".encode()
    done = subprocess.run(
        [*command, "--budget-tokens", "8", "--json"], input=asked, capture_output=True, check=True
    )
    rows = json.loads(done.stdout)["metrics"]["expansions"]
    assert [row["query"] for row in rows] == ["what causes\u2028 tides"]
    # Blank lines, and those that are no text (here a control character), keep their places.
    asked = b"what causes tides\n\n\x01\nwhat causes tides\n"
    done = subprocess.run([*command, "--budget-tokens", "8"], input=asked, capture_output=True, check=False)
    lines = done.stdout.decode().splitlines()
    assert done.returncode == 7 and [bool(line) for line in lines] == [True, False, False, True]
