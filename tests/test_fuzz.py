"""Whatever somebody sends or ships: a clear refusal or a right answer, and never anything else.

`pytest tests/test_fuzz.py tests/test_queries.py --hypothesis-profile long` looks for ten minutes and more.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving import Server

from qe_edge.errors import BadInput
from qe_edge.export.gguf import convert_gguf
from qe_edge.student.join import Join
from qe_edge.student.prompt import load_prompt
from qe_edge.student.spec import MAX_BYTES, ModelSpec, parse_spec, read_spec

SPEC = json.loads(ModelSpec(load_prompt(), Join(), base_model="a/b").to_json())
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)


@st.composite
def mutated(draw: st.DrawFn, original: dict[str, Any]) -> dict[str, Any]:
    """A JSON object with something in it replaced, missing or added."""
    copy = json.loads(json.dumps(original))
    for _ in range(draw(st.integers(1, 3))):
        at = copy
        while True:
            key = draw(st.sampled_from(sorted(at)))
            if not (isinstance(at[key], dict) and at[key] and draw(st.booleans())):
                break
            at = at[key]
        change = draw(st.sampled_from(["replace", "drop", "add"]))
        if change == "replace":
            at[key] = draw(anything)
        elif change == "drop" and len(at) > 1:
            del at[key]
        else:
            at[draw(st.text(max_size=10))] = draw(anything)
    return copy


def check_spec(content: bytes) -> None:
    try:
        spec = parse_spec(content, source="student.gguf")
    except BadInput as error:
        assert "student.gguf" in str(error)
        return
    # What was let in can be used.
    assert parse_spec(spec.to_json(), source="again") == spec
    assert "tides" in spec.prompt.render("what causes tides")
    weights = spec.join(["tide"], ["moon", "sea"])
    assert all(0 < weight < float("inf") for weight in weights.values())
    spec.gate.before("what causes tides", [2.0, 1.0])
    spec.gate.after("what causes tides", "the moon")


@given(st.binary(max_size=200))
def test_bytes_are_no_spec(content: bytes) -> None:
    check_spec(content)


@given(mutated(SPEC))
def test_a_spec_that_was_tampered_with_is_refused_or_works(spec: dict[str, Any]) -> None:
    check_spec(json.dumps(spec).encode("utf-8", "surrogatepass"))


@pytest.mark.parametrize(
    "content", [b"[" * 60_000, b"{" * 60_000, b" " * (MAX_BYTES + 1), b"\0" * 100, b"1e999"]
)
def test_extreme_specs_are_refused(content: bytes) -> None:
    with pytest.raises(BadInput, match=r"student.gguf"):
        parse_spec(content, source="student.gguf")


@pytest.fixture(scope="module")
def server(tiny_qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    pytest.importorskip("llama_cpp")
    pytest.importorskip("fastapi", reason="needs the extra serve")
    folder = tmp_path_factory.mktemp("fuzz")
    gguf = convert_gguf(tiny_qwen3, folder / "student.gguf", dtype="f32", spec=read_spec(tiny_qwen3))
    running = Server(
        folder, "--model", gguf, "--budget-tokens", 2, "--index", "demo-en", "--workdir", folder / "work"
    )
    yield running
    running.stop()


EXPAND = {"query": "tides", "deadline_ms": 50}
SEARCH = {"query": "tides", "index": "demo-en", "k": 2, "expand": True, "deadline_ms": 50}
bodies = st.one_of(
    st.binary(max_size=100),
    st.one_of(anything, mutated(EXPAND), mutated(SEARCH)).map(
        lambda body: json.dumps(body).encode("utf-8", "surrogatepass")
    ),
)


@given(st.sampled_from(["/expand", "/search"]), bodies)
def test_a_body_is_answered_or_refused(server: Server, path: str, body: bytes) -> None:
    reply = server.ask("POST", path, body)
    assert reply.status in (200, 400, 404, 422), reply.text
    assert isinstance(reply.json, dict)


@given(st.binary(max_size=60))
def test_a_streams_query_is_answered_or_refused(server: Server, query: bytes) -> None:
    encoded = "".join(f"%{byte:02x}" for byte in query)
    assert server.ask("GET", f"/expand/stream?deadline_ms=50&query={encoded}").status in (200, 422)


def test_it_still_works(server: Server) -> None:
    assert server.post("/expand", query="tides").status == 200
    assert "Traceback" not in server.log.read_text()
