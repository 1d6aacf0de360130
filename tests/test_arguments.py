"""Numbers that no engine survives, and values of other types, are refused where they come in."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qe_edge import Encoder, ExpandedQuery, Expander, Gate, Index, queries, words_of
from qe_edge.arguments import check_number, check_whole
from qe_edge.errors import BadArgument, BadInput
from qe_edge.records import configured
from qe_edge.runtime.cache import ExpansionCache
from qe_edge.student.join import DEFAULT_JOIN, Join
from qe_edge.student.spec import parse_spec, read_spec

pytest.importorskip("llama_cpp")
NAN, INF = math.nan, math.inf


@pytest.fixture(scope="module")
def expander(gguf):
    with Expander.load(gguf, budget_tokens=2) as expander:
        yield expander


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threads": 10**6}, "threads must be from 1 to 512, not 1000000"),
        ({"threads": 0}, "threads must be from 1 to 512, not 0"),
        ({"threads": -1}, "threads must be from 1 to 512, not -1"),
        ({"parallel": 0}, "parallel must be from 1 to 10000"),
        ({"parallel": 10**9}, "parallel must be from 1 to 10000"),
        ({"budget_tokens": 0}, "budget_tokens must be from 1 to 2047"),
        ({"budget_tokens": 10**9}, "budget_tokens must be from 1 to 2047"),
        ({"passages": 51}, "passages must be from 1 to 50"),
        ({"stop_when_dry": 0}, "stop_when_dry must be from 1 to 2048"),
        ({"gate": Gate(clear_lead=NAN)}, "the gate's clear_lead: expected"),
        ({"gate": Gate(max_words=-1)}, "the gate's max_words: expected"),
        ({"gate": Gate(min_distinct=2.0)}, "the gate's min_distinct: expected"),
    ],
)
def test_settings_of_a_load(gguf, settings, message):
    with pytest.raises(BadArgument, match=message):
        Expander.load(gguf, **settings)


@pytest.mark.parametrize(
    "settings",
    [{"threads": 2.5}, {"threads": "4"}, {"threads": True}, {"passages": 2.0}, {"budget_tokens": "8"}],
)
def test_settings_of_another_type(gguf, settings):
    with pytest.raises(TypeError, match=f"{next(iter(settings))} must be a whole number, not "):
        Expander.load(gguf, **settings)


@pytest.mark.parametrize("given", [1e15, INF, NAN, -1, -INF])
def test_a_deadline_out_of_bounds(expander, given):
    message = "deadline_ms must be from 0 to 1000000000, not "
    for call in (expander.expand, expander.stream):
        with pytest.raises(BadArgument, match=message):
            call("tides", deadline_ms=given)
    with pytest.raises(BadArgument, match=message):
        expander.feedback("tides", ["the moon"], deadline_ms=given)
    assert expander.expand("tides", deadline_ms=1e9).query == "tides"
    assert expander.expand("tides", deadline_ms=0).fallback


def test_a_long_deadline_is_waited_for_also_while_somebody_else_leads(gguf):
    import threading

    with Expander.load(gguf, budget_tokens=200, parallel=2) as expander:
        found = []
        threads = [
            threading.Thread(target=lambda: found.append(expander.expand("tides", deadline_ms=1e9)))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert [expanded.query for expanded in found] == ["tides"] * 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": NAN}, "temperature must be from 0 to 10, not nan"),
        ({"temperature": -1}, "temperature must be from 0 to 10, not -1"),
        ({"temperature": 1e9}, "temperature must be from 0 to 10"),
        ({"seed": 2**70}, "seed must be from"),
        ({"scores": [NAN]}, "scores must be finite numbers, not nan"),
        ({"scores": [9.0, INF]}, "scores must be finite numbers, not inf"),
        ({"scores": ["9"]}, "scores must be finite numbers, not '9'"),
    ],
)
def test_settings_of_an_expansion(expander, settings, message):
    with pytest.raises(BadArgument, match=message):
        expander.expand("tides", **settings)


@pytest.mark.parametrize("query", [5, None, b"x", ["tides"], 1.5])
def test_a_query_of_another_type_is_one_clear_error(expander, query):
    import asyncio

    kind = type(query).__name__

    async def drain():
        return [piece async for piece in expander.astream(query)]

    calls = [
        lambda: expander.expand(query),
        lambda: expander.stream(query),
        lambda: list(expander.expand_many([query])),
        lambda: expander.feedback(query, ["the moon"]),
        lambda: asyncio.run(expander.aexpand(query)),
        lambda: asyncio.run(expander.afeedback(query, ["the moon"])),
        lambda: asyncio.run(drain()),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=f"a query must be a str, not {kind}"):
            call()


def test_one_text_where_several_belong(expander):
    with pytest.raises(TypeError, match="passages must be several texts, such as a list, not one str"):
        expander.feedback("tides", "the moon")
    with pytest.raises(TypeError, match="queries must be several texts, such as a list, not one str"):
        next(expander.expand_many("tides"))
    with pytest.raises(TypeError, match="a passage, such as a search returns, must be a str, not bytes"):
        expander.feedback("tides", [b"the moon"])
    with pytest.raises(TypeError, match="model must be a str or a Path, not int"):
        Expander.load(5)  # type: ignore[arg-type]


def test_numbers_elsewhere(tmp_path):
    index = Index.build([("a", "moon tides")], analyzer="english")
    for k in (0, -1, 2**40):
        with pytest.raises(BadArgument, match="k must be from 1 to"):
            index.search({"moon": 1.0}, k=k)
    for weight in (NAN, INF):
        with pytest.raises(BadArgument, match="the weight of 'moon' must be from"):
            index.search({"moon": weight})
    for size in (NAN, -1):
        with pytest.raises(BadArgument, match="max_mb must be from 0 to"):
            ExpansionCache(tmp_path / "x.db", max_mb=size)
    for value in (NAN, 0, -1, INF, 1e-320):
        with pytest.raises(ValueError, match="a join's value must be from 1e-09 to 1e\\+09"):
            Join("mass", value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('"max_tokens":128', '"max_tokens":0'), "max_tokens must be from 1"),
        (('"max_tokens":128', '"max_tokens":99999999999'), "max_tokens must be from 1"),
        (('"value":0.7', '"value":1e-320'), "a join's value must be from"),
        (('"passages":10', '"passages":51'), "passages"),
        (('"temperature":0.25', '"temperature":0'), "temperature"),
        (('"max_words":256', '"max_words":-1'), "max_words"),
        (('"max_words":256', '"max_words":1e400'), "malformed"),
    ],
)
def test_numbers_of_a_spec(tiny_qwen3, change, message):
    text = read_spec(tiny_qwen3).to_json()
    assert change[0] in text
    with pytest.raises(BadInput, match=message):
        parse_spec(text.replace(*change), source="x")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("teach", "concurrency"),
        ("teach", "timeout"),
        ("teach", "patience"),
        ("teach", "max_tokens_total"),
        ("teach", "max_cost"),
        ("plan", "seed"),
        ("plan", "temperature"),
        ("plan", "max_tokens"),
        ("pairs", "min_gap"),
        ("pairs", "length_penalty"),
        ("sft", "seed"),
        ("sft", "rank"),
        ("sft", "epochs"),
        ("sft", "batch_size"),
        ("dpo", "beta"),
        ("bench", "threads"),
        ("bench", "passages"),
        ("export", "budget_mb"),
        ("export", "target_bpw"),
        ("serve", "deadline_ms"),
        ("serve", "port"),
    ],
)
@pytest.mark.parametrize("value", [NAN, -1, 1e300, 2**70])
def test_settings_from_flags_and_recipes(kind, name, value):
    from qe_edge.bench.config import BenchConfig
    from qe_edge.export.config import ExportConfig
    from qe_edge.serve.config import ServeConfig
    from qe_edge.train.config import DpoConfig, PairsConfig, SftConfig
    from qe_edge.train.teach.config import AskConfig, TeachConfig

    kinds = {
        "teach": (AskConfig, {"price_in": 1.0}),
        "plan": (TeachConfig, {"model": "m"}),
        "pairs": (PairsConfig, {}),
        "sft": (SftConfig, {}),
        "dpo": (DpoConfig, {}),
        "bench": (BenchConfig, {"dataset": ["x"], "feedback": True}),
        "export": (ExportConfig, {}),
        "serve": (ServeConfig, {}),
    }
    config, needed = kinds[kind]
    with pytest.raises(BadArgument, match=name.replace("_", "-")):
        configured(config, needed | {name: value})


@given(st.integers() | st.floats() | st.text(max_size=2) | st.none() | st.booleans())
def test_what_passes_is_a_number_within_its_bounds(value):
    for check, kinds in ((check_number, (int, float)), (check_whole, (int,))):
        try:
            check("x", value, 1, 5)
        except (TypeError, BadArgument):
            continue
        assert isinstance(value, kinds) and not isinstance(value, bool)
        assert 1 <= value <= 5


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        ('{"query": "tides", "deadline_ms": NaN}', 422),
        ('{"query": "tides", "deadline_ms": Infinity}', 422),
        ('{"query": "tides", "deadline_ms": 1e15}', 422),
        ('{"query": "tides", "deadline_ms": -1}', 422),
        ('{"query": 5}', 422),
        ('{"query": "tides", "deadline_ms": 500}', 200),
    ],
)
def test_numbers_of_a_request(expander, sent, status):
    pytest.importorskip("fastapi")
    from fastapi.testclient import TestClient

    from qe_edge.serve.http import create_app

    client = TestClient(create_app(expander, {}), base_url="http://localhost")
    answer = client.post("/expand", content=sent, headers={"Content-Type": "application/json"})
    assert answer.status_code == status
    deadline = sent.partition("_ms")[2].strip('": }')
    if deadline:
        assert client.get(f"/expand/stream?query=tides&deadline_ms={deadline}").status_code == status


@pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning")
def test_a_search_of_the_wrong_kind_is_named(expander):
    import asyncio

    async def later(_):
        return ["the moon"]

    written = ExpandedQuery("tides", "moon", expander.spec.join)
    with pytest.raises(TypeError, match="passages must be texts, such as a list, not NoneType"):
        expander.refine("tides", lambda _: None, written=written)
    with pytest.raises(TypeError, match="not coroutine; `arefine` is for a search that is awaited"):
        expander.refine("tides", later, written=written)
    with pytest.raises(TypeError, match="`arefine` awaits what its search returns, not list"):
        asyncio.run(expander.arefine("tides", lambda _: ["the moon"], written=written))


@pytest.mark.parametrize(
    ("work", "kind", "message"),
    [
        (lambda e: Expander("student.gguf"), TypeError, r"Expander\.load\(model\) takes a file"),
        (lambda e: Expander.load(""), BadArgument, "model is empty; name a file"),
        (lambda e: Expander.load("x.gguf", reader=3), TypeError, "reader must be a str or a Path, not int"),
        (lambda e: Expander.load("x.gguf", reader=""), BadArgument, "reader is empty"),
        (lambda e: Expander.load("x.gguf", cache=True), TypeError, "cache must be a str or a Path, not bool"),
        (lambda e: ExpansionCache(":memory:"), BadArgument, "a cache is a file"),
        (lambda e: e.refine("tides", None), TypeError, "search must be a function of the expanded query"),
        (lambda e: e.refine("tides", str, written="moon"), TypeError, "written must be an ExpandedQuery"),
        (lambda e: e.expand("tides", scores=None), TypeError, "scores must be numbers, such as a list, not"),
        (lambda e: e.expand("tides", scores=3), TypeError, "scores must be numbers, such as a list, not int"),
        (
            lambda e: list(e.expand_many(None)),
            TypeError,
            "queries must be several texts, such as a list, not",
        ),
        (lambda e: Encoder(None), TypeError, "an encoder must be a str or a Path, not NoneType"),
        (lambda e: Encoder("x.gguf", query_prefix=3), TypeError, "query_prefix must be a str, not int"),
        (lambda e: words_of(None), TypeError, "a text must be a str, not NoneType"),
        (lambda e: ExpandedQuery(None, "", DEFAULT_JOIN), TypeError, "a query must be a str, not NoneType"),
        (
            lambda e: plain().to_fts5(columns=3),
            TypeError,
            "columns must be several texts, such as a list, not",
        ),
        (lambda e: plain().to_fts5(columns=[1]), TypeError, "columns must be a str, not int"),
        (lambda e: plain().to_elasticsearch(["a"]), TypeError, "a field must be a str, not list"),
        (lambda e: queries.fts5(["tap"]), TypeError, "words must be a dict of words and weights"),
        (lambda e: queries.fts5({"a": math.inf}), BadArgument, "the weight of 'a' must be from"),
        (lambda e: queries.fts5({"a": "1"}), TypeError, "the weight of 'a' must be a number, not str"),
        (lambda e: ExpandedQuery("tap", "water", "mass:0.7"), TypeError, "join must be a Join, such as"),
        (lambda e: Join("foo", 1), ValueError, "rule must be one of repeat, adaptive, mass, not 'foo'"),
        (lambda e: Join("mass", "1"), TypeError, "a join's value must be a number, not str"),
        (lambda e: indexed().search("tap"), TypeError, "weights must be a dict of terms and weights"),
        (lambda e: indexed().search({"tap": "x"}), TypeError, "the weight of 'tap' must be a number"),
        (lambda e: indexed().search_text("tap", join="mass:1"), TypeError, "join must be a Join"),
        (lambda e: indexed("tap drips"), TypeError, r"a document must be an \(id, text\) pair of two str"),
        (lambda e: indexed((1, "tap")), TypeError, r"two str, not \(1, 'tap'\)"),
    ],
)
def test_what_is_of_another_kind_is_named(expander, work, kind, message):
    with pytest.raises(kind, match=message):
        work(expander)


def indexed(document=("a", "tap drips")):
    return Index.build([document], analyzer="english")


def plain():
    return ExpandedQuery("tap drips", "", DEFAULT_JOIN)


def test_no_column_is_all_columns():
    assert plain().to_fts5(columns="") == plain().to_fts5(columns=[]) == plain().to_fts5()


def test_a_gate_is_a_gate(expander):
    with pytest.raises(TypeError, match=r"a gate is a Gate, such as qe_edge\.OPEN, not str"):
        expander.gate = "off"
