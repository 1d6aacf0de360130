"""What the scores of the candidates say about teachers, queries and the pairs made of them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from math import isclose
from statistics import fmean
from textwrap import wrap
from typing import Any

import msgspec

from qe_edge.console import several
from qe_edge.records import Candidate, Pair
from qe_edge.retrieval.measures import mean_interval
from qe_edge.train.scoring import NDCG

# Lower edges of the histogram of each query's gap between best and worst reward.
GAPS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5)
PLAIN = "plain query"
MARKED = "marked as "  # by `teach`, with the problem behind it
CUT = f"{MARKED}cut"
# Why two candidates of a query make no pair; all else keeps a text from being a candidate.
NO_PAIR = (EQUAL, TOO_NEAR, ALIKE, TOO_MANY) = (
    "of equal reward",
    "below --min-gap",
    "of nearly the same words",
    "over --max-per-query",
)


def summarize(
    candidates: Sequence[Candidate],
    made: Sequence[Pair],
    dropped: Counter[str],
    *,
    queries: int,
    reward: str = NDCG,
) -> dict[str, Any]:
    """Counts, and means over the queries that have candidates; nDCG@10 on the scale 0..1.

    `candidates` holds the plain queries as well. All means are over queries, a query's several candidates of
    one origin (model and mode) being averaged first; differences to the plain query are paired, on the
    queries that the origin wrote for, with 95 % bootstrap intervals. `best_of` says for how many queries the
    mean reward of an origin is the highest, alone or with others, the plain query being one of them.
    """
    by_query: dict[str, list[Candidate]] = defaultdict(list)
    plain: dict[str, Candidate] = {}
    for candidate in candidates:
        if candidate.mode == "plain":
            plain[candidate.query_id] = candidate
        else:
            by_query[candidate.query_id].append(candidate)
    written = [candidate for group in by_query.values() for candidate in group]
    with_pairs = {pair.query_id for pair in made}
    best_of = _best_of(by_query, plain)
    return {
        "reward": reward,
        "queries": queries,
        "queries_with_candidates": len(by_query),
        "queries_with_pairs": len(with_pairs),
        "queries_without_usable_pair": len(by_query) - len(with_pairs),
        "queries_with_one_candidate": sum(len(group) == 1 for group in by_query.values()),
        "queries_where_every_candidate_hurts": sum(
            all(c.ndcg < c.plain_ndcg for c in group) for group in by_query.values()
        ),
        "candidates": len(written),
        "candidates_better_than_plain": sum(c.ndcg > c.plain_ndcg for c in written),
        "candidates_worse_than_plain": sum(c.ndcg < c.plain_ndcg for c in written),
        "pairs": len(made),
        "dropped": dict(dropped),
        "plain query": {
            "ndcg@10": fmean(plain[query_id].ndcg for query_id in by_query),
            "best_of": best_of[PLAIN],
        },
        "candidates_of_each_query": {
            name: _against_plain({i: choose(c.ndcg for c in group) for i, group in by_query.items()}, plain)
            for name, choose in (("best", max), ("worst", min))
        },
        "origins": {
            origin: _against_plain(values, plain) | {"best_of": best_of[origin]}
            for origin, values in sorted(_by_origin(by_query).items())
        },
        "gaps": _gaps(by_query),
    }


def _origin(candidate: Candidate) -> str:
    return PLAIN if candidate.mode == "plain" else f"{candidate.model} {candidate.mode}"


def _by_origin(by_query: Mapping[str, Sequence[Candidate]]) -> dict[str, dict[str, float]]:
    """Origin -> query -> the mean nDCG@10 of its candidates."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for query_id, group in by_query.items():
        for origin in {_origin(candidate) for candidate in group}:
            found[origin][query_id] = fmean(c.ndcg for c in group if _origin(c) == origin)
    return found


def _against_plain(values: Mapping[str, float], plain: Mapping[str, Candidate]) -> dict[str, Any]:
    difference = mean_interval([value - plain[query_id].ndcg for query_id, value in values.items()])
    return {
        "queries": len(values),
        "ndcg@10": fmean(values.values()),
        "vs_plain": msgspec.to_builtins(difference),
    }


def _best_of(by_query: Mapping[str, Sequence[Candidate]], plain: Mapping[str, Candidate]) -> Counter[str]:
    found: Counter[str] = Counter()
    for query_id, group in by_query.items():
        rewards: dict[str, list[float]] = defaultdict(list)
        for candidate in (plain[query_id], *group):
            rewards[_origin(candidate)].append(candidate.reward)
        means = {origin: fmean(values) for origin, values in rewards.items()}
        best = max(means.values())
        found.update(origin for origin, mean in means.items() if isclose(mean, best, abs_tol=1e-9))
    return found


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
    queries, plain = report["queries_with_candidates"], report["plain query"]
    each = report["candidates_of_each_query"]
    single = report["queries_with_one_candidate"]
    by_reward = "" if report["reward"] == NDCG else f" by {report['reward']}"
    lines = [
        f"nDCG@10 of {several(queries, 'query', 'queries')}; gain over plain [95 %]; "
        f"best, or as good, for how many{by_reward}",
        "(a model's several texts of one mode are averaged for each query first)",
        f"  {plain['ndcg@10']:.3f}                           plain query, best for {plain['best_of']}",
        *(
            _line(row, f"{origin}, best for {row['best_of']}{_some(row, queries)}")
            for origin, row in report["origins"].items()
        ),
        _line(each["best"], "each query's best candidate"),
        _line(each["worst"], "each query's worst candidate"),
        f"candidates {report['candidates']}: {report['candidates_better_than_plain']} better than the plain "
        f"query, {report['candidates_worse_than_plain']} worse{by_reward and ' by nDCG@10'}",
        f"queries whose candidates are all worse: {report['queries_where_every_candidate_hurts']}",
        f"gaps between best and worst reward{by_reward}, of queries with several candidates:",
        *(
            f"  {label}: {several(count, 'query', 'queries')}"
            for label, count in report["gaps"].items()
            if count
        ),
        f"queries without a pair: {report['queries_without_usable_pair']}"
        + (f", {single} of them with a single candidate" if single else ""),
    ]
    if without := report["queries"] - queries:
        lines.append(f"queries without a candidate that can be used: {without}")
    of_pairs = {reason: count for reason, count in report["dropped"].items() if reason in NO_PAIR}
    of_texts = {reason: count for reason, count in report["dropped"].items() if reason not in NO_PAIR}
    if of_texts:
        lines.append(f"texts left out: {listed(of_texts)}")
    if of_pairs:
        lines.append(f"pairs not made: {listed(of_pairs)}")
    return "\n".join(
        part
        for line in "\n".join(lines).splitlines()
        for part in wrap(line, 80, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    )


def listed(counts: Mapping[str, int]) -> str:
    """`3 of equal reward, 1 marked as cut`, and how to let in the latter: its text is always kept."""
    takes = {CUT: " (--accept cut takes it)"}
    return ", ".join(f"{count} {reason}{takes.get(reason, '')}" for reason, count in counts.items())


def _line(row: dict[str, Any], what: str) -> str:
    gain = row["vs_plain"]
    return f"  {row['ndcg@10']:.3f}  {gain['mean']:+z.3f} [{gain['low']:+z.3f}, {gain['high']:+z.3f}]  {what}"


def _some(row: dict[str, Any], queries: int) -> str:
    if row["queries"] == queries:
        return ""
    plain = row["ndcg@10"] - row["vs_plain"]["mean"]
    return f"\n         (of the {row['queries']} with a text that can be used; plain has {plain:.3f} there)"
