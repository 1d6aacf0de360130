"""`teach` against a real HTTP server that fails on purpose, and against a real llama.cpp server."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
from endpoint import FAULTS, one_in_three, serve

from qe_edge.datasets import load_dataset, load_queries
from qe_edge.errors import BadArgument, BadInput, NotFound, PartlyDone, QeEdgeError
from qe_edge.manifest import read_json
from qe_edge.records import Expansion, read_jsonl
from qe_edge.train.plan import TeachConfig
from qe_edge.train.teach import AskConfig, teach

pytest.importorskip("openai")


def rows(out):
    return list(read_jsonl(out / "expansions.jsonl", Expansion))


@pytest.fixture
def three(tmp_path):
    """A data set of three queries without judgments."""
    file = tmp_path / "three.jsonl"
    texts = ("what causes tides", "how does bread rise", "why is the sky blue")
    file.write_text("".join(json.dumps({"_id": f"q{i}", "text": t}) + "\n" for i, t in enumerate(texts)))
    return load_queries(file)


def zero_shot(**settings):
    return TeachConfig(**({"model": "big", "modes": ("zero-shot",)} | settings))


def test_every_candidate_is_asked_for_once_with_what_was_configured(three, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    out = tmp_path / "out"
    config = zero_shot(n=2, seed=7, temperature=0.5, max_tokens=99, extra={"top_p": 0.9, "max_tokens": None})
    with serve() as endpoint:
        outcome = teach(three, config, AskConfig(endpoint=endpoint.url, api_key_env="MY_KEY"), out=out)
    assert (outcome.candidates, outcome.done, outcome.asked, outcome.failed) == (6, 6, 6, 0)
    assert (outcome.prompt_tokens, outcome.completion_tokens) == (600, 300)
    assert set(endpoint.answers.values()) == {1}
    body = endpoint.requests[0]
    assert body["authorization"] == "Bearer secret"
    assert (body["model"], body["temperature"], body["top_p"]) == ("big", 0.5, 0.9)
    assert "max_tokens" not in body
    assert [m["role"] for m in body["messages"]] == ["system", "user"]
    assert {r["seed"] for r in endpoint.requests} == {7, 8}
    first = rows(out)[0]
    assert first.text == "Moon gravity pulls water, take 7."
    assert (first.dataset, first.lang, first.model, first.mode) == ("three", "en", "big", "zero-shot")
    assert (first.prompt_id, first.sample, first.finish_reason) == ("teacher-v1", 0, "stop")
    assert "secret" not in (out / "run.json").read_text()


def test_run_again_asks_for_nothing_and_changed_settings_for_new_candidates(three, tmp_path):
    out = tmp_path / "out"
    with serve() as endpoint:
        ask = AskConfig(endpoint=endpoint.url)
        teach(three, zero_shot(), ask, out=out)
        assert teach(three, zero_shot(), ask, out=out).asked == 0
        assert teach(three, zero_shot(n=2), ask, out=out).asked == 3  # the second sample alone
        for changed in (
            {"temperature": 0.3},
            {"seed": 5},
            {"max_tokens": 64},
            {"model": "other"},
            {"extra": {"top_p": 0.5}},
        ):
            assert teach(three, zero_shot(**changed), ask, out=out).asked == 3, changed
    assert len({row.key for row in rows(out)}) == len(rows(out)) == 21
    assert [s["asked"] for s in read_json(out / "run.json")["sessions"]] == [3, 0, 3, 3, 3, 3, 3, 3]


def test_a_prompt_of_ones_own_counts_by_its_text(three, tmp_path):
    prompt = tmp_path / "mine.toml"
    template = """id = "mine"
