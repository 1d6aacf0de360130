"""`qe-edge serve` as a process of its own, asked over HTTP."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from serving import Reply, Server

from qe_edge import ExpandedQuery, Expander

pytest.importorskip("llama_cpp")
pytest.importorskip("fastapi", reason="needs the extra serve")
QUERIES = ["what causes tides", "iron deficiency", "什么是基因", "moon"]


@pytest.fixture(scope="module")
def server(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    running = Server(
        folder, "--model", gguf, "--budget-tokens", 24, "--index", "demo-en", "--index", "zh=demo-zh",
        "--workdir", folder / "work", "--cache", folder / "cache.db", "--parallel", 4, "--queue", 4,
    )  # fmt: skip
    yield running
    running.stop()


def test_it_expands_one_query_or_several(server: Server, gguf: Path) -> None:
    with Expander.load(gguf, budget_tokens=24) as expander:
        alone = [expander.expand(query) for query in QUERIES]
    one = server.post("/expand", query=QUERIES[0]).json["expansions"]
    several = server.post("/expand", query=QUERIES).json["expansions"]
    assert [found["text"] for found in several] == [expanded.text for expanded in alone]
    assert [found["fallback"] for found in several] == [expanded.fallback for expanded in alone]
    assert [found["words"] for found in several] == [pytest.approx(expanded.words()) for expanded in alone]
    assert [found["terms"] for found in several] == [pytest.approx(expanded.terms()) for expanded in alone]
    assert one[0]["tokens"] == several[0]["tokens"] == alone[0].tokens
    again = server.post("/expand", query=QUERIES).json["expansions"]
    assert all(found["cached"] for found in again)


def test_it_searches_a_named_index(server: Server) -> None:
    plain = server.post("/search", query="what makes bread rise", expand=False, k=3).json
    assert plain["index"] == "demo-en" and plain["expansion"] is None
    assert [hit["rank"] for hit in plain["hits"]] == [hit["plain_rank"] for hit in plain["hits"]] == [1, 2, 3]
    assert all(hit["text"] and hit["score"] > 0 for hit in plain["hits"])
    expanded = server.post("/search", query="what makes bread rise").json
    assert expanded["expansion"]["query"] == "what makes bread rise"
    assert len(expanded["hits"]) == 10
    read = server.post("/search", query="what makes bread rise", feedback=True).json
    assert read["expansion"]["tokens"] == 0 and read["expansion"]["fallback"] == ""
    heaviest = read["expansion"]["summary"].split()
    assert len(heaviest) == 12 and set(heaviest) < set(read["expansion"]["words"])
    refined = server.post("/search", query="what makes bread rise", refine=True).json
    assert refined["expansion"]["summary"]  # what was written, or the heaviest words of what was read
    assert len(refined["expansion"]["words"]) > len(expanded["expansion"]["words"])
    assert server.post("/search", query="bread", refine=True, feedback=True).status == 422
    chinese = server.post("/search", query="糖尿病患者可以吃什么", index="zh").json
    assert re.search("[一-龥]", chinese["hits"][0]["text"])
    missing = server.post("/search", query="x", index="nothing")
    assert (
        missing.status == 404
        and missing.json["detail"] == "no index 'nothing'; the indexes here: demo-en, zh"
    )


def test_an_expansion_comes_as_the_query_of_every_engine(server: Server, gguf: Path) -> None:
    fields = ["title^2", "body"]
    (found,) = server.post("/expand", query="what causes tides", fields=fields).json["expansions"]
    (plain,) = server.post("/expand", query="what causes tides").json["expansions"]
    assert plain["queries"] == found["queries"] | {"elasticsearch": None}
    with Expander.load(gguf, budget_tokens=24) as expander:
        alone = expander.expand("what causes tides")
    assert found["queries"] == {
        "fts5": alone.to_fts5(),
        "tantivy": alone.to_tantivy(),
        "lucene": alone.to_lucene(),
        "elasticsearch": alone.to_elasticsearch(*fields),
        "text": alone.to_text(),
    }


def test_passages_of_another_index_are_read(server: Server, gguf: Path) -> None:
    passages = ["The moon's pull moves the sea.", "Yeast raises dough."]
    with Expander.load(gguf, budget_tokens=24) as expander:
        alone = expander.feedback(QUERIES[0], passages)
        written = ExpandedQuery(QUERIES[0], "the moon", expander.spec.join)
        both = expander.refine(QUERIES[0], lambda _: passages, written=written, rounds=1)
    read = server.post("/feedback", query=QUERIES[0], passages=passages).json
    assert read["words"] == pytest.approx(alone.words(), rel=1e-3) and "moon" in read["words"]
    assert read["queries"]["fts5"].count('"') == alone.to_fts5().count('"')
    refined = server.post("/feedback", query=QUERIES[0], passages=passages, text=written.text).json
    assert (refined["text"], refined["summary"], refined["passages"]) == ("the moon", "the moon", 2)
    assert (read["text"], read["passages"]) == ("", 2) and "moon" in read["summary"]
    assert refined["words"] == pytest.approx(both.words(), rel=1e-3)
    nothing = server.post("/feedback", query="tides", passages=[]).json
    assert nothing["fallback"] == "there was no passage to read"


def test_it_streams_what_is_written(server: Server) -> None:
    reply = server.ask("GET", "/expand/stream?query=how%20do%20tides%20rise")
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = re.findall(r"event: (\w+)\ndata: (.*)\n", reply.text)
    *pieces, (name, whole) = [(event, json.loads(data)) for event, data in events]
    assert {event for event, _ in pieces} == {"text"} and name == "expansion"
    written = " ".join("".join(text for _, text in pieces).split())
    assert written == whole["text"] or whole["fallback"]
    misspelt = server.ask("GET", "/expand/stream?query=tides&deadline=5")
    assert misspelt.status == 422 and "deadline" in misspelt.text


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/expand", {"query": "  "}, 422, "the query is empty"),
        ("/expand", {"query": "  "}, 422, '"loc": ["body", "query", "one"]'),
        ("/expand", {"query": 5}, 422, "valid string"),
        ("/expand", {"query": ["tides", "\0"]}, 422, "the query is empty"),
        ("/expand", {"query": "x" * 1001}, 422, "at most 1000 characters"),
        ("/expand", {"query": ["x"] * 65}, 422, "at most 64 items"),
        ("/expand", {"query": []}, 422, "at least 1 item"),
        ("/expand", {"queries": ["x"]}, 422, "Field required"),
        ("/expand", {"query": "x", "deadline_ms": -1}, 422, "greater than or equal to 0"),
        ("/expand", b'{"query": "\\ud800"}', 422, "query"),
        ("/expand", b'{"\\ud800": 1}', 422, "valid string"),
        ("/expand", b"\xff{", 400, "parsing the body"),
        ("/expand", b'{"query": "' + b"x" * 800_000 + b'"}', 413, ""),
        ("/search", {"query": "x", "k": 100_000}, 422, "less than or equal to 1000"),
        ("/feedback", {"query": "x"}, 422, "passages"),
        ("/feedback", {"query": "x", "passages": ["y"] * 51}, 422, "at most 50 items"),
        ("/feedback", {"query": "x", "passages": ["y" * 2001]}, 422, "at most 2000 characters"),
        ("/nothing", {}, 404, "Not Found"),
    ],
    ids=str,
)
def test_what_it_cant_take_is_named(server: Server, path: str, body: Any, status: int, message: str) -> None:
    reply = server.ask("POST", path, body)
    assert (reply.status, message in reply.text) == (status, True), reply.text
    assert server.ask("GET", "/health").status == 200


def test_a_page_from_elsewhere_cant_reach_it(server: Server) -> None:
    assert server.ask("GET", "/health", Host=f"evil.example:{server.port}").status == 400


def test_a_full_queue_says_when_to_come_again(server: Server) -> None:
    queries = [f"a long tale of queue number {i}" for i in range(64)]
    refused = server.post("/expand", query=queries)
    assert refused.status == 413 and "at most 8 queries" in refused.text
    with ThreadPoolExecutor(32) as pool:
        replies = list(pool.map(lambda query: server.post("/expand", query=query), queries))
    assert {reply.status for reply in replies} <= {200, 429}
    assert all(int(reply.headers["retry-after"]) >= 1 for reply in replies if reply.status == 429)
    assert [reply.status for reply in replies].count(200) >= 8  # all that fit
    assert server.ask("GET", "/health").json["pending"] == 0


def test_a_deadline_holds(server: Server) -> None:
    found = server.post("/expand", query="a question with a deadline", deadline_ms=0).json["expansions"][0]
    assert found["fallback"] == "the deadline passed before the first whole word"
    assert found["finish_reason"] == "deadline"


def test_it_counts(server: Server) -> None:
    def value(name: str) -> float:
        text = server.ask("GET", "/metrics").text
        return sum(float(number) for number in re.findall(rf"^{re.escape(name)} (\S+)$", text, re.M))

    before = value('qe_edge_requests_total{path="/expand",status="200"}')
    queries = value("qe_edge_queries_total")
    server.post("/expand", query=["sun", "wind"])
    assert value('qe_edge_requests_total{path="/expand",status="200"}') == before + 1
    assert value("qe_edge_queries_total") == queries + 2
    assert value("qe_edge_expansion_seconds_count") == queries + 2
    assert value("qe_edge_pending") == 0


def test_its_documentation_is_there(server: Server) -> None:
    paths = server.ask("GET", "/openapi.json").json["paths"]
    assert {"/expand", "/feedback", "/expand/stream", "/search", "/health", "/metrics"} == paths.keys()
    assert "qe-edge" in server.ask("GET", "/docs").text


def test_it_finishes_what_it_began_when_it_is_stopped(gguf: Path, tmp_path: Path) -> None:
    # With one thread: several wait long for each other on a busy machine.
    running = Server(tmp_path, "--model", gguf, "--budget-tokens", 1500, "--threads", 1)
    replies: list[Reply] = []
    client = threading.Thread(target=lambda: replies.append(running.post("/expand", query="a long one")))
    client.start()
    while running.ask("GET", "/health").json["pending"] == 0:
        assert client.is_alive()
    stopped = running.stop()
    client.join()
    assert replies[0].status == 200 and replies[0].json["expansions"][0]["tokens"] > 0
    assert stopped in (0, 143)
    assert "Traceback" not in running.log.read_text()


def test_a_token_is_wanted_where_others_can_come(gguf: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "qe_edge", "serve", "--model", str(gguf), "--host", "0.0.0.0"]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and "give a --token" in refused.stderr
    running = Server(
        tmp_path, "--model", gguf, "--host", "0.0.0.0", "--token", "geheim", "--budget-tokens", 4
    )
    for headers in ({}, {"Authorization": "Bearer guess"}, {"Authorization": "Basic geheim"}):
        assert running.ask("POST", "/expand", {"query": "x"}, **headers).status == 401
    assert running.ask("POST", "/expand", {"query": "x"}, Authorization="Bearer geheim").status == 200
    assert running.ask("GET", "/metrics").status == 401
    assert running.ask("GET", "/health").status == 200
    running.stop()
