"""What the scores of the candidates say about teachers, queries and the pairs made of them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from qe_edge.records import Candidate, Pair
from qe_edge.retrieval.measures import mean

# Lower edges of the histogram of each query's gap between best and worst reward.
GAPS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5)
PLAIN = "plain query"


def summarize(
    candidates: Sequence[Candidate], made: Sequence[Pair], dropped: Counter[str], *, queries: int
) -> dict[str, Any]:
    """Counts and means over the queries that have candidates; nDCG@10 and rewards on the scale 0..1.

    `candidates` holds the plain queries as well. `wins` says how often each model and mode wrote the best
    of a query's candidates, the plain query among them; equals share a win.
    """
    by_query: dict[str, list[Candidate]] = defaultdict(list)
    plain: dict[str, Candidate] = {}
    for candidate in candidates:
        if candidate.mode == "plain":
            plain[candidate.query_id] = candidate
        else:
            by_query[candidate.query_id].append(candidate)
    written = [candidate for group in by_query.values() for candidate in group]
    by_origin: dict[str, list[float]] = defaultdict(list)
    for candidate in written:
        by_origin[_origin(candidate)].append(candidate.ndcg)
    with_pairs = {pair.query_id for pair in made}
    return {
        "queries": queries,
        "queries_with_candidates": len(by_query),
        "queries_with_pairs": len(with_pairs),
        "queries_without_usable_pair": len(by_query) - len(with_pairs),
        "queries_where_every_candidate_hurts": sum(
            all(c.ndcg < c.plain_ndcg for c in group) for group in by_query.values()
        ),
        "candidates": len(written),
        "candidates_better_than_plain": sum(c.ndcg > c.plain_ndcg for c in written),
        "candidates_worse_than_plain": sum(c.ndcg < c.plain_ndcg for c in written),
        "pairs": len(made),
        "dropped": dict(dropped),
        "ndcg@10": {
            PLAIN: mean({query_id: plain[query_id].ndcg for query_id in by_query}),
            "best candidate (oracle)": mean(_of_each(by_query, max)),
            "worst candidate (oracle)": mean(_of_each(by_query, min)),
        },
        "ndcg@10_by_origin": {origin: fmean(values) for origin, values in sorted(by_origin.items())},
        "wins": _wins(by_query, plain),
        "gaps": _gaps(by_query),
    }


def _of_each(by_query: dict[str, list[Candidate]], choose: Any) -> dict[str, float]:
    return {query_id: choose(c.ndcg for c in group) for query_id, group in by_query.items()}


def _origin(candidate: Candidate) -> str:
    return PLAIN if candidate.mode == "plain" else f"{candidate.model} {candidate.mode}"


def _wins(by_query: dict[str, list[Candidate]], plain: dict[str, Candidate]) -> dict[str, float]:
    wins: Counter[str] = Counter()
    for query_id, group in by_query.items():
        everyone = [plain[query_id], *group]
        best = max(c.reward for c in everyone)
        winners = [_origin(c) for c in everyone if c.reward == best]
        for origin in winners:
            wins[origin] += 1 / len(winners)  # type: ignore[assignment]
    return {origin: round(share, 2) for origin, share in wins.most_common()}


def _gaps(by_query: dict[str, list[Candidate]]) -> dict[str, int]:
    """How many queries have a gap in each range, those with a single candidate left out."""
    counts = dict.fromkeys(GAPS, 0)
    for group in by_query.values():
        if len(group) > 1:
            rewards = [c.reward for c in group]
            gap = max(rewards) - min(rewards)
            counts[max(edge for edge in GAPS if gap >= edge)] += 1
    edges = [*GAPS, None]
    return {
        f"{low:g} to {high:g}" if high else f"{low:g} and more": counts[low]
        for low, high in zip(GAPS, edges[1:], strict=True)
    }


def describe(report: dict[str, Any]) -> str:
    """The report as a few lines of text."""
    ndcg = report["ndcg@10"]
    best, worst = ndcg["best candidate (oracle)"], ndcg["worst candidate (oracle)"]
    lines = [
        f"nDCG@10   plain query {ndcg[PLAIN]:.3f}, each query's best candidate {best:.3f}, worst {worst:.3f}",
        f"          better than the plain query: {report['candidates_better_than_plain']} of "
        f"{report['candidates']} candidates, worse: {report['candidates_worse_than_plain']}",
        *(
            f"          {value:.3f} {origin}, best for {report['wins'].get(origin, 0):g} queries"
            for origin, value in report["ndcg@10_by_origin"].items()
        ),
        f"          the plain query is best for {report['wins'].get(PLAIN, 0):g} queries; "
        f"every candidate hurts {report['queries_where_every_candidate_hurts']}",
        "gaps      " + ", ".join(f"{label}: {count}" for label, count in report["gaps"].items()),
        f"no pair   {report['queries_without_usable_pair']} of {report['queries_with_candidates']} queries",
    ]
    if report["dropped"]:
        dropped = ", ".join(f"{count} {reason}" for reason, count in report["dropped"].items())
        lines.append(f"not used  {dropped}")
    return "\n".join(lines)
