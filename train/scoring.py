"""Score candidate expansions by retrieval: over all cores or a cluster, each candidate once and for all."""

from __future__ import annotations

import hashlib
import re
import signal
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from qe_edge.console import progress
from qe_edge.errors import BadArgument, QeEdgeError, require
from qe_edge.retrieval.bulk import BulkSearch
from qe_edge.retrieval.datasets import Dataset
from qe_edge.retrieval.index import Index
from qe_edge.retrieval.measures import check_measure, depth, evaluate
from qe_edge.retrieval.opensearch import OpenSearchIndex
from qe_edge.retrieval.trec import Qrels, Ranking
from qe_edge.serve.collection import Collection
from qe_edge.student.join import Join
from qe_edge.train.config import Executor
from qe_edge.train.refined import Refiner
from qe_edge.work.files import sha256
from qe_edge.work.machine import usable_cores, versions

CHUNK = 128  # candidates that travel to a worker together
SERIAL = 16 * CHUNK  # up to so many, starting processes costs more than it saves
VERSION = 1  # of how scores are made: a change of it makes kept scores void
NDCG = "nDCG@10"  # what is always measured and reported, whatever the reward


class Reward(NamedTuple):
    """What a candidate is worth: a weighted sum of ir_measures' measures, less a price for its length.

    `length_penalty` is taken off for every hundred words of the expansion, a Chinese character counting as
    one: words, because a pair must not depend on the tokenizer of one student.
    """

    parts: tuple[tuple[float, str], ...] = ((1.0, NDCG),)
    length_penalty: float = 0.0

    @classmethod
    def parse(cls, text: str, length_penalty: float = 0.0) -> Reward:
        """`nDCG@10`, or a mix such as `0.7*nDCG@10 + 0.3*R@100`.

        Raises:
            BadArgument: it can't be read, or ir_measures knows no such measure.
        """
        parts = []
        for part in text.split("+"):
            found = re.fullmatch(r"\s*(?:([0-9.]+)\s*\*)?\s*(\S+)\s*", part)
            if not found:
                raise BadArgument(f"can't read the reward {text!r}; write nDCG@10 or 0.7*nDCG@10 + 0.3*R@100")
            try:
                weight = float(found[1] or 1)
            except ValueError:
                raise BadArgument(f"{found[1]!r} in the reward {text!r} is not a number") from None
            parts.append((weight, check_measure(found[2])))
        return cls(tuple(parts), length_penalty)

    @property
    def measures(self) -> list[str]:
        """All that has to be measured."""
        return list(dict.fromkeys([NDCG, *(measure for _, measure in self.parts)]))

    def of(self, values: dict[str, float], words: int) -> float:
        gained = sum(weight * values[measure] for weight, measure in self.parts)
        return gained - self.length_penalty * words / 100


class Refining(NamedTuple):
    """Candidates are refined by an encoder before they are scored; see `qe_edge.train.refined`."""

    dataset: str
    indexes: Path
    analyzer: str
    reader: str
    passages: int | None


class Scoring(NamedTuple):
    """What every worker needs to know."""

    searched: Path | str  # our own index, or the address of an OpenSearch index
    queries: dict[str, str]
    qrels: Qrels
    join: Join
    measures: list[str]
    reading: Refining | None = None


Item = tuple[str, str]
"""(query id, expansion); an empty expansion is the plain query."""


def score(
    items: Sequence[Item],
    data: Dataset,
    index: Index | OpenSearchIndex,
    join: Join,
    measures: list[str],
    *,
    cache: Path,
    executor: Executor = "local",
    workers: int = 0,
    reading: Refining | None = None,
) -> list[dict[str, float]]:
    """The measures' values of every item, in their order; what `cache` holds is not searched again.

    `workers` are processes, 0 standing for one per usable core. Workers of a Ray cluster must see the index
    under the same path or address.
    """
    where = index.address if isinstance(index, OpenSearchIndex) else index.folder
    if where is None:
        raise ValueError("the index must be saved, so that workers can open it")
    scoring = Scoring(where, data.queries, data.qrels, join, measures, reading)
    with closing(_Cache(cache, scoring, index)) as known:
        found, missing = known.look_up(items)
        chunks = [missing[i : i + CHUNK] for i in range(0, len(missing), CHUNK)]
        with progress("scoring candidates", len(items), done=len(found)) as advance:
            for chunk in _map(scoring, chunks, executor, workers):
                known.add(chunk)
                found |= chunk
                advance(len(chunk))
    return [dict(zip(measures, found[item], strict=True)) for item in items]


Values = dict[Item, list[float]]


def _map(scoring: Scoring, chunks: list[list[Item]], executor: Executor, workers: int) -> Iterator[Values]:
    """Each chunk's values as they come."""
    if not chunks:
        return
    if isinstance(scoring.searched, Path):
        require("numba", "train")  # said here, once, and not by every worker
    few = sum(map(len, chunks)) <= SERIAL or (workers or usable_cores()) == 1
    if executor == "local" and (few or scoring.reading):  # an encoder takes all cores by itself
        _start(scoring)
        yield from map(_score_chunk, chunks)
        return
    if executor == "ray":
        require("ray", "ray")
        from ray.util.multiprocessing import Pool

        with Pool(workers or None, initializer=_start, initargs=(scoring,)) as pool:
            yield from pool.imap_unordered(_score_chunk, chunks)
        return
    # A forked copy of a process with threads may hang; a fresh one does not.
    with ProcessPoolExecutor(
        workers or usable_cores(), get_context("spawn"), initializer=_start, initargs=(scoring, True)
    ) as processes:
        try:
            yield from processes.map(_score_chunk, chunks)
        except BrokenProcessPool:
            raise QeEdgeError(
                "a worker process died; what was scored is kept. It may have run out of memory (try fewer "
                'with --workers), or a script calls this outside of `if __name__ == "__main__":`'
            ) from None
        finally:
            processes.shutdown(cancel_futures=True)


