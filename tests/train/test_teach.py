"""`teach` against a real HTTP server that fails on purpose, and against a real llama.cpp server."""

import asyncio
import os
import re
import subprocess
import sys
import time

import pytest
from chat_servers import llama_cpp_server
from endpoint import FAULTS, serve
from teaching import many, rows, zero_shot

from qe_edge import Expander
from qe_edge.errors import BadArgument, BadInput, NotFound, QeEdgeError
from qe_edge.records import Expansion
from qe_edge.retrieval.datasets import load_queries
from qe_edge.student.gate import OPEN
from qe_edge.train.teach.config import TeachConfig
from qe_edge.train.teach.ledger import Ledger, read_texts
from qe_edge.train.teach.pace import Pace, Stopped
from qe_edge.train.teach.teach import teach
from qe_edge.work.files import read_json

pytest.importorskip("openai")


def test_every_candidate_is_asked_for_once_with_what_was_configured(three, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    out = tmp_path / "out"
    settings = {
        "n": 2,
        "seed": 7,
        "temperature": 0.5,
        "max_tokens": 99,
        "extra": {"top_p": 0.9, "max_tokens": None},
    }
    with serve() as endpoint:
        outcome = teach(three, zero_shot(**settings, endpoint=endpoint.url, api_key_env="MY_KEY"), out=out)
    assert (outcome.candidates, outcome.done, outcome.asked, outcome.failed) == (6, 6, 6, 0)
    assert (outcome.prompt_tokens, outcome.completion_tokens) == (600, 300)
    assert set(endpoint.answers.values()) == {1}
    body = endpoint.requests[0]
    assert body["authorization"] == "Bearer secret"
    assert (body["model"], body["temperature"], body["top_p"]) == ("big", 0.5, 0.9)
    assert "max_tokens" not in body
    assert [m["role"] for m in body["messages"]] == ["system", "user"]
    assert {r["seed"] for r in endpoint.requests} == {7, 8}
    first = min(rows(out), key=lambda row: (row.query_id, row.sample))  # they come as they are answered
    assert first.text == "Moon gravity pulls water, take 7."
    assert (first.dataset, first.lang, first.model, first.mode) == ("three", "en", "big", "zero-shot")
    assert (first.prompt_id, first.sample, first.finish_reason) == ("teacher-v1", 0, "stop")
    assert "secret" not in (out / "run.json").read_text()


def test_texts_that_are_still_being_written_are_taken_with_a_word(tmp_path, capsys):
    file = tmp_path / "expansions.jsonl"
    row = Expansion("tiny", "q0", "tides", "en", "teacher", "zero-shot", "the moon")
    with Ledger(file, Expansion, "teach", "candidates") as ledger:
        ledger.append(row)
        capsys.readouterr()
        assert read_texts([file]) == [row]
        told = f"warning: `qe-edge teach` is still adding to {file}: what it holds now is taken\n"
        assert capsys.readouterr().err == told
    assert read_texts([file]) == [row]
    assert capsys.readouterr().err == ""


def test_run_again_asks_for_nothing_and_changed_settings_for_new_candidates(three, tmp_path):
    out = tmp_path / "out"
    with serve() as endpoint:
        ask = {"endpoint": endpoint.url}
        teach(three, zero_shot(**ask), out=out)
        assert teach(three, zero_shot(**ask), out=out).asked == 0
        assert teach(three, zero_shot(n=2, **ask), out=out).asked == 3  # the second sample alone
        for changed in (
            {"temperature": 0.3},
            {"seed": 5},
            {"max_tokens": 64},
            {"model": "other"},
            {"extra": {"top_p": 0.5}},
        ):
            assert teach(three, zero_shot(**changed, **ask), out=out).asked == 3, changed
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
            config = zero_shot(prompt=str(prompt), endpoint=endpoint.url)
            assert teach(three, config, out=out).asked == 3
        assert endpoint.requests[-1]["messages"][0]["content"] == "two"
    prompt.write_text(template.replace("{{query}}:", "it"))
    with pytest.raises(BadInput, match=r"mine\.toml: not a valid teacher prompt: .*\{query\} exactly once"):
        teach(three, zero_shot(prompt=str(prompt), endpoint=endpoint.url), out=out)
    with pytest.raises(NotFound, match="there are: teacher-v1"):
        teach(three, zero_shot(prompt="nothing", endpoint=endpoint.url), out=out)


def test_bad_answers_are_marked_and_not_paid_for_again(three, tmp_path):
    texts = iter(["I'm sorry, but I can't help with that.", "<think>hm</think> Yeast.", "   "])
    out = tmp_path / "out"
    with serve(text=lambda body: next(texts)) as endpoint:
        outcome = teach(three, zero_shot(endpoint=endpoint.url, concurrency=1), out=out)
        assert teach(three, zero_shot(endpoint=endpoint.url), out=out).asked == 0
    assert outcome.problems == {"refused": 1, "think block": 1, "empty": 1}
    assert [(row.problem, row.text) for row in rows(out)] == [
        ("refused", ""),
        ("think block", ""),
        ("empty", ""),
    ]


def test_keep_bad_keeps_the_text_and_a_cut_one_is_kept_anyway(three, tmp_path):
    texts = iter(["The moon", "Sorry, I can't.", "Blue light"])
    with serve(text=lambda body: next(texts)) as endpoint:
        endpoint.finish_reason = "length"
        teach(three, zero_shot(endpoint=endpoint.url, concurrency=1), out=tmp_path / "out")
    assert [(row.problem, row.text) for row in rows(tmp_path / "out")] == [
        ("cut", "The moon"),
        ("refused", ""),
        ("cut", "Blue light"),
    ]
    with serve(text=lambda body: "Sorry, I can't.") as endpoint:
        teach(three, zero_shot(endpoint=endpoint.url, keep_bad=True), out=tmp_path / "kept")
    assert rows(tmp_path / "kept")[0].text == "Sorry, I can't."


@pytest.mark.parametrize(
    ("reason", "problem"),
    [
        ("stop", None),
        (None, None),
        ("eos", None),
        ("model_length", "cut"),
        ("MAX_TOKENS", "cut"),
        ("what", "cut"),
    ],
)
def test_other_servers_words_for_the_end(three, tmp_path, reason, problem):
    with serve() as endpoint:
        endpoint.finish_reason = reason
        teach(three, zero_shot(endpoint=endpoint.url), out=tmp_path / "out")
    assert {row.problem for row in rows(tmp_path / "out")} == {problem}


def test_answers_that_are_odd_in_json_do_no_harm(three, tmp_path):
    """Fractions and words as counts, half a surrogate pair, and an answer broken off."""
    out = tmp_path / "out"
    with serve(text=lambda body: "Moon \ud83d gravity.") as endpoint:
        endpoint.usage = {"prompt_tokens": 100.0, "completion_tokens": "many"}
        assert teach(three, zero_shot(endpoint=endpoint.url), out=out).done == 3
    assert {(row.text, row.prompt_tokens, row.completion_tokens) for row in rows(out)} == {
        ("Moon ? gravity.", 100, None)
    }
    with serve() as endpoint:
        endpoint.finish_reason = "insufficient_system_resource"
        outcome = teach(three, zero_shot(endpoint=endpoint.url), out=tmp_path / "off")
    assert (outcome.done, outcome.problems, len(endpoint.requests)) == (3, {"cut": 3}, 3)


@pytest.mark.parametrize("fault", FAULTS)
def test_every_passing_fault_is_outlived(three, tmp_path, fault):
    ask_timeout = 1.0 if fault == "hang" else 20.0
    with serve(lambda number, body: fault if number == 0 else None) as endpoint:
        ask = {"endpoint": endpoint.url, "timeout": ask_timeout}
        outcome = teach(three, zero_shot(**ask), out=tmp_path / "out")
    assert (outcome.done, outcome.failed) == (3, 0)
    assert len(endpoint.requests) == 4
    assert set(endpoint.answers.values()) == {1}
    assert "�" not in "".join(row.text for row in rows(tmp_path / "out"))


@pytest.mark.parametrize(("word", "query_id"), [("tides", "q0"), ("sky", "q2")], ids=["first", "last"])
def test_a_refused_request_is_marked_and_not_sent_again(three, tmp_path, capsys, word, query_id):
    out = tmp_path / "out"

    def filtered(number, body):
        return "400 content filter" if word in body["messages"][1]["content"] else None

    with serve(filtered) as endpoint:
        ask = {"endpoint": endpoint.url, "concurrency": 1}
        outcome = teach(three, zero_shot(**ask), out=out)
        assert (outcome.done, outcome.failed, outcome.problems) == (3, 1, {"refused": 1})
        assert (
            f"no answer for query {query_id} (zero-shot, sample 0): 400: content" in capsys.readouterr().err
        )
        assert teach(three, zero_shot(**ask), out=out).asked == 0
    assert len(endpoint.requests) == 3


def test_when_every_request_is_refused_the_settings_are_wrong_and_nothing_is_marked(tmp_path):
    out = tmp_path / "out"
    with serve(lambda number, body: "400 prompt is too long") as endpoint:
        with pytest.raises(QeEdgeError, match=r"4 requests in a row failed, .*prompt is too long"):
            teach(many(), zero_shot(endpoint=endpoint.url), out=out)
        assert not list(out.glob("*.jsonl"))
        endpoint.fault = lambda number, body: None
        assert teach(many(), zero_shot(endpoint=endpoint.url), out=out).done == 48


def test_a_request_that_keeps_failing_is_left_for_the_next_run(three, tmp_path):
    def broken(number, body):
        return "500" if "bread" in body["messages"][1]["content"] else None

    with serve(broken) as endpoint:
        ask = {"endpoint": endpoint.url, "patience": 1e-6}
        outcome = teach(three, zero_shot(**ask), out=tmp_path / "out")
        assert (outcome.done, outcome.failed, outcome.stopped) == (2, 1, "")
        endpoint.fault = lambda number, body: None
        assert teach(three, zero_shot(**ask), out=tmp_path / "out").asked == 1


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        ("401 wrong key", QeEdgeError, "answers 401 for the model 'big': wrong key"),
        ("402 no credit", QeEdgeError, "no credit"),
        ("404 no such model", NotFound, "no such model"),
        ("429 insufficient_quota", QeEdgeError, "insufficient_quota"),
    ],
)
def test_hopeless_answers_stop_at_once(tmp_path, fault, kind, message):
    with serve(lambda number, body: fault) as endpoint, pytest.raises(kind, match=message):
        teach(many(), zero_shot(endpoint=endpoint.url), out=tmp_path / "out")
    assert len(endpoint.requests) <= 4  # those that were sent together at the start


