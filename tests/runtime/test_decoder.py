"""The decoder's thread, with an engine that computes nothing and tells what it was asked."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from qe_edge import OPEN, Expander
from qe_edge.errors import BadInput, QeEdgeError
from qe_edge.runtime.decoder import Decoder
from qe_edge.runtime.generation import Generation, Reading
from qe_edge.student.join import DEFAULT_JOIN
from qe_edge.student.prompt import load_prompt
from qe_edge.student.spec import ModelSpec

END = 0
SHORT, LONG = 100, 1000  # tokens that a sequence may have among others, and alone


class FakeBatch:
    """Sequences of which each step appends a token; a prompt is read in a step of its own."""

    def __init__(self, backend: FakeBackend, slots: int):
        self._backend, self._slots = backend, slots
        self.longest = LONG if slots == 1 else SHORT
        self.running: set[int] = set()

    def fits(self, tokens: int) -> bool:
        return len(self.running) < self._slots and tokens <= self.longest

    def add(self, prompt: Sequence[int], **_: Any) -> int:
        number = prompt[0]
        self.running.add(number)
        self._backend.log.append(f"add {number}")
        return number

    def step(self, piece: int | None = None) -> dict[int, int]:
        self._backend.step(self)
        return dict.fromkeys(self.running, 7)

    def remove(self, number: int) -> None:
        self.running.remove(number)
        self._backend.log.append(f"end {number}")

    def forget(self) -> None:
        self._backend.log.append("forget")

    def clear(self) -> None:
        self.running.clear()

    def close(self) -> None:
        self._backend.log.append("close")


class FakeReader:
    def __init__(self, backend: FakeBackend):
        self._backend = backend

    def log_likelihoods(
        self, prompts: Sequence[list[int]], answer: list[int], *, prefix: int
    ) -> Iterator[list[float]]:
        for prompt in prompts:
            self._backend.log.append(f"read {prompt[0]}")
            time.sleep(self._backend.pause)
            yield [-1.0]

    def forget(self) -> None: ...

    def close(self) -> None: ...


def reading_of(decoder: Decoder, *prompts: list[int]) -> Reading:
    return Reading(
        lambda: decoder.reader().log_likelihoods(prompts, [6], prefix=0), [len(prompt) for prompt in prompts]
    )


class FakeBackend:
    """Held until `go_on`; a step takes `pause` seconds, and raises `error` if there is one."""

    engine, context, parallel = "llama.cpp", LONG, 8

    def __init__(self) -> None:
        self.spec = ModelSpec(prompt=load_prompt(), join=DEFAULT_JOIN, base_model="none")
        self.log: list[str] = []
        self.go_on, self.in_step = Event(), Event()
        self.go_on.set()
        self.pause = 0.0
        self.error: Exception | None = None

    def step(self, batch: FakeBatch) -> None:
        self.log.append(f"step {' '.join(map(str, sorted(batch.running)))}")
        self.in_step.set()
        self.go_on.wait(30)
        time.sleep(self.pause)
        if self.error:
            raise self.error

    def tokenize(self, text: str, special: bool) -> list[int]:
        return [END] if text == self.spec.prompt.end else [ord(c) % 50 + 1 for c in text]

    def detokenize(self, tokens: list[int]) -> str:
        return " ".join(f"word{number}" for number, _ in enumerate(tokens))

    def batch(self, slots: int) -> FakeBatch:
        return FakeBatch(self, slots)

    def reader(self) -> FakeReader:
        return FakeReader(self)

    def close(self) -> None: ...


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def decoder(backend: FakeBackend) -> Iterator[Decoder]:
    made = Decoder(backend)  # type: ignore[arg-type]
    yield made
    backend.go_on.set()
    made.close()


def held(decoder: Decoder, backend: FakeBackend) -> Generation:
    """An answer in the middle of its first step, in which the thread stays."""
    backend.go_on.clear()
    first = Generation([1], 0, budget=50)
    decoder.write(first)
    assert backend.in_step.wait(30)
    return first


def test_a_long_one_at_the_head_holds_no_short_one_up(decoder: Decoder, backend: FakeBackend) -> None:
    decoder.room(4)
    first = held(decoder, backend)
    long = [Generation([n, *[5] * 200], 201, budget=50) for n in (2, 3)]
    short = Generation([4], 0, budget=5)
    for generation in (*long, short):
        decoder.write(generation)
    backend.go_on.set()
    for generation in (first, *long, short):
        generation.future.result(30)
    steps = [line for line in backend.log if line.startswith("step")]
    assert "end 4" in backend.log
    between = backend.log[backend.log.index("add 4") : backend.log.index("end 4")]
    assert sum(line == "step 1 4" for line in between) == 5
    assert backend.log.index("end 4") < backend.log.index("end 2") < backend.log.index("add 3")
    assert len(steps) < 50 + 2 * 50 + 5


def test_those_who_write_and_those_who_read_share_the_time(decoder: Decoder, backend: FakeBackend) -> None:
    backend.pause = 0.005
    first = held(decoder, backend)
    reading = reading_of(decoder, *([n] for n in range(10, 30)))
    decoder.read(reading)
    backend.go_on.set()
    reading.future.result(30)
    assert reading.values == [-1.0] * 20
    meanwhile = backend.log[backend.log.index("read 10") : backend.log.index("read 29")]
    assert 10 <= meanwhile.count("step 1") <= 30
    first.future.result(30)


def test_one_that_fails_to_be_read_disturbs_no_other(
    decoder: Decoder, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = held(decoder, backend)
    good, bad = reading_of(decoder, [10]), reading_of(decoder, [])
    for reading in (bad, good):
        decoder.read(reading)
    backend.go_on.set()
    with pytest.raises(IndexError):
        bad.future.result(30)
    assert good.future.result(30) is None and good.values == [-1.0]
    assert first.future.result(30) is None and len(first.tokens) == 50


def test_an_engines_error_is_everybodys_and_the_next_is_written(
    decoder: Decoder, backend: FakeBackend
) -> None:
    first = held(decoder, backend)
    second = Generation([2], 0, budget=5)
    decoder.write(second)
    backend.error = RuntimeError("broken")
    backend.go_on.set()
    for generation in (first, second):
        with pytest.raises(RuntimeError, match="broken"):
            generation.future.result(30)
    backend.error = None
    third = Generation([3], 0, budget=5)
    decoder.write(third)
    assert third.future.result(30) is None and third.finish == "length"


def test_close_ends_what_waits_and_what_comes_later(decoder: Decoder, backend: FakeBackend) -> None:
    first = held(decoder, backend)
    others = [Generation([n], 0, budget=5) for n in (2, 3)]
    reading = reading_of(decoder, [10])
    for generation in others:
        decoder.write(generation)
    decoder.read(reading)
    with ThreadPoolExecutor(1) as pool:
        closing = pool.submit(decoder.close)
        backend.go_on.set()
        closing.result(30)
    for work in (first, *others, reading):
        with pytest.raises(QeEdgeError, match="the model was closed"):
            work.future.result(30)
    with pytest.raises(QeEdgeError, match="the model was closed"):
        decoder.write(Generation([4], 0, budget=5))
    decoder.forget()
    decoder.close()


def test_what_is_cancelled_or_late_ends_at_the_next_step(decoder: Decoder, backend: FakeBackend) -> None:
    first = held(decoder, backend)
    late = Generation([2], 0, budget=5, deadline=time.perf_counter())
    decoder.write(late)
    first.future.cancel()
    backend.go_on.set()
    assert late.future.result(30) is None
    assert (late.tokens, late.finish, len(first.tokens)) == ([], None, 1)
    decoder.forget()  # after all steps
    assert backend.log == ["add 1", "step 1", "end 1", "forget"]


def test_a_decoder_that_nobody_has_ends_its_thread(backend: FakeBackend) -> None:
    decoder = Decoder(backend)  # type: ignore[arg-type]
    written = Generation([1], 0, budget=3)
    decoder.write(written)
    written.future.result(30)
    thread, gone = decoder._thread, weakref.ref(decoder)
    assert thread and thread.is_alive()
    del decoder
    thread.join(30)  # it lets go a moment after the answer
    assert gone() is None and not thread.is_alive()


@pytest.mark.parametrize("way", ["expand_many", "aexpand_many"])
def test_many_and_their_error_come_alike(backend: FakeBackend, way: str) -> None:
    found: list[str] = []

    async def all_of(expander: Expander) -> None:
        async for expanded in expander.aexpand_many(["a", "b", " ", "c"]):
            found.append(expanded.query)

    expander = Expander(backend, gate=OPEN, budget_tokens=5)  # type: ignore[arg-type]
    with expander, pytest.raises(BadInput, match="the query is empty"):
        if way == "aexpand_many":
            asyncio.run(all_of(expander))
        for expanded in expander.expand_many(["a", "b", " ", "c"]):
            found.append(expanded.query)
    assert found == ["a", "b"]


def test_a_query_is_cleaned_once(backend: FakeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    from qe_edge.student import prompt

    cleaned = []
    own = prompt.clean_text
    monkeypatch.setattr(prompt, "clean_text", lambda text: cleaned.append(text) or own(text))
    with Expander(backend, gate=OPEN, budget_tokens=5) as expander:  # type: ignore[arg-type]
        cleaned.clear()
        expander.expand(" tides ")
    assert cleaned == [" tides "]


@pytest.mark.parametrize("busy", [True, False])
def test_the_process_ends_with_its_main_thread(busy: bool) -> None:
    """Whatever its thread does; nothing is closed."""
    code = f"""
import sys; sys.path[:0] = {sys.path[:1]!r} + [{str(Path(__file__).parent)!r}]
from test_decoder import FakeBackend, Generation, Decoder
backend = FakeBackend(); backend.pause = 0.01
decoder = Decoder(backend)
generation = Generation([1], 0, budget={900 if busy else 1})
decoder.write(generation)
backend.in_step.wait(30)
if not {busy}: generation.future.result()
print("end")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_child_is_told_so(decoder: Decoder, backend: FakeBackend) -> None:
    written = Generation([1], 0, budget=3)
    decoder.write(written)
    written.future.result(30)
    child = os.fork()
    if not child:
        try:
            decoder.close()  # which is the parent's
            decoder.write(Generation([2], 0, budget=3))
        except QeEdgeError as error:
            os._exit(0 if "forked" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    again = Generation([3], 0, budget=3)
    decoder.write(again)
    assert again.future.result(30) is None
