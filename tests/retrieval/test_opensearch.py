"""An OpenSearch index in place of our own. No server can be installed from the registries that the tests may
use: a stand-in takes the requests, holds them against OpenSearch's published format
(https://docs.opensearch.org/latest/api-reference/multi-search/) and ranks by the boosted words in them."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import msgspec
import pytest

from qe_edge.bench.bench import bench
from qe_edge.bench.config import BenchConfig
from qe_edge.bench.result import read_result
from qe_edge.cli import main
from qe_edge.errors import BadArgument, NotFound, QeEdgeError
from qe_edge.retrieval.datasets import builtin_folder, load_dataset
from qe_edge.retrieval.index import Index
from qe_edge.retrieval.opensearch import AUTH, OpenSearchIndex
from qe_edge.student.join import DEFAULT_JOIN, Join
from qe_edge.work.folder import Workdir

pytest.importorskip("opensearchpy", reason="needs the extra opensearch")


class Match(msgspec.Struct, forbid_unknown_fields=True):
    query: str
    boost: float


class MultiMatch(Match, forbid_unknown_fields=True):
    fields: list[str]


class Clause(msgspec.Struct, forbid_unknown_fields=True):
    match: dict[str, Match] | None = None
    multi_match: MultiMatch | None = None


class Bool(msgspec.Struct, forbid_unknown_fields=True):
    should: list[Clause]
    minimum_should_match: int


class Query(msgspec.Struct, forbid_unknown_fields=True):
    bool: Bool | None = None
    match_none: dict[str, Any] | None = None


class Search(msgspec.Struct, forbid_unknown_fields=True):
    query: Query
    size: int
    source: bool = msgspec.field(name="_source")


class Cluster(ThreadingHTTPServer):
    """`demo` holds demo-en, with its words analysed as ours are."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.index = Index.build(load_dataset("demo-en").documents(), analyzer="english")
        self.searches: list[Search] = []
        self.password, self.broken = "", 0
        self.url = f"http://127.0.0.1:{self.server_port}"

    def search(self, search: Search) -> dict[str, Any]:
        self.searches.append(search)
        weights: dict[str, float] = {}
        for clause in search.query.bool.should if search.query.bool else []:
            match = clause.multi_match or next(iter((clause.match or {}).values()))
            for term in self.index.analyze(match.query):
                weights[term] = weights.get(term, 0) + match.boost
        hits = [{"_id": name, "_score": score} for name, score in self.index.search(weights, search.size)]
        return {"status": 200, "hits": {"hits": hits}}


class Handler(BaseHTTPRequestHandler):
    server: Cluster
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        given = self.headers.get("Authorization", "")
        if (
            self.server.password
            and given != "Basic " + base64.b64encode(self.server.password.encode()).decode()
        ):
            self.reply(401, {"error": "no"})
        elif self.server.broken:
            self.server.broken -= 1
            self.reply(503, {"error": "busy"})
        elif self.path == "/demo/_count":
            self.reply(200, {"count": len(self.server.index.ids)})
        elif self.path == "/demo":
            self.reply(200, {"demo": {"settings": {"index": {"uuid": "one"}}, "mappings": {}}})
        elif self.path == "/demo/_msearch":
            assert body.endswith(b"\n")
            lines = body.splitlines()
            assert all(json.loads(line) == {} for line in lines[::2])
            answers = [self.server.search(msgspec.json.decode(line, type=Search)) for line in lines[1::2]]
            self.reply(200, {"responses": answers})
        else:
            self.reply(404, {"error": {"type": "index_not_found_exception"}})

    do_GET = do_POST

    def reply(self, status: int, value: Any) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    running = Cluster()
    Thread(target=running.serve_forever, daemon=True).start()
    yield running
    running.shutdown()
    running.server_close()


