"""Expansions are written once, kept within bounds, and shared by threads and processes."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from qe_edge import Expander
from qe_edge.backends.llama_batch import LlamaBatch
from qe_edge.errors import BadInput, QeEdgeError
from qe_edge.runtime.cache import ExpansionCache
from qe_edge.student.gate import OPEN


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
from qe_edge.runtime.cache import ExpansionCache
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
    for table in ("answers (id INTEGER)", "models (id INTEGER)", "mine (a)"):
        path = tmp_path / f"{table[:3]}.db"
        with sqlite3.connect(path) as db:
            db.execute(f"CREATE TABLE {table}")
        before = path.read_bytes()
        name = table.split(" ")[0]
        with pytest.raises(BadInput, match=rf"is another program's database, with a table '{name}'"):
            ExpansionCache(path)
        assert path.read_bytes() == before  # not a byte of it is touched


def test_a_models_digest_is_computed_once_for_each_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qe_edge.runtime import cache as module

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


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Another program has the file for itself, so that nobody else reads it either."""
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("PRAGMA locking_mode=EXCLUSIVE")
    holder.execute("BEGIN EXCLUSIVE")
    holder.execute("DELETE FROM models")
    try:
        yield
    finally:
        holder.close()


def test_a_locked_one_is_waited_for_as_long_as_is_said(tmp_path: Path) -> None:
    cache = ExpansionCache(tmp_path / "cache.db")
    cache.put("a", "moon")
    with locked(cache.path):
        for call in (lambda: cache.get("a", str, wait=0.1), lambda: cache.put("a", "sun", wait=0.1)):
            with pytest.raises(BadInput, match="locked"):
                call()
    assert cache.get("a", str) == "moon"


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """For how many seconds each call would wait for the cache."""
    found: list[float] = []
    connected = ExpansionCache._connected

    def noted(cache: ExpansionCache, *, wait: float = 1.0) -> Any:
        found.append(wait)
        return connected(cache, wait=wait)

    monkeypatch.setattr(ExpansionCache, "_connected", noted)
    return found


