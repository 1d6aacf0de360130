"""Expansions are written once, kept within bounds, and shared by threads and processes."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qe_edge.cache import ExpansionCache
from qe_edge.errors import BadInput


def test_what_was_put_is_there_for_everybody(tmp_path: Path) -> None:
    cache = ExpansionCache(tmp_path / "new" / "cache.db")
    assert cache.get("a", str) is None
    cache.put("a", "moon")
    cache.put("a", "sun")
    assert cache.get("a", str) == ExpansionCache(cache.path).get("a", str) == "sun"
    assert cache.get("a", int) is None  # another version's


def test_the_oldest_go_when_there_is_no_room(tmp_path: Path) -> None:
    cache = ExpansionCache(tmp_path / "cache.db", max_mb=0.3)
    cache.put("used", "x" * 1000)
    for i in range(1000):
        cache.put(str(i), "x" * 1000)
        if i % 20 == 0:
            assert cache.get("used", str)
    assert cache.get("999", str) and cache.get("0", str) is None
    kept = sum(cache.get(str(i), str) is not None for i in range(1000))
    assert 100 < kept < 300
    assert cache.path.stat().st_size < 0.4e6
    assert cache.get("used", str)


def test_one_that_is_too_large_is_not_kept_for_ever(tmp_path: Path) -> None:
    cache = ExpansionCache(tmp_path / "cache.db", max_mb=0.1)
    cache.put("large", "x" * 500_000)
    assert cache.get("large", str) is None
    cache.put("small", "x")
    assert cache.get("small", str) == "x"


WRITE = """
import sys
from qe_edge.cache import ExpansionCache
cache = ExpansionCache(sys.argv[1])
for i in range(100):
    cache.put(f"{sys.argv[2]} {i}", sys.argv[2])
    assert cache.get(f"{sys.argv[2]} {i}", str) == sys.argv[2]
"""


def test_processes_and_threads_share_it(tmp_path: Path) -> None:
    path = tmp_path / "cache.db"
    command = [sys.executable, "-c", WRITE, str(path)]
    children = [subprocess.Popen([*command, name]) for name in "abc"]
    cache = ExpansionCache(path)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: cache.put(f"thread {i}", i), range(200)))
    assert [child.wait() for child in children] == [0, 0, 0]
    assert all(cache.get(f"{name} {i}", str) == name for name in "abc" for i in range(100))
    assert [cache.get(f"thread {i}", int) for i in range(200)] == list(range(200))


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no database, but long enough to be looked at\n" * 100)
    with pytest.raises(BadInput, match=r"notes.txt.*can't be used as a cache"):
        ExpansionCache(tmp_path / "notes.txt")
    with sqlite3.connect(tmp_path / "other.db") as db:
        db.execute("CREATE TABLE answers (id INTEGER)")
    with pytest.raises(BadInput, match=r"other.db.*can't be used as a cache"):
        ExpansionCache(tmp_path / "other.db")


def test_a_models_digest_is_computed_once_for_each_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qe_edge import cache as module

    read: list[Path] = []
    own = module.sha256
    monkeypatch.setattr(module, "sha256", lambda path: (read.append(path), own(path))[1])
    cache = ExpansionCache(tmp_path / "cache.db")
    model, folder = tmp_path / "student.gguf", tmp_path / "mlx"
    model.write_bytes(b"one")
    folder.mkdir()
    (folder / "weights").write_bytes(b"one")
    first, of_folder = cache.digest(model), cache.digest(folder)
    assert cache.digest(model) == first and cache.digest(folder) == of_folder and first != of_folder
    assert read == [model, folder]
    (folder / "weights").write_bytes(b"two")
    os.utime(folder / "weights", ns=(time.time_ns(), time.time_ns() + 10**9))
    assert cache.digest(folder) != of_folder
    assert read == [model, folder, folder]
