"""Any text on any console, any name of a file, and no traceback for what a user's system lacks."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qe_edge.console import json_bytes, shown
from qe_edge.errors import NotInstalled, require
from qe_edge.student.models import resolve
from qe_edge.work.files import read_json

pytest.importorskip("llama_cpp")
CAFE = os.fsdecode(b"caf\xe9")  # a name that is no UTF-8, as an old disk may hold it


def qe_edge(
    *arguments: object, encoding: str = "utf-8", code: int = 0, **environment: str
) -> tuple[bytes, bytes]:
    done = subprocess.run(
        [sys.executable, "-m", "qe_edge", *map(str, arguments)],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": encoding} | environment,
        check=False,
    )
    assert b"Traceback" not in done.stderr, done.stderr
    assert done.returncode == code, done.stderr
    return done.stdout, done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_a_console_of_any_encoding(gguf, encoding):
    arguments = ("search", "潮汐是怎么形成的 naïve", "--plain", "-d", "demo-zh")
    out, _ = qe_edge(*arguments, encoding=encoding)
    text = out.decode(encoding)
    assert ("\\u7684" in text) != ("的" in text)
    envelope = json.loads(qe_edge(*arguments, "--json", encoding=encoding)[0].decode("utf-8"))
    assert envelope["inputs"]["query"] == "潮汐是怎么形成的 naïve"
    assert "的" in envelope["metrics"]["hits"][0]["text"]
    _, err = qe_edge("search", "x", "-d", "潮汐", encoding=encoding, code=4)
    assert b"no data set" in err
    for command in ((), ("bench",), ("train", "sft")):
        qe_edge(*command, "--help", encoding=encoding)


def test_an_argument_that_is_no_text(gguf):
    out, _ = qe_edge("expand", CAFE, "-m", gguf, "--budget-tokens", 2, "--json")
    envelope = json.loads(out.decode())
    assert envelope["metrics"]["expansions"][0]["query"] == "caf\ufffd"
    _, err = qe_edge("expand", "x", "-m", CAFE, code=4)
    assert b"no model" in err
    assert json.loads(qe_edge("expand", "x", "-m", CAFE, "--json", code=4)[0].decode())["status"] == "error"


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_names_of_files_that_are_no_text(gguf, tiny_qwen3, tmp_path, encoding):
    """A model, a data set and the work folder; and a path is printed in the bytes that it has."""
    model = shutil.copy(gguf, tmp_path / f"{CAFE}.gguf")
    data = tmp_path / CAFE
    (data / "qrels").mkdir(parents=True)
    (data / "corpus.jsonl").write_text(
        '{"_id": "d1", "text": "The moon."}\n{"_id": "d2", "text": "Yeast."}\n'
    )
    (data / "queries.jsonl").write_text('{"_id": "q1", "text": "moon"}\n')
    (data / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\n")
    work = tmp_path / f"work-{CAFE}"
    arguments = ("bench", "-d", data, "-m", model, "--budget-tokens", 2, "--workdir", work)
    out, _ = qe_edge(*arguments, encoding=encoding)
    assert os.fsencode(work / "bench" / "001" / "result.json") in out
    record = read_json(work / "bench" / "001" / "run.json")
    assert record["settings"]["dataset"] == [shown(str(data))]
    envelope = json.loads(qe_edge(*arguments, "--json", encoding=encoding)[0].decode())
    assert "caf\ufffd@test" in envelope["metrics"]["ndcg@10"]
    qe_edge("report", "--workdir", work, encoding=encoding)
    export = ("export", "--format", "gguf", "--f16", "--workdir", work)
    out, _ = qe_edge(*export, tiny_qwen3, encoding=encoding)
    assert os.fsencode(work / "export" / "001" / "student-F16.gguf") in out
    # The one library that can't: it is said so.
    source = shutil.copytree(tiny_qwen3, tmp_path / f"model-{CAFE}")
    _, err = qe_edge(*export, source, encoding=encoding, code=5)
    assert b"is not valid UTF-8" in err


def test_halves_of_pairs_become_one_mark_each():
    assert shown("a\ud83db\udce9c 潮😀") == "a\ufffdb\ufffdc 潮😀"
    assert shown("\ud83d\ude00") == "😀"
    value = {"x\udce9": ["\udce9", Path("\udce9"), 3, None, ("\udce9",)]}
    assert json.loads(json_bytes(value)) == {"x\ufffd": ["\ufffd", "\ufffd", 3, None, ["\ufffd"]]}


# What exists as typed, and what a file is


def test_a_path_with_an_equals_sign_is_a_model(gguf, tmp_path, monkeypatch):
    from qe_edge.bench.inputs import parse_model

    folder = tmp_path / "c=d"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    shutil.copy(gguf, folder / "tiny.gguf")
    shutil.copy(gguf, tmp_path / "a=b.gguf")
    assert parse_model("c=d/tiny.gguf") == ("tiny.gguf", "c=d/tiny.gguf")
    assert parse_model("a=b.gguf") == ("a=b.gguf", "a=b.gguf")
    assert parse_model("mine=a=b.gguf") == ("mine", "a=b.gguf")
    assert parse_model("mine=builtin:smollm2-135m") == ("mine", "builtin:smollm2-135m")


def test_a_path_with_an_equals_sign_is_an_index(tmp_path, monkeypatch):
    from qe_edge.retrieval.datasets import builtin_folder
    from qe_edge.serve.collection import open_collections

    monkeypatch.chdir(tmp_path)
    shutil.copytree(builtin_folder("demo-en"), tmp_path / "a=b" / "notes@home")
    opened = open_collections(["a=b/notes@home", "mine=demo-en"], tmp_path / "index")
    assert list(opened) == ["notes@home", "mine"]
    assert str(opened["notes@home"].data) == "notes@home@test"


@pytest.mark.parametrize("name", ["Student.GGUF", "sha256-1a2b3c", "no.ending", "student.bin"])
def test_a_gguf_is_known_by_its_first_bytes(gguf, tmp_path, name):
    file = Path(shutil.copy(gguf, tmp_path / name))
    ref = resolve(file)
    assert (ref.engine, ref.is_gguf, ref.size_bytes()) == ("llama.cpp", True, file.stat().st_size)
    out, _ = qe_edge("expand", "tides", "-m", file, "--budget-tokens", 2, "--json")
    assert json.loads(out)["status"] == "ok"


def test_a_gguf_without_an_ending_can_be_trained(gguf, tmp_path):
    from qe_edge.train.base_model import prepare_student
    from qe_edge.work.folder import Workdir

    file = shutil.copy(gguf, tmp_path / "Sha256-1A2B")
    folder, _ = prepare_student(str(file), Workdir(tmp_path / "work"))
    assert (Path(folder) / "config.json").is_file()


# A user's environment


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (
            "ImportError('libfoo.so: cannot open shared object')",
            "an installed package can't be imported (libfoo",
        ),
        ("ValueError('bad\\nvalue')", "error: ValueError: bad value (set QE_EDGE_DEBUG=1"),
        ("RuntimeError('no home folder')", "error: RuntimeError: no home folder (set QE_EDGE_DEBUG=1"),
        ("RecursionError()", "RecursionError: no reason is given"),
        ("MemoryError()", "memory is short"),
        ("OSError(28, 'No space left on device')", "No space left on device"),
    ],
)
def test_no_error_of_the_system_is_a_traceback(raised, message):
    code = f"""