def test_many_queries_wait_for_a_locked_one_as_long_as_one_does(
    gguf: Path, tmp_path: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cache.db"
    monkeypatch.setattr("qe_edge.runtime.writer.PAUSE", 60.0)
    with Expander.load(gguf, gate=OPEN, budget_tokens=2, cache=path) as expander:
        queries = [f"moon {i}" for i in range(40)]
        texts = [expanded.text for expanded in expander.expand_many(queries)]
        with locked(path):
            waits.clear()
            again = list(expander.expand_many(queries))
        assert sum(waits) == pytest.approx(0.1) and len(waits) == 80
        assert [expanded.text for expanded in again] == texts
        assert not any(expanded.cached for expanded in again)
        expander._writer._patient_from = 0.0  # the pause is over
        assert expander.expand(queries[0]).cached


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache is waited for so long that a slow machine doesn't look like it."""
    monkeypatch.setattr("qe_edge.runtime.writer.PATIENCE", 1.0)


def test_a_deadline_holds_beside_a_locked_one(
    gguf: Path, tmp_path: Path, patient: None, waits: list[float]
) -> None:
    path = tmp_path / "cache.db"
    with Expander.load(gguf, gate=OPEN, budget_tokens=200, cache=path) as expander, locked(path):
        waits.clear()
        assert expander.expand("tides", deadline_ms=20).finish_reason == "deadline"
        assert len(waits) == 1 and waits[0] <= 0.02


def test_the_loop_goes_on_while_the_cache_is_waited_for(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, held = tmp_path / "cache.db", Event()
    own = ExpansionCache.get

    def get(cache: ExpansionCache, *key: Any, **settings: Any) -> Any:
        assert held.wait(30), "the loop waits for the cache"
        return own(cache, *key, **settings)

    monkeypatch.setattr(ExpansionCache, "get", get)

    async def ask(expander: Expander, *, way: str) -> None:
        """The cache is asked until the loop has had some turns."""
        held.clear()

        async def work() -> list[str]:
            if way == "aexpand":
                return [(await expander.aexpand("tides")).text]
            if way == "aexpand_many":
                return [expanded.text async for expanded in expander.aexpand_many(["tides"])]
            return [str(piece) async for piece in expander.astream("tides")][-1:]

        task = asyncio.create_task(work())
        for _ in range(20):
            await asyncio.sleep(0.001)
        assert not task.done()
        held.set()
        assert await task == [text]

    with Expander.load(gguf, gate=OPEN, budget_tokens=4) as plain:
        text = plain.expand("tides").text
    for way in ("aexpand", "aexpand_many", "astream"):
        with Expander.load(gguf, gate=OPEN, budget_tokens=4, cache=path) as expander:
            asyncio.run(ask(expander, way=way))


def test_what_is_cancelled_before_it_is_asked_is_not_written(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cache.db"
    monkeypatch.setattr("qe_edge.runtime.writer.PATIENCE", 60.0)  # longer than any machine takes to cancel

    async def cancel(expander: Expander) -> None:
        async def drain() -> None:
            async for _ in expander.astream("moon"):
                pass

        async def drain_many() -> None:
            async for _ in expander.aexpand_many(["sea", "wind"]):
                pass

        with locked(path):
            tasks = [asyncio.create_task(work) for work in (expander.aexpand("tides"), drain(), drain_many())]
            await asyncio.sleep(0.1)  # the cache is waited for
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(result) for result in results] == [asyncio.CancelledError] * 3
        assert (await expander.aexpand("sun")).tokens == 4
        assert len(written) == 1

    written: list[Any] = []
    add = LlamaBatch.add

    def counted(batch: LlamaBatch, prompt: Any, **settings: Any) -> int:
        written.append(prompt)
        return add(batch, prompt, **settings)

    monkeypatch.setattr(LlamaBatch, "add", counted)
    with Expander.load(gguf, gate=OPEN, budget_tokens=4, cache=path) as expander:
        asyncio.run(cancel(expander))


def test_errors_come_from_the_await(gguf: Path) -> None:
    async def ask(expander: Expander) -> None:
        for deadline in (None, 0, 1e9):
            with pytest.raises(TypeError, match="a query must be a str, not int"):
                await expander.aexpand(5, deadline_ms=deadline)  # type: ignore[arg-type]
            with pytest.raises(BadInput, match="the query is empty"):
                await expander.aexpand(" ", deadline_ms=deadline)
            with pytest.raises(BadInput, match="the query is empty"):
                async for _ in expander.astream(" ", deadline_ms=deadline):
                    pass
        with pytest.raises(BadInput, match="the query is empty"):
            async for _ in expander.aexpand_many(["tides", " "]):
                pass
        expander.close()
        with pytest.raises(QeEdgeError, match="the model was closed"):
            await expander.aexpand("tides")

    with Expander.load(gguf, gate=OPEN, budget_tokens=4) as expander:
        asyncio.run(ask(expander))


def test_what_is_only_unreadable_here_is_another_programs_and_stays(tmp_path):
    path = tmp_path / "app.db"
    for schema in ("CREATE TABLE notes (x TEXT COLLATE own)", "CREATE VIEW answers AS SELECT 1 AS a"):
        with closing(sqlite3.connect(path)) as app:
            app.create_collation("own", lambda a, b: (a > b) - (a < b))
            app.execute("PRAGMA journal_mode=WAL")
            app.execute(schema)
            if "notes" in schema:
                app.execute("CREATE INDEX by_x ON notes (x)")
                app.execute("INSERT INTO notes VALUES ('precious')")
            app.commit()
            with pytest.raises(BadInput):
                ExpansionCache(path)
            assert sorted(file.name for file in tmp_path.iterdir()) == ["app.db", "app.db-shm", "app.db-wal"]
            if "notes" in schema:
                assert app.execute("SELECT x FROM notes").fetchall() == [("precious",)]
        path.unlink()


def test_what_was_set_aside_before_stays(tmp_path, capsys):
    path = tmp_path / "x.db"
    (tmp_path / "x.db.damaged").write_text("an earlier one")
    ExpansionCache(path).put("k", {"text": "moon"})
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA journal_mode=DELETE")
    content = bytearray(path.read_bytes())
    content[100:2000] = bytes(1900)
    path.write_bytes(bytes(content))
    ExpansionCache(path)
    assert "it is kept as x.db.damaged1, and a new cache is begun" in capsys.readouterr().err
    assert (tmp_path / "x.db.damaged").read_text() == "an earlier one"
    assert (tmp_path / "x.db.damaged1").read_bytes() == bytes(content)


@pytest.mark.parametrize("seed", range(12))
def test_a_damaged_cache_is_set_aside_or_refused_and_never_fatal(tmp_path, seed, capsys):
    import random

    path, chance = tmp_path / "x.db", random.Random(seed)
    cache = ExpansionCache(path)
    for number in range(50):
        cache.put(f"k{number}", {"text": "the moon " * 20})
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        db.execute("PRAGMA journal_mode=DELETE")
    content = bytearray(path.read_bytes())
    for _ in range(chance.choice([3, 50, 2000])):
        # behind the words that make it an SQLite file
        content[chance.randrange(16, 4096 if seed % 2 else len(content))] = chance.randrange(256)
    path.write_bytes(bytes(content))
    try:
        cache = ExpansionCache(path)
    except BadInput:  # what says that it is a cache is damaged, too: it stays where it is
        assert path.read_bytes() == bytes(content)
        return
    for number in range(50):
        with suppress(BadInput):
            cache.get(f"k{number}", dict)
    if (tmp_path / "x.db.damaged").exists():
        assert "x.db is damaged; it is kept as x.db.damaged" in capsys.readouterr().err
        assert (tmp_path / "x.db.damaged").read_bytes() == bytes(content)
        cache.put("new", {"a": 1})
        assert cache.get("new", dict) == {"a": 1}
