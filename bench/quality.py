"""How well expanded queries retrieve: one run per system, compared query by query."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from qe_edge.bench.result import System
from qe_edge.retrieval.datasets import Dataset
from qe_edge.retrieval.index import Retriever
from qe_edge.retrieval.measures import holm, mean_interval, per_query, randomization_test, ratio_interval
from qe_edge.retrieval.trec import Ranking
from qe_edge.student.join import Join

MEASURE = "nDCG@10"
# Deep enough for R@1000, so that any tool can compute any usual measure from the run files.
DEPTH = 1000


def retrieve(
    data: Dataset, index: Retriever, expansions: dict[str, str], join: Join, *, depth: int = DEPTH
) -> dict[str, Ranking]:
    """The ranking of every query, expanded where there is an expansion."""
    return {
        query_id: index.search_text(text, expansions.get(query_id, ""), join=join, k=depth)
        for query_id, text in data.queries.items()
    }


def values_of(data: Dataset, run: dict[str, Ranking]) -> dict[str, float]:
    """The measure for every judged query."""
    return per_query(data.qrels, run, MEASURE)


def compare_all(systems: Sequence[System], teacher: System | None) -> list[System]:
    """Compare the systems with the first of them, which is plain BM25, and with the teacher."""
    bm25, *others = systems
    compared = [compare(system, bm25, teacher) for system in others]
    for name in ("p_vs_bm25", "p_vs_teacher"):
        tested = [i for i, system in enumerate(compared) if getattr(system, name) is not None]
        for i, p in zip(tested, holm([getattr(compared[i], name) for i in tested]), strict=True):
            compared[i] = msgspec.structs.replace(compared[i], **{name: p})
    return [bm25, *compared]


def compare(system: System, bm25: System, teacher: System | None) -> System:
    """Add what a system gains over BM25 and keeps of the teacher, paired over the queries.

    The p-values are those of the two comparisons alone.
    """
    ids = list(system.per_query)
    own, plain = ([s.per_query[i] for i in ids] for s in (system, bm25))
    gain = [a - b for a, b in zip(own, plain, strict=True)]
    compared = msgspec.structs.replace(
        system,
        vs_bm25=mean_interval(gain),
        p_vs_bm25=randomization_test(gain),
        helped=sum(difference > 0 for difference in gain),
        hurt=sum(difference < 0 for difference in gain),
    )
    if teacher is None or teacher is system:
        return compared
    taught = [teacher.per_query[i] for i in ids]
    loss = [a - b for a, b in zip(own, taught, strict=True)]
    return msgspec.structs.replace(
        compared,
        vs_teacher=mean_interval(loss),
        p_vs_teacher=randomization_test(loss),
        retention=ratio_interval(own, taught),
        gain_retention=ratio_interval(gain, [a - b for a, b in zip(taught, plain, strict=True)]),
    )