def test_an_endpoint_that_is_down_is_given_up(tmp_path, capsys):
    ask = {"endpoint": "http://127.0.0.1:9/v1", "patience": 0.1}
    with pytest.raises(
        QeEdgeError,
        match=r"4 requests in a row failed, the last with: no connection to http://127\.0\.0\.1:9/v1: ",
    ):
        teach(many(), zero_shot(**ask), out=tmp_path / "out")
    told = capsys.readouterr().err
    assert told.count("s more: no connection to ") == 1  # told before all patience is gone
    assert len(re.findall("no answer for .*: no connection to", told)) == 1  # said once
    assert len(re.findall(r"no answer for .*\): the same$", told, re.M)) == 3
    assert not list(tmp_path.rglob("*.jsonl"))


def test_a_model_that_the_endpoint_does_not_list_is_told(tmp_path, capsys):
    for number, (listed, told) in enumerate(
        (
            (["a", "bigger", "c"], "doesn't list a model 'big'; it lists bigger\n"),
            (["a", "c"], "doesn't list a model 'big'; it lists a, c\n"),
            (["a", "big"], ""),
            (["big:latest"], ""),
            ([], ""),
        )
    ):
        with serve() as endpoint:
            endpoint.models = listed
            outcome = teach(many(), zero_shot(endpoint=endpoint.url), out=tmp_path / str(number))
        err = capsys.readouterr().err
        assert outcome.done == 48 and (told in err if told else "doesn't list" not in err)


