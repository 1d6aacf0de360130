"""What a candidate is worth where its passages are read, too: `Expander.refine` without a student."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np

from qe_edge.runtime.expander import ROUNDS
from qe_edge.runtime.expansion import ExpandedQuery
from qe_edge.runtime.reader import Encoder, Passage
from qe_edge.serve.collection import Collection
from qe_edge.student.feedback import Feedback, RelevanceModel
from qe_edge.student.join import Join


class Refiner:
    """`Expander.refine` for texts that are there already; a passage is encoded once for all of them.

    Raises:
        NotFound, BadInput: see `Encoder`.
    """

    def __init__(self, collection: Collection, reader: Path | str, passages: int | None = None):
        self.collection, self._encoder = collection, Encoder(reader)
        settings = Feedback(temperature=self._encoder.temperature, tokens=self._encoder.tokens)
        self._settings = msgspec.structs.replace(settings, passages=passages or settings.passages)
        self._vectors: dict[str, np.ndarray] = {}

    def terms(self, query: str, text: str, join: Join) -> dict[str, float]:
        """The weighted terms of a query in the collection's index, expanded by a text and what it finds."""
        settings, worth = self._settings, dict[str, float]()
        expanded = written = ExpandedQuery(query, text, join)
        for _ in range(ROUNDS if self._encoder.knows(query) else 0):
            found = self.collection.found(expanded, settings.passages)
            heads = dict.fromkeys(settings.beginning(passage) for passage in found)
            unread = [head for head in heads if head not in worth]
            passages = [Passage(head, self._vector(head)) for head in unread]
            for head, values in zip(unread, self._encoder.cosines(query, text, passages), strict=True):
                worth[head] = values[0]
            if not worth:
                break
            weights = settings.weigh(list(worth.values()))
            model = RelevanceModel(tuple(worth), weights, settings.terms, settings.join)
            expanded = replace(written, relevance=model)
        return self.collection.terms(expanded)

    def _vector(self, head: str) -> np.ndarray:
        if head not in self._vectors:
            self._vectors[head] = self._encoder.vectors([head])[0]
        return self._vectors[head]

    def close(self) -> None:
        self._encoder.close()
