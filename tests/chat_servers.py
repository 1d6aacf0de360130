"""Servers of others on loopback: chat programs that know nothing of us."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SERVER = """
import runpy
import llama_cpp
from qe_edge.backends.amx import kept_off_amx
with kept_off_amx(llama_cpp):
    runpy.run_module("llama_cpp.server", run_name="__main__", alter_sys=True)
"""


@contextmanager
def llama_cpp_server(model: Path) -> Iterator[str]:
    """Its URL, as an OpenAI client wants it."""
    pytest.importorskip("llama_cpp.server.app", reason="needs llama-cpp-python[server]")
    # One thread: several that wait for each other take a minute a token beside other work.
    with _running("-c", SERVER, "--model", str(model), "--n_threads", "1") as url:
        yield url


@contextmanager
def mlx_lm_server(model: Path) -> Iterator[str]:
    """The URL of mlx-lm's own server."""
    with _running("-m", "mlx_lm", "server", "--model", str(model)) as url:
        yield url


@contextmanager
def _running(*arguments: str) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, *arguments, "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        url = f"http://127.0.0.1:{port}/v1"
        _wait_until_up(url, server)
        yield url
    finally:
        server.kill()
        server.wait()


def _wait_until_up(url: str, server: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        assert server.poll() is None, "the server ended"
        try:
            with urllib.request.urlopen(f"{url}/models"):
                return
        except OSError:
            time.sleep(0.1)
    raise AssertionError("the server did not start")
