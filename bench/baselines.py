"""What a user could take instead: an encoder over all documents, over BM25's first ones, or beside BM25.

`dense` ranks all documents by the cosine with the query, `rerank` BM25's first FIRST, `hybrid` adds up the
reciprocal ranks of BM25 and dense (Cormack et al., SIGIR 2009). What expansion doesn't cost is measured too:
all documents are encoded once, the vectors kept. Times are the encoder's and its search's; BM25's own, for
rerank and hybrid, come on top.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import quantiles
from typing import Literal, NamedTuple, get_args

from qe_edge.bench.encoders import open_ranker
from qe_edge.bench.result import Encoding, Speed
from qe_edge.bench.speed import peak_memory_mb
from qe_edge.console import progress, shown
from qe_edge.errors import BadArgument, NotFound
from qe_edge.retrieval.datasets import Dataset
from qe_edge.retrieval.dense import DenseIndex
from qe_edge.retrieval.prf import read_texts
from qe_edge.retrieval.trec import Ranking
from qe_edge.student.hub import PREFIX, local_file
from qe_edge.student.spec import is_hub_id
from qe_edge.work.files import sha256
from qe_edge.work.machine import usable_cores

Kind = Literal["dense", "rerank", "hybrid"]
FIRST = 50  # of BM25's, that are reranked
RANK = 60  # that is added to each rank before its reciprocal


class Baseline(NamedTuple):
    """`model` is a GGUF, a folder or a hub id."""

    kind: Kind
    model: str

    @property
    def name(self) -> str:
        return f"{self.kind} {label_of(self.model)}"


def label_of(model: str) -> str:
    """A model's name in tables."""
    return shown(Path(model).name.removesuffix(".gguf"))


def digest_of(model: str) -> str:
    """SHA-256 of a model's files, or of its hub id, where the library keeps them."""
    path = Path(model)
    return sha256(path) if path.exists() else hashlib.sha256(model.encode()).hexdigest()


def parse_baseline(text: str) -> Baseline:
    """`KIND:MODEL`.

    Raises:
        BadArgument: an unknown kind.
        NotFound: no such model.
    """
    kind, _, model = text.partition(":")
    known: dict[str, Kind] = {name: name for name in get_args(Kind)}
    if kind not in known or not model:
        raise BadArgument(
            f"can't read the baseline {text!r}: write dense:MODEL, rerank:MODEL or hybrid:MODEL "
            "(BM25 and RM3 are rows of every bench)"
        )
    if model.startswith(PREFIX):
        model = str(local_file(model))
    path = Path(model)
    if not (path.suffix == ".gguf" if path.is_file() else path.is_dir() or is_hub_id(model)):
        raise NotFound(
            f"{model}: neither a .gguf file (here, or hf:…), nor a model folder, nor a hub id (org/name)"
        )
    return Baseline(known[kind], model)


class EncoderSystem:
    """An encoder and, where all documents are ranked, its vectors of a collection.

    Args:
        cache: where vectors are kept, for each collection and encoder.
    """

    def __init__(self, model: str, data: Dataset, ids: Sequence[str], cache: Path, threads: int | None):
        self._data, self._ids, self._threads = data, ids, threads or usable_cores()
        start = time.perf_counter()
        self._encoder = open_ranker(model, threads=self._threads)
        self._load_s = time.perf_counter() - start
        digest = digest_of(model)
        self._index = DenseIndex(self._encoder, digest, data, ids, cache, threads=self._threads)
        self.encoding: Encoding | None = None

    def unknown(self) -> int:
        """How many queries it lacks the tokens for, as an English encoder does for Chinese."""
        return sum(not self._encoder.knows(query) for query in self._data.queries.values())

    def close(self) -> None:
        self._encoder.close()

    def dense(self, texts: Mapping[str, str], depth: int) -> tuple[dict[str, Ranking], Speed]:
        """Every query's best documents; where there is a text, by the mean of its vector and the query's."""
        self._index.vectors()
        found, times = {}, []
        for query_id, query in self._data.queries.items():
            start = time.perf_counter()
            found[query_id] = self._index.search(query, texts.get(query_id, ""), k=depth)
            times.append(time.perf_counter() - start)
        self.encoding = Encoding(*self._index.cost())
        return found, self._speed(times)

    def rerank(self, run: Mapping[str, Ranking]) -> tuple[dict[str, Ranking], Speed]:
        """Each ranking with its FIRST documents by the model; those below them stay below."""
        wanted = {doc_id for ranking in run.values() for doc_id, _ in ranking[:FIRST]}
        texts, found, times = read_texts(self._data, wanted), {}, []
        with progress(f"reranking {self._data}", len(self._data.queries)) as advance:
            for query_id, query in self._data.queries.items():
                start = time.perf_counter()
                found[query_id] = self._reranked(query, run[query_id], texts)
                times.append(time.perf_counter() - start)
                advance()
        return found, self._speed(times)

    def _reranked(self, query: str, ranking: Ranking, texts: Mapping[str, str]) -> Ranking:
        first = [doc_id for doc_id, _ in ranking[:FIRST]]
        scores = self._encoder.scores(query, [texts[i] for i in first])
        order = sorted(range(len(first)), key=lambda i: -scores[i])
        # What was not looked at follows, in its order.
        least = float(min(scores, default=0.0)) - 1
        below = [(doc_id, least - rank) for rank, (doc_id, _) in enumerate(ranking[FIRST:])]
        return [(first[i], float(scores[i])) for i in order] + below

    def _speed(self, times: Sequence[float]) -> Speed:
        cuts = quantiles(times, n=20, method="inclusive") if len(times) > 1 else [times[0]] * 19
        return Speed(
            engine=self._encoder.engine,
            threads=self._threads,
            load_s=self._load_s,
            prefill_tokens_per_s=None,
            decode_tokens_per_s=None,
            ms_per_query_p50=1000 * cuts[9],
            ms_per_query_p95=1000 * cuts[18],
            mean_tokens=0.0,
            peak_memory_mb=peak_memory_mb(),
            file_mb=self._encoder.megabytes,
        )


def fused(one: Mapping[str, Ranking], other: Mapping[str, Ranking], depth: int) -> dict[str, Ranking]:
    """Both rankings of each query by the sum of their reciprocal ranks."""
    found = {}
    for query_id in one:
        scores: dict[str, float] = {}
        for ranking in (one[query_id], other[query_id]):
            for rank, (doc_id, _) in enumerate(ranking, 1):
                scores[doc_id] = scores.get(doc_id, 0.0) + 1 / (RANK + rank)
        found[query_id] = sorted(scores.items(), key=lambda item: -item[1])[:depth]
    return found
