"""A query on its way: the gate and the cache are asked before the student, the gate again after it."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

from qe_edge.arguments import check_number, check_scores, check_text, check_whole
from qe_edge.backends.protocol import Backend
from qe_edge.errors import BadInput, QeEdgeError
from qe_edge.runtime.cache import ExpansionCache
from qe_edge.runtime.decoder import Answer, Decoder
from qe_edge.runtime.expansion import ExpandedQuery, FinishReason
from qe_edge.student.gate import OPEN, Gate
from qe_edge.student.prompt import clean_query
from qe_edge.text import words_of

HOTTEST = 10  # temperature, above which all words are as likely
PATIENCE = 0.1  # seconds for a cache that another process holds
PAUSE = 1.0  # seconds after that in which nobody waits for it


class Completion(NamedTuple):
    """What a model wrote after a prompt; times in seconds, as in `ExpandedQuery`."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prefill_s: float
    decode_s: float


@dataclass
class Asked:
    """A query on its way; once it is asked: its expansion, or the answer that is awaited."""

    query: str
    ready: ExpandedQuery | None = None
    answer: Answer | None = None
    key: str = ""
    abandoned: bool = False  # nobody waits for it any more


class Asker:
    """What stands between a query and the student: `ask` lets it be written, `expanded` waits for it."""

    def __init__(
        self,
        backend: Backend,
        *,
        budget_tokens: int,
        stop_when_dry: int | None,
        gate: Gate | None,
        cache: ExpansionCache | None,
        digest: str,
    ):
        self.backend, self.spec, self.budget_tokens = backend, backend.spec, budget_tokens
        end = backend.tokenize(self.spec.prompt.end, True)
        if len(end) != 1:
            raise BadInput(
                f"the model's vocabulary has no single token {self.spec.prompt.end!r} to end an answer"
            )
        # A larger one would leave no room for any query, and each would fall back without a word.
        check_whole("budget_tokens", budget_tokens, 1, backend.context - 1)
        if stop_when_dry is not None:
            check_whole("stop_when_dry", stop_when_dry, 1, backend.context)
        self.gate = (self.spec.gate if gate is None else gate).checked()
        self.decoder = Decoder(backend, end[0])
        # What every prompt of a language begins with is what two of its prompts have in common.
        self.prefixes = [
            _common(*(self.spec.prompt.encode(query, backend.tokenize) for query in pair))
            for pair in (("a", "7"), ("水", "火"))
        ]
        self._dry, self._cache = stop_when_dry, cache
        self._patient_from = 0.0  # on `time.perf_counter`'s clock
        self._settings = f"{digest} {self.spec.to_json()} {budget_tokens} {stop_when_dry}"

    def ask(
        self,
        asked: Asked,
        *,
        deadline: float = math.inf,
        scores: Sequence[float] = (),
        temperature: float = 0.0,
        seed: int = 0,
        streamed: bool = False,
    ) -> Asked:
        """Let it be written from now on, unless the gate or the cache make that needless.

        It may wait for the cache and for the tokenizer. Another thread may abandon it meanwhile.
        """
        query, cleaned = asked.query, _cleaned(asked.query)
        check_scores(scores)
        check_number("temperature", temperature, 0, HOTTEST)
        check_whole("seed", seed, -(2**63), 2**63 - 1)
        if reason := self.gate.before(cleaned, scores, languages=self.spec.prompt.languages):
            asked.ready = ExpandedQuery(query, "", self.spec.join, fallback=reason)
            return asked
        if self._cache and temperature == 0:
            asked.key = hashlib.sha256(f"{self._settings} {cleaned}".encode()).hexdigest()
            with self._waiting_for_cache(deadline) as wait:
                if found := self._cache.get(asked.key, Completion, wait=wait):
                    asked.ready = self._judged(query, found, cached=True)
                    return asked
        prompt = self.spec.prompt.encode(query, self.backend.tokenize)
        prefix = max(len(known) if prompt[: len(known)] == known else 0 for known in self.prefixes)
        enough = None if self._dry is None else dried(query, self._dry, self.backend.detokenize)
        answer = Answer(
            prompt, prefix, self.budget_tokens, temperature, seed, enough, deadline, streamed=streamed
        )
        try:
            self.decoder.ask(answer)
        except BadInput as error:
            if self.gate == OPEN:
                raise
            asked.ready = ExpandedQuery(query, "", self.spec.join, fallback=str(error))
            return asked
        asked.answer = answer
        if asked.abandoned:  # looked at last: `abandon` sets it first
            self.abandon(asked)
        return asked

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

    def completed(self, answer: Answer, *, beyond: float = math.inf) -> Completion:
        """What is written when the answer is done, or has more than `beyond` tokens."""
        try:
            self.decoder.wait(answer, beyond=beyond)
        except BaseException:
            answer.abandoned = True
            raise
        if answer.abandoned and not answer.done:
            raise QeEdgeError("the expansion was given up")
        return self._written(answer)

    def _written(self, answer: Answer) -> Completion:
        tokens = list(answer.tokens)  # an answer that is late may still get one
        return Completion(
            text=self.backend.detokenize(tokens),
            token_ids=tuple(tokens),
            finish_reason=answer.finish or "deadline",
            prefill_s=max(0.0, answer.first - answer.begin),
            decode_s=answer.end - answer.first,
        )

    def expanded(self, asked: Asked) -> ExpandedQuery:
        """What became of the query, waited for if need be.

        Raises:
            QeEdgeError: the engine failed or was closed, or the query was abandoned.
        """
        if asked.ready is None:
            assert asked.answer
            written = self.completed(asked.answer)
            asked.ready = self._judged(asked.query, written, prompt_tokens=len(asked.answer.prompt))
            # A failed one may succeed the next time, and one that was cut says nothing about the next.
            if asked.key and self._cache and not asked.ready.fallback and written.finish_reason != "deadline":
                with self._waiting_for_cache() as wait:
                    self._cache.put(asked.key, written, wait=wait)
        return asked.ready

    def late(self, asked: Asked) -> ExpandedQuery:
        """What there is now that its time is up, asked or not yet: nothing is waited for.

        Raises:
            QeEdgeError: as `expanded`; BadInput for a blank query.
        """
        _cleaned(asked.query)
        if asked.ready:
            return asked.ready
        if asked.answer is None:
            return self._judged(asked.query, Completion("", (), "deadline", 0.0, 0.0))
        if asked.answer.error:
            raise asked.answer.error
        written = self._written(asked.answer)
        return self._judged(asked.query, written, prompt_tokens=len(asked.answer.prompt))

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

    def abandon(self, asked: Asked) -> None:
        """Nobody waits for it any more."""
        asked.abandoned = True
        if asked.answer:
            asked.answer.abandoned = True
            self.decoder.wake()


def _cleaned(query: str) -> str:
    check_text("a query", query)
    return clean_query(query)


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

    def __init__(self, asker: Asker, asked: Asked):
        self._asker, self._asked = asker, asked

    def __iter__(self) -> Iterator[str]:
        answer, shown = self._asked.answer, ""
        try:
            done = answer is None
            while answer and not done:
                done = answer.done  # looked at first: another caller may write the rest meanwhile
                text = self._asker.completed(answer, beyond=len(answer.tokens)).text
                if len(text) > len(shown):
                    yield text[len(shown) :]
                    shown = text
        finally:
            if answer and not answer.done:
                self._asker.abandon(self._asked)
        if answer is None and self.expanded.text:
            yield self.expanded.text

    @property
    def expanded(self) -> ExpandedQuery:
        """The whole, waited for if need be."""
        return self._asker.expanded(self._asked)
