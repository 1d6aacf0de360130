"""Files that are damaged, newer than we are, or not there: one line that says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from results import bench

from qe_edge.backends.pretrained import load_pretrained
from qe_edge.bench.result import read_result
from qe_edge.errors import BadInput, NotFound
from qe_edge.records import Query, read_jsonl
from qe_edge.retrieval.official import read_origin
from qe_edge.student.spec import parse_spec, read_spec
from qe_edge.work.runs import RunFolder, check_output, read_record

NESTED = "[" * 20_000 + "]" * 20_000


def test_json_that_is_nested_too_deeply(tmp_path):
    for content in (NESTED, '{"prompt": ' + NESTED + "}"):
        with pytest.raises(BadInput, match="its qe-edge spec is malformed"):
            parse_spec(content, source="x")
    for name, read in (
        ("result.json", read_result),
        ("run.json", lambda file: read_record(file.parent)),
        ("origin.json", lambda file: read_origin(file.parent)),
        ("q.jsonl", lambda file: list(read_jsonl(file, Query))),
    ):
        (tmp_path / name).write_text('{"_id": "q", "text": "x", "more": ' + NESTED + "}")
        with pytest.raises(BadInput, match=name):
            read(tmp_path / name)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"{", b"[]", b"5"])
def test_json_that_is_damaged(tmp_path, content):
    tmp_path /= "out"
    tmp_path.mkdir()
    for name, read in (
        ("result.json", lambda: read_result(tmp_path)),
        ("run.json", lambda: read_record(tmp_path)),
        ("run.json", lambda: check_output(tmp_path, "export")),
        ("origin.json", lambda: read_origin(tmp_path)),
        ("qe_edge.json", lambda: read_spec(tmp_path)),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadInput, match=name):
            read()


def test_what_is_newer_than_we_are(tmp_path):
    import msgspec

    content = msgspec.to_builtins(bench()) | {"schema_version": 99}
    (tmp_path / "result.json").write_text(json.dumps(content))
    with pytest.raises(BadInput, match=r"result\.json: a bench result of version 99; update qe-edge"):
        read_result(tmp_path)
    partial = tmp_path / "001.partial"
    partial.mkdir()
    (partial / "run.json").write_text('{"schema_version": 99}')
    with pytest.raises(BadInput, match=r"run\.json: of version 99; update qe-edge"):
        RunFolder("bench", {}, {}, tmp_path / "001")
    (partial / "run.json").write_text('{"schema_version": 1}')  # a key of ours is missing
    RunFolder("bench", {}, {}, tmp_path / "001")


def test_a_mistyped_folder_is_asked_for_once(monkeypatch):
    pytest.importorskip("transformers")
    from huggingface_hub import HfApi
    from transformers import AutoTokenizer

    asked: list[str] = []

    def refused(_: HfApi, name: str, **settings: Any) -> None:
        asked.append(name)
        assert settings == {"timeout": 10.0}
        raise OSError("nobody answers")

    monkeypatch.setattr(HfApi, "model_info", refused)
    with pytest.raises(
        NotFound, match="no model 'models/studnet': there is no such file or folder here, and"
    ):
        load_pretrained(AutoTokenizer, "models/studnet")
    assert asked == ["models/studnet"]


def test_a_loop_of_links_is_one_line(tmp_path):
    import subprocess
    import sys

    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    done = subprocess.run(
        [sys.executable, "-m", "qe_edge", "export", str(Path("x")), "--workdir", str(loop)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (4, 6)
    assert "Traceback" not in done.stderr