def test_a_slow_endpoint_is_asked_for_less_at_once():
    pace = Pace(16)
    for _ in range(4):
        pace.answered(slowly=True)
    assert pace.allowed == 4
    for _ in range(8):
        pace.answered()
    assert pace.allowed == 12
    started = time.monotonic()
    assert pace.late(started) and pace.allowed == 6
    assert not pace.late(started) and pace.allowed == 6  # it flew together with the first
    assert pace.late(time.monotonic()) and pace.allowed == 3


def test_a_model_that_only_thinks_is_told_from_its_first_answers(tmp_path):
    with serve(text=lambda body: "") as endpoint:
        endpoint.finish_reason = "length"
        outcome = teach(many(), zero_shot(endpoint=endpoint.url), out=tmp_path / "out")
    assert "the first 8 answers are empty" in outcome.stopped and "enable_thinking" in outcome.stopped
    assert len(endpoint.requests) < 48


def test_a_rate_limit_lowers_the_number_at_once(tmp_path):
    limit = 3

    def too_many(number, body):
        return "429 with Retry-After" if endpoint.flying >= limit else None

    def slow(body):
        time.sleep(0.02)
        return "Moon and gravity."

    with serve(too_many, slow) as endpoint:
        ask = {"endpoint": endpoint.url, "concurrency": 32}
        outcome = teach(many(), zero_shot(n=4, **ask), out=tmp_path / "out")
    assert (outcome.done, outcome.failed) == (192, 0)
    assert endpoint.most_flying < 12  # it would be 32


