"""Many queries at once: real llama.cpp, in one batch or in many threads, and the answers of one by one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from signal import SIGINT, default_int_handler, pthread_kill, signal
from threading import Event, Thread, main_thread
from time import sleep

import pytest

from qe_edge import Expander
from qe_edge.backends.llama_batch import LlamaBatch
from qe_edge.errors import BadArgument, BadInput, QeEdgeError
from qe_edge.student.gate import OPEN

pytest.importorskip("llama_cpp")
# Of different lengths, in both languages, more than there are places.
QUERIES = [
    f"{words} {i}" for i in range(5) for words in ("what causes tides", "潮汐", "how does bread rise at home")
]
TOKENS = 12


@pytest.fixture
def expander(gguf: Path) -> Iterator[Expander]:
    with Expander.load(gguf, budget_tokens=TOKENS, gate=OPEN) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def alone(gguf: Path) -> list[str]:
    """Each query's expansion, written alone."""
    with Expander.load(gguf, budget_tokens=TOKENS, gate=OPEN) as loaded:
        return [loaded.expand(query).text for query in QUERIES]


@pytest.mark.parametrize("parallel", [1, 4, 16])
def test_many_are_expanded_as_one_by_one_and_in_order(
    expander: Expander, alone: list[str], parallel: int
) -> None:
    found = list(expander.expand_many(QUERIES, parallel=parallel))
    assert [expanded.query for expanded in found] == QUERIES
    assert [expanded.text for expanded in found] == alone
    assert all(expanded.prefill_s > 0 and expanded.decode_s > 0 for expanded in found)


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each call of llama.cpp gets."""
    found: list[int] = []
    decode = LlamaBatch._decode

    def counted(batch: LlamaBatch, size: int) -> None:
        found.append(size)
        decode(batch, size)

    monkeypatch.setattr(LlamaBatch, "_decode", counted)
    return found


def test_threads_share_the_batch(expander: Expander, alone: list[str], sizes: list[int]) -> None:
    list(expander.expand_many(QUERIES[:1]))  # makes room for several
    sizes.clear()
    with ThreadPoolExecutor(8) as pool:
        assert [e.text for e in pool.map(expander.expand, QUERIES)] == alone
    # 15 answers of 12 tokens in two rounds of 8, some of the calls with newcomers' prompts.
    assert len(sizes) < len(QUERIES) * TOKENS / 3


def test_a_single_query_is_not_kept_waiting_by_many(expander: Expander, alone: list[str]) -> None:
    started, finished = Event(), Event()

    def coming() -> Iterator[str]:
        for number, query in enumerate(QUERIES * 20):
            if number == 20:
                started.set()
            if finished.is_set():
                return
            yield query

    with ThreadPoolExecutor(1) as pool:
        many = pool.submit(lambda: len(list(expander.expand_many(coming(), parallel=4))))
        started.wait()
        assert expander.expand(QUERIES[1]).text == alone[1]
        finished.set()
        assert many.result() < len(QUERIES) * 20


def test_an_engines_error_ends_all_answers_and_the_next_one_is_written(
    expander: Expander, alone: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step, begun, go_on = LlamaBatch.step, Event(), Event()

    def broken(batch: LlamaBatch, piece: int | None = None) -> dict[int, int]:
        begun.set()
        go_on.wait(60)
        raise QeEdgeError("broken")

    monkeypatch.setattr(LlamaBatch, "step", broken)
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(expander.expand, query) for query in QUERIES[:8]]
        begun.wait(60)
        monkeypatch.setattr(LlamaBatch, "step", step)
        go_on.set()
        texts = [str(future.exception() or future.result()) for future in asked]
    # One was being written; the others waited, or came after the error.
    assert "broken" in texts and {*texts} <= {"broken", *alone}
    assert [expanded.text for expanded in expander.expand_many(QUERIES)] == alone


def test_ctrl_c_ends_the_wait_of_one_and_disturbs_no_other(
    expander: Expander, alone: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step, begun, go_on = LlamaBatch.step, Event(), Event()

    def held(batch: LlamaBatch, piece: int | None = None) -> dict[int, int]:
        begun.set()
        go_on.wait(60)
        return step(batch, piece)

    def interrupt() -> None:
        begun.wait(60)
        pthread_kill(main_thread().ident or 0, SIGINT)

    monkeypatch.setattr(LlamaBatch, "step", held)
    signal(SIGINT, default_int_handler)  # which a process in the background begins without
    with ThreadPoolExecutor(8) as pool:
        others = [pool.submit(expander.expand, query) for query in QUERIES[1:6]]
        with pytest.raises(KeyboardInterrupt):  # it may come before the wait has begun, too
            pool.submit(interrupt)
            expander.expand(QUERIES[0])
        go_on.set()
        assert [future.result().text for future in others] == alone[1:6]
    assert expander.expand(QUERIES[0]).text == alone[0]


def test_closing_ends_what_is_on_its_way(gguf: Path) -> None:
    with Expander.load(gguf, budget_tokens=TOKENS, gate=OPEN) as expander:
        many = expander.expand_many(QUERIES)
        next(many)
    with pytest.raises(QeEdgeError, match="the model was closed"):
        next(many)
    with pytest.raises(QeEdgeError, match="the model was closed"):
        expander.expand("tides")
    expander.close()


def test_more_places_than_llama_cpp_has_are_as_many_as_it_has(expander: Expander, alone: list[str]) -> None:
    assert [e.text for e in expander.expand_many(QUERIES, parallel=5000)] == alone
    with pytest.raises(BadArgument, match="parallel must be from 1 to 10000, not 0"):
        next(expander.expand_many(QUERIES, parallel=0))


def test_settings_that_mean_nothing_are_refused(expander: Expander, alone: list[str]) -> None:
    with pytest.raises(BadArgument, match="temperature must be from 0 to 10, not -1"):
        expander.expand("tides", temperature=-1.0)
    with pytest.raises(BadInput, match="the prompt is empty"):
        expander.complete([])
    assert expander.expand("tides", temperature=1.0, seed=-1).tokens > 0
    assert expander.expand(QUERIES[0]).text == alone[0]


def test_a_long_prompt_is_kept_for_the_next_that_is_the_same(expander: Expander, sizes: list[int]) -> None:
    prompt = [300 + i % 97 for i in range(700)]
    first = expander.complete(prompt, prefix=len(prompt) - 1)
    assert sizes[:3] == [512, 187, 1]
    sizes.clear()
    assert expander.complete(prompt, prefix=len(prompt) - 1).token_ids == first.token_ids
    assert sizes[0] == 1
    # Where the cache can't hold it beside the sequence itself, it is computed whole.
    longest = [300 + i % 89 for i in range(1800)]
    expander.complete(longest, prefix=len(longest) - 1)
    sizes.clear()
    expander.complete(longest, prefix=len(longest) - 1)
    assert sum(sizes[:4]) == len(longest)


def test_more_threads_than_places_wait(expander: Expander, alone: list[str]) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert [e.text for e in pool.map(expander.expand, QUERIES)] == alone


def test_an_expansion_in_the_middle_of_many_disturbs_none(expander: Expander, alone: list[str]) -> None:
    found = []
    for expanded in expander.expand_many(QUERIES, parallel=3):
        found.append(expanded.text)
        assert expander.expand(QUERIES[0]).text == alone[0]
    assert found == alone


def test_a_bad_query_ends_many_after_those_before_it(expander: Expander, alone: list[str]) -> None:
    found = []
    with pytest.raises(BadInput, match="the query is empty"):
        for expanded in expander.expand_many([*QUERIES[:5], " ", QUERIES[5]]):
            found.append(expanded.text)
    assert found == alone[:5]
    with pytest.raises(BadInput, match="tokens, over 512"):
        list(expander.expand_many(["word " * 5000]))
    assert expander.expand(QUERIES[0]).text == alone[0]


def test_those_who_stop_listening_leave_no_place_taken(expander: Expander, alone: list[str]) -> None:
    for _ in range(5):
        assert next(iter(expander.expand_many(QUERIES, parallel=4))).text == alone[0]
    assert [expanded.text for expanded in expander.expand_many(QUERIES)] == alone


def test_a_long_query_waits_for_its_cells(expander: Expander) -> None:
    long = ["tides " * n for n in (300, 250, 200, 150)]
    expected = [expander.expand(query).text for query in long]
    assert [expanded.text for expanded in expander.expand_many(long * 2, parallel=2)] == expected * 2


def test_a_warm_query_is_read_from_its_own_words_on(expander: Expander, sizes: list[int]) -> None:
    whole = expander.expand("what causes tides").prompt_tokens
    prefix, own, *answer = sizes
    assert prefix + own == whole and own < whole / 2
    assert set(answer) == {1}
    sizes.clear()
    more = expander.expand("what causes tides and waves").prompt_tokens - whole
    assert sizes[0] == own + more
    # Both languages' prefixes stay.
    expander.expand("潮汐")
    sizes.clear()
    expander.expand("what causes tides")
    assert sizes[0] == own
    expander.forget()
    sizes.clear()
    expander.expand("what causes tides")
    assert sizes[:2] == [prefix, own]


# Fairness


def test_long_queries_keep_nobody_waiting(gguf: Path) -> None:
    """Three that are decoded alone, then ten short ones: these take the other places at once."""
    long = [f"{i} " + "what causes the tides of the sea " * 29 for i in range(3)]
    short = [f"tides {i}" for i in range(10)]
    with Expander.load(gguf, parallel=4, budget_tokens=40, gate=OPEN) as expander:
        ended: list[str] = []

        def ask(query: str) -> None:
            expander.expand(query)
            ended.append(query)

        threads = [Thread(target=ask, args=(query,)) for query in [*long, *short]]
        for thread in threads:
            thread.start()
            sleep(0.01)  # in this order
        for thread in threads:
            thread.join(60)
    assert set(ended) == {*long, *short}
    assert [query for query in ended if query in long] == long  # among them, the first one is first
    assert sum(ended.index(query) < ended.index(long[1]) for query in short) >= 4


def test_a_prompt_is_read_in_pieces_while_others_write(expander: Expander) -> None:
    backend = expander.backend
    batch = LlamaBatch(backend.model, 4)  # type: ignore[attr-defined]
    writer = batch.add(backend.tokenize("tides", False), prefix=0, answer=50)
    assert set(batch.step()) == {writer}
    reader = batch.add([5] * 150, prefix=0, answer=4)
    steps = [set(batch.step(64)) for _ in range(3)]
    assert steps == [{writer}, {writer}, {writer, reader}]
    whole = batch.add([5] * 150, prefix=0, answer=4)
    assert set(batch.step()) == {writer, reader, whole}
    batch.close()


def test_a_query_of_too_many_tokens_is_searched_as_it_is(gguf: Path) -> None:
    rare = "sky " + "".join(chr(0x1F300 + i) for i in range(446))
    with Expander.load(gguf, parallel=4, budget_tokens=4) as expander:
        assert "tokens, over 512" in expander.expand(rare).fallback
        expander.gate = OPEN
        with pytest.raises(BadInput, match=r"the query takes \d+ tokens, over 512"):
            expander.expand(rare)


@pytest.mark.parametrize(("given", "spin"), [({}, "3000"), ({"GOMP_SPINCOUNT": "7"}, "7")])
def test_threads_that_wait_soon_sleep_unless_the_user_says_otherwise(
    gguf: Path, given: dict[str, str], spin: str
) -> None:
    code = f"""
import os
from qe_edge import Expander
Expander.load({str(gguf)!r}).close()
print(os.environ.get("GOMP_SPINCOUNT"))
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP", "GOMP"))}
    environment |= {"OMP_DISPLAY_ENV": "verbose", **given}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    if "OPENMP DISPLAY ENVIRONMENT" not in done.stderr:
        pytest.skip("llama.cpp was built without OpenMP")
    assert f"GOMP_SPINCOUNT = '{spin}'" in done.stderr
    assert done.stdout.strip() == given.get("GOMP_SPINCOUNT", "None")
