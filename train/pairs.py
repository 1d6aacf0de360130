"""Retrieval decides: score candidate expansions under BM25, pair the better with the worse."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import msgspec
from msgspec.structs import replace

from qe_edge.errors import BadInput
from qe_edge.records import Candidate, Expansion, Pair, Problem, encode_jsonl
from qe_edge.retrieval.datasets import Dataset, load_dataset
from qe_edge.retrieval.index import Index
from qe_edge.retrieval.opensearch import OpenSearchIndex
from qe_edge.student.hub import local_file
from qe_edge.student.join import Join
from qe_edge.text import count_words
from qe_edge.train.config import PairsConfig, Strategy
from qe_edge.train.pair_report import ALIKE, CUT, EQUAL, MARKED, TOO_MANY, TOO_NEAR, listed, summarize
from qe_edge.train.scoring import NDCG, Refining, Reward, score
from qe_edge.train.teach.ledger import read_texts
from qe_edge.work.files import MANIFEST, atomic_path, write_json
from qe_edge.work.folder import Workdir
from qe_edge.work.runs import check_output, run_record

PAIRS, BEST, CANDIDATES, REPORT = "pairs.jsonl", "best.jsonl", "candidates.jsonl", "report.json"
# Share of index terms in common from which two expansions are one expansion, slightly reworded.
NEAR_DUPLICATE = 0.9


def pairs(
    dataset: str,
    expansions: Sequence[Path | str],
    config: PairsConfig | None = None,
    *,
    out: Path | None = None,
    workdir: Workdir,
) -> Path:
    """Build preference pairs for a data set's judged queries; returns a folder.

    It holds `pairs.jsonl`, each query's best candidate where it beats the plain query in `best.jsonl` (for
    SFT), every candidate's score (the plain query's too) in `candidates.jsonl`, and what came of them in
    `report.json`. Scores are kept in the work folder: a rerun scores only what is new.

    Raises:
        BadInput: no expansion is of a judged query, or no two candidates differ enough.
    """
    config = config or PairsConfig()
    join, reward = Join.parse(config.join), Reward.parse(config.reward, config.length_penalty)
    out = out or workdir.new("pairs")
    check_output(out, "pairs", expansions)
    if config.reader:
        config = replace(config, reader=str(local_file(config.reader)))
    data = load_dataset(dataset)
    rows = read_texts(expansions)
    known, dropped = usable(rows, data, config.accept)
    if not known:
        raise BadInput(
            f"none of the {len(rows)} expansions can be scored on {data}; dropped: {listed(dropped)}"
        )
    index: Index | OpenSearchIndex
    if config.retriever:
        index = OpenSearchIndex(config.retriever)
    else:
        index = Index.for_dataset(data, workdir.root / "index", analyzer=config.analyzer)
        data.check_judgments(index.ids)

    queries = list(dict.fromkeys(row.query_id for row in known))
    items = [(query_id, "") for query_id in queries] + [(row.query_id, row.text) for row in known]
    values = score(
        items,
        data,
        index,
        join,
        reward.measures,
        cache=workdir.root / "scores",
        executor=config.executor,
        workers=config.workers,
        reading=_reading(data, config, workdir),
    )
    plain = {query_id: found[NDCG] for query_id, found in zip(queries, values, strict=False)}
    candidates = [
        _plain_candidate(data, query_id, plain[query_id], reward, values[i])
        for i, query_id in enumerate(queries)
    ]
    candidates += [
        _candidate(row, found, reward, plain[row.query_id])
        for row, found in zip(known, values[len(queries) :], strict=True)
    ]
    scored = list(zip(known, candidates[len(queries) :], strict=True))
    made, why_not = make_pairs(scored, config, index.analyze)
    best = best_of(scored, {candidate.query_id: candidate.reward for candidate in candidates[: len(queries)]})
    penalty = f" less {config.length_penalty:g} per hundred words" if config.length_penalty else ""
    named = f"{config.reward}{penalty}"
    report = summarize(candidates, made, dropped + why_not, queries=len(data.queries), reward=named)
    if not made:
        more = "Ask for more of each query (`qe-edge teach --n 4`)"
        texts = Counter(row.query_id for row in rows if row.problem in (None, "cut"))
        if CUT in report["dropped"] and any(texts[query_id] > 1 for query_id in data.queries):
            more = "Take what was cut (--accept cut), or ask for more of each query (`qe-edge teach --n 4`)"
        if TOO_NEAR in report["dropped"]:
            more += ", or take a smaller --min-gap"
        if len(plain) == len(data.queries) and all(value == 1 for value in plain.values()):
            more = "BM25 alone reaches 1.000 for each of these queries: take harder ones"
        more += "; `train sft` needs no pairs"
        if len(known) == len(queries):
            left_out = f" ({listed(report['dropped'])})" if report["dropped"] else ""
            raise BadInput(f"no query has two candidates, of which a pair could be made{left_out}. {more}")
        raise BadInput(
            f"no two candidates of one query differ by {config.min_gap} {config.reward}; "
            f"{listed(report['dropped'])}. {more}"
        )
    with atomic_path(out) as partial:
        partial.mkdir()
        (partial / PAIRS).write_bytes(encode_jsonl(made))
        (partial / BEST).write_bytes(encode_jsonl(best))
        (partial / CANDIDATES).write_bytes(encode_jsonl(candidates))
        write_json(partial / REPORT, report)
        inputs = {f"expansions[{i}]": path for i, path in enumerate(expansions)}
        settings = {"dataset": dataset, **msgspec.to_builtins(config)}
        write_json(partial / MANIFEST, run_record("pairs", settings, inputs))
    return out


def _reading(data: Dataset, config: PairsConfig, workdir: Workdir) -> Refining | None:
    if not config.reader:
        return None
    indexes = workdir.root / "index"
    return Refining(data.source, indexes, config.analyzer, config.reader, config.passages)


def best_of(scored: Iterable[tuple[Expansion, Candidate]], plain: Mapping[str, float]) -> list[Expansion]:
    """Each query's best candidate, the first of equals, where it is worth more than the `plain` query."""
    best: dict[str, tuple[float, Expansion]] = {}
    for row, candidate in scored:
        least = best[row.query_id][0] if row.query_id in best else plain[row.query_id]
        if candidate.reward > least:
            best[row.query_id] = candidate.reward, row
    return [row for _, row in best.values()]