[texts.en]
system = "{}"
zero_shot = "About {{query}}:"
few_shot = "{{exemplars}}{{query}}"
exemplar = "{{query}} {{passage}}"
"""
    out = tmp_path / "out"
    with serve() as endpoint:
        for system in ("one", "two"):
            prompt.write_text(template.format(system))
            config = zero_shot(prompt=str(prompt))
            assert teach(three, config, AskConfig(endpoint=endpoint.url), out=out).asked == 3
        assert endpoint.requests[-1]["messages"][0]["content"] == "two"
    prompt.write_text(template.replace("{{query}}:", "it"))
    with pytest.raises(BadInput, match=r"mine\.toml: not a valid teacher prompt: .*\{query\} exactly once"):
        teach(three, zero_shot(prompt=str(prompt)), AskConfig(endpoint=endpoint.url), out=out)
    with pytest.raises(NotFound, match="there are: teacher-v1"):
        teach(three, zero_shot(prompt="nothing"), AskConfig(endpoint=endpoint.url), out=out)


def test_bad_answers_are_marked_and_not_paid_for_again(three, tmp_path):
    texts = iter(["I'm sorry, but I can't help with that.", "<think>hm</think> Yeast.", "   "])
    out = tmp_path / "out"
    with serve(text=lambda body: next(texts)) as endpoint:
        outcome = teach(three, zero_shot(), AskConfig(endpoint=endpoint.url, concurrency=1), out=out)
        assert teach(three, zero_shot(), AskConfig(endpoint=endpoint.url), out=out).asked == 0
    assert outcome.problems == {"refused": 1, "think block": 1, "empty": 1}
    assert [(row.problem, row.text) for row in rows(out)] == [
        ("refused", ""),
        ("think block", ""),
        ("empty", ""),
    ]


def test_keep_bad_keeps_the_text(three, tmp_path):
    with serve() as endpoint:
        endpoint.finish_reason = "length"
        ask = AskConfig(endpoint=endpoint.url, keep_bad=True)
        assert teach(three, zero_shot(), ask, out=tmp_path / "out").problems == {"cut": 3}
    row = rows(tmp_path / "out")[0]
    assert (row.problem, row.text, row.finish_reason) == (
        "cut",
        "Moon gravity pulls water, take 0.",
        "length",
    )


@pytest.mark.parametrize("fault", FAULTS)
def test_every_passing_fault_is_outlived(three, tmp_path, fault):
    ask_timeout = 1.0 if fault == "hang" else 20.0
    with serve(lambda number, body: fault if number == 0 else None) as endpoint:
        ask = AskConfig(endpoint=endpoint.url, timeout=ask_timeout)
        outcome = teach(three, zero_shot(), ask, out=tmp_path / "out")
    assert (outcome.done, outcome.failed) == (3, 0)
    assert len(endpoint.requests) == 4
    assert set(endpoint.answers.values()) == {1}
    assert "�" not in "".join(row.text for row in rows(tmp_path / "out"))


def test_what_no_attempt_saves_is_left_for_the_next_run(three, tmp_path, capsys):
    out = tmp_path / "out"

    def filtered(number, body):
        return "400 content filter" if "bread" in body["messages"][1]["content"] else None

    with serve(filtered) as endpoint:
        with pytest.raises(PartlyDone, match=r"2 of 3 candidates are in .*Run the same command again"):
            teach(three, zero_shot(), AskConfig(endpoint=endpoint.url), out=out)
        assert len(endpoint.requests) == 3  # a refused request is not sent again
        assert "no answer for query q1 (zero-shot, sample 0): 400: content filter" in capsys.readouterr().err
        endpoint.fault = lambda number, body: None
        assert teach(three, zero_shot(), AskConfig(endpoint=endpoint.url), out=out).asked == 1


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        ("401 wrong key", QeEdgeError, "answers 401 for the model 'big': wrong key"),
        ("402 no credit", QeEdgeError, "no credit"),
        ("404 no such model", NotFound, "no such model"),
        ("429 insufficient_quota", QeEdgeError, "insufficient_quota"),
    ],
)
def test_hopeless_answers_stop_at_once(three, tmp_path, fault, kind, message):
    with serve(lambda number, body: fault) as endpoint, pytest.raises(kind, match=message):
        teach(three, zero_shot(), AskConfig(endpoint=endpoint.url, concurrency=1), out=tmp_path / "out")
    assert len(endpoint.requests) == 1


def test_an_endpoint_that_is_down_is_given_up(tmp_path):
    data = load_dataset("demo-en@train")
    ask = AskConfig(endpoint="http://127.0.0.1:9/v1", attempts=1)
    with pytest.raises(QeEdgeError, match="20 requests in a row failed, the last with: connection failed"):
        teach(data, zero_shot(), ask, out=tmp_path / "out")


def test_a_rate_limit_lowers_the_number_at_once(tmp_path):
    data = load_dataset("demo-en@train")
    limit = 3

    def too_many(number, body):
        return "429" if endpoint.flying >= limit else None

    def slow(body):
        time.sleep(0.02)
        return "Moon and gravity."

    with serve(too_many, slow) as endpoint:
        outcome = teach(
            data, zero_shot(n=4), AskConfig(endpoint=endpoint.url, concurrency=32), out=tmp_path / "out"
        )
    assert (outcome.done, outcome.failed) == (192, 0)
    assert endpoint.most_flying < 32
    assert endpoint.faults["429"] < 192  # far fewer than a fixed 32 at once would get


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
        ask = AskConfig(endpoint=endpoint.url, concurrency=8, **limit)
        for _ in range(2):
            with pytest.raises(PartlyDone, match="stopped: the budget is spent"):
                teach(data, zero_shot(max_tokens=50), ask, out=out)
    # An answer takes 150 tokens, .002 in money; the last ones are not risked on a guess.
    assert 3 <= len(endpoint.requests) <= most
    session = read_json(out / "run.json")["sessions"][-1]
    assert session["prompt_tokens"] == 100 * len(endpoint.requests)
    if "max_cost" in limit:
        assert session["cost"] == pytest.approx(0.002 * len(endpoint.requests))


def test_a_budget_needs_an_endpoint_that_counts(three, tmp_path):
    with serve() as endpoint:
        endpoint.usage = None
        ask = AskConfig(endpoint=endpoint.url, concurrency=1, max_tokens_total=10_000)
        with pytest.raises(PartlyDone, match="reports no token usage"):
            teach(three, zero_shot(), ask, out=tmp_path / "out")
        assert len(rows(tmp_path / "out")) == 1  # it was paid for, so it is kept
        assert teach(three, zero_shot(), AskConfig(endpoint=endpoint.url), out=tmp_path / "out").done == 3


# Killed


def command(endpoint, *more):
    arguments = ["teach", "-d", "demo-en@train", "-m", "big", "--endpoint", endpoint.url, "--timeout", "2"]
    return [sys.executable, "-m", "qe_edge.cli", *arguments, *more]


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
    assert process.returncode == 7
    assert "waiting for the answers that are on their way" in err
    assert re.search(r"error: \d+ of 96 candidates are in .*; stopped: interrupted. Run the same", err)
    assert lines(out) == sum(endpoint.answers.values())


def test_two_at_once_are_refused(three, tmp_path):
    filelock = pytest.importorskip("filelock")
    out = tmp_path / "out"
    with serve() as endpoint:
        teach(three, zero_shot(), AskConfig(endpoint=endpoint.url), out=out)
    with (
        filelock.FileLock(out / "expansions.jsonl.lock"),
        pytest.raises(QeEdgeError, match="another `qe-edge teach` is writing"),
    ):
        teach(three, zero_shot(), AskConfig(endpoint="http://127.0.0.1:9/v1"), out=out)


def test_a_damaged_line_is_named_and_nothing_is_asked(three, tmp_path):
    out = tmp_path / "out"
    with serve() as endpoint:
        teach(three, zero_shot(), AskConfig(endpoint=endpoint.url), out=out)
        file = out / "expansions.jsonl"
        file.write_bytes(b"{]\n" + file.read_bytes())
        with pytest.raises(BadInput, match=r"expansions\.jsonl:1: not a valid expansion"):
            teach(three, zero_shot(n=2), AskConfig(endpoint=endpoint.url), out=out)
    assert len(endpoint.requests) == 3


# Settings


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "name the queries with --dataset or --queries"),
        (["-d", "demo-en"], 2, "the teacher with --model"),
        (["-d", "demo-en", "--queries", "x"], 2, "either --dataset or --queries"),
        (["-d", "demo-en", "-m", "x", "--mode", "one-shot"], 2, "one-shot"),
        (["-d", "demo-en", "-m", "x", "--n", "2", "--temperature", "0"], 2, "would be the same"),
        (["-d", "demo-en", "-m", "x", "--max-cost", "5"], 2, "needs the prices"),
        (["-d", "demo-en", "-m", "x", "--extra", "[]"], 2, "must be a JSON object"),
        (["-d", "demo-en", "-m", "x", "--exemplars", "demo-en@test"], 2, "must not come from test queries"),
        (["-d", "demo-en", "-m", "x", "--shots", "99"], 5, "exemplars may be shown"),
        (["-d", "demo-en", "-m", "nowhere", "--mode", "zero-shot"], 4, "no model 'nowhere'"),
        (["-d", "demo-en", "--import", "x.tsv", "--format", "querygym"], 2, "give --dataset and --model"),
        (["--import", "x.jsonl"], 4, "x.jsonl: no such file"),
        (["--queries", "nothing.jsonl", "-m", "x"], 4, "nothing.jsonl: no such file"),
    ],
)
def test_a_users_mistake_is_one_line(tmp_path, arguments, code, message):
    done = subprocess.run(
        [sys.executable, "-m", "qe_edge.cli", "teach", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={name: value for name, value in os.environ.items() if name != "OPENAI_BASE_URL"},
    )
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_queries_without_judgments_need_a_named_training_split(three, tmp_path):
    with pytest.raises(BadArgument, match="name one with --exemplars NAME@train"):
        teach(three, TeachConfig(model="big"), AskConfig(endpoint="http://x"), out=tmp_path / "out")
    with serve() as endpoint:
        config = TeachConfig(model="big", exemplars="demo-en@train")
        assert teach(three, config, AskConfig(endpoint=endpoint.url), out=tmp_path / "out").done == 6


def test_a_blank_query_is_named_before_anything_is_asked(tmp_path):
    file = tmp_path / "q.jsonl"
    file.write_text('{"_id": "q1", "text": "tides"}\n{"_id": "q2", "text": "  "}\n')
    with serve() as endpoint, pytest.raises(BadInput, match="query 'q2' of q: the query is empty"):
        teach(load_queries(file), zero_shot(), AskConfig(endpoint=endpoint.url), out=tmp_path / "out")
    assert not endpoint.requests


# Real models


def test_a_real_llama_cpp_server_is_a_teacher(three, tmp_path):
    """llama-cpp-python's own server on loopback, with the embedded student as the teacher."""
    pytest.importorskip("llama_cpp.server.app", reason="needs llama-cpp-python[server]")
    from qe_edge.models import resolve

    model = resolve("builtin:smollm2-135m").path
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "llama_cpp.server", "--model", str(model), "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        url = f"http://127.0.0.1:{port}/v1"
        wait_until_up(url, server)
        config = TeachConfig(model="smollm2", exemplars="demo-en@train", shots=2, max_tokens=24)
        ask = AskConfig(endpoint=url, concurrency=2, keep_bad=True)
        outcome = teach(three, config, ask, out=tmp_path / "out")
    finally:
        server.kill()
        server.wait()
    assert (outcome.done, outcome.failed) == (6, 0)
    written = rows(tmp_path / "out")
    assert {row.mode for row in written} == {"zero-shot", "few-shot"}
    assert all(row.text and 0 < row.completion_tokens <= 24 for row in written)
    assert all(row.prompt_tokens > 50 for row in written)


def free_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until_up(url, process):
    import urllib.request

    for _ in range(600):
        assert process.poll() is None, "the server ended"
        try:
            with urllib.request.urlopen(f"{url}/models"):
                return
        except OSError:
            time.sleep(0.1)
    raise AssertionError("the server did not start")


def test_a_local_model_is_a_teacher_too(three, tmp_path):
    pytest.importorskip("llama_cpp")
    out = tmp_path / "out"
    config = zero_shot(model="builtin:smollm2-135m", max_tokens=24, temperature=0)
    outcome = teach(three, config, AskConfig(keep_bad=True), out=out)
    assert outcome.done == 3
    written = rows(out)
    assert all(0 < row.completion_tokens <= 24 for row in written)
    assert all(row.finish_reason == "stop" or row.problem == "cut" for row in written)
    assert teach(three, config, AskConfig(), out=out).asked == 0
    with pytest.raises(BadArgument, match="a local model takes none"):
        teach(three, zero_shot(model="builtin:smollm2-135m", extra={"a": 1}), AskConfig(), out=out)