def test_it_ranks_as_the_same_words_do_in_our_index(cluster: Cluster) -> None:
    there = OpenSearchIndex(f"{cluster.url}/demo?fields=title^2,text")
    assert there.documents == len(cluster.index.ids)
    join = Join("mass", 0.5)
    texts = [("why does bread rise", "yeast makes gas"), ("tides", ""), ("🌊", "")] * 30
    found = there.search_many(texts, join=join, k=5)
    ours = cluster.index.search_text(*texts[0], join=join, k=5)
    assert [name for name, _ in found[0]] == [name for name, _ in ours]
    assert [score for _, score in found[0]] == pytest.approx([score for _, score in ours], rel=0.2)
    assert [name for name, _ in found[1]] == [
        name for name, _ in cluster.index.search_text("tides", join=join, k=5)
    ]
    assert found[2] == [] and len(found) == 90
    search = cluster.searches[0]
    assert (search.size, search.source) == (5, False)
    assert search.query.bool and search.query.bool.should[0].multi_match
    assert search.query.bool.should[0].multi_match.fields == ["title^2", "text"]


def test_a_benchmark_and_pairs_search_there(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"{cluster.url}/demo"
    expansions = builtin_folder("demo-en") / "expansions" / "train.jsonl"
    teacher = str(expansions.with_name("test.jsonl"))
    config = BenchConfig(datasets=("demo-en",), teachers=(teacher,))
    (own,) = read_result(bench(config, workdir=Workdir(tmp_path / "own"))).datasets
    config = msgspec.structs.replace(config, retriever=address)
    (there,) = read_result(bench(config, workdir=Workdir(tmp_path / "there"))).datasets
    assert [system.name for system in there.systems] == [
        system.name for system in own.systems if system.name != "BM25 + RM3"
    ]
    assert there.systems[0].ndcg.mean == pytest.approx(own.systems[0].ndcg.mean, abs=1e-3)
    assert there.info.documents == own.info.documents

    def pairs(*more: str) -> list[dict[str, Any]]:
        out = tmp_path / f"pairs{len(more)}"
        arguments = ["pairs", "-d", "demo-en@train", "-e", str(expansions), "--out", str(out), *more]
        monkeypatch.setattr(sys, "argv", ["qe-edge", *arguments])
        with pytest.raises(SystemExit):
            main()
        return [json.loads(line) for line in (out / "candidates.jsonl").read_text().splitlines()]

    here, elsewhere = pairs(), pairs("--retriever", address)
    assert len(here) == len(elsewhere)
    # The mass of an expansion is counted in words there and in terms here, which is nearly the same.
    same = [a["ndcg"] == pytest.approx(b["ndcg"], abs=0.05) for a, b in zip(here, elsewhere, strict=True)]
    assert sum(same) > 0.8 * len(here)


def test_what_goes_wrong_is_named(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    for address in ("demo", "ftp://localhost/demo", "http://localhost", "http://localhost/a/b"):
        with pytest.raises(BadArgument, match="is no http://HOST:PORT/INDEX"):
            OpenSearchIndex(address)
    with pytest.raises(BadArgument, match=AUTH):
        OpenSearchIndex("http://me:secret@localhost/demo")
    with pytest.raises(NotFound, match="has no index 'nothing'"):
        OpenSearchIndex(f"{cluster.url}/nothing")
    with pytest.raises(NotFound, match="can't be reached"):
        OpenSearchIndex("http://127.0.0.1:9/demo")
    cluster.password = "me:secret"
    with pytest.raises(BadArgument, match=rf"refuses us \(401\); set {AUTH}"):
        OpenSearchIndex(f"{cluster.url}/demo")
    monkeypatch.setenv(AUTH, "me:secret")
    there = OpenSearchIndex(f"{cluster.url}/demo")
    cluster.broken = 2  # asked again
    assert there.search_text("tides", join=DEFAULT_JOIN)
    cluster.broken = 100
    with pytest.raises(QeEdgeError, match="failed"):
        there.search_text("tides", join=DEFAULT_JOIN)


def test_a_refused_search_is_an_error(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    there = OpenSearchIndex(f"{cluster.url}/demo")
    monkeypatch.setattr(cluster, "search", lambda _: {"error": {"type": "too_many_clauses"}, "status": 400})
    with pytest.raises(QeEdgeError, match=r"refused a search.*too_many_clauses"):
        there.search_text("tides", join=DEFAULT_JOIN)
