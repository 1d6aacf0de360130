"""What a user could take instead: an encoder over all documents, over BM25's first ones, or beside BM25.

`dense` ranks all documents by the cosine with the query, `rerank` BM25's first FIRST, `hybrid` adds up the
reciprocal ranks of BM25 and dense (Cormack et al., SIGIR 2009). The encoder is a GGUF on llama.cpp, as a
reader's is. What expansion doesn't cost is measured too: all documents are encoded once, the vectors kept.
Times are the encoder's and its search's; BM25's own, for rerank and hybrid, come on top.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import quantiles
from typing import Literal, NamedTuple, get_args

from qe_edge.bench.result import Encoding, Speed
from qe_edge.bench.speed import peak_memory_mb
from qe_edge.console import shown
from qe_edge.errors import BadArgument, NotFound
from qe_edge.retrieval.datasets import Dataset
from qe_edge.retrieval.dense import DenseIndex, query_vector
from qe_edge.retrieval.prf import read_texts
from qe_edge.retrieval.trec import Ranking
from qe_edge.runtime.reader import Encoder
from qe_edge.work.machine import usable_cores

Kind = Literal["dense", "rerank", "hybrid"]
FIRST = 50  # of BM25's, that are reranked
RANK = 60  # that is added to each rank before its reciprocal


class Baseline(NamedTuple):
    kind: Kind
    model: Path

    @property
    def name(self) -> str:
        return f"{self.kind} {shown(self.model.stem)}"


def parse_baseline(text: str) -> Baseline:
    """`KIND:FILE`.

    Raises:
        BadArgument: an unknown kind.
        NotFound: no such file.
    """
    kind, _, file = text.partition(":")
    known: dict[str, Kind] = {name: name for name in get_args(Kind)}
    if kind not in known or not file:
        raise BadArgument(f"can't read the baseline {text!r}: write dense:FILE, rerank:FILE or hybrid:FILE")
    if not Path(file).is_file():
        raise NotFound(f"{file}: no such file; an encoder is a .gguf file")
    return Baseline(known[kind], Path(file))


class EncoderSystem:
    """An encoder and, where all documents are ranked, its vectors of a collection.

    Args:
        cache: where vectors are kept, for each collection and encoder.
    """

    def __init__(self, model: Path, data: Dataset, ids: Sequence[str], cache: Path, threads: int | None):
        self._data, self._ids, self._threads = data, ids, threads or usable_cores()
        start = time.perf_counter()
        self._encoder = Encoder(model, threads=self._threads)
        self._load_s = time.perf_counter() - start
        self._model = model
        self._index = DenseIndex(model, self._encoder, data, ids, cache, threads=self._threads)
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
        """Each ranking with its FIRST documents by cosine; those below them stay below."""
        wanted = {doc_id for ranking in run.values() for doc_id, _ in ranking[:FIRST]}
        texts, found, times = read_texts(self._data, wanted), {}, []
        for query_id, query in self._data.queries.items():
            start = time.perf_counter()
            first = [doc_id for doc_id, _ in run[query_id][:FIRST]]
            cosines = self._encoder.vectors([texts[i] for i in first]) @ query_vector(self._encoder, query)
            order = sorted(range(len(first)), key=lambda i: -cosines[i])
            # Cosines are 1 at most: what was not looked at follows, in its order.
            below = [(doc_id, -2.0 - rank) for rank, (doc_id, _) in enumerate(run[query_id][FIRST:])]
            found[query_id] = [(first[i], float(cosines[i])) for i in order] + below
            times.append(time.perf_counter() - start)
        return found, self._speed(times)

    def _speed(self, times: Sequence[float]) -> Speed:
        cuts = quantiles(times, n=20, method="inclusive") if len(times) > 1 else [times[0]] * 19
        return Speed(
            engine="llama.cpp",
            threads=self._threads,
            load_s=self._load_s,
            prefill_tokens_per_s=None,
            decode_tokens_per_s=None,
            ms_per_query_p50=1000 * cuts[9],
            ms_per_query_p95=1000 * cuts[18],
            mean_tokens=0.0,
            peak_memory_mb=peak_memory_mb(),
            file_mb=self._model.stat().st_size / 1e6,
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