def usable(
    rows: Iterable[Expansion], data: Dataset, accept: Sequence[Problem] = ()
) -> tuple[list[Expansion], Counter[str]]:
    """The rows that can be scored: of a judged query, not marked, not empty, each text once per query."""
    kept: list[Expansion] = []
    dropped: Counter[str] = Counter()
    seen: set[tuple[str, str]] = set()
    for row in rows:
        if row.query_id not in data.queries:
            dropped["of queries not judged in this split"] += 1
        elif row.query != data.queries[row.query_id]:
            dropped["of another query with that id"] += 1
        elif row.problem and row.problem not in accept:
            dropped[f"{MARKED}{row.problem}"] += 1
        elif not row.text.strip():
            dropped["empty"] += 1
        elif (row.query_id, row.text) in seen:
            dropped["seen before"] += 1
        else:
            seen.add((row.query_id, row.text))
            kept.append(row)
    return kept, dropped


def _candidate(row: Expansion, values: dict[str, float], reward: Reward, plain: float) -> Candidate:
    return Candidate(
        dataset=row.dataset,
        query_id=row.query_id,
        model=row.model,
        mode=row.mode,
        ndcg=values[NDCG],
        plain_ndcg=plain,
        reward=reward.of(values, count_words(row.text)),
        text=row.text,
    )


def _plain_candidate(
    data: Dataset, query_id: str, ndcg: float, reward: Reward, values: dict[str, float]
) -> Candidate:
    return Candidate(data.name, query_id, "", "plain", ndcg, ndcg, reward.of(values, 0), "")


class _Scored(NamedTuple):
    row: Expansion
    candidate: Candidate
    terms: frozenset[str]


def make_pairs(
    candidates: Iterable[tuple[Expansion, Candidate]],
    config: PairsConfig,
    analyze: Callable[[str], list[str]],
) -> tuple[list[Pair], Counter[str]]:
    """Pairs of one query's candidates, and why the other combinations made none."""
    by_query: dict[str, list[_Scored]] = defaultdict(list)
    for row, candidate in candidates:
        by_query[row.query_id].append(_Scored(row, candidate, frozenset(analyze(row.text))))
    made: list[Pair] = []
    dropped: Counter[str] = Counter()
    for query_id, group in by_query.items():
        # Stable: of equals, the first in the files comes first.
        group.sort(key=lambda scored: -scored.candidate.reward)
        wide = []
        for better, worse in _combinations(group, config.strategy):
            gap = better.candidate.reward - worse.candidate.reward
            if gap < config.min_gap:
                dropped[EQUAL if gap == 0 else TOO_NEAR] += 1
            elif _near_duplicates(better, worse):
                dropped[ALIKE] += 1
            else:
                wide.append((gap, better, worse))
        if config.strategy == "best-vs-sampled":
            random.Random(f"{config.seed}:{query_id}").shuffle(wide)
        else:
            wide.sort(key=lambda item: -item[0])
        dropped[TOO_MANY] += len(wide[config.max_per_query :])
        made += [_pair(better, worse) for _, better, worse in wide[: config.max_per_query]]
    return made, +dropped


def _combinations(group: list[_Scored], strategy: Strategy) -> Iterable[tuple[_Scored, _Scored]]:
    """The (better, worse) combinations that a strategy looks at, of a group sorted best first."""
    if strategy == "best-worst":
        return [(group[0], group[-1])] if len(group) > 1 else []
    if strategy == "best-vs-sampled":
        return [(group[0], other) for other in group[1:]]
    return combinations(group, 2)


def _near_duplicates(a: _Scored, b: _Scored) -> bool:
    return len(a.terms & b.terms) >= NEAR_DUPLICATE * len(a.terms | b.terms)


def _pair(better: _Scored, worse: _Scored) -> Pair:
    row = better.row
    return Pair(
        dataset=row.dataset,
        query_id=row.query_id,
        query=row.query,
        lang=row.lang,
        chosen=row.text,
        rejected=worse.row.text,
        chosen_ndcg=better.candidate.ndcg,
        rejected_ndcg=worse.candidate.ndcg,
        chosen_reward=better.candidate.reward,
        rejected_reward=worse.candidate.reward,
        chosen_model=row.model,
        chosen_mode=row.mode,
        rejected_model=worse.row.model,
        rejected_mode=worse.row.mode,
    )
