"""Search a data set with the plain and with the expanded query, side by side."""

from __future__ import annotations

from pathlib import Path

import msgspec

from qe_edge.datasets import load_dataset
from qe_edge.expander import ExpandedQuery, Expander
from qe_edge.index import Index, Ranking
from qe_edge.join import DEFAULT_JOIN


class Hit(msgspec.Struct, frozen=True):
    """One result; `plain_rank` is its rank without the expansion, None when not among the first k."""

    rank: int
    doc_id: str
    score: float
    plain_rank: int | None
    text: str


def search(
    query: str, dataset: str, *, expander: Expander | None, cache: Path, k: int = 5, analyzer: str = ""
) -> tuple[list[Hit], ExpandedQuery | None]:
    """The k best documents for the expanded query; for the plain one without an expander."""
    data = load_dataset(dataset)
    index = Index.for_dataset(data, cache, analyzer=analyzer)
    plain = index.search_text(query, join=DEFAULT_JOIN, k=k)
    expanded = expander.expand(query) if expander else None
    ranking = index.search(expanded.terms(index.meta.analyzer), k) if expanded else plain
    found = {doc_id for doc_id, _ in ranking}
    texts = {doc_id: text for doc_id, text in data.documents() if doc_id in found}
    return _hits(ranking, plain, texts), expanded


def _hits(ranking: Ranking, plain: Ranking, texts: dict[str, str]) -> list[Hit]:
    before = {doc_id: rank for rank, (doc_id, _) in enumerate(plain, 1)}
    return [
        Hit(rank, doc_id, round(score, 4), before.get(doc_id), texts[doc_id])
        for rank, (doc_id, score) in enumerate(ranking, 1)
    ]
