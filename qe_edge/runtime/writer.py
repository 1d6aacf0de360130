"""What stands between a query and the student who writes: gate and cache before it, the gate after it."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from threading import Event
from typing import NamedTuple

from qe_edge.arguments import check_number, check_scores, check_text, check_whole
from qe_edge.backends.protocol import Backend
from qe_edge.errors import BadInput, QeEdgeError
from qe_edge.runtime.cache import ExpansionCache
from qe_edge.runtime.decoder import Decoder
from qe_edge.runtime.expansion import ExpandedQuery, FinishReason
from qe_edge.runtime.generation import Generation
from qe_edge.runtime.pending import Pending
from qe_edge.student.gate import OPEN, Gate
from qe_edge.student.prompt import clean_query
from qe_edge.text import whole_words, words_of

HOTTEST = 10  # temperature, above which all words are as likely
PATIENCE = 0.1  # seconds for a cache that another process holds
PAUSE = 1.0  # seconds after that in which nobody waits for it
# Why a text ended before its student was done.
CUT = {"deadline": "the deadline passed", "broken off": "the writing was broken off"}


class Completion(NamedTuple):
    """What a model wrote after a prompt; times in seconds, as in `ExpandedQuery`."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prefill_s: float
    decode_s: float


class Writer:
    """A student that writes, with its gate and its cache.

    Raises:
        BadArgument: a number is out of its bounds.
    """

    def __init__(
        self,
        backend: Backend,
        decoder: Decoder,
        *,
        budget_tokens: int,
        stop_when_dry: int | None,
        gate: Gate | None,
        cache: ExpansionCache | None,
        digest: str,
    ):
        self.backend, self.decoder, self.budget_tokens = backend, decoder, budget_tokens
        if stop_when_dry is not None:
            check_whole("stop_when_dry", stop_when_dry, 1, backend.context)
        self.gate = backend.spec.gate if gate is None else gate
        # What every prompt of a language begins with is what two of its prompts have in common.
        self.prefixes = [
            _common(*(backend.spec.prompt.encode(query, backend.tokenize) for query in pair))
            for pair in (("a", "7"), ("水", "火"))
        ]
        self.dry, self._cache = stop_when_dry, cache
        self._patient_from = 0.0  # on `time.perf_counter`'s clock
        self._settings = f"{digest} {backend.spec.to_json()} {budget_tokens} {stop_when_dry}"

    @property
    def gate(self) -> Gate:
        return self._gate

    @gate.setter
    def gate(self, gate: Gate) -> None:
        if not isinstance(gate, Gate):
            raise TypeError(f"a gate is a Gate, such as qe_edge.OPEN, not {type(gate).__name__}")
        self._gate = gate.checked()

    def writing(
        self,
        query: str,
        *,
        deadline: float = math.inf,
        scores: Sequence[float] = (),
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Writing:
        """An expansion that can be begun; see `Expander.expand`.

        Raises:
            BadInput: the query is blank.
        """
        check_text("a query", query)
        check_scores(scores)
        check_number("temperature", temperature, 0, HOTTEST)
        check_whole("seed", seed, -(2**63), 2**63 - 1)
        return Writing(self, query, deadline, scores, temperature, seed)

    def complete(self, prompt: list[int], *, prefix: int, temperature: float, seed: int) -> Completion:
        """See `Expander.complete`."""
        generation = Generation(prompt, prefix, self.budget_tokens, temperature, seed)
        self.decoder.write(generation)
        try:
            generation.future.result()
        except BaseException:  # Ctrl-C
            generation.future.cancel()
            raise
        return self.written(generation)

    def written(self, generation: Generation | None) -> Completion:
        """What there is of an answer by now."""
        if generation is None:
            return Completion("", (), "deadline", 0.0, 0.0)
        tokens = list(generation.tokens)  # one that is late may still get another
        return Completion(
            text=self.backend.detokenize(tokens),
            token_ids=tuple(tokens),
            finish_reason=generation.finish or "deadline",
            prefill_s=max(0.0, generation.first - generation.begin),
            decode_s=generation.last - generation.first,
        )

    def key(self, cleaned: str) -> str:
        """What a greedy expansion is kept under; empty without a cache."""
        return hashlib.sha256(f"{self._settings} {cleaned}".encode()).hexdigest() if self._cache else ""

    def kept(self, key: str, deadline: float) -> Completion | None:
        """What was written before."""
        with self._waiting_for_cache(deadline) as wait:
            return self._cache.get(key, Completion, wait=wait) if self._cache else None
        return None

    def keep(self, key: str, written: Completion) -> None:
        """Have it written no second time."""
        with self._waiting_for_cache() as wait:
            if self._cache:
                self._cache.put(key, written, wait=wait)

    @contextmanager
    def _waiting_for_cache(self, deadline: float = math.inf) -> Iterator[float]:
        """For how many seconds; an error is no more than a cache without an answer.

        What is kept must not be in the way of what can be written: where one waited in vain, the next ones
        don't wait.
        """
        now = time.perf_counter()
        try:
            yield max(0.0, min(PATIENCE, deadline - now)) if now >= self._patient_from else 0.0
        except BadInput:
            self._patient_from = time.perf_counter() + PAUSE


class Writing(Pending):
    """An expansion that is written, looked up, or held back by the gate."""

    def __init__(
        self,
        writer: Writer,
        query: str,
        deadline: float,
        scores: Sequence[float],
        temperature: float,
        seed: int,
    ):
        super().__init__(deadline)
        self._writer, self._query, self._cleaned = writer, query, clean_query(query)
        self._scores, self._temperature, self._seed = scores, temperature, seed
        self._key = "" if temperature else writer.key(self._cleaned)
        self._generation: Generation | None = None
        self._listener: Callable[[], None] = lambda: None

    def begin(self) -> None:
        writer, spec, backend = self._writer, self._writer.backend.spec, self._writer.backend
        if reason := writer.gate.before(self._cleaned, self._scores, languages=spec.prompt.languages):
            self.ready = ExpandedQuery(self._query, "", spec.join, fallback=reason)
            return
        if self._key and (found := writer.kept(self._key, self.deadline)):
            self.ready = self._judged(found, cached=True)
            return
        prompt = spec.prompt.encode_clean(self._cleaned, backend.tokenize)
        prefix = max(len(known) if prompt[: len(known)] == known else 0 for known in writer.prefixes)
        generation = Generation(
            prompt,
            prefix,
            writer.budget_tokens,
            self._temperature,
            self._seed,
            enough=None if writer.dry is None else dried(self._query, writer.dry, backend.detokenize),
            on_token=lambda: self._listener(),
            deadline=self.deadline,
            future=self.future,
        )
        try:
            writer.decoder.write(generation)
        except BadInput as error:
            if writer.gate == OPEN:
                raise
            self.ready = ExpandedQuery(self._query, "", spec.join, fallback=str(error))
        else:
            self._generation = generation

    def finish(self) -> ExpandedQuery:
        if self.error:
            raise self.error
        return self._judged(self._writer.written(self._generation), prompt_tokens=self._prompt_tokens)

    @property
    def _prompt_tokens(self) -> int:
        return len(self._generation.prompt) if self._generation else 0

    def wait(self) -> ExpandedQuery:
        expanded = super().wait()
        # One that was cut says nothing about the next. What the gate rejects would be rejected again.
        if self._key and self._generation and expanded.finish_reason not in CUT:
            self._writer.keep(self._key, self._writer.written(self._generation))
            self._key = ""
        return expanded

    def _judged(self, written: Completion, *, prompt_tokens: int = 0, cached: bool = False) -> ExpandedQuery:
        cut = CUT.get(written.finish_reason, "")
        text = " ".join((whole_words(written.text) if cut else written.text).split())
        if cut and not text:
            reason = f"{cut} before the first whole word"
        else:
            reason = self._writer.gate.after(self._query, text)
            if reason and cut:
                reason = f"{cut}; so far, {reason}"
        return ExpandedQuery(
            query=self._query,
            text="" if reason else text,
            join=self._writer.backend.spec.join,
            prompt_tokens=prompt_tokens,
            token_ids=written.token_ids,
            finish_reason=written.finish_reason,
            prefill_s=written.prefill_s,
            decode_s=written.decode_s,
            fallback=reason,
            rejected=text if reason else "",
            cached=cached,
        )

    def cut(self) -> None:
        """End it with what there is, since nobody reads on."""
        self.cancel()
        if not (self.ready or self.error):
            written = self._writer.written(self._generation)
            if written.finish_reason == "deadline" and time.perf_counter() < self.deadline:
                written = written._replace(finish_reason="broken off")
            self.ready = self._judged(written, prompt_tokens=self._prompt_tokens)

    def listen(self, listener: Callable[[], None]) -> None:
        """Have it called from now on in the decoder's thread, after each token and at the end."""
        self._listener = listener
        self.future.add_done_callback(lambda _: listener())

    def pieces(self) -> Iterator[str | None]:
        """The text in pieces as far as it is written; None where more must be waited for.

        Raises:
            QeEdgeError: the engine failed or was closed, or it was given up.
        """
        if self.ready and not self._generation:
            if self.ready.text:
                yield self.ready.text
            return
        shown, done = "", False
        while not done:
            done = self.future.done()  # looked at first: the rest may be written meanwhile
            text = self._writer.written(self._generation).text
            if len(text) > len(shown):
                yield text[len(shown) :]
                shown = text
            if not done:
                yield None
        if self.future.cancelled() and not self.ready:
            raise QeEdgeError("the expansion was given up")
        if self.error:
            raise self.error


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


class Stream:
    """Pieces of an expansion's text, as soon as they are written; then `expanded` has the whole of it."""

    def __init__(self, writing: Writing):
        self._writing = writing

    def __iter__(self) -> Iterator[str]:
        changed = Event()
        self._writing.listen(changed.set)
        try:
            for piece in self._writing.pieces():
                if piece is None:
                    changed.wait()
                    changed.clear()
                else:
                    yield piece
        finally:
            self._writing.cut()

    @property
    def expanded(self) -> ExpandedQuery:
        """The whole, waited for if need be; of pieces that were read in part, what was written by then."""
        return self._writing.wait()