import sys
from qe_edge import cli, doctor
def broken(*_): raise {raised}
doctor.look = broken
sys.argv = ["qe-edge", "doctor", *sys.argv[1:]]
cli.main()
"""

    def run(*arguments, **environment):
        return subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True,
            text=True,
            env=os.environ | environment,
            check=False,
        )

    done = run("--json")
    assert (done.returncode, done.stderr.count("\n")) == (6, 1)
    assert message in done.stderr
    envelope = json.loads(done.stdout)
    assert envelope["status"] == "error"
    assert message.removeprefix("error: ") in envelope["errors"][0]
    traced = run(QE_EDGE_DEBUG="1")
    assert "Traceback" in traced.stderr and traced.returncode == 6


def test_a_broken_library_is_a_missing_one(tmp_path, monkeypatch):
    (tmp_path / "broken_lib.py").write_text(
        "raise OSError('libcudart.so.12: cannot open shared object file')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(NotInstalled, match=r"libcudart.*pip install 'qe-edge\[llama\]'"):
        require("broken_lib", "llama")


def test_no_home_folder_is_one_line(tmp_path):
    code = "import pwd; pwd.getpwuid = None; from qe_edge.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "data", "list"],
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name not in ("HOME", "QE_EDGE_DATA")},
        check=False,
    )
    assert "Traceback" not in done.stderr


NO_PLACE = """
import numba.core.caching as caching

