"""`qe-edge serve` beside clients that wish it ill, or send half of what they want, and a cache in use."""

from __future__ import annotations

import re
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from serving import Reply, Server
from typer.testing import CliRunner

from qe_edge.cli import app
from qe_edge.errors import BadArgument

pytest.importorskip("llama_cpp")
pytest.importorskip("fastapi", reason="needs the extra serve")
HEADER = b"POST /expand HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
HALF_HEADER = HEADER[:40]
HALF_BODY = HEADER + b'Content-Length: 20\r\n\r\n{"query'


OWN = """
import sys
from qe_edge import Expander
from qe_edge.serve.http import create_app
from qe_edge.serve.guard import run

model, files, arrival_s = sys.argv[1:]
if int(files):
    import resource
    resource.setrlimit(resource.RLIMIT_NOFILE, (int(files), int(files)))
expander = Expander.load(model, budget_tokens=1500, threads=1)  # two are slow on a busy machine
run(create_app(expander, {}), host="127.0.0.1", port=0, last=10, arrival_s=float(arrival_s))
"""


class OwnServer(Server):
    """The same with other limits than the command has."""

    def __init__(self, folder: Path, model: Path, *, files: int = 0, arrival_s: float = 10.0):
        self.log = folder / "server.log"
        command = [sys.executable, "-c", OWN, str(model), str(files), str(arrival_s)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stderr=log, cwd=folder)
        deadline = time.monotonic() + 60
        while not (found := re.search(r"running on http://[^:]+:(\d+)", self.log.read_text())):
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)
        self.port = int(found[1])


@contextmanager
def connected(server: Server, *sent: bytes) -> Iterator[list[socket.socket]]:
    """A connection for each, on which so much is sent and no more."""
    with ExitStack() as stack:
        made = []
        for content in sent:
            made.append(stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=20)))
            made[-1].sendall(content)
        yield made


def heard(connection: socket.socket) -> bytes:
    """All that comes until the server closes."""
    found = b""
    try:
        while part := connection.recv(65536):
            found += part
    except ConnectionResetError:  # closed with something unread
        pass
    return found


def counted(server: Server, name: str) -> float:
    found = re.search(rf"^{name} (\S+)$", server.ask("GET", "/metrics").text, re.M)
    assert found
    return float(found[1])


def test_a_locked_cache_keeps_nobody_waiting(gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "cache.db"
    server = Server(tmp_path, "--model", gguf, "--budget-tokens", 24, "--cache", path)

    def expand(i: int) -> Reply:
        return server.post("/expand", query=f"moon {i}", deadline_ms=5000)

    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("PRAGMA locking_mode=EXCLUSIVE")  # readers are kept out, too
    holder.execute("BEGIN EXCLUSIVE")
    holder.execute("DELETE FROM models")
    with pytest.raises(sqlite3.OperationalError, match="locked"), sqlite3.connect(path, timeout=0) as other:
        other.execute("SELECT count(*) FROM answers")
    with ThreadPoolExecutor(16) as pool:
        asked = [pool.submit(expand, i) for i in range(48)]
        turns = 0
        while not all(one.done() for one in asked):
            assert server.ask("GET", "/health").status == 200
            turns += 1
    assert turns > 3
    for one in asked:
        reply = one.result()
        (found,) = reply.json["expansions"]
        assert reply.status == 200 and found["tokens"] > 0 and not found["cached"]
        assert found["finish_reason"] != "deadline"
    holder.close()
    time.sleep(1.1)  # then the cache is asked again
    queries = ["tides", "iron deficiency", "什么是基因"]
    first, again = (server.post("/expand", query=queries).json["expansions"] for _ in range(2))
    assert not any(found["cached"] for found in first) and all(found["cached"] for found in again)
    server.stop()


@pytest.mark.skipif(sys.platform == "win32", reason="has no such limit")
def test_unfinished_connections_take_no_place_from_others(gguf: Path, tmp_path: Path) -> None:
    server = OwnServer(tmp_path, gguf, files=100)
    with connected(server) as made, ExitStack() as stack:
        for _ in range(150):
            made.append(stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=20)))
            made[-1].send(HALF_HEADER)
        for _ in range(20):
            assert server.ask("GET", "/health").status == 200
            time.sleep(0.05)
        assert server.post("/expand", query="tides", deadline_ms=200).status == 200
        assert heard(made[0]) == b""  # the oldest made room
    log = server.log.read_text()
    assert "closed a connection: there are more than" in log and "Traceback" not in log
    assert len(log) < 2000
    server.stop()


