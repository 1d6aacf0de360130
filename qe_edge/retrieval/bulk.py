"""Search for many queries at machine speed: the same top k as `Index.search`, compiled by numba."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from qe_edge.errors import require

if TYPE_CHECKING:
    from qe_edge.retrieval.index import Index
    from qe_edge.retrieval.trec import Ranking
    from qe_edge.student.join import Join

Terms = Sequence[str]


class BulkSearch:
    """Search without Python in the inner loops. The first on a machine compiles for some seconds.

    Raises:
        NotInstalled: numba is missing.
    """

    def __init__(self, index: Index):
        require("numba", "train")
        from qe_edge.retrieval.kernel import best_of_each

        self._best_of_each = best_of_each
        self._index = index
        # As unsigned numbers, an index need not be looked at for being negative.
        self._postings = (index.data, index.rows.view(np.uint32), index.starts)

    def search(self, candidates: Sequence[tuple[Terms, Terms]], join: Join, k: int = 10) -> list[Ranking]:
        """For each (query terms, expansion terms) what `Index.search` finds for the joined terms."""
        get = self._index.vocab.get
        columns: list[list[int]] = []
        lengths, scales = [], []
        for query, expansion in candidates:
            for terms in (query, expansion):
                columns.append([column for term in terms if (column := get(term)) is not None])
                lengths.append(len(columns[-1]))
            scales.append(join.scales(len(query), len(expansion)))
        documents = len(self._index.ids)
        rows, scores = self._best_of_each(
            *self._postings,
            np.fromiter(chain.from_iterable(columns), np.int64, sum(lengths)),
            np.cumsum([0, *lengths]),
            np.array(scales, dtype=np.float64).reshape(-1, 2),
            min(k, documents),
            documents,
        )
        ids = self._index.ids
        return [
            [(ids[row], score) for row, score in zip(*found, strict=True) if score > 0]
            for found in zip(rows.tolist(), scores.tolist(), strict=True)
        ]
