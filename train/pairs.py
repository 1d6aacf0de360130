"""Retrieval decides: score candidate expansions by nDCG@10 under BM25, pair the better with the worse."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

import msgspec

from qe_edge.console import progress
from qe_edge.datasets import Dataset, load_dataset
from qe_edge.errors import BadInput
from qe_edge.index import Index
from qe_edge.join import DEFAULT_JOIN, Join
from qe_edge.manifest import MANIFEST, atomic_path, check_output, run_record, write_json
from qe_edge.measures import mean, per_query
from qe_edge.records import Candidate, Count, Expansion, Pair, encode_jsonl, read_jsonl
from qe_edge.workdir import Workdir

PAIRS, CANDIDATES, REPORT = "pairs.jsonl", "candidates.jsonl", "report.json"


class PairsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`min_gap` is the nDCG@10 difference (0..1) from which two candidates make a pair.

    Of each query at most `max_per_query` pairs are kept, widest gap first. `analyzer` replaces the one
    of the collection's language.
    """

    join: str = str(DEFAULT_JOIN)
    min_gap: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.05
    max_per_query: Count = 4
    analyzer: str = ""


def pairs(
    dataset: str,
    expansions: Sequence[Path | str],
    config: PairsConfig | None = None,
    *,
    out: Path | None = None,
    workdir: Workdir,
) -> Path:
    """Build preference pairs for a data set's judged queries; returns a folder.

    It holds `pairs.jsonl`, every candidate's score in `candidates.jsonl`, and the counts in `report.json`.

    Raises:
        BadInput: no expansion is of a judged query, or no two candidates differ enough.
    """
    config = config or PairsConfig()
    join = Join.parse(config.join)
    out = out or workdir.new("pairs")
    check_output(out, "pairs")
    data = load_dataset(dataset)
    rows = [row for path in expansions for row in read_jsonl(path, Expansion)]
    known, dropped = usable(rows, data)
    if not known:
        raise BadInput(f"none of the {len(rows)} expansions is of a judged query of {data}")
    index = Index.for_dataset(data, workdir.root / "index", analyzer=config.analyzer)
    data.check_judgments(index.ids)
    candidates, plain = score(known, data, index, join)
    made, why_not = make_pairs(list(zip(known, candidates, strict=True)), config)
    report = summarize(candidates, plain, made, dropped + why_not, queries=len(data.queries))
    if not made:
        why = report["dropped"] or "no query has two candidates"
        raise BadInput(f"no two candidates of one query differ by {config.min_gap} nDCG@10; counts: {why}")
    with atomic_path(out) as partial:
        partial.mkdir()
        (partial / PAIRS).write_bytes(encode_jsonl(made))
        (partial / CANDIDATES).write_bytes(encode_jsonl(candidates))
        write_json(partial / REPORT, report)
        inputs = {f"expansions[{i}]": path for i, path in enumerate(expansions)}
        settings = {"dataset": dataset, **msgspec.to_builtins(config)}
        write_json(partial / MANIFEST, run_record("pairs", settings, inputs))
    return out


def usable(rows: Iterable[Expansion], data: Dataset) -> tuple[list[Expansion], Counter[str]]:
    """The rows that can be scored: of a judged query, not empty, each text once per query."""
    kept: list[Expansion] = []
    dropped: Counter[str] = Counter()
    seen: set[tuple[str, str]] = set()
    for row in rows:
        if row.query_id not in data.queries:
            dropped["query not judged in this split"] += 1
        elif row.query != data.queries[row.query_id]:
            dropped["other query of that id"] += 1
        elif not row.text.strip():
            dropped["empty expansion"] += 1
        elif (row.query_id, row.text) in seen:
            dropped["duplicate expansion"] += 1
        else:
            seen.add((row.query_id, row.text))
            kept.append(row)
    return kept, dropped


