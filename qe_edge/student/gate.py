"""Never worse than no expansion: when the plain query is searched instead of the expanded one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec

from qe_edge.errors import BadArgument
from qe_edge.records import Lang, lowered
from qe_edge.text import count_words, detect_language, stop_words, words_of

Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Words = Annotated[int, msgspec.Meta(ge=1, le=10**6)]


class Gate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Thresholds beyond which an expansion is not used; None (or False) switches one off.

    - `max_words`: a query of more words is a document, longer than any that was measured, and one of none,
      such as "?!", asks nothing. A Han character counts as a word.
    - `clear_lead`: one whose best plain BM25 score leads the second by this share of it has found its answer.
    - `min_new_words`: an expansion with fewer words, function words aside, that the query lacks is a copy of
      it, or empty.
    - `min_distinct`: one with a smaller share of different words among all its words repeats itself.
    - `same_language`: the student must know the query's language, and write in it.
    """

    max_words: Words | None = 256
    clear_lead: Share | None = None
    min_new_words: Words | None = 1
    min_distinct: Share | None = 0.3
    same_language: bool = True

    def checked(self) -> Gate:
        """The gate, once its numbers are known to be in their bounds, as they are where one is read.

        Raises:
            BadArgument: one is not.
        """
        try:
            return msgspec.convert(msgspec.structs.asdict(self), Gate)
        except msgspec.ValidationError as error:
            what, _, where = str(error).partition(" - at `$.")
            raise BadArgument(f"the gate's {where.rstrip('`')}: {lowered(what)}") from None

    def before(self, query: str, scores: Sequence[float] = (), *, languages: Sequence[Lang] = ()) -> str:
        """Why a query is not to be expanded; empty if it is.

        `scores` are those that plain BM25 found for it, best first (below zero as FTS5 gives them, or above),
        and `languages` the student's, where they are known.
        """
        words = count_words(query)
        if self.max_words is not None and not words:
            return "the query has no words"
        if self.same_language and languages and (found := detect_language(query)) not in languages:
            where = "neither in Latin nor in Chinese letters" if found == "other" else f"in {found}"
            return f"the query is {where}, and the student writes {' and '.join(languages)}"
        if self.max_words is not None and words > self.max_words:
            return f"the query has {words} words, over {self.max_words}"
        if self.clear_lead is not None and len(scores) > 1 and scores[0]:
            best, second = map(abs, scores[:2])  # FTS5's are below zero, the best one farthest
            lead = (best - second) / best
            if lead >= self.clear_lead:
                return f"the plain query's best result leads by {lead:.0%}"
        return ""

    def after(self, query: str, text: str) -> str:
        """Why an expansion must not be used; empty if it may."""
        if self.same_language and words_of(text) and detect_language(text) != detect_language(query):
            return f"the text is not in the query's language, {detect_language(query)}"
        words = words_of(text)
        new = set(words) - set(words_of(query)) - stop_words(more=True)
        if self.min_new_words is not None and len(new) < self.min_new_words:
            return "the text adds nothing to the query" if words else "the text is empty"
        if self.min_distinct is not None and len(set(words)) < self.min_distinct * len(words):
            return f"the text repeats itself: {len(set(words))} different words of {len(words)}"
        return ""


OPEN = Gate(None, None, None, None, False)
"""Nothing is held back."""
