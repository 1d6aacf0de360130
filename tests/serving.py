"""A real `qe-edge serve`, and how a test asks it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, NamedTuple


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)


class Server:
    """A running `qe-edge serve`."""

    def __init__(self, folder: Path, *arguments: object):
        command = [sys.executable, "-m", "qe_edge", "serve", "--port", "0", *map(str, arguments)]
        self.log = folder / "server.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stderr=log, cwd=folder)
        deadline = time.monotonic() + 60
        while not (found := re.search(r"running on http://[^:]+:(\d+)", self.log.read_text())):
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)
        self.port = int(found[1])

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Reply:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, content, {"Content-Type": "application/json", **headers})
        response = connection.getresponse()
        reply = Reply(response.status, dict(response.headers), response.read().decode())
        connection.close()
        return reply

    def post(self, path: str, **body: Any) -> Reply:
        return self.ask("POST", path, body)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)