class _Worker:
    def __init__(self, scoring: Scoring):
        self.scoring, self.depth = scoring, depth(scoring.measures)
        if scoring.reading:
            self.search = _search_refined(scoring, scoring.reading)
        elif isinstance(scoring.searched, Path):
            self.search = _search_locally(scoring)
        else:
            self.search = _search_cluster(scoring)

    def score(self, chunk: list[Item]) -> Values:
        rankings = self.search(chunk, self.depth)
        # One query stands in a chunk many times, so each item is a query of its own to the measures.
        run = {str(i): ranking for i, ranking in enumerate(rankings)}
        qrels = {str(i): self.scoring.qrels[query_id] for i, (query_id, _) in enumerate(chunk)}
        values = evaluate(qrels, run, self.scoring.measures)
        return {item: [values[m][str(i)] for m in self.scoring.measures] for i, item in enumerate(chunk)}


Search = Callable[[list[Item], int], list[Ranking]]
"""(items, k) -> the ranking of each."""


def _search_locally(scoring: Scoring) -> Search:
    assert isinstance(scoring.searched, Path)
    index = Index.open(scoring.searched)
    bulk = BulkSearch(index)
    query_terms = {query_id: index.analyze(text) for query_id, text in scoring.queries.items()}

    def search(items: list[Item], k: int) -> list[Ranking]:
        terms = [(query_terms[query_id], index.analyze(text)) for query_id, text in items]
        return bulk.search(terms, scoring.join, k=k)

    return search


def _search_refined(scoring: Scoring, reading: Refining) -> Search:
    collection = Collection.open(reading.dataset, reading.indexes, analyzer=reading.analyzer)
    refiner = Refiner(collection, reading.reader, reading.passages)

    def search(items: list[Item], k: int) -> list[Ranking]:
        return [
            collection.index.search(refiner.terms(scoring.queries[query_id], text, scoring.join), k)
            for query_id, text in items
        ]

    return search


def _search_cluster(scoring: Scoring) -> Search:
    cluster = OpenSearchIndex(str(scoring.searched))

    def search(items: list[Item], k: int) -> list[Ranking]:
        texts = [(scoring.queries[query_id], text) for query_id, text in items]
        return cluster.search_many(texts, join=scoring.join, k=k)

    return search


_worker: _Worker


def _start(scoring: Scoring, own_process: bool = False) -> None:
    global _worker
    if own_process:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which then ends us
    _worker = _Worker(scoring)


def _score_chunk(chunk: list[Item]) -> Values:
    return _worker.score(chunk)


class _Cache:
    """Scores by query, judgments and expansion; one file for each index, join and list of measures."""

    def __init__(self, folder: Path, scoring: Scoring, index: Index | OpenSearchIndex):
        folder.mkdir(parents=True, exist_ok=True)
        installed = versions()
        made_by = [installed.get(name) for name in ("bm25s", "ir-measures", "PyStemmer", "jieba")]
        if isinstance(scoring.searched, Path) and isinstance(index, Index):
            where: list[Any] = [scoring.searched.name, index.meta]
        else:
            assert isinstance(index, OpenSearchIndex)
            where = [index.address, index.documents, index.made_with]
        if reading := scoring.reading:
            where += [sha256(Path(reading.reader)), reading.passages]
        setting = msgspec.json.encode([VERSION, made_by, *where, scoring.join, scoring.measures])
        name = hashlib.sha256(setting).hexdigest()[:16]
        self._database = sqlite3.connect(folder / f"{name}.sqlite")
        self._database.execute(
            "CREATE TABLE IF NOT EXISTS scores (key BLOB PRIMARY KEY, value BLOB) WITHOUT ROWID"
        )
        self._prefix = {
            query_id: hashlib.blake2b(
                msgspec.json.encode([text, scoring.qrels[query_id]], order="deterministic")
            )
            for query_id, text in scoring.queries.items()
        }

    def _key(self, item: Item) -> bytes:
        digest = self._prefix[item[0]].copy()
        digest.update(item[1].encode())
        return digest.digest()[:16]

    def look_up(self, items: Sequence[Item]) -> tuple[Values, list[Item]]:
        """What is known, and what isn't."""
        found: Values = {}
        missing: dict[Item, Any] = {}
        for item in items:
            row = self._database.execute(
                "SELECT value FROM scores WHERE key = ?", (self._key(item),)
            ).fetchone()
            if row:
                found[item] = np.frombuffer(row[0]).tolist()
            else:
                missing[item] = None
        return found, list(missing)

    def add(self, values: Values) -> None:
        rows = [(self._key(item), np.array(v).tobytes()) for item, v in values.items()]
        with self._database:
            self._database.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?)", rows)

    def close(self) -> None:
        self._database.close()
