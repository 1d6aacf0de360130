"""The student reads what the plain query found: a few passages at a time, and one caller at a time."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from threading import TIMEOUT_MAX, Event, Lock

from qe_edge.arguments import check_scores, check_text, check_texts, check_whole
from qe_edge.backends.protocol import Backend, Reader
from qe_edge.errors import BadInput, QeEdgeError
from qe_edge.runtime.expansion import ExpandedQuery
from qe_edge.student.feedback import MOST_PASSAGES, RelevanceModel
from qe_edge.student.gate import OPEN, Gate
from qe_edge.student.prompt import clean_query
from qe_edge.text import words_of


def check_passages(most: int) -> None:
    """Refuse a number of passages that can't be read."""
    check_whole("passages", most, 1, MOST_PASSAGES)


class PassageReader:
    """A student that weighs `most` passages, in as many threads as you like; see `Expander.feedback`.

    Raises:
        BadArgument: none is to be read, or over MOST_PASSAGES.
    """

    def __init__(self, backend: Backend, most: int):
        check_passages(most)
        self._backend, self.most, self._lock, self._closed = backend, most, Lock(), False
        self._reader: Reader | None = None  # made when it is wanted: it has a cache of its own

    def feedback(
        self,
        query: str,
        passages: Sequence[str],
        *,
        gate: Gate,
        deadline: float,
        scores: Sequence[float],
        over: Event | None = None,
    ) -> ExpandedQuery:
        """`deadline` is on `time.perf_counter`'s clock; it also ends when `over` is set by another thread."""
        check_text("a query", query)
        check_texts("passages", passages)
        for passage in passages:
            check_text("a passage", passage)
        check_scores(scores)
        begin, spec = time.perf_counter(), self._backend.spec
        settings = spec.feedback
        plain = ExpandedQuery(query, "", settings.join)
        if reason := gate.before(clean_query(query), scores, languages=spec.prompt.languages):
            return replace(plain, fallback=reason)
        heads = [settings.beginning(passage) for passage in passages[: self.most]]
        new = {word for head in heads for word in words_of(head)} - set(words_of(query))
        if not any(heads):
            return replace(plain, fallback="the plain query found nothing to read")
        if gate.min_new_words is not None and len(new) < gate.min_new_words:
            return replace(plain, fallback="what the plain query found adds nothing to it")
        prompts, answer, prefix = settings.encode(query, heads, spec.prompt, self._backend.tokenize)
        read: list[float] = []
        try:
            for values in self._in_turns(prompts, answer, prefix, deadline, over or Event()):
                read += values
        except BadInput as error:
            if gate == OPEN:
                raise
            return replace(plain, fallback=str(error))
        if not read:
            return replace(plain, fallback="the deadline passed before the first passage was read")
        return replace(
            plain,
            prompt_tokens=prefix + sum(len(prompt) - prefix + len(answer) for prompt in prompts[: len(read)]),
            finish_reason="stop" if len(read) == len(prompts) else "deadline",
            prefill_s=time.perf_counter() - begin,
            relevance=RelevanceModel(
                tuple(heads[: len(read)]), settings.weigh(read, len(answer)), settings.terms
            ),
        )

    def _in_turns(
        self, prompts: list[list[int]], answer: list[int], prefix: int, deadline: float, over: Event
    ) -> Iterator[list[float]]:
        """The log-likelihoods of a few prompts after the other, until it is over; others' in between."""
        reading: Iterator[list[float]] | None = None
        while (left := deadline - time.perf_counter()) > 0:
            if not self._lock.acquire(timeout=-1 if left == math.inf else min(left, TIMEOUT_MAX)):
                return
            try:
                if over.is_set():
                    return
                if self._closed:
                    raise QeEdgeError("the model was closed")
                self._reader = self._reader or self._backend.reader()
                reading = reading or self._reader.log_likelihoods(prompts, answer, prefix=prefix)
                values = next(reading, None)
            finally:
                self._lock.release()
            if values is None:
                return
            yield values

    def forget(self) -> None:
        """Drop what is kept of earlier prompts."""
        with self._lock:
            if self._reader:
                self._reader.forget()

    def close(self) -> None:
        """Give the memory back; whoever still reads gets an error."""
        with self._lock:
            self._closed = True
            if self._reader:
                self._reader.close()