def test_what_arrives_too_slowly_is_closed(gguf: Path, tmp_path: Path) -> None:
    server = OwnServer(tmp_path, gguf, arrival_s=1.0)
    start = time.perf_counter()
    kinds = [b"", HALF_HEADER, HALF_BODY, HEADER + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{"]
    with connected(server, *kinds * 5, HALF_HEADER) as made:
        *silent, dripping = made

        def drip() -> None:
            try:
                while True:
                    dripping.sendall(b"x")
                    time.sleep(0.1)
            except OSError:  # it is closed
                ended.append(time.perf_counter() - start)

        ended: list[float] = []
        thread = threading.Thread(target=drip)
        thread.start()
        assert server.post("/expand", query="tides", deadline_ms=200).status == 200
        assert {heard(connection) for connection in silent} == {b""}
        assert time.perf_counter() - start > 0.8
        thread.join(10)
        assert ended[0] > 0.8
    assert server.log.read_text().count("no whole request came within 1 s") <= 4  # one a second
    assert "Traceback" not in server.log.read_text()
    server.stop()


def test_the_answer_may_take_longer_than_the_request(gguf: Path, tmp_path: Path) -> None:
    server = OwnServer(tmp_path, gguf, arrival_s=0.2)
    start = time.perf_counter()
    reply = server.post("/expand", query=[f"a long tale {i}" for i in range(32)], deadline_ms=700)
    assert time.perf_counter() - start > 0.6
    assert reply.status == 200
    assert "deadline" in {found["finish_reason"] for found in reply.json["expansions"]}
    server.stop()


def test_two_requests_in_one_packet_are_answered(gguf: Path, tmp_path: Path) -> None:
    server = OwnServer(tmp_path, gguf, arrival_s=1.0)
    ask = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
    with connected(server, (ask + b"\r\n") * 2 + ask + b"Connection: close\r\n\r\n") as (one,):
        assert heard(one).count(b"HTTP/1.1 200 OK") == 3
    # The half that came with a whole one has its time, too.
    with connected(server, ask + b"\r\n" + HALF_BODY) as (one,):
        start = time.perf_counter()
        assert heard(one).count(b"HTTP/1.1 ") == 1
        assert time.perf_counter() - start > 0.8
    server.stop()


def test_half_requests_do_not_delay_the_end(gguf: Path, tmp_path: Path) -> None:
    server = OwnServer(tmp_path, gguf)
    replies: list[Reply] = []
    client = threading.Thread(
        target=lambda: replies.append(server.post("/expand", query="a long one", deadline_ms=1000))
    )
    with connected(server, *[HALF_HEADER, HALF_BODY] * 50) as made:
        client.start()
        while server.ask("GET", "/health").json["pending"] == 0:
            assert client.is_alive()
        server.stop()
        assert {heard(connection) for connection in made} == {b""}
    client.join()
    assert replies[0].status == 200 and replies[0].json["expansions"][0]["tokens"] > 0
    log = server.log.read_text()
    assert "no whole request came" not in log  # it would have waited for them
    assert "Traceback" not in log


def test_the_token_comes_before_the_body(gguf: Path, tmp_path: Path) -> None:
    server = Server(tmp_path, "--model", gguf, "--token", "geheim", "--budget-tokens", 4)
    for given in (b"", b"Authorization: Bearer guess\r\n", b"Authorization: Basic geheim\r\n"):
        with connected(server, HEADER + given + b"Content-Length: 20\r\n\r\n") as (one,):
            answer = one.recv(65536).lower()
            assert answer.startswith(b"http/1.1 401") and b"www-authenticate: bearer" in answer
    assert server.ask("POST", "/expand", b"no json").status == 401
    assert server.ask("POST", "/expand", {"query": "x"}, Authorization="bearer geheim").status == 200
    for path in ("/expand/stream?query=x", "/metrics", "/nothing"):
        assert server.ask("GET", path).status == 401
    for path in ("/health", "/docs", "/openapi.json"):
        assert server.ask("GET", path).status == 200
    server.stop()


def test_a_page_of_another_site_starts_nothing(gguf: Path, tmp_path: Path) -> None:
    server = Server(tmp_path, "--model", gguf, "--budget-tokens", 4)
    path = "/expand/stream?query=tides"
    foreign = [
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Origin": "https://evil.example"},
        {"Origin": f"http://localhost.evil.example:{server.port}"},
        {"Origin": "null"},
        {"Origin": "http://[::1"},
        {"Sec-Fetch-Site": "cross-site", "Origin": f"http://localhost:{server.port}"},
    ]
    for headers in foreign:
        assert server.ask("GET", path, **headers).status == 403, headers
        assert server.ask("POST", "/expand", {"query": "x"}, **headers).status == 403, headers
    assert counted(server, "qe_edge_queries_total") == 0
    own = [
        {},
        {"Sec-Fetch-Site": "none"},
        {"Sec-Fetch-Site": "same-origin", "Origin": f"http://127.0.0.1:{server.port}"},
        {"Origin": f"http://LOCALHOST:{server.port}"},
        {"Origin": f"http://[::1]:{server.port}"},
    ]
    for headers in own:
        assert server.ask("GET", path, **headers).status == 200, headers
        assert server.ask("GET", "/docs", **headers).status == 200, headers
    assert counted(server, "qe_edge_queries_total") == len(own)
    server.stop()


def test_where_any_name_serves_it_is_that_of_the_request(gguf: Path, tmp_path: Path) -> None:
    server = Server(tmp_path, "--model", gguf, "--host", "0.0.0.0", "--token", "geheim", "--budget-tokens", 4)
    known = {"Authorization": "Bearer geheim", "Host": "search.example"}
    for origin, status in (("https://search.example", 200), ("https://evil.example", 403), ("null", 403)):
        assert server.ask("POST", "/expand", {"query": "x"}, Origin=origin, **known).status == status
    server.stop()


def test_a_port_in_use_is_named_before_a_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        found = CliRunner().invoke(app, ["serve", "--port", str(port), "--model", "builtin:smollm2-135m"])
    assert isinstance(found.exception, BadArgument)
    assert f"can't listen on 127.0.0.1:{port}: Address already in use; choose another" in str(found.exception)
