"""What the plain query finds, to be expanded with; and RM3, the baseline that does so without any model.

RM3 (Abdul-Jaleel et al., TREC 2004) with Anserini's numbers: the ten best terms of each of the ten best
documents, weighted by the documents' scores, the ten best of these beside the query with half the weight.
Terms of more than a tenth of the documents are left out as there, but not very short or long ones.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping

from qe_edge.retrieval.datasets import Dataset
from qe_edge.retrieval.index import Index
from qe_edge.retrieval.trec import Ranking

DOCUMENTS, TERMS, QUERY_WEIGHT = 10, 10, 0.5
COMMON = 0.1


def found_texts(data: Dataset, run: Mapping[str, Ranking]) -> dict[str, list[str]]:
    """Query id -> the texts of the DOCUMENTS best documents of its run.

    The documents are read until all that are needed were there.
    """
    texts = read_texts(data, {doc_id for ranking in run.values() for doc_id, _ in ranking[:DOCUMENTS]})
    return {
        query_id: [texts[doc_id] for doc_id, _ in ranking[:DOCUMENTS]] for query_id, ranking in run.items()
    }


def read_texts(data: Dataset, wanted: Collection[str]) -> dict[str, str]:
    """The texts of documents by their ids."""
    texts: dict[str, str] = {}
    for doc_id, text in data.documents():
        if doc_id in wanted:
            texts[doc_id] = text
            if len(texts) == len(wanted):
                break
    return texts


def rm3(
    data: Dataset, index: Index, run: Mapping[str, Ranking], texts: Mapping[str, list[str]], depth: int
) -> dict[str, Ranking]:
    """Search again with each query's terms and those of the best documents of its plain `run`.

    `texts` are theirs, at least DOCUMENTS of each query's.
    """
    vectors = {
        text: _best_terms(index, Counter(index.analyze(text)))
        for text in {text for found in texts.values() for text in found[:DOCUMENTS]}
    }
    found = {}
    for query_id, query in data.queries.items():
        feedback: dict[str, float] = defaultdict(float)
        for (_, score), text in zip(run[query_id], texts[query_id][:DOCUMENTS], strict=False):
            vector = vectors[text]
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