def score(
    rows: Sequence[Expansion], data: Dataset, index: Index, join: Join
) -> tuple[list[Candidate], dict[str, float]]:
    """nDCG@10 of every row's expanded query and, per query, of the plain one."""
    plain_run = {query_id: index.search_text(text, join=join) for query_id, text in data.queries.items()}
    plain = per_query(data.qrels, plain_run)
    scored: list[Candidate] = []
    with progress("scoring candidates", len(rows)) as advance:
        for batch in _rounds(rows):
            run = {}
            for row in batch:
                run[row.query_id] = index.search_text(data.queries[row.query_id], row.text, join=join)
                advance()
            values = per_query({query_id: data.qrels[query_id] for query_id in run}, run)
            scored += [
                Candidate(
                    dataset=row.dataset,
                    query_id=row.query_id,
                    model=row.model,
                    mode=row.mode,
                    ndcg=values[row.query_id],
                    plain_ndcg=plain[row.query_id],
                    text=row.text,
                )
                for row in batch
            ]
    by_key = {(c.query_id, c.text): c for c in scored}
    return [by_key[row.query_id, row.text] for row in rows], plain


def _rounds(rows: Sequence[Expansion]) -> Iterable[list[Expansion]]:
    """Batches in which each query stands once, since a run has one ranking per query."""
    rounds: dict[int, list[Expansion]] = defaultdict(list)
    count: Counter[str] = Counter()
    for row in rows:
        rounds[count[row.query_id]].append(row)
        count[row.query_id] += 1
    return rounds.values()


def make_pairs(
    candidates: Iterable[tuple[Expansion, Candidate]], config: PairsConfig
) -> tuple[list[Pair], Counter[str]]:
    """Pairs of one query's candidates, widest gap first, and why the other combinations made none."""
    by_query: dict[str, list[tuple[Expansion, Candidate]]] = defaultdict(list)
    for row, candidate in candidates:
        by_query[row.query_id].append((row, candidate))
    made: list[Pair] = []
    dropped: Counter[str] = Counter()
    for group in by_query.values():
        wide = []
        for a, b in combinations(group, 2):
            better, worse = (a, b) if a[1].ndcg >= b[1].ndcg else (b, a)
            gap = better[1].ndcg - worse[1].ndcg
            if gap < config.min_gap:
                dropped["tie" if gap == 0 else "gap below the minimum"] += 1
            else:
                wide.append((gap, better, worse))
        wide.sort(key=lambda item: -item[0])  # stable: equal gaps keep the files' order
        dropped["over the limit per query"] += len(wide[config.max_per_query :])
        made += [_pair(better, worse) for _, better, worse in wide[: config.max_per_query]]
    return made, +dropped


def _pair(better: tuple[Expansion, Candidate], worse: tuple[Expansion, Candidate]) -> Pair:
    row = better[0]
    return Pair(
        dataset=row.dataset,
        query_id=row.query_id,
        query=row.query,
        lang=row.lang,
        chosen=row.text,
        rejected=worse[0].text,
        chosen_ndcg=better[1].ndcg,
        rejected_ndcg=worse[1].ndcg,
        chosen_model=row.model,
        chosen_mode=row.mode,
        rejected_model=worse[0].model,
        rejected_mode=worse[0].mode,
    )


def summarize(
    candidates: Sequence[Candidate],
    plain: dict[str, float],
    made: Sequence[Pair],
    dropped: Counter[str],
    *,
    queries: int,
) -> dict[str, Any]:
    """Counts and means (nDCG@10, 0..1) of a pairs run, over the queries that have candidates."""
    by_query: dict[str, list[float]] = defaultdict(list)
    for candidate in candidates:
        by_query[candidate.query_id].append(candidate.ndcg)
    return {
        "queries": queries,
        "queries_with_candidates": len(by_query),
        "queries_with_pairs": len({pair.query_id for pair in made}),
        "candidates": len(candidates),
        "candidates_better_than_plain": sum(c.ndcg > c.plain_ndcg for c in candidates),
        "candidates_worse_than_plain": sum(c.ndcg < c.plain_ndcg for c in candidates),
        "pairs": len(made),
        "dropped": dict(dropped),
        "ndcg@10": {
            "plain query": mean({q: plain[q] for q in by_query}),
            "best candidate (oracle)": mean({q: max(values) for q, values in by_query.items()}),
            "worst candidate (oracle)": mean({q: min(values) for q, values in by_query.items()}),
        },
    }