def test_pace_halves_once_for_requests_that_flew_together_and_waits_as_told():
    async def session():
        pace = Pace(32)
        for _ in range(20):
            pace.answered()
        assert pace.allowed == 24
        before = time.monotonic()
        assert pace.throttled(before, 40.0) == 40.0  # told
        assert (pace.allowed, pace.throttled(before, 40.0)) == (12, 0.0)  # the same news
        pace.answered()
        assert pace.allowed == 12 + 1 / 12
        waiting = asyncio.create_task(anext(aiter_of(pace)))
        await asyncio.sleep(0.05)
        assert not waiting.done()  # the forty seconds
        pace.stopping.set()
        with pytest.raises(Stopped):
            await waiting

    async def aiter_of(pace):
        async with pace.slot() as started:
            yield started

    asyncio.run(session())


def test_without_retry_after_the_wait_doubles_until_an_answer_comes():
    async def waits():
        pace, found = Pace(4), []
        for _ in range(4):
            pace.throttled(time.monotonic(), None)
            found.append(round(pace._closed_until - time.monotonic()))
        pace.answered()
        pace._closed_until = 0.0
        pace.throttled(time.monotonic(), None)
        return found, round(pace._closed_until - time.monotonic())

    assert asyncio.run(waits()) == ([1, 2, 4, 8], 1)


