"""What an endpoint's refusals do to a run of `teach`: no candidate is lost, and none is paid for twice."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from endpoint import serve
from hypothesis import given, settings
from hypothesis import strategies as st
from teaching import many, rows, zero_shot

from qe_edge.errors import BadArgument, NotInstalled, QeEdgeError
from qe_edge.train.teach.config import AskConfig
from qe_edge.train.teach.refusals import Refused, Unanswerable, Unanswered, what_it_means
from qe_edge.train.teach.teach import teach
from qe_edge.train.teach.teacher import EndpointTeacher, read_answer
from qe_edge.work.files import read_json

pytest.importorskip("openai")


def error(message: str, **more: Any) -> dict[str, Any]:
    return {"error": {"message": message, **more}}


ACCOUNT = [
    (403, error("Key limit exceeded", code=403)),
    (401, error("Incorrect API key provided")),
    (402, error("Insufficient Balance")),
    (400, error("API key expired. Please renew the API key.")),
    (400, error("API key not valid. Please pass a valid API key.")),
    (400, error("Unsupported parameter: 'seed'", code="unsupported_parameter")),
    (400, error("Unrecognized request argument supplied: seed")),
    (422, {"detail": [{"type": "extra_forbidden", "msg": "Extra inputs are not permitted"}]}),
    (429, error("You exceeded your current quota", code="insufficient_quota")),
    (429, error("Rate limit exceeded: free-models-per-day")),
    (429, error("Rate limit reached on requests per day (RPD): Limit 200. Please try again in 7m12s")),
    (200, error("Key limit exceeded", code=403)),
    (200, error("No credits left", code="402")),
    (200, {"error": "invalid api key"}),
]


@pytest.mark.parametrize("fault", ACCOUNT, ids=lambda fault: f"{fault[0]} {json.dumps(fault[1])[:50]}")
def test_an_account_error_marks_nothing_and_leaves_the_rest_for_the_next_run(tmp_path, fault):
    out = tmp_path / "out"
    with serve(lambda number, body: fault if number >= 6 else None) as endpoint:
        ask = {"endpoint": endpoint.url, "concurrency": 1}
        outcome = teach(many(), zero_shot(**ask), out=out)
        assert (outcome.done, outcome.failed, len(endpoint.requests)) == (6, 0, 7)
        assert "answers" in outcome.stopped
        assert {row.problem for row in rows(out)} == {None}
        endpoint.fault = lambda number, body: None
        outcome = teach(many(), zero_shot(**ask), out=out)
    assert (outcome.done, outcome.asked, outcome.stopped) == (48, 42, "")
    assert set(endpoint.answers.values()) == {1}
    assert len({row.key for row in rows(out)}) == 48


def test_the_servers_words_are_said_once_with_exit_code_7(tmp_path):
    with serve(lambda number, body: ACCOUNT[0] if number >= 6 else None) as endpoint:
        command = [sys.executable, "-m", "qe_edge", "teach", "-d", "demo-en@train", "-m", "big"]
        done = subprocess.run(
            [*command, "--endpoint", endpoint.url, "--out", str(tmp_path / "out"), "--json"],
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 7
    assert done.stderr.count("Key limit exceeded") == 1
    assert json.loads(done.stdout)["metrics"]["done"] == 6


@pytest.mark.parametrize(
    ("status", "said", "headers", "kind"),
    [
        (400, {"message": "This model's maximum context length is 4096 tokens"}, {}, Unanswerable),
        (400, {"message": "the request exceeds the available context size"}, {}, Unanswerable),
        (400, {"code": "content_filter", "message": "The response was filtered"}, {}, Unanswerable),
        (400, {"message": "Content Exists Risk"}, {}, Unanswerable),
        (400, {"code": "data_inspection_failed", "message": "Output data may contain …"}, {}, Unanswerable),
        (403, {"message": "Your input was flagged by moderation"}, {}, Unanswerable),
        (200, {"message": "prompt is too long", "code": 400}, {}, Unanswerable),
        (400, {"message": "Something we never heard of"}, {}, Refused),
        (404, {"message": "no such model"}, {}, QeEdgeError),
        (403, "<html>Forbidden</html>", {}, QeEdgeError),
        (429, {"message": "slow down"}, {}, Unanswered),
        (429, {"message": "Quota exceeded, see billing. Please retry in 34.4s."}, {}, Unanswered),
        (429, {"message": "exceeded your current quota"}, {"retry-after": "20"}, Unanswered),
        (429, {"message": "Limit 30000 tokens per min; add a payment method"}, {}, Unanswered),
        (200, {"message": "slow down", "code": 429}, {}, Unanswered),
        (200, {"message": "Provider returned error", "code": 503}, {}, Unanswered),
        (200, {"message": "internal error"}, {}, Unanswered),
        (503, {"message": "quota service is down"}, {}, Unanswered),
    ],
)
def test_what_a_refusal_means(status, said, headers, kind):
    found = what_it_means(status, said, headers, where=("http://x/v1", "big"), hide=str)
    assert type(found) is kind or (kind is QeEdgeError and isinstance(found, QeEdgeError))
    if isinstance(found, Unanswered):
        assert found.throttled == (429 in (status, said.get("code")))


def test_a_refusal_in_unknown_words_is_passed_over_but_never_marked(three, tmp_path):
    def odd(number, body):
        return (400, error("rejected by upstream")) if "bread" in body["messages"][1]["content"] else None

    with serve(odd) as endpoint:
        ask = {"endpoint": endpoint.url, "concurrency": 1}
        outcome = teach(three, zero_shot(**ask), out=tmp_path / "out")
        assert (outcome.done, outcome.failed, outcome.stopped) == (2, 1, "")
        assert len(endpoint.requests) == 3  # not sent again in this session
        endpoint.fault = lambda number, body: None
        assert teach(three, zero_shot(**ask), out=tmp_path / "out").asked == 1


def test_a_rate_limits_reason_is_told_once(three, tmp_path, capsys):
    def busy(number, body):
        return (429, error("tokens per min (TPM): Limit 30000")) if number < 2 else None

    with serve(busy) as endpoint:
        teach(three, zero_shot(endpoint=endpoint.url), out=tmp_path / "out")
    assert capsys.readouterr().err.count("tokens per min (TPM): Limit 30000") == 1


# Every answer that arrives counts once

CONTENTS: list[tuple[Any, str | None, str]] = [
    ([{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "The moon."}], None, "The moon."),
    ([{"type": "text", "text": "The "}, {"type": "text", "text": "moon."}], None, "The moon."),
    (["The ", {"text": "moon."}], None, "The moon."),
    ({"type": "text", "text": "The moon."}, None, "The moon."),
    ([{"type": "thinking", "thinking": "hm"}], "unreadable", ""),
    ([], "unreadable", ""),
    (5, "unreadable", ""),
    ({"text": None}, "unreadable", ""),
    (None, "empty", ""),
]


@pytest.mark.parametrize(("content", "problem", "text"), CONTENTS, ids=[str(c[0])[:40] for c in CONTENTS])
def test_content_in_parts(three, tmp_path, content, problem, text):
    with serve(text=lambda body: content) as endpoint:
        ask = {"endpoint": endpoint.url, "max_cost": 1.0, "price_in": 10.0, "price_out": 20.0}
        outcome = teach(three, zero_shot(**ask), out=tmp_path / "out")
        assert teach(three, zero_shot(**ask), out=tmp_path / "out").asked == 0
    assert len(endpoint.requests) == outcome.done == 3
    assert outcome.cost == pytest.approx(3 * 0.002)
    assert {(row.problem, row.text) for row in rows(tmp_path / "out")} == {(problem, text)}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["choices", "message", "content", "usage", "prompt_tokens", "text", "type", "x"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


@given(JSON)
def test_any_json_is_an_answer(content):
    answer = read_answer(content)
    assert isinstance(answer.text, str)
    answer.text.encode()


@settings(max_examples=15)
@given(value=JSON)
def test_requests_are_as_many_as_candidates_whatever_the_body_is(three, tmp_path_factory, value):
    out = tmp_path_factory.mktemp("any") / "out"
    for body in (value, {"choices": value}, {"choices": [{"message": {"content": value}}]}):
        with serve(lambda number, _, body=body: (200, body)) as endpoint:
            outcome = teach(three, zero_shot(endpoint=endpoint.url), out=out)
            assert len(endpoint.requests) == outcome.asked
    assert (outcome.done, outcome.asked) == (3, 0)
    assert len(rows(out)) == 3


@pytest.mark.parametrize("body", ["[" * 100_000, '{"choices": ' + "[" * 9000 + "]" * 9000 + "}", "9" * 5000])
def test_a_body_that_json_readers_choke_on(body):
    from qe_edge.train.teach.teacher import _decode

    try:
        value = _decode(body.encode())
    except ValueError:
        return  # it is no JSON, so that it is asked for again
    assert read_answer(value).finish_reason == "unreadable"


# Secrets

KEY = "sk-proj-abcdef0123456789"


@pytest.mark.parametrize("fault", [None, (401, error(f"Incorrect API key provided: {KEY}")), "cut"])
def test_no_output_holds_a_key_or_a_password(tmp_path, fault):
    """Given as people give them: in the environment, in the address, in its query and in a field."""
    work = tmp_path / "work"
    with serve(lambda number, body: fault if number > 3 else None) as endpoint:
        url = endpoint.url.replace("http://", "http://user:pass-w0rd@") + "?api-key=query-secret"
        command = [sys.executable, "-m", "qe_edge", "teach", "-d", "demo-en@train", "-m", "big", "--json"]
        command += ["--endpoint", url, "--extra", '{"api_key": "field-secret"}', "--mode", "zero-shot"]
        command += ["--patience", "0.001", "--concurrency", "1", "--workdir", str(work)]
        done = subprocess.run(
            command,
            capture_output=True,
            env={"PATH": "/usr/bin", "OPENAI_API_KEY": f"{KEY}\n", "HOME": str(tmp_path)},
            check=False,
        )
    assert done.returncode == (7 if fault else 0), done.stderr
    assert endpoint.requests[0]["api_key"] == "field-secret"
    assert endpoint.paths[0] == "/v1/chat/completions?api-key=query-secret"
    assert endpoint.headers[0]["Authorization"].startswith("Basic ")  # the address has its own
    outputs = [done.stdout, done.stderr] + [file.read_bytes() for file in work.rglob("*") if file.is_file()]
    assert len(outputs) >= 4
    for secret in (KEY, "pass-w0rd", "query-secret", "field-secret"):
        assert not [output for output in outputs if secret.encode() in output], secret


@pytest.mark.parametrize("key", ["sk-with blank", "sk-\u200bzero", "sk-two\nlines", "schlüssel-1234"])
def test_a_key_that_no_header_can_hold_is_refused_unseen(three, tmp_path, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(BadArgument, match="the key in OPENAI_API_KEY holds a blank") as error:
        teach(three, zero_shot(endpoint="http://127.0.0.1:9/v1"), out=tmp_path / "out")
    assert key not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_key_in_place_of_its_variables_name_is_refused_unseen(three, tmp_path):
    with pytest.raises(ValueError, match="not the key itself") as error:
        AskConfig(model="big", endpoint="http://x/v1", api_key_env=KEY)
    assert KEY not in str(error.value)
    ask = {"endpoint": "http://x/v1", "api_key_env": "sk_live_0123456789"}
    with pytest.raises(BadArgument, match="that --api-key-env names is not set") as unset:
        teach(three, zero_shot(**ask), out=tmp_path / "out")
    assert "sk_live" not in str(unset.value)


# Where an endpoint is


@pytest.mark.parametrize(
    "url", ["localhost:8080/v1", "ftp://x/v1", "http://", "http:///v1", "http://x:99999/v1", "http://[x/v1"]
)
def test_an_address_that_is_none_is_told_before_anything_is_asked(three, tmp_path, url):
    with pytest.raises(BadArgument, match="is no address"):
        teach(three, zero_shot(endpoint=url), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_query_in_the_address_stays_a_query(three, tmp_path):
    with serve() as endpoint:
        ask = {"endpoint": f"{endpoint.url}/gpt/?api-version=2024-10-21&x="}
        teach(three, zero_shot(**ask), out=tmp_path / "out")
    assert set(endpoint.paths) == {"/v1/gpt/chat/completions?api-version=2024-10-21&x="}
    assert read_json(tmp_path / "out" / "run.json")["settings"]["endpoint"] == ask["endpoint"]


@pytest.mark.parametrize(
    ("proxy", "kind", "message"),
    [
        (
            "socks5://127.0.0.1:9",
            NotInstalled,
            r"in ALL_PROXY needs a package .*pip install 'httpx\[socks\]'",
        ),
        ("foo://127.0.0.1:9", BadArgument, "in ALL_PROXY can't be used: .*foo"),
        ("http://127.0.0.1:port", BadArgument, "in ALL_PROXY can't be used"),
        ("foo://me:pass-w0rd@127.0.0.1:9", BadArgument, "in ALL_PROXY can't be used"),
    ],
)
def test_a_proxy_that_cant_be_used_is_one_line(monkeypatch, proxy, kind, message):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("ALL_PROXY", proxy)
    if proxy.startswith("socks"):
        monkeypatch.setitem(sys.modules, "socksio", None)
    with pytest.raises(kind, match=message) as error:
        EndpointTeacher("http://x/v1", api_key="none", timeout=1.0)
    assert "pass-w0rd" not in str(error.value)
    assert "\n" not in str(error.value)
