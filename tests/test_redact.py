"""What is taken out of messages and files, and what is left in."""

import pytest

from qe_edge.redact import HIDDEN, Secrets, redact


@pytest.mark.parametrize(
    "text",
    [
        "http://user:hunter22@host/v1",
        "socks5://me:hunter22@host:9",
        "http://user:p@hunter22@host",
        "GET /x?api-key=hunter22&y=1",
        "/v1?key=hunter22",
        "Authorization: Bearer hunter22hunter22",
        "bearer hunter22hunter22",
        '{"api_key": "hunter22"}',
        "api-key=hunter22",
        "access_token: hunter22",
        "Incorrect API key provided: sk-hunter22hunter22.",
        "hf_hunter22hunter22",
    ],
)
def test_a_secret_is_hidden(text):
    assert "hunter22" not in redact(text)
    assert HIDDEN in redact(text)


@pytest.mark.parametrize(
    "text",
    [
        "the query takes 300 tokens with its prompt; shorten it",
        "--max-tokens 64",
        "http://localhost:8080/v1?fields=title^2,body",
        "line 3: unknown key: nDCG",
        "pip install scikit-learn",
        "give a --token that clients must send",
        "bench: model.gguf on demo-en@test: 49 tokens/s",
        "C:\\models\\student.gguf",
    ],
)
def test_all_else_stays(text):
    assert redact(text) == text


def test_what_the_environment_keeps_secret_is_hidden_wherever_it_stands(monkeypatch):
    monkeypatch.setenv("MY_KEY", "opaque-value")
    monkeypatch.setenv("QE_EDGE_OPENSEARCH_AUTH", "elastic:changeme1")
    monkeypatch.setenv("OTHER_KEY", "none")
    assert redact("no opaque-value, no changeme1, none") == "no ***, no ***, none"


def test_values_of_every_shape():
    before = {
        "token": "abc",
        "n": 3,
        "inner": ["--token", "abc", {"a": "x?sig=1"}],
        "max_tokens": 5,
        "none": None,
        "empty": [],
    }
    assert redact(before) == {
        "token": HIDDEN,
        "n": 3,
        "inner": ["--token", HIDDEN, {"a": f"x?sig={HIDDEN}"}],
        "max_tokens": 5,
        "none": None,
        "empty": [],
    }
    assert redact(("--api-key-env", "NAME", "--token=abc")) == ["--api-key-env", "NAME", f"--token={HIDDEN}"]


def test_a_short_value_is_no_secret():
    assert Secrets("none", "").hide("none of it") == "none of it"