caching.CacheImpl._locator_classes = []
from qe_edge.retrieval.bulk import BulkSearch
from qe_edge.retrieval.index import Index
from qe_edge.student.join import Join

index = Index.build([("a", "moon tides"), ("b", "bread")], analyzer="english")
print(BulkSearch(index).search([(["moon"], ["tide"])], Join())[0][0][0])
"""


def test_code_is_compiled_where_it_can_be_kept_nowhere():
    """As in a read-only installation with a home folder that can't be written to."""
    pytest.importorskip("numba")
    done = subprocess.run([sys.executable, "-c", NO_PLACE], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("a\n", 0), done.stderr


# A cut answer


@pytest.mark.parametrize("engine", ["llama.cpp", "transformers"])
def test_a_cut_answer_ends_in_whole_characters(gguf, tiny_qwen3, engine):
    from engines import says, scripted

    from qe_edge import Expander
    from qe_edge.student.gate import OPEN

    text = "月球🌙的引力"
    with Expander.load(gguf if engine == "llama.cpp" else tiny_qwen3, engine=engine, gate=OPEN) as whole:
        ids = whole.backend.tokenize(text, False)
        cut = [whole.backend.detokenize(ids[:n]) for n in range(len(ids) + 1)]
    assert all(text.startswith(part) for part in cut)
    assert len(set(cut)) < len(cut)  # some characters need several tokens
    for budget in range(1, len(ids)):
        model = gguf if engine == "llama.cpp" else tiny_qwen3
        with scripted(model, engine=engine, gate=OPEN, budget_tokens=budget) as expander:
            says(expander, text)
            assert expander.expand("潮汐").text == cut[budget]
            says(expander, text)
            assert "".join(expander.stream("潮汐")) == cut[budget]
        if engine == "transformers":
            break  # loading it takes longer


def test_without_a_terminal_long_work_says_where_it_is(monkeypatch, capsys):
    from qe_edge import console

    def comes(pattern):
        """Lines come when time has passed, whatever the work does."""
        while not any(re.fullmatch(pattern, line) for line in capsys.readouterr().err.splitlines()):
            time.sleep(0.01)

    monkeypatch.setattr(console, "FIRST", 0.1)
    monkeypatch.setattr(console, "SILENCE", 0.1)
    with console.progress("train sft", 10, done=4) as advance:
        comes(r"train sft: 4 of 10, 00:00 so far")  # in the first step
        advance(1, info="loss 1.234")
        comes(r"train sft: 5 of 10, \d\d:\d\d left, loss 1\.234")
        advance(2)
        comes(r"train sft: 7 of 10, \d\d:\d\d left")
    capsys.readouterr()
    time.sleep(0.3)
    assert capsys.readouterr().err == ""  # it has ended
    with console.progress("indexing", None) as advance:
        assert list(console.counting(range(2500), advance)) == list(range(2500))
        comes(r"indexing: 2000, \d\d:\d\d so far")
    monkeypatch.setattr(console, "SILENCE", 1.2)
    monkeypatch.setattr(console, "FIRST", 60)
    with console.progress("train sft", 10):
        comes(r"train sft: 0 of 10, 00:0\d so far")  # nothing was said before it, either
    monkeypatch.setattr(console, "SILENCE", 60)
    monkeypatch.setattr(console, "FIRST", 0.1)
    with console.progress("train sft", 10) as advance:
        comes(r"train sft: 0 of 10, \d\d:\d\d so far")
        advance()
        time.sleep(0.3)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(console, "FIRST", 60)
    with console.progress("train sft", 10) as advance:
        advance()
    assert capsys.readouterr().err == ""
