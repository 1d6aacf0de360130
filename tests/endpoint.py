"""A chat-completions endpoint for the tests, which fails as real ones do."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Fault = str | tuple[int, Any] | None
"""By name; or a status with the JSON value of its body; or none."""
FAULTS = (
    "429",
    "429 with Retry-After",
    "500",
    "503",
    "hang",
    "cut",
    "not JSON",
    "another type",
    "not UTF-8",
)


def one_in_three(number: int, _: dict[str, Any]) -> Fault:
    """Every third request fails, each time in the next way."""
    return FAULTS[number // 3 % len(FAULTS)] if number % 3 == 2 else None


class Endpoint:
    """`answers` counts the requests that were answered well, by (user message, seed)."""

    def __init__(self, fault: Callable[[int, dict[str, Any]], Fault], text: Callable[[dict[str, Any]], str]):
        self.fault, self.text = fault, text
        self.answers: Counter[tuple[str, int]] = Counter()
        self.requests: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.faults: Counter[str] = Counter()
        self.flying = self.most_flying = 0
        self.finish_reason = "stop"
        self.usage: dict[str, int] | None = {"prompt_tokens": 100, "completion_tokens": 50}
        self.lock = threading.Lock()
        self.released = threading.Event()  # ends the hanging requests when the test does
        self.url = ""
        self.models: list[str] = []  # that are listed, if any are


@contextmanager
def serve(
    fault: Callable[[int, dict[str, Any]], Fault] = lambda number, body: None,
    text: Callable[[dict[str, Any]], str] = lambda body: (
        f"Moon gravity pulls water, take {body.get('seed')}."
    ),
) -> Iterator[Endpoint]:
    """Run an endpoint on a free port of this machine."""
    endpoint = Endpoint(fault, text)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            names = endpoint.models if self.path == "/v1/models" else []
            listed = json.dumps({"object": "list", "data": [{"id": name} for name in names]}).encode()
            self.send(200 if names else 404, listed)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with endpoint.lock:
                fault = endpoint.fault(len(endpoint.requests), body)
                endpoint.requests.append(body | {"authorization": self.headers["Authorization"]})
                endpoint.faults[str(fault or "")] += 1
                endpoint.paths.append(self.path)
                endpoint.headers.append(dict(self.headers))
                endpoint.flying += 1
                endpoint.most_flying = max(endpoint.most_flying, endpoint.flying)
            try:
                self.answer(body, fault)
            except BrokenPipeError:  # the client was killed
                pass
            finally:
                with endpoint.lock:
                    endpoint.flying -= 1

        def answer(self, body: dict[str, Any], fault: Fault) -> None:
            completion = {
                "id": "x",
                "object": "chat.completion",
                "created": 0,
                "model": body["model"],
                "choices": [
                    {
                        "index": 0,
                        "finish_reason": endpoint.finish_reason,
                        "message": {"role": "assistant", "content": endpoint.text(body)},
                    }
                ],
                "usage": endpoint.usage,
            }
            content = json.dumps(completion).encode()
            if fault is None:
                with endpoint.lock:
                    endpoint.answers[body["messages"][-1]["content"], body.get("seed", -1)] += 1
                self.send(200, content)
            elif isinstance(fault, tuple):
                self.send(fault[0], json.dumps(fault[1]).encode())
            elif fault[:3].isdecimal():
                code, _, message = fault.partition(" ")
                waits = {"with Retry-After": "0.2", "come back tomorrow": "86400"}
                headers = {"Retry-After": waits[message]} if message in waits else {}
                error = {"error": {"message": message or "no", "code": message or None}}
                self.send(int(code), json.dumps(error).encode(), headers)
            elif fault == "hang":
                endpoint.released.wait(60)
            elif fault == "cut":
                self.send(200, content[:20], {"Content-Length": str(len(content))})
            elif fault == "not JSON":
                self.send(200, content[:-9])
            elif fault == "another type":
                self.send(200, b"<html>busy</html>", {"Content-Type": "text/html"})
            elif fault == "not UTF-8":
                self.send(200, content.replace(b"Moon", b"M\xff\xfen"))

        def send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            defaults = {"Content-Type": "application/json", "Content-Length": str(len(content))}
            for name, value in (defaults | (headers or {})).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)
            self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    # A short look-around, or every test would wait half a second for the end.
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    endpoint.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield endpoint
    finally:
        endpoint.released.set()
        server.shutdown()
        server.server_close()
