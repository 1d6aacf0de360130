"""The student reads what the plain query found, and writes nothing."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from qe_edge.arguments import check_scores, check_text, check_texts, check_whole
from qe_edge.backends.protocol import Backend
from qe_edge.errors import BadInput
from qe_edge.runtime.decoder import Decoder
from qe_edge.runtime.expansion import ExpandedQuery
from qe_edge.runtime.generation import Reading
from qe_edge.runtime.pending import Pending
from qe_edge.student.feedback import MOST_PASSAGES, RelevanceModel
from qe_edge.student.gate import OPEN, Gate
from qe_edge.student.prompt import clean_query
from qe_edge.text import words_of


def check_passages(most: int) -> None:
    """Refuse a number of passages that can't be read."""
    check_whole("passages", most, 1, MOST_PASSAGES)


class PassageReader:
    """A student that weighs `most` passages; see `Expander.feedback`.

    Raises:
        BadArgument: none is to be read, or over MOST_PASSAGES.
    """

    def __init__(self, backend: Backend, decoder: Decoder, most: int):
        check_passages(most)
        self.backend, self.decoder, self.most = backend, decoder, most

    def weighing(
        self, query: str, passages: Sequence[str], *, gate: Gate, deadline: float, scores: Sequence[float]
    ) -> Weighing:
        """An expansion that can be begun.

        Raises:
            BadInput: the query is blank.
        """
        check_text("a query", query)
        check_texts("passages", passages)
        for passage in passages:
            check_text("a passage", passage)
        check_scores(scores)
        return Weighing(self, query, passages[: self.most], gate, deadline, scores)


class Weighing(Pending):
    """An expansion by passages, weighed by how likely the query is after each, or held back by the gate."""

    def __init__(
        self,
        reader: PassageReader,
        query: str,
        passages: Sequence[str],
        gate: Gate,
        deadline: float,
        scores: Sequence[float],
    ):
        super().__init__(deadline)
        self._reader, self._query, self._cleaned = reader, query, clean_query(query)
        self._passages, self._gate, self._scores = passages, gate, scores
        self._heads: list[str] = []
        self._reading: Reading | None = None
        self._start = time.perf_counter()

    def begin(self) -> None:
        spec = self._reader.backend.spec
        self._heads = [spec.feedback.beginning(passage) for passage in self._passages]
        if reason := self._reason():
            self.ready = self._plain(reason)
            return
        prompts, answer, prefix = spec.feedback.encode(
            self._query, self._heads, spec.prompt, self._reader.backend.tokenize
        )
        reading = Reading(prompts, answer, prefix, deadline=self.deadline, future=self.future)
        self._reader.decoder.read(reading)
        self._reading = reading

    def _reason(self) -> str:
        """Why the plain query is to be searched, if it is."""
        languages = self._reader.backend.spec.prompt.languages
        if reason := self._gate.before(self._cleaned, self._scores, languages=languages):
            return reason
        if not any(self._heads):
            return "the plain query found nothing to read"
        new = {word for head in self._heads for word in words_of(head)} - set(words_of(self._query))
        if self._gate.min_new_words is not None and len(new) < self._gate.min_new_words:
            return "what the plain query found adds nothing to it"
        return ""

    def finish(self) -> ExpandedQuery:
        if self.error:
            if isinstance(self.error, BadInput) and self._gate != OPEN:
                return self._plain(str(self.error))
            raise self.error
        reading = self._reading
        read = list(reading.values) if reading else []
        if not (reading and read):
            return self._plain("the deadline passed before the first passage was read")
        own = [len(prompt) - reading.prefix + len(reading.answer) for prompt in reading.prompts[: len(read)]]
        settings = self._reader.backend.spec.feedback
        return replace(
            self._plain(""),
            prompt_tokens=reading.prefix + sum(own),
            finish_reason="stop" if len(read) == len(reading.prompts) else "deadline",
            prefill_s=time.perf_counter() - self._start,
            relevance=RelevanceModel(
                tuple(self._heads[: len(read)]), settings.weigh(read, len(reading.answer)), settings.terms
            ),
        )

    def _plain(self, reason: str) -> ExpandedQuery:
        return ExpandedQuery(self._query, "", self._reader.backend.spec.feedback.join, fallback=reason)
