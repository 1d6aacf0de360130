"""BM25 with pseudo-relevance feedback: the baseline that expands a query without any model.

RM3 (Abdul-Jaleel et al., TREC 2004) with Anserini's numbers: the ten best terms of each of the ten best
documents, weighted by the documents' scores, the ten best of these beside the query with half the weight.
Terms of more than a tenth of the documents are left out as there, but not very short or long ones.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping

from qe_edge.datasets import Dataset
from qe_edge.index import Index, Ranking

DOCUMENTS, TERMS, QUERY_WEIGHT = 10, 10, 0.5
COMMON = 0.1


def rm3(data: Dataset, index: Index, run: Mapping[str, Ranking], depth: int) -> dict[str, Ranking]:
    """Search again with each query's terms and those of the best documents of its plain `run`.

    The documents are read until all that are needed were there, and only those are analysed.
    """
    wanted = {doc_id for ranking in run.values() for doc_id, _ in ranking[:DOCUMENTS]}
    vectors: dict[str, dict[str, float]] = {}
    for doc_id, text in data.documents():
        if doc_id in wanted:
            vectors[doc_id] = _best_terms(index, Counter(index.analyze(text)))
            if len(vectors) == len(wanted):
                break
    found = {}
    for query_id, query in data.queries.items():
        feedback: dict[str, float] = defaultdict(float)
        for doc_id, score in run[query_id][:DOCUMENTS]:
            vector = vectors[doc_id]
            for term, count in vector.items():
                feedback[term] += score * count / sum(vector.values())
        found[query_id] = index.search(_interpolate(index.analyze(query), _heaviest(feedback)), k=depth)
    return found


def _best_terms(index: Index, counts: Mapping[str, int]) -> dict[str, float]:
    limit = COMMON * len(index.ids)
    return _heaviest({term: float(n) for term, n in counts.items() if index.frequency(term) <= limit})


def _heaviest(weights: Mapping[str, float]) -> dict[str, float]:
    return dict(sorted(weights.items(), key=lambda item: (-item[1], item[0]))[:TERMS])


def _interpolate(query: list[str], feedback: Mapping[str, float]) -> dict[str, float]:
    """Both scaled to a sum of one, then mixed."""
    weights: dict[str, float] = defaultdict(float)
    for term, count in Counter(query).items():
        weights[term] += QUERY_WEIGHT * count / len(query)
    total = sum(feedback.values())
    for term, weight in feedback.items():
        weights[term] += (1 - QUERY_WEIGHT) * weight / total
    return dict(weights)
