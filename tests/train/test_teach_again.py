"""`teach` keeps its budgets over all runs, and loses and repeats nothing when it is killed."""

import re
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
from endpoint import FAULTS, one_in_three, serve
from teaching import many, rows, zero_shot

from qe_edge.errors import BadInput, QeEdgeError
from qe_edge.records import Expansion, encode_jsonl, read_jsonl
from qe_edge.retrieval.datasets import load_dataset
from qe_edge.train.teach.ledger import Ledger
from qe_edge.train.teach.session import SPENT
from qe_edge.train.teach.teach import teach
from qe_edge.work.files import read_json

pytest.importorskip("openai")


# Budgets


@pytest.mark.parametrize(
    ("limit", "most"),
    [
        ({"max_tokens_total": 1000}, 6),
        ({"max_cost": 0.01, "price_in": 10.0, "price_out": 20.0}, 5),
    ],
)
def test_a_budget_is_kept_over_all_runs(tmp_path, limit, most):
    data, out = load_dataset("demo-en@train"), tmp_path / "out"
    with serve() as endpoint:
        ask = dict(endpoint=endpoint.url, concurrency=8, **limit)
        for _ in range(2):
            outcome = teach(data, zero_shot(max_tokens=50, **ask), out=out)
            assert outcome.stopped == SPENT
    # An answer takes 150 tokens, .002 in money; the last ones are not risked on a guess.
    assert 3 <= len(endpoint.requests) <= most
    record = read_json(out / "run.json")
    assert record["folder"] == str(data.folder)
    sessions = record["sessions"]
    assert sum(session["prompt_tokens"] for session in sessions) == 100 * len(endpoint.requests)
    if "max_cost" in limit:
        assert sum(s["cost"] for s in sessions) == pytest.approx(0.002 * len(endpoint.requests))


def test_a_budget_holds_under_other_names_of_the_token_limit(tmp_path):
    extra = {"max_tokens": None, "max_completion_tokens": 2000}
    with serve() as endpoint:
        endpoint.usage = {"prompt_tokens": 100, "completion_tokens": 2000}
        ask = {"endpoint": endpoint.url, "max_tokens_total": 10_000}
        outcome = teach(many(), zero_shot(extra=extra, **ask), out=tmp_path / "out")
    assert outcome.stopped == SPENT
    assert 2 <= len(endpoint.requests) <= 4  # four take 8,400
    assert endpoint.requests[0]["max_completion_tokens"] == 2000


def test_other_models_answers_are_not_in_a_models_budget(three, tmp_path):
    with serve() as endpoint:
        teach(three, zero_shot(model="cheap", endpoint=endpoint.url), out=tmp_path / "out")
        ask = {"endpoint": endpoint.url, "max_tokens_total": 1000}
        assert teach(three, zero_shot(max_tokens=50, **ask), out=tmp_path / "out").done == 3


def test_a_budget_needs_an_endpoint_that_counts(three, tmp_path):
    with serve() as endpoint:
        endpoint.usage = None
        ask = {"endpoint": endpoint.url, "concurrency": 1, "max_tokens_total": 10_000}
        assert "reports no token usage" in teach(three, zero_shot(**ask), out=tmp_path / "out").stopped
        assert len(rows(tmp_path / "out")) == 1  # it was paid for, so it is kept
        assert teach(three, zero_shot(endpoint=endpoint.url), out=tmp_path / "out").done == 3


def test_a_session_without_an_answer_leaves_the_record_of_the_texts(three, tmp_path):
    with serve() as endpoint:
        teach(three, zero_shot(endpoint=endpoint.url), out=tmp_path / "out")
    before = read_json(tmp_path / "out" / "run.json")
    assert teach(three, zero_shot(model="other", endpoint=endpoint.url), out=tmp_path / "out").failed == 3
    with pytest.raises(QeEdgeError, match="no model 'other'"):
        teach(three, zero_shot(model="other"), out=tmp_path / "out")
    after = read_json(tmp_path / "out" / "run.json")
    assert [session["asked"] for session in after["sessions"]] == [3, 0]
    assert before | {"sessions": None} == after | {"sessions": None}


# Killed


def command(endpoint, *more):
    arguments = ["teach", "-d", "demo-en@train", "-m", "big", "--endpoint", endpoint.url, "--timeout", "2"]
    return [sys.executable, "-m", "qe_edge", *arguments, *more]


