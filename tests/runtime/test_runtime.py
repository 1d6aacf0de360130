"""What an app relies on: deadlines, streams, asyncio, the gate, early stops and the cache."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from engines import says, scripted

from qe_edge import Expander, Gate
from qe_edge.errors import BadArgument, BadInput, QeEdgeError
from qe_edge.student.gate import OPEN

pytest.importorskip("llama_cpp")
QUERIES = ["what causes tides", "潮汐是怎么形成的", "iron deficiency", "how does dns work", "moon", "sea"]


def test_the_gate_spares_the_student_or_refuses_what_it_wrote(gguf: Path) -> None:
    with scripted(gguf, gate=Gate(max_words=3, clear_lead=0.5)) as expander:
        for expanded in (expander.expand("one two three four"), expander.expand("tides", scores=[9.0, 1.0])):
            assert expanded.fallback and not expanded.text and not expanded.tokens
            assert expanded.finish_reason == "skipped"
        says(expander, "moon moon moon moon")
        refused = expander.expand("tides")
    assert refused.fallback == "the text repeats itself: 1 different words of 4"
    assert (refused.text, refused.rejected) == ("", "moon moon moon moon")
    assert refused.terms() == {"tide": 1.0} and refused.words() == {"tides": 1.0}


def test_a_query_beyond_the_context_is_searched_as_it_is(gguf: Path) -> None:
    with Expander.load(gguf) as expander:
        assert "tokens, over 512" in expander.expand("x" * 10_000).fallback
        assert expander.expand("word " * 5000).fallback == "the query has 5000 words, over 256"
        with pytest.raises(BadInput, match="the query is empty"):
            expander.expand(" \0 ")


def test_at_the_deadline_there_is_what_there_is(gguf: Path) -> None:
    with scripted(gguf, gate=OPEN) as expander:
        nothing = expander.expand("tides", deadline_ms=0)
        assert nothing.fallback == "the deadline passed before the first whole word"
        assert (nothing.text, nothing.tokens, nothing.finish_reason) == ("", 0, "deadline")
        says(expander, "moon sun sea wind ", pause=0.03, end=False)
        some = expander.expand("tides", deadline_ms=200)
        assert some.finish_reason == "deadline" and not some.fallback
        assert 1 <= some.tokens <= 7 and "moon sun sea wind moon sun".startswith(some.text[:8])
        assert set(some.text.split()) <= {"moon", "sun", "sea", "wind"}  # no half of one
        # The place is free again.
        assert expander.expand("tides", deadline_ms=100).finish_reason == "deadline"


def test_what_the_deadline_cut_is_not_blamed_on_the_student(gguf: Path) -> None:
    with scripted(gguf) as expander:
        says(expander, "what causes tides? " * 20 + "the moon", pause=0.02)
        cut = expander.expand("what causes tides", deadline_ms=200)
        assert cut.fallback == "the deadline passed; so far, the text adds nothing to the query"
        assert cut.finish_reason == "deadline" and cut.rejected.startswith("what")


def test_a_deadline_holds_while_others_are_written(gguf: Path) -> None:
    with scripted(gguf, gate=OPEN, budget_tokens=40) as expander:
        says(expander, "moon sun sea wind ", pause=0.02, end=False)  # one at a time
        with ThreadPoolExecutor(3) as pool:
            slow = pool.submit(expander.expand, "tides")
            time.sleep(0.1)
            late = pool.submit(expander.expand, "moon", deadline_ms=100).result()
            assert not slow.done()
            assert late.finish_reason == "deadline" and late.tokens == 0
            assert slow.result().tokens == 40


def test_a_stream_is_the_text_in_pieces(gguf: Path) -> None:
    with scripted(gguf, gate=OPEN, budget_tokens=24) as expander:
        for query in QUERIES:
            stream = expander.stream(query)
            pieces = list(stream)
            assert stream.expanded.text == expander.expand(query).text == " ".join("".join(pieces).split())
        says(expander, "潮汐 and 🌊 tides")  # of several tokens each
        stream = expander.stream("moon")
        pieces = list(stream)
        assert "".join(pieces) == stream.expanded.text == "潮汐 and 🌊 tides"
        assert len(pieces) > 4 and not any("\ufffd" in piece for piece in pieces)
        says(expander, "moon sun sea wind ", end=False)
        given_up = iter(expander.stream("tides"))
        next(given_up)
        given_up.close()  # type: ignore[attr-defined]
        assert expander.expand("sea").tokens == 24
        stopped = expander.stream("tides")
        piece = next(text for text in accumulate(stopped) if " " in text)  # as a loop that is broken off
        # What is written by then can be searched with, and read for.
        assert stopped.expanded.text.startswith(piece.split()[0]) and stopped.expanded.tokens < 24
        assert stopped.expanded.finish_reason == "broken off"


def test_a_refused_stream_says_so_at_its_end(gguf: Path) -> None:
    with scripted(gguf) as expander:
        says(expander, "tides tides")
        stream = expander.stream("tides")
        assert "".join(stream) == "tides tides"
        assert stream.expanded.fallback == "the text adds nothing to the query"


def test_asyncio_gets_the_same(gguf: Path) -> None:
    with Expander.load(gguf, gate=OPEN, budget_tokens=12, parallel=4) as expander:
        alone = [expander.expand(query).text for query in QUERIES]

        async def ask() -> None:
            together = await asyncio.gather(*map(expander.aexpand, QUERIES))
            assert [expanded.text for expanded in together] == alone
            assert [expanded.text async for expanded in expander.aexpand_many(QUERIES, parallel=2)] == alone
            *pieces, whole = [piece async for piece in expander.astream(QUERIES[0])]
            assert " ".join("".join(map(str, pieces)).split()) == str(whole) == alone[0]

        asyncio.run(ask())


def test_deadlines_hold_with_more_tasks_than_threads(gguf: Path) -> None:
    with scripted(gguf, gate=OPEN, budget_tokens=500) as expander:
        says(expander, "moon sun sea wind ", pause=0.02, end=False)

        async def ask() -> None:
            long = [asyncio.create_task(expander.aexpand("tides")) for _ in range(8)]
            await asyncio.sleep(0.2)
            late = await asyncio.gather(*(expander.aexpand("moon", deadline_ms=300) for _ in range(8)))
            assert not any(task.done() for task in long)
            assert {expanded.fallback for expanded in late} == {
                "the deadline passed before the first whole word"
            }
            for task in long:
                task.cancel()
            await asyncio.gather(*long, return_exceptions=True)

        asyncio.run(ask())


def test_a_cancelled_task_is_no_longer_written(gguf: Path) -> None:
    with scripted(gguf, gate=OPEN, budget_tokens=500) as expander:
        says(expander, "moon sun sea wind ", pause=0.02, end=False)

        async def ask() -> None:
            task = asyncio.create_task(expander.aexpand("tides"))
            await asyncio.sleep(0.2)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            # The other one would take ten seconds more.
            assert (await expander.aexpand("moon", deadline_ms=3000)).tokens > 3

        asyncio.run(ask())


def test_an_expansion_ends_when_it_brings_nothing_new(gguf: Path) -> None:
    with scripted(gguf, gate=OPEN, stop_when_dry=12, budget_tokens=200) as expander:
        says(expander, "moon sun sea wind ", end=False)
        expanded = expander.expand("tides")
        lap = len(expander.backend.tokenize("moon sun sea wind ", False))
        assert expanded.finish_reason == "dry"
        assert lap + 12 <= expanded.tokens <= lap + 16
        # One that brings new words all the time isn't ended.
        says(expander, " ".join(f"w{i}" for i in range(100)))
        assert expander.expand("tides").finish_reason == "length"
    with pytest.raises(BadArgument, match="stop_when_dry"):
        scripted(gguf, stop_when_dry=0)


def test_an_expansion_is_written_once(gguf: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"cache": tmp_path / "cache.db", "gate": OPEN, "budget_tokens": 12}
    with Expander.load(gguf, **settings) as one, Expander.load(gguf, **settings) as other:
        first = one.expand("tides")
        again = other.expand("  tides\n")
        assert (first.cached, again.cached) == (False, True)
        assert (again.text, again.token_ids, again.finish_reason) == (
            first.text, first.token_ids, first.finish_reason,
        )  # fmt: skip
        assert list(other.stream("tides")) == [first.text]
        assert [expanded.cached for expanded in other.expand_many(["moon", "tides"])] == [False, True]
        assert not other.expand("tides", temperature=1.0).cached
        assert not other.expand("Tides").cached
    with Expander.load(gguf, **{**settings, "budget_tokens": 11}) as shorter:
        assert not shorter.expand("tides").cached


def test_what_was_rejected_is_kept_and_what_was_cut_is_not(gguf: Path, tmp_path: Path) -> None:
    with scripted(gguf, cache=tmp_path / "cache.db") as expander:
        says(expander, "tides tides")
        first, again = expander.expand("tides"), expander.expand("tides")
        assert (first.cached, again.cached) == (False, True)
        assert again.fallback == first.fallback == "the text adds nothing to the query"
        says(expander, "moon sun sea wind ", pause=0.02, end=False)
        assert expander.expand("sea", deadline_ms=100).finish_reason == "deadline"
        says(expander, "moon and wind")
        assert not expander.expand("sea").cached
        assert expander.expand("sea").cached


def test_a_stream_that_was_overtaken_has_its_end(gguf: Path) -> None:
    with Expander.load(gguf, gate=OPEN, budget_tokens=24) as expander:
        stream = expander.stream("moon")
        assert "".join(stream) == "".join(expander.stream("moon"))
        slow = expander.stream("moon")
        pieces = iter(slow)
        first = next(pieces)
        whole = slow.expanded.text  # somebody else writes the rest
        assert " ".join((first + "".join(pieces)).split()) == whole


def test_cancelling_many_ends_them(gguf: Path) -> None:
    with scripted(gguf, gate=OPEN, budget_tokens=500) as expander:
        says(expander, "moon sun sea wind ", pause=0.02, end=False)

        async def ask() -> None:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    async for _ in expander.aexpand_many(QUERIES):
                        pass
            # The other one would take ten seconds more.
            assert (await expander.aexpand("moon", deadline_ms=3000)).tokens > 3

        asyncio.run(ask())


def test_closing_does_not_wait_for_those_who_wait(gguf: Path) -> None:
    expander = scripted(gguf, gate=OPEN, budget_tokens=1000)
    says(expander, "moon sun sea wind ", pause=0.01, end=False)
    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(expander.expand, query) for query in QUERIES[:4]]
        time.sleep(0.2)
        expander.close()
        for asked in running:
            with pytest.raises(QeEdgeError, match="the model was closed"):
                asked.result()
    expander.close()
    expander.forget()
    with pytest.raises(QeEdgeError, match="the model was closed"):
        expander.expand("tides")


def test_where_memory_is_short_fewer_are_decoded_together(
    gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Expander.load(gguf, gate=OPEN, budget_tokens=8) as expander:
        alone = [expander.expand(query).text for query in QUERIES]
        made, own = [], type(expander.backend).batch

        def batch(backend: Any, slots: int) -> Any:
            made.append(slots)
            if slots > 2:
                raise QeEdgeError("memory is short")
            return own(backend, slots)

        monkeypatch.setattr(type(expander.backend), "batch", batch)
        assert [found.text for found in expander.expand_many(QUERIES)] == alone
        assert made == [16, 8, 4, 2]


def test_a_cache_in_use_is_not_in_the_way(gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "cache.db"
    with Expander.load(gguf, gate=OPEN, budget_tokens=8, cache=path) as expander:
        first = expander.expand("tides")
        with sqlite3.connect(path) as other:
            other.execute("BEGIN IMMEDIATE")
            assert expander.expand("tides").text == first.text
            assert expander.expand("tides").cached
            assert expander.expand("moon").tokens
        path.write_bytes(b"no database any more" * 100)
        assert expander.expand("tides").text == first.text
