"""An expansion by passages that a search found, weighed by a reader, or held back by the gate."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from qe_edge.arguments import check_scores
from qe_edge.errors import BadInput
from qe_edge.runtime.decoder import Decoder
from qe_edge.runtime.expansion import ExpandedQuery
from qe_edge.runtime.generation import Reading
from qe_edge.runtime.pending import Pending
from qe_edge.runtime.reader import Passage, PassageReader
from qe_edge.student.feedback import RelevanceModel
from qe_edge.student.gate import OPEN, Gate
from qe_edge.student.prompt import clean_query
from qe_edge.student.spec import ModelSpec
from qe_edge.text import stop_words, words_of


class Weighing(Pending):
    """The reader's weights of the first passages, added to what was `written` for the query, if anything was.

    `worth` is what passages are worth that were read for it before: they are not read again, and count too.
    """

    def __init__(
        self,
        decoder: Decoder,
        reader: PassageReader,
        spec: ModelSpec,
        written: ExpandedQuery,
        passages: Sequence[Passage],
        gate: Gate,
        *,
        deadline: float,
        scores: Sequence[float] = (),
        worth: dict[str, float] | None = None,
    ):
        super().__init__(deadline)
        check_scores(scores)
        self._decoder, self._reader, self._spec, self._written = decoder, reader, spec, written
        self._passages, self._gate, self._scores = passages[: reader.settings.passages], gate, scores
        self._worth = {} if worth is None else worth
        self._cleaned = clean_query(written.query)
        self._unread: list[str] = []  # beginnings
        self._reading: Reading | None = None
        self._start = time.perf_counter()

    def begin(self) -> None:
        beginning = self._reader.settings.beginning
        heads = {head: passage for passage in self._passages if (head := beginning(passage.text))}
        if reason := self._reason(list(heads)):
            self.ready = self._plain(reason)
            return
        self._unread = [head for head in heads if head not in self._worth]
        reading = self._reader.read(
            self._written.query,
            self._written.text,
            [heads[head]._replace(text=head) for head in self._unread],
        )
        reading.deadline, reading.future = self.deadline, self.future
        self._decoder.read(reading)
        self._reading = reading

    def _reason(self, heads: Sequence[str]) -> str:
        """Why the query is searched without them, if it is."""
        if reason := self._gate.before(self._cleaned, self._scores, languages=self._spec.prompt.languages):
            return reason
        if not self._reader.knows(self._cleaned):
            return "the reader doesn't know the query's letters"
        if not heads:
            return "there was no passage to read"
        found = {word for head in heads for word in words_of(head)} - stop_words(more=True)
        new = found - set(words_of(self._written.query))
        if self._gate.min_new_words is not None and len(new) < self._gate.min_new_words:
            return "the passages add nothing to the query"
        return ""

    def finish(self) -> ExpandedQuery:
        if self.error:
            if isinstance(self.error, BadInput) and self._gate != OPEN:
                return self._plain(str(self.error))
            raise self.error
        reading, settings, written = self._reading, self._reader.settings, self._written
        read = list(reading.values) if reading else []
        self._worth |= dict(zip(self._unread, read, strict=False))
        if not (reading and self._worth):
            reason = "the deadline passed before the first passage was read"
            return self._plain(reason, finish_reason="deadline")
        relevance = RelevanceModel(
            tuple(self._worth), settings.weigh(list(self._worth.values())), settings.terms, settings.join
        )
        # A text of the caller's own has no end that is known of.
        ended = "stop" if written.finish_reason == "skipped" or not written.text else written.finish_reason
        return replace(
            written,
            prompt_tokens=written.prompt_tokens + reading.prefix + sum(reading.sizes[: len(read)]),
            finish_reason=ended if len(read) == len(reading.sizes) else "deadline",
            prefill_s=written.prefill_s + time.perf_counter() - self._start,
            fallback="",
            relevance=relevance,
        )

    def _plain(self, reason: str, **changed: Any) -> ExpandedQuery:
        """What was written; the plain query where nothing was."""
        written = replace(self._written, **changed)
        return written if written.text else replace(written, fallback=reason)
