"""Two commands in one work folder: each has a folder of its own, and kept rows serve the same settings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from qe_edge.bench.generations import generate_once
from qe_edge.bench.speed import Generated, Task
from qe_edge.errors import BadArgument
from qe_edge.records import encode_jsonl, read_jsonl
from qe_edge.work.folder import Workdir
from qe_edge.work.runs import RunFolder

pytest.importorskip("llama_cpp")


def test_two_benches_at_once_keep_both_results_apart(gguf, tmp_path):
    work = tmp_path / "work"
    budgets = (4, 16, 8)
    running = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "qe_edge", "bench", "-d", "demo-en", "-m", gguf),
                *("--workdir", work, "--budget-tokens", str(budget), "--json"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        for budget in budgets
    ]
    folders = []
    for process in running:
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        folders.append(Path(json.loads(out)["artifacts"]["folder"]))
    assert sorted(path.name for path in folders) == ["001", "002", "003"]
    for budget, folder in zip(budgets, folders, strict=True):
        result = json.loads((folder / "result.json").read_text())
        assert result["settings"]["budget_tokens"] == budget
        files = list((folder / "generated").rglob("*.jsonl"))
        rows = [row for file in files for row in read_jsonl(file, Generated)]
        assert len(rows) == 26 and len({row.key for row in rows}) == 1
        assert max(row.tokens for row in rows) == budget
    kept = [list(read_jsonl(file, Generated)) for file in (work / "generations").glob("*.jsonl")]
    assert sorted(max(row.tokens for row in rows) for rows in kept) == sorted(budgets)


def test_a_place_is_kept_until_its_process_ends(tmp_path):
    code = """
import sys
from qe_edge.work.folder import Workdir
print(Workdir(sys.argv[1]).new("export").name, flush=True)
sys.stdin.read()
"""

    def other():
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout
        return process, process.stdout.readline().strip()

    first, name = other()
    second, name_of_second = other()
    assert (name, name_of_second) == ("001", "002")
    mine = Workdir(tmp_path)
    assert mine.new("export").name == mine.new("export").name == "003"  # nothing was written to it yet
    first.kill()
    first.wait()
    third, name_of_third = other()
    assert name_of_third == "001"  # a killed one's is given again, to be resumed
    for process in (second, third):
        process.kill()
        process.wait()


def test_a_folder_that_another_command_is_writing_is_refused(tmp_path):
    code = """
import sys
from pathlib import Path
from qe_edge.work.runs import RunFolder
RunFolder("bench", {}, {}, Path(sys.argv[1]))
print("there", flush=True)
sys.stdin.read()
"""
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stdout.readline()
    with pytest.raises(BadArgument, match="another command is writing"):
        RunFolder("bench", {}, {}, out)
    process.kill()
    process.wait()
    RunFolder("bench", {}, {}, out)


def test_rows_of_other_settings_are_not_taken(gguf, tmp_path):
    request = Task(
        str(gguf), "en", {"q1": "tides", "q2": "bread"}, str(tmp_path / "own.jsonl"), "x", budget_tokens=3
    )
    rows, _, _ = generate_once(request, "digest", tmp_path / "kept")
    (kept,) = (tmp_path / "kept").glob("*.jsonl")
    assert {row.key for row in rows} == {kept.stem}
    # As two commands at once could leave it: a row of another budget among those of this one.
    mixed = [msgspec.structs.replace(rows[0], key="other", text="of another budget"), rows[1]]
    kept.write_bytes(encode_jsonl(mixed))
    again = msgspec.structs.replace(request, out=str(tmp_path / "again.jsonl"))
    found, _, _ = generate_once(again, "digest", tmp_path / "kept")
    assert {row.query_id: row.text for row in found} == {row.query_id: row.text for row in rows}


FORKED = """
import os, sys
from qe_edge import Expander, QeEdgeError
from qe_edge.student.gate import OPEN

loaded = Expander.load(sys.argv[1], gate=OPEN, budget_tokens=4)
loaded.expand("tides")
calls = [
    lambda: loaded.expand("tides"),
    lambda: loaded.feedback("tides", ["the moon"]),
    lambda: Expander.load(sys.argv[1], gate=OPEN, budget_tokens=4),
]
for call in calls:
    child = os.fork()
    if not child:
        try:
            call()
        except QeEdgeError as error:
            sys.exit(7 if "spawn" in str(error) else 1)
        sys.exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
print(len(loaded.expand("tides").token_ids))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that forks")
def test_a_forked_child_is_told_instead_of_hanging(gguf):
    done = subprocess.run(
        [sys.executable, "-c", FORKED, str(gguf)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.returncode) == ("4\n", 0), done.stderr


SEVERAL = """
import os, sys
from qe_edge import Expander, OPEN

def computed():
    loaded = Expander.load(sys.argv[1], gate=OPEN, budget_tokens=4, threads=4)
    loaded.expand("tides")
    loaded.feedback("tides", ["the moon"])
    return loaded, len(os.listdir("/proc/self/task"))

first, before = computed()
second, after = computed()
print(after - before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted as Linux tells them")
def test_a_second_model_needs_one_thread_more(gguf):
    """Its decoder's. Threads that compute are those of the first one, or both would be slow."""
    done = subprocess.run(
        [sys.executable, "-c", SEVERAL, str(gguf)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.returncode) == ("1\n", 0), done.stderr
