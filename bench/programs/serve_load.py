"""`qe-edge serve` under load: many clients on this machine, with and without batching.

    python -m qe_edge.bench.programs.serve_load MODEL.gguf --clients 64 --seconds 60

Each way is a server of its own, one after the other, asked by the same clients. A client sends one query
after the other, each different from all before; told that the queue is full, it waits as long as it was told.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import msgspec
import numpy as np
import psutil
import typer

from qe_edge.console import note
from qe_edge.errors import QeEdgeError
from qe_edge.retrieval.datasets import load_dataset
from qe_edge.work.files import write_json


class Load(msgspec.Struct, frozen=True):
    """What clients saw: replies by status ("error" for none), seconds of the good ones, and the memory."""

    parallel: int
    seconds: float
    replies: dict[str, int]
    latencies: list[float]
    tokens: int
    memory_mb: list[float]


def main(
    model: Annotated[Path, typer.Argument(help="A student's GGUF.")],
    dataset: Annotated[str, typer.Option("--dataset", "-d", help="Whose queries are asked.")] = "demo-en",
    clients: Annotated[int, typer.Option(min=1)] = 64,
    seconds: Annotated[float, typer.Option(min=1)] = 60,
    parallel: Annotated[
        list[int] | None, typer.Option(help="Queries decoded together, a server each (default: 1, 16).")
    ] = None,
    queue: Annotated[int, typer.Option(min=0, help="Queries that may wait beside them.")] = 32,
    deadline_ms: Annotated[float, typer.Option(min=1)] = 60_000,
    budget_tokens: Annotated[int | None, typer.Option(min=1)] = None,
    out: Annotated[Path | None, typer.Option(help="Write all that was measured to this JSON file.")] = None,
) -> None:
    """Print a row for each server."""
    queries = list(load_dataset(dataset).queries.values())
    settings = ["--queue", str(queue), "--deadline-ms", str(deadline_ms)]
    settings += ["--budget-tokens", str(budget_tokens)] if budget_tokens else []
    found = []
    for together in parallel or [1, 16]:
        note(f"{together} at a time")
        found.append(_load(model, queries, clients, seconds, together, settings))
    print(f"{model.name}, {clients} clients for {seconds:g} s\n")
    columns = [
        "at a time",
        "answered",
        "429",
        "errors",
        "queries/s",
        "tokens/s",
        "p50 s",
        "p95 s",
        "MB, first",
        "last",
    ]
    print(f"| {' | '.join(columns)} |")
    print("| --: " * len(columns) + "|")
    for load in found:
        good, refused = load.replies.get("200", 0), load.replies.get("429", 0)
        middle, late = np.percentile(load.latencies, [50, 95]) if load.latencies else (np.nan, np.nan)
        print(
            f"| {load.parallel} | {good} | {refused} | {sum(load.replies.values()) - good - refused} "
            f"| {good / load.seconds:.2f} | {load.tokens / load.seconds:.0f} | {middle:.2f} | {late:.2f} "
            f"| {load.memory_mb[0]:.0f} | {load.memory_mb[-1]:.0f} |"
        )
    if out:
        write_json(out, found)


def _load(
    model: Path, queries: list[str], clients: int, seconds: float, parallel: int, settings: list[str]
) -> Load:
    command = [sys.executable, "-P", "-m", "qe_edge", "serve", "--model", str(model), "--port", "0"]
    with TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("wb") as file:
            server = subprocess.Popen([*command, "--parallel", str(parallel), *settings], stderr=file)
        try:
            port = _port(server, log)
            for number in range(2 * parallel):  # makes room for all that are decoded together
                _ask(port, queries[number % len(queries)])
            replies: Counter[str] = Counter()
            latencies: list[float] = []
            tokens, memory = 0, []
            start = time.perf_counter()
            end = start + seconds

            def client(number: int) -> tuple[Counter[str], list[float], int]:
                seen: Counter[str] = Counter()
                took, written, turn = [], 0, 0
                while time.perf_counter() < end:
                    turn += 1
                    asked = time.perf_counter()
                    query = queries[(number + turn * clients) % len(queries)]
                    status, wait, count = _ask(port, f"{query} {number} {turn}")
                    seen[status] += 1
                    if status == "200":
                        took.append(time.perf_counter() - asked)
                        written += count
                    time.sleep(min(wait, max(0.0, end - time.perf_counter())))
                return seen, took, written

            with ThreadPoolExecutor(clients) as pool:
                running = [pool.submit(client, number) for number in range(clients)]
                process = psutil.Process(server.pid)
                while time.perf_counter() < end:
                    memory.append(process.memory_info().rss / 1e6)
                    time.sleep(1)
                for done in running:
                    seen, took, written = done.result()
                    replies += seen
                    latencies += took
                    tokens += written
            lasted = time.perf_counter() - start
        finally:
            server.terminate()
            server.wait(60)
    return Load(parallel, lasted, dict(replies), latencies, tokens, memory)


def _port(server: subprocess.Popen[bytes], log: Path) -> int:
    """Wait until it listens."""
    while not (found := re.search(r"running on http://[^:]+:(\d+)", log.read_text())):
        if server.poll() is not None:
            raise QeEdgeError(f"the server ended: {log.read_text()}")
        time.sleep(0.05)
    return int(found[1])


def _ask(port: int, query: str) -> tuple[str, float, int]:
    """Status, seconds to wait, and tokens that were written."""
    try:
        connection = HTTPConnection("127.0.0.1", port, timeout=120)
        connection.request(
            "POST", "/expand", json.dumps({"query": query}), {"Content-Type": "application/json"}
        )
        reply = connection.getresponse()
        body = json.loads(reply.read())
        connection.close()
    except (OSError, HTTPException, ValueError):
        return "error", 0.1, 0
    if reply.status != 200:
        return str(reply.status), float(reply.headers.get("Retry-After", 0)), 0
    return "200", 0.0, body["expansions"][0]["tokens"]


if __name__ == "__main__":
    typer.run(main)
