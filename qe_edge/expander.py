"""`Expander`: load a student once, expand many queries."""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice, takewhile
from pathlib import Path
from typing import NamedTuple, TypeVar

from qe_edge.analysis import words_of
from qe_edge.backends import Backend, open_backend
from qe_edge.cache import ExpansionCache
from qe_edge.decoding import Answer, Decoder
from qe_edge.errors import BadArgument, BadInput, QeEdgeError
from qe_edge.expansion import ExpandedQuery, FinishReason
from qe_edge.gate import OPEN, Gate
from qe_edge.models import Engine, resolve
from qe_edge.prompt import clean_query
from qe_edge.spec import ModelSpec

T = TypeVar("T")
PARALLEL = 16  # queries decoded together: more bring little, and each takes memory


class Completion(NamedTuple):
    """What a model wrote after a prompt; times in seconds, as in `ExpandedQuery`."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prefill_s: float
    decode_s: float


@dataclass
class _Asked:
    """A query on its way: its expansion if that needs no student, else the answer that is awaited."""

    query: str
    ready: ExpandedQuery | None = None
    answer: Answer | None = None
    key: str = ""


class Expander:
    """A student ready to expand queries, in as many threads as you like.

    expander = Expander.load("student-Q4_K_M.gguf")
    expander.expand("what causes tides").text
    """

    def __init__(
        self,
        backend: Backend,
        *,
        budget_tokens: int | None = None,
        parallel: int = 1,
        stop_when_dry: int | None = None,
        gate: Gate | None = None,
        cache: ExpansionCache | None = None,
        digest: str = "",
    ):
        self.backend = backend
        self.budget_tokens = backend.spec.prompt.max_tokens if budget_tokens is None else budget_tokens
        end = backend.tokenize(self.spec.prompt.end, True)
        if len(end) != 1:
            raise BadInput(
                f"the model's vocabulary has no single token {self.spec.prompt.end!r} to end an answer"
            )
        if self.budget_tokens < 1:
            raise BadArgument("the token budget must be at least 1")
        if stop_when_dry is not None and stop_when_dry < 1:
            raise BadArgument("stop_when_dry is a number of tokens, at least 1")
        self._dry, self._cache = stop_when_dry, cache
        self.gate = self.spec.gate if gate is None else gate
        # What every prompt of a language begins with is what two of its prompts have in common.
        self._prefixes = [
            _common(*(self.spec.prompt.encode(query, backend.tokenize) for query in pair))
            for pair in (("a", "7"), ("水", "火"))
        ]
        self._settings = f"{digest} {self.spec.to_json()} {self.budget_tokens} {stop_when_dry}"
        self._decoder = Decoder(backend, end[0])
        self._threads: ThreadPoolExecutor | None = None
        self._room(parallel)

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        engine: Engine | None = None,
        threads: int | None = None,
        budget_tokens: int | None = None,
        parallel: int = 1,
        stop_when_dry: int | None = None,
        gate: Gate | None = None,
        cache: ExpansionCache | Path | str | None = None,
    ) -> Expander:
        """Load a .gguf file, an MLX or Hugging Face folder, a hub id or a `builtin:` model.

        Prompt, join, gate and token budget come from the model itself.

        Args:
            threads: that compute; all cores by default.
            budget_tokens: of an expansion, instead of the model's own.
            parallel: queries from several threads or tasks that are decoded together, on llama.cpp and MLX.
            stop_when_dry: end an expansion after so many tokens that brought no new word.
            gate: when the plain query is searched instead; `qe_edge.gate.OPEN` for never.
            cache: a SQLite file for greedy expansions, to be used again by this and other processes. A hub
                id's, whose weights may change, are not kept.

        Raises:
            NotFound, BadInput, NotInstalled: see `qe_edge.models.resolve` and the backends.
        """
        ref = resolve(model)
        kept = ExpansionCache(cache) if isinstance(cache, str | Path) else cache
        return cls(
            open_backend(ref, engine=engine, threads=threads),
            budget_tokens=budget_tokens,
            parallel=parallel,
            stop_when_dry=stop_when_dry,
            gate=gate,
            cache=kept if ref.path else None,
            digest=f"{kept.digest(ref.path)} {engine or ref.engine}" if kept and ref.path else "",
        )

    @property
    def spec(self) -> ModelSpec:
        return self.backend.spec

    def expand(
        self,
        query: str,
        *,
        deadline_ms: float | None = None,
        scores: Sequence[float] = (),
        temperature: float = 0.0,
        seed: int = 0,
    ) -> ExpandedQuery:
        """Write one expansion; greedy unless a temperature is given.

        At `deadline_ms` after the call the expansion ends with what is there, if need be with nothing: at
        most one step of the model later. `scores` are what plain BM25 found for the query, best first, for
        the gate.

        Raises:
            BadInput: the query is blank or, with an open gate, doesn't fit the model's context.
        """
        asked = self._ask(query, deadline_ms=deadline_ms, scores=scores, temperature=temperature, seed=seed)
        return self._expanded(asked)

    def stream(self, query: str, *, deadline_ms: float | None = None, scores: Sequence[float] = ()) -> Stream:
        """As `expand`, but the text can be read while it is written."""
        asked = self._ask(query, deadline_ms=deadline_ms, scores=scores, streamed=True)
        return Stream(self, asked)

    def expand_many(self, queries: Iterable[str], *, parallel: int = PARALLEL) -> Iterator[ExpandedQuery]:
        """Expand queries greedily and yield them in their order, some of them read ahead.

        On llama.cpp and MLX, `parallel` of them are decoded in one batch, which the next query joins as soon
        as one is done; the room for them is kept, as far as memory has it. transformers takes one at a time.
        A batch may round differently from a single sequence, so that a near tie is decided differently.

        Raises:
            BadInput: as `expand`, after the queries before it.
        """
        self._room(parallel)
        coming: Iterator[str] | None = iter(queries)
        problem: Exception | None = None
        waiting: deque[_Asked] = deque()
        try:
            while True:
                # As many again wait for their turn, or a place would be empty until the oldest is yielded.
                while coming is not None and len(waiting) < 2 * parallel:
                    try:
                        waiting.append(self._ask(next(coming)))
                    except StopIteration:
                        coming = None
                    except Exception as error:  # when those before it are yielded
                        coming, problem = None, error
                if not waiting:
                    break
                expanded = self._expanded(waiting[0])
                waiting.popleft()
                yield expanded
        finally:
            for asked in waiting:
                self._abandon(asked)
        if problem:
            raise problem

    async def aexpand(
        self, query: str, *, deadline_ms: float | None = None, scores: Sequence[float] = ()
    ) -> ExpandedQuery:
        """`expand` for asyncio; a cancelled one is no longer written."""
        asked = self._ask(query, deadline_ms=deadline_ms, scores=scores)
        return await self._in_thread(asked, lambda: self._expanded(asked))

    async def aexpand_many(
        self, queries: Iterable[str], *, parallel: int = PARALLEL
    ) -> AsyncIterator[ExpandedQuery]:
        """`expand_many` for asyncio."""
        self._room(parallel)
        coming, waiting = iter(queries), deque[_Asked]()
        try:
            while True:
                for query in islice(coming, 2 * parallel - len(waiting)):
                    waiting.append(self._ask(query))
                if not waiting:
                    break
                asked = waiting[0]
                expanded = await self._in_thread(asked, partial(self._expanded, asked))
                waiting.popleft()
                yield expanded
        finally:
            for asked in waiting:
                self._abandon(asked)

    async def astream(
        self, query: str, *, deadline_ms: float | None = None, scores: Sequence[float] = ()
    ) -> AsyncIterator[str | ExpandedQuery]:
        """`stream` for asyncio: pieces of text, then the expanded query."""
        asked = self._ask(query, deadline_ms=deadline_ms, scores=scores, streamed=True)
        stream = Stream(self, asked)
        pieces = iter(stream)
        try:
            while (piece := await self._in_thread(asked, lambda: next(pieces, None))) is not None:
                yield piece
            yield stream.expanded
        finally:
            self._abandon(asked)

    async def _in_thread(self, asked: _Asked, work: Callable[[], T]) -> T:
        """Wait for it in a thread of our own: asyncio has too few for many that wait."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(256, thread_name_prefix="qe-edge")
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        except asyncio.CancelledError:
            self._abandon(asked)
            raise

    def complete(
        self, prompt: list[int], *, prefix: int = 0, temperature: float = 0.0, seed: int = 0
    ) -> Completion:
        """What the model writes after any prompt of token ids, up to its end token or the budget.

        The first `prefix` tokens are kept for the next prompt that begins with them.

        Raises:
            BadInput: prompt and budget together don't fit the model's context.
        """
        answer = Answer(prompt, prefix, self.budget_tokens, temperature, seed)
        self._decoder.ask(answer)
        return self._completed(answer)

    def _ask(
        self,
        query: str,
        *,
        deadline_ms: float | None = None,
        scores: Sequence[float] = (),
        temperature: float = 0.0,
        seed: int = 0,
        streamed: bool = False,
    ) -> _Asked:
        """Let it be written from now on, unless the gate or the cache make that needless."""
        if temperature < 0:
            raise BadArgument("a temperature can't be negative")
        deadline = math.inf if deadline_ms is None else time.perf_counter() + deadline_ms / 1000
        if reason := self.gate.before(clean_query(query), scores, languages=self.spec.prompt.languages):
            return _Asked(query, ready=ExpandedQuery(query, "", self.spec.join, fallback=reason))
        key = ""
        if self._cache and temperature == 0:
            key = hashlib.sha256(f"{self._settings} {clean_query(query)}".encode()).hexdigest()
            with suppress(BadInput):  # what is kept must not be in the way of what can be written
                if found := self._cache.get(key, Completion):
                    return _Asked(query, ready=self._judged(query, found, cached=True))
        prompt = self.spec.prompt.encode(query, self.backend.tokenize)
        prefix = max(len(known) if prompt[: len(known)] == known else 0 for known in self._prefixes)
        enough = None if self._dry is None else dried(query, self._dry, self.backend.detokenize)
        answer = Answer(
            prompt, prefix, self.budget_tokens, temperature, seed, enough, deadline, streamed=streamed
        )
        try:
            self._decoder.ask(answer)
        except BadInput as error:
            if self.gate == OPEN:
                raise
            return _Asked(query, ready=ExpandedQuery(query, "", self.spec.join, fallback=str(error)))
        return _Asked(query, answer=answer, key=key)

    def _completed(self, answer: Answer, *, beyond: float = math.inf) -> Completion:
        try:
            self._decoder.wait(answer, beyond=beyond)
        except BaseException:
            answer.abandoned = True
            raise
        if answer.abandoned and not answer.done:
            raise QeEdgeError("the expansion was given up")
        tokens = list(answer.tokens)  # an answer that is late may still get one
        return Completion(
            text=self.backend.detokenize(tokens),
            token_ids=tuple(tokens),
            finish_reason=answer.finish or "deadline",
            prefill_s=max(0.0, answer.first - answer.begin),
            decode_s=answer.end - answer.first,
        )

    def _expanded(self, asked: _Asked) -> ExpandedQuery:
        if asked.ready is None:
            assert asked.answer
            written = self._completed(asked.answer)
            asked.ready = self._judged(asked.query, written, prompt_tokens=len(asked.answer.prompt))
            # A failed one may succeed the next time, and one that was cut says nothing about the next.
            if asked.key and self._cache and not asked.ready.fallback and written.finish_reason != "deadline":
                with suppress(BadInput):
                    self._cache.put(asked.key, written)
        return asked.ready

    def _judged(
        self, query: str, written: Completion, *, prompt_tokens: int = 0, cached: bool = False
    ) -> ExpandedQuery:
        text = " ".join(written.text.split())
        if written.finish_reason == "deadline" and not text:
            reason = "the deadline passed before the first word"
        else:
            reason = self.gate.after(query, text)
        return ExpandedQuery(
            query=query,
            text="" if reason else text,
            join=self.spec.join,
            prompt_tokens=prompt_tokens,
            token_ids=written.token_ids,
            finish_reason=written.finish_reason,
            prefill_s=written.prefill_s,
            decode_s=written.decode_s,
            fallback=reason,
            rejected=text if reason else "",
            cached=cached,
        )

    def _abandon(self, asked: _Asked) -> None:
        if asked.answer:
            asked.answer.abandoned = True
            self._decoder.wake()

    def _room(self, parallel: int) -> None:
        if parallel < 1:
            raise BadArgument("at least 1 query at a time")
        if parallel > 1:
            self._decoder.room(parallel)

    def forget(self) -> None:
        """Drop what is kept of earlier prompts, so that the next one is computed whole."""
        self._decoder.forget()

    def close(self) -> None:
        """Give the memory back. Whoever still waits for an expansion gets an error."""
        self._decoder.close()
        if self._threads:
            self._threads.shutdown()
        self.backend.close()

    def __enter__(self) -> Expander:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Stream:
    """Pieces of an expansion's text, as soon as they are written; then `expanded` has the whole of it."""

    def __init__(self, expander: Expander, asked: _Asked):
        self._expander, self._asked = expander, asked

    def __iter__(self) -> Iterator[str]:
        answer, shown = self._asked.answer, ""
        try:
            done = answer is None
            while answer and not done:
                done = answer.done  # looked at first: another caller may write the rest meanwhile
                text = self._expander._completed(answer, beyond=len(answer.tokens)).text
                # A character may need more than one token; llama.cpp shows a mark instead until it is whole.
                whole = text if done else text.rstrip("\ufffd")
                if len(whole) > len(shown):
                    yield whole[len(shown) :]
                    shown = whole
        finally:
            if answer and not answer.done:
                self._expander._abandon(self._asked)
        if answer is None and self.expanded.text:
            yield self.expanded.text

    @property
    def expanded(self) -> ExpandedQuery:
        """The whole, waited for if need be."""
        return self._expander._expanded(self._asked)


def _common(one: list[int], other: list[int]) -> list[int]:
    """What both begin with."""
    return [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))]


def dried(query: str, most: int, detokenize: Callable[[list[int]], str]) -> Callable[[list[int]], bool]:
    """Whether the last `most` tokens of an answer, asked for after each of them, brought no new word."""
    grown, last = 0, 0  # when there were last more words, and how many

    def ends(tokens: list[int]) -> bool:
        nonlocal grown, last
        # The last word may still go on.
        words = len({*words_of(query), *words_of(detokenize(tokens))[:-1]})
        if words > last:
            grown, last = len(tokens), words
        return len(tokens) - grown >= most

    return ends
