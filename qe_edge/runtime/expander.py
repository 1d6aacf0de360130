"""`Expander`: load a student once, expand many queries."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from functools import partial
from pathlib import Path

from qe_edge.arguments import (
    MOST_PARALLEL,
    MOST_THREADS,
    check_deadline,
    check_kind,
    check_path,
    check_text,
    check_texts,
    check_whole,
)
from qe_edge.backends.open import open_backend
from qe_edge.backends.protocol import Backend
from qe_edge.errors import BadArgument
from qe_edge.runtime.cache import ExpansionCache
from qe_edge.runtime.decoder import Decoder
from qe_edge.runtime.expansion import ExpandedQuery
from qe_edge.runtime.reader import Encoder, EncoderReader, Passage, StudentReader, check_passages, known
from qe_edge.runtime.refining import AsyncSearch, Search, Steps, arun, refined, run
from qe_edge.runtime.weighing import Weighing
from qe_edge.runtime.writer import Completion, Stream, Writer, Writing
from qe_edge.student.gate import Gate
from qe_edge.student.models import Engine, resolve
from qe_edge.student.spec import ModelSpec

PARALLEL = 16  # queries decoded together: more bring little, and each takes memory
HELPERS = 4  # threads beside asyncio's loop
ROUNDS = 2  # of searching and reading; MOST_ROUNDS at most
MOST_ROUNDS = 10


class Expander:
    """A student ready to expand queries, in as many threads as you like.

    `Expander.load("student-Q4_K_M.gguf").expand("what causes tides").text` is an expansion.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        budget_tokens: int | None = None,
        passages: int | None = None,
        reader: Encoder | None = None,
        parallel: int = 1,
        stop_when_dry: int | None = None,
        gate: Gate | None = None,
        cache: ExpansionCache | None = None,
        digest: str = "",
    ):
        if isinstance(backend, str | Path):
            raise TypeError("an Expander is made of a backend; Expander.load(model) takes a file")
        self.backend = backend
        self.name = ""  # the student's file, folder, hub id or built-in, where it was loaded by one
        self.budget_tokens = backend.spec.prompt.max_tokens if budget_tokens is None else budget_tokens
        # A larger one would leave no room for any query, and each would fall back without a word.
        check_whole("budget_tokens", self.budget_tokens, 1, backend.context - 1)
        self._decoder = Decoder(backend)
        self._writer = Writer(
            backend,
            self._decoder,
            budget_tokens=self.budget_tokens,
            stop_when_dry=stop_when_dry,
            gate=gate,
            cache=cache,
            digest=digest,
        )
        most = backend.spec.feedback.passages if passages is None else passages
        check_passages(most)
        settings = backend.spec.feedback
        self._reader = (
            EncoderReader(reader, settings, most) if reader else StudentReader(backend, self._decoder, most)
        )
        self._own_encoder: Encoder | None = None
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
        passages: int | None = None,
        reader: Encoder | Path | str | None = None,
        parallel: int = 1,
        stop_when_dry: int | None = None,
        gate: Gate | None = None,
        cache: ExpansionCache | Path | str | None = None,
    ) -> Expander:
        """Load a .gguf file, an MLX or Hugging Face folder, a hub id or a `builtin:` model.

        Prompt, join, gate and token budget come from the model itself.

        Args:
            engine: llama.cpp, mlx or transformers, for a folder that more than one can run.
            threads: how many compute, 1 to 512; by default all cores that other processes leave free.
            budget_tokens: most tokens of an expansion, instead of the model's own number.
            passages: how many that a search found are read, instead of the model's own number; 1 to 50.
            reader: what reads them: an `Encoder`, or its GGUF, here or on the hub (`hf:…`). By default
                the student does.
            parallel: how many queries from several threads or tasks are decoded together, on llama.cpp and
                MLX; as many as the engine can, if that is fewer.
            stop_when_dry: end an expansion after so many tokens that brought no new word.
            gate: when the plain query is searched instead; `qe_edge.OPEN` for never.
            cache: a SQLite file for greedy expansions, to be used again by this and other processes. A hub
                id's, whose weights may change, are not kept.

        Raises:
            NotFound, BadInput, NotInstalled: see `qe_edge.student.models.resolve` and the backends.
            BadArgument: a number is out of its bounds.
        """
        # Before a large model is loaded.
        check_path("model", model)
        for name, path, kind in (("reader", reader, Encoder), ("cache", cache, ExpansionCache)):
            if path is not None and not isinstance(path, kind):
                check_path(name, path)
        if threads is not None:
            check_whole("threads", threads, 1, MOST_THREADS)
        if passages is not None:
            check_passages(passages)
        _check_parallel(parallel)
        ref = resolve(model)
        encoder = Encoder(reader, threads=threads) if isinstance(reader, str | Path) else reader
        kept = ExpansionCache(cache) if isinstance(cache, str | Path) else cache
        expander = cls(
            open_backend(ref, engine=engine, threads=threads),
            budget_tokens=budget_tokens,
            passages=passages,
            reader=encoder,
            parallel=parallel,
            stop_when_dry=stop_when_dry,
            gate=gate,
            cache=kept if ref.path else None,
            digest=f"{kept.digest(ref.path)} {engine or ref.engine}" if kept and ref.path else "",
        )
        expander.name = ref.public_name
        if encoder is not reader:  # nobody else has it
            expander._own_encoder = encoder
        return expander

    @property
    def spec(self) -> ModelSpec:
        """The model's prompt, join, gate and how it reads, as they travel with it."""
        return self.backend.spec

    @property
    def passages(self) -> int:
        """How many passages are read at most of what a search found."""
        return self._reader.settings.passages

    @property
    def gate(self) -> Gate:
        """When the plain query is searched instead; the next query already meets what is set here."""
        return self._writer.gate

    @gate.setter
    def gate(self, gate: Gate) -> None:
        self._writer.gate = gate

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

        At `deadline_ms` after the call the expansion ends with what is there, if need be with nothing.
        `scores` are what plain BM25 found for the query, best first, for the gate.

        Raises:
            BadInput: the query is blank or, with an open gate, doesn't fit the model's context.
        """
        writing = self._writer.writing(
            query, deadline=_deadline(deadline_ms), scores=scores, temperature=temperature, seed=seed
        )
        writing.begin()
        return writing.wait()

    async def aexpand(
        self, query: str, *, deadline_ms: float | None = None, scores: Sequence[float] = ()
    ) -> ExpandedQuery:
        """`expand` for asyncio; a cancelled one is no longer written."""
        writing = self._writer.writing(query, deadline=_deadline(deadline_ms), scores=scores)
        return await writing.arrive(self._helpers)

    def feedback(
        self,
        query: str,
        passages: Sequence[str | Passage],
        *,
        deadline_ms: float | None = None,
        scores: Sequence[float] = (),
    ) -> ExpandedQuery:
        """Expand a query with the passages that the plain one found, best first; the student writes nothing.

        The reader weighs the beginnings of the first few, at most the expander's `passages` (see
        `qe_edge.student.feedback`). At `deadline_ms` those count that were read by then, in steps of one
        long passage or several short ones. `scores` are plain BM25's, for the gate.

        Raises:
            BadInput: the query is blank or, with an open gate, too long.
            BadArgument: a passage has a vector, and the reader is no encoder, or another one's.
        """
        weighing = self._feedback(query, passages, deadline_ms, scores)
        weighing.begin()
        return weighing.wait()

    async def afeedback(
        self,
        query: str,
        passages: Sequence[str | Passage],
        *,
        deadline_ms: float | None = None,
        scores: Sequence[float] = (),
    ) -> ExpandedQuery:
        """`feedback` for asyncio; a cancelled one reads no further."""
        return await self._feedback(query, passages, deadline_ms, scores).arrive(self._helpers)

    def refine(
        self,
        query: str,
        search: Search,
        *,
        written: ExpandedQuery | None = None,
        rounds: int = ROUNDS,
        deadline_ms: float | None = None,
        scores: Sequence[float] = (),
    ) -> ExpandedQuery:
        """Write, search, read, search: expand a query by a text and by the passages that it finds.

        `search` returns the passages that an expanded query finds, best first. It is asked first with what
        the student wrote, and in each further one of `rounds` with what the reader made of that. The result
        is yours to search with: query, text and passages, each weighed. An expansion that is `written`
        already, such as a stream's, is not written again.

        At `deadline_ms` there is what was done by then: passages and text, the text alone, or the plain
        query; a search under way is waited for. Where the gate holds the query back, nothing is searched.
        `scores` are plain BM25's, for the gate.

        Raises:
            BadInput: the query is blank or, with an open gate, doesn't fit the model's context.
            BadArgument: `rounds` are not from 1 to 10, or `written` is for another query; of a vector, see
                `feedback`.
        """
        check_kind("search", search, Callable, "a function of the expanded query")  # type: ignore[arg-type]
        return run(self._refining(query, written, rounds, _deadline(deadline_ms), scores), search)

    async def arefine(
        self,
        query: str,
        search: AsyncSearch,
        *,
        written: ExpandedQuery | None = None,
        rounds: int = ROUNDS,
        deadline_ms: float | None = None,
        scores: Sequence[float] = (),
    ) -> ExpandedQuery:
        """`refine` for asyncio, with a search to be awaited, which is cancelled at the deadline."""
        check_kind("search", search, Callable, "a function of the expanded query")  # type: ignore[arg-type]
        deadline = _deadline(deadline_ms)
        steps = self._refining(query, written, rounds, deadline, scores)
        return await arun(steps, search, self._helpers, deadline)

    def _refining(
        self,
        query: str,
        written: ExpandedQuery | None,
        rounds: int,
        deadline: float,
        scores: Sequence[float],
    ) -> Steps:
        check_whole("rounds", rounds, 1, MOST_ROUNDS)
        if written is not None:
            check_kind("written", written, ExpandedQuery, "an ExpandedQuery, such as `expand` returns")
        if written and written.query != query:
            raise BadArgument(f"what is written is for {written.query!r}, not for {query!r}")
        writing = written or self._writer.writing(query, deadline=deadline, scores=scores)
        weigh = partial(self._weighing, deadline=deadline, scores=scores)
        return refined(writing, weigh, rounds, deadline)

    def _weighing(
        self,
        written: ExpandedQuery,
        passages: Iterable[str | Passage],
        worth: dict[str, float] | None = None,
        *,
        deadline: float,
        scores: Sequence[float],
    ) -> Weighing:
        return Weighing(
            self._decoder,
            self._reader,
            self.spec,
            written,
            known(passages),
            self.gate,
            deadline=deadline,
            scores=scores,
            worth=worth,
        )

    def _feedback(
        self,
        query: str,
        passages: Sequence[str | Passage],
        deadline_ms: float | None,
        scores: Sequence[float],
    ) -> Weighing:
        check_text("a query", query)
        plain = ExpandedQuery(query, "", self.spec.feedback.join)
        return self._weighing(plain, passages, deadline=_deadline(deadline_ms), scores=scores)

    def stream(self, query: str, *, deadline_ms: float | None = None, scores: Sequence[float] = ()) -> Stream:
        """As `expand`, but the text can be read while it is written."""
        writing = self._writer.writing(query, deadline=_deadline(deadline_ms), scores=scores)
        writing.begin()
        return Stream(writing)

    async def astream(
        self, query: str, *, deadline_ms: float | None = None, scores: Sequence[float] = ()
    ) -> AsyncIterator[str | ExpandedQuery]:
        """`stream` for asyncio: pieces of text, then the expanded query."""
        writing = self._writer.writing(query, deadline=_deadline(deadline_ms), scores=scores)
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def tell() -> None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(changed.set)

        try:
            await asyncio.wrap_future(self._helpers.submit(writing.begin))
            writing.listen(tell)
            for piece in writing.pieces():
                if piece is None:
                    await changed.wait()
                    changed.clear()
                else:
                    yield piece
            yield await writing.arrive(self._helpers, begun=True)
        finally:
            writing.cancel()

    def expand_many(self, queries: Iterable[str], *, parallel: int = PARALLEL) -> Iterator[ExpandedQuery]:
        """Expand queries greedily and yield them in their order, some of them read ahead.

        On llama.cpp and MLX, `parallel` of them are decoded in one batch, which the next query joins as soon
        as one is done; the room for them is kept, as far as memory has it. transformers takes one at a time.
        A batch may round differently from a single sequence, so that a near tie is decided differently.

        Raises:
            BadInput: as `expand`, after the queries before it.
        """
        with closing(self._in_turn(queries, parallel, [])) as turns:
            for writing in turns:
                yield writing.wait()

    async def aexpand_many(
        self, queries: Iterable[str], *, parallel: int = PARALLEL
    ) -> AsyncIterator[ExpandedQuery]:
        """`expand_many` for asyncio."""
        waiting: list[Writing] = []
        turns = self._in_turn(queries, parallel, waiting)
        step = self._helpers.submit(next, turns, None)
        try:
            while writing := await asyncio.wrap_future(step):
                yield await writing.arrive(self._helpers, begun=True)
                step = self._helpers.submit(next, turns, None)
        finally:  # which may come in the middle of a step
            for writing in waiting.copy():
                writing.cancel()
            step.add_done_callback(lambda _: turns.close())

    def _in_turn(
        self, queries: Iterable[str], parallel: int, waiting: list[Writing]
    ) -> Generator[Writing, None, None]:
        """The expansions of queries in their order, each with enough behind it: all `waiting`."""
        check_texts("queries", queries)
        self._room(parallel)
        coming: Iterator[str] | None = iter(queries)
        problem: Exception | None = None
        try:
            while True:
                # As many again wait for their turn, or a place would be empty until the oldest is yielded.
                while coming is not None and len(waiting) < 2 * parallel:
                    begun = len(waiting)
                    try:
                        waiting.append(self._writer.writing(next(coming)))
                        waiting[-1].begin()  # which may be cancelled meanwhile
                    except StopIteration:
                        coming = None
                    except Exception as error:  # when those before it are yielded
                        coming, problem = None, error
                        del waiting[begun:]
                if not waiting:
                    break
                yield waiting[0]
                del waiting[0]
        finally:
            for writing in waiting:
                writing.cancel()
        if problem:
            raise problem

    def complete(
        self, prompt: list[int], *, prefix: int = 0, temperature: float = 0.0, seed: int = 0
    ) -> Completion:
        """What the model writes after any prompt of token ids, up to its end token or the budget.

        The first `prefix` tokens are kept for the next prompt that begins with them.

        Raises:
            BadInput: prompt and budget together don't fit the model's context.
        """
        check_kind("prompt", prompt, list, "a list of token ids")
        return self._writer.complete(prompt, prefix=prefix, temperature=temperature, seed=seed)

    @property
    def _helpers(self) -> ThreadPoolExecutor:
        """Threads for what asyncio's loop must not wait for: the cache and the tokenizer."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(HELPERS, thread_name_prefix="qe-edge")
        return self._threads

    def _room(self, parallel: int) -> None:
        _check_parallel(parallel)
        if parallel > 1:
            self._decoder.room(parallel)

    def forget(self) -> None:
        """Drop what is kept of earlier prompts, so that the next one is computed whole."""
        self._decoder.forget()

    def close(self) -> None:
        """Give the memory back. Whoever still waits for an expansion gets an error."""
        self._decoder.close()
        threads, self._threads = self._threads, None  # whoever comes now is told by another one
        if threads:
            threads.shutdown()
        self.backend.close()
        if self._own_encoder:
            self._own_encoder.close()

    def __enter__(self) -> Expander:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check_parallel(parallel: int) -> None:
    check_whole("parallel", parallel, 1, MOST_PARALLEL)


def _deadline(milliseconds: float | None) -> float:
    """So long from now, on `time.perf_counter`'s clock."""
    check_deadline(milliseconds)
    return math.inf if milliseconds is None else time.perf_counter() + milliseconds / 1000