# Settings


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "name the queries with --dataset or --queries"),
        (["-d", "demo-en"], 2, "the teacher's model with --model"),
        (["-d", "demo-en", "--queries", "x"], 2, "either --dataset or --queries"),
        (["-d", "demo-en", "-m", "x", "--mode", "one-shot"], 2, "one-shot"),
        (["-d", "demo-en", "-m", "x", "--n", "2", "--temperature", "0"], 2, "would be the same"),
        (["-d", "demo-en", "-m", "x", "--max-cost", "5"], 2, "needs the prices"),
        (["-d", "demo-en", "-m", "x", "--extra", "[]"], 2, "must be a JSON object"),
        (["-d", "demo-en", "-m", "x", "--exemplars", "demo-en@test"], 2, "must not come from test queries"),
        (["-d", "demo-en", "-m", "x", "--shots", "99"], 5, "exemplars may be shown"),
        (["-d", "demo-en", "-m", "nowhere", "--mode", "zero-shot"], 4, "no model 'nowhere'"),
        (
            ["-d", "demo-en", "--import", "x.tsv", "--format", "querygym"],
            2,
            "give --dataset, --model, --mode",
        ),
        (["-d", "demo-en", "-m", "x", "--extra", '{"n": 3}'], 2, "must not hold `n`"),
        (["--import", "x.jsonl"], 4, "x.jsonl: no such file"),
        (["--queries", "nothing.jsonl", "-m", "x"], 4, "nothing.jsonl: no such file"),
    ],
)
def test_a_users_mistake_is_one_line(tmp_path, arguments, code, message):
    done = subprocess.run(
        [sys.executable, "-m", "qe_edge", "teach", *arguments],
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
        teach(three, TeachConfig(model="big", endpoint="http://x"), out=tmp_path / "out")
    with serve() as endpoint:
        config = TeachConfig(model="big", exemplars="demo-en@train", endpoint=endpoint.url)
        assert teach(three, config, out=tmp_path / "out").done == 6


def test_a_blank_query_is_named_before_anything_is_asked(tmp_path):
    file = tmp_path / "q.jsonl"
    file.write_text('{"_id": "q1", "text": "tides"}\n{"_id": "q2", "text": "  "}\n')
    with serve() as endpoint, pytest.raises(BadInput, match="query 'q2' of q: the query is empty"):
        teach(load_queries(file), zero_shot(endpoint=endpoint.url), out=tmp_path / "out")
    assert not endpoint.requests


# Real models


def test_a_real_llama_cpp_server_is_a_teacher(three, tmp_path):
    """With the embedded student as the teacher."""
    from qe_edge.student.models import resolve

    with llama_cpp_server(resolve("builtin:smollm2-135m").path) as url:
        exemplars = {"exemplars": "demo-en@train", "shots": 2}
        ask = {"endpoint": url, "concurrency": 2, "keep_bad": True}
        config = TeachConfig(model="smollm2", max_tokens=24, **exemplars, **ask)
        outcome = teach(three, config, out=tmp_path / "out")
    assert (outcome.done, outcome.failed) == (6, 0)
    written = rows(tmp_path / "out")
    assert {row.mode for row in written} == {"zero-shot", "few-shot"}
    assert all(row.text and 0 < row.completion_tokens <= 24 for row in written)
    assert all(row.prompt_tokens > 50 for row in written)


def test_a_local_model_is_a_teacher_too(three, tmp_path):
    pytest.importorskip("llama_cpp")
    out = tmp_path / "out"
    config = {"model": "builtin:smollm2-135m", "max_tokens": 24, "temperature": 0}
    outcome = teach(three, zero_shot(**config, keep_bad=True), out=out)
    assert outcome.done == 3
    written = rows(out)
    assert all(0 < row.completion_tokens <= 24 for row in written)
    assert all(row.finish_reason == "stop" or row.problem == "cut" for row in written)
    assert teach(three, zero_shot(**config), out=out).asked == 0
    with pytest.raises(BadArgument, match="a local model takes none"):
        teach(three, zero_shot(model="builtin:smollm2-135m", extra={"a": 1}), out=out)


def test_a_student_writes_candidates_by_its_own_prompt(three, tmp_path):
    pytest.importorskip("llama_cpp")
    out = tmp_path / "out"
    asked = {"model": "builtin:smollm2-135m", "modes": ["student"], "max_tokens": 24}
    outcome = teach(three, TeachConfig(**asked, n=2, temperature=0.8, keep_bad=True), out=out)
    assert outcome.done == 6
    written = rows(out)
    assert {(row.mode, row.prompt_id) for row in written} == {("student", "student-v2")}
    assert len({row.text for row in written}) > 3
    with Expander.load("builtin:smollm2-135m", budget_tokens=24, gate=OPEN) as expander:
        row = written[0]
        alone = expander.expand(row.query, temperature=0.8, seed=row.seed)
        assert row.prompt_tokens == alone.prompt_tokens
    with pytest.raises(ValueError, match="known of local models alone"):
        TeachConfig(**asked, endpoint="http://localhost:1/v1")