def lines(out):
    file = out / "expansions.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def wait_for(out, count, process):
    while lines(out) < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def test_killed_twice_among_faults_every_candidate_is_there_once(tmp_path):
    out = tmp_path / "out"
    with serve(one_in_three) as endpoint:
        arguments = command(endpoint, "--n", "3", "--out", str(out))  # 48 queries, 2 modes, 3 samples
        for count in (70, 180):
            with subprocess.Popen(arguments, stderr=subprocess.PIPE) as process:
                wait_for(out, count, process)
                process.kill()
        with (out / "expansions.jsonl").open("ab") as file:
            file.write(b'{"dataset": "demo-en", "query_id": "q0')  # as if killed in the middle of a line
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "dropped an unfinished last line" in done.stderr
    written = rows(out)
    assert len(written) == len({row.key for row in written}) == 288
    per_query = Counter((row.query_id, row.mode) for row in written)
    assert set(per_query.values()) == {3} and len(per_query) == 96
    # Only what was on its way when it was killed, at most 16 requests each time, was answered twice.
    assert sum(endpoint.answers.values()) - 288 <= 2 * 16
    assert len(endpoint.answers) == 288
    assert sum(count for fault, count in endpoint.faults.items() if fault) > 100
    assert set(FAULTS) <= set(endpoint.faults)


def test_ctrl_c_waits_for_what_is_on_its_way(tmp_path):
    out = tmp_path / "out"

    def slow(body):
        time.sleep(0.2)
        return "Moon and gravity."

    with serve(text=slow) as endpoint:
        arguments = command(endpoint, "--out", str(out))
        with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as process:
            wait_for(out, 5, process)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate()
    assert process.returncode == 130
    assert re.search(r"waiting for \d+ answers on their way", err)
    assert "error: interrupted. Run the same command again for the others" in err
    assert lines(out) == sum(endpoint.answers.values()) == len(endpoint.requests)


def test_ctrl_c_while_the_endpoint_asks_to_wait_sends_nothing_more(tmp_path):
    out = tmp_path / "out"
    with (
        serve(lambda number, body: None if number < 8 else "429 come back tomorrow") as endpoint,
        subprocess.Popen(command(endpoint, "--out", str(out)), stderr=subprocess.PIPE) as process,
    ):
        wait_for(out, 8, process)
        while not endpoint.faults["429 come back tomorrow"]:
            time.sleep(0.01)
        sent = 0
        while sent < (sent := len(endpoint.requests)):  # those on their way come in, at their own pace
            time.sleep(1)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
    assert process.returncode == 130
    assert len(endpoint.requests) == sent


def test_a_disk_that_is_full_for_a_while_leaves_whole_lines(three, tmp_path, monkeypatch):
    class Full:
        """Half of the first line fits, the rest doesn't; then there is room again."""

        def __init__(self, file):
            self.file, self.failed = file, 0

        def write(self, line):
            if self.failed < 2:
                self.failed += 1
                if self.failed == 2:
                    raise OSError(28, "No space left on device")
                return self.file.write(line[: len(line) // 2])
            return self.file.write(line)

        def __getattr__(self, name):
            return getattr(self.file, name)

    with Ledger(tmp_path / "expansions.jsonl", Expansion, "teach", "candidates") as ledger:
        row = Expansion("d", "1", "q", "en", "m", "zero-shot", "text", key="k")
        ledger.append(row)
        ledger._file = Full(ledger._file)
        with pytest.raises(OSError, match="No space left"):
            ledger.append(row)
        ledger.append(row)
    assert list(read_jsonl(tmp_path / "expansions.jsonl", Expansion)) == [row, row]


def test_a_last_line_without_its_end_is_kept_where_it_is_whole_and_left_where_it_is_not_ours(tmp_path):
    file = tmp_path / "expansions.jsonl"
    row = Expansion("d", "1", "q", "en", "m", "zero-shot", "text", key="k")
    for content in (encode_jsonl([row, row]).rstrip(), encode_jsonl([row])):
        file.write_bytes(content)
        with Ledger(file, Expansion, "teach", "candidates") as ledger:
            assert ledger.keys == {"k"}
        assert set(read_jsonl(file, Expansion)) == {row}
    for content in (b'{"a": 1}', b"my notes", encode_jsonl([row]) + b'{"a": '):
        file.write_bytes(content)
        with pytest.raises(BadInput, match="its last line is none that `qe-edge teach` wrote"):
            Ledger(file, Expansion, "teach", "candidates")
        assert file.read_bytes() == content


def test_two_at_once_are_refused(three, tmp_path):
    filelock = pytest.importorskip("filelock")
    out = tmp_path / "out"
    with serve() as endpoint:
        teach(three, zero_shot(endpoint=endpoint.url), out=out)
    with (
        filelock.FileLock(out / "expansions.jsonl.lock"),
        pytest.raises(QeEdgeError, match="another `qe-edge teach` is writing"),
    ):
        teach(three, zero_shot(endpoint="http://127.0.0.1:9/v1"), out=out)


def test_a_damaged_line_is_named_and_nothing_is_asked(three, tmp_path):
    out = tmp_path / "out"
    with serve() as endpoint:
        teach(three, zero_shot(endpoint=endpoint.url), out=out)
        file = out / "expansions.jsonl"
        file.write_bytes(b"{]\n" + file.read_bytes())
        with pytest.raises(BadInput, match=r"expansions\.jsonl:1: not a valid expansion"):
            teach(three, zero_shot(n=2, endpoint=endpoint.url), out=out)
    assert len(endpoint.requests) == 3
